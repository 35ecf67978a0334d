"""k-NN accuracy of a run's frozen features on held-out images.

    python eval/knn.py runs/demo --data petals --image-size 48
    python eval/knn.py runs/photos --data PHOTOS --image-size 64

The bank is what pretraining may see (train, with val where there is a test), the queries are held out; k = 20 is fixed,
so nothing is chosen on either.
"""

import dataclasses
import sys

import torch
import tyro

from scott_sparse import load_encoder
from scott_sparse.data import open_data, short_side_for
from scott_sparse.knn import knn_accuracy, mean_token_features


@dataclasses.dataclass(frozen=True)
class Question:
    run: tyro.conf.Positional[str]
    """Run folder with encoder.safetensors, or a Hub repository owner/name."""
    data: str
    """'petals' or a folder of labelled images."""
    image_size: int
    """Side in pixels, a multiple of the encoder's patch size."""


def main() -> None:
    question = tyro.cli(Question)
    try:
        print(f"{answer(question):.1f} %")
    except ValueError as mistake:
        sys.exit(f"error: {' '.join(str(mistake).split())}")


def answer(question: Question) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(question.run).to(device)
    size = (question.image_size, question.image_size)
    data = open_data(question.data, short_side=short_side_for(size))
    if data.classes is None or data.held_out is None:
        raise ValueError(f"--data {question.data} has no labels; expected class folders (see README).")
    bank, queries = (
        mean_token_features(encoder, part, size=size, device=device) for part in (data.train, data.held_out)
    )
    return knn_accuracy(bank, data.train.labels, queries, data.held_out.labels)


if __name__ == "__main__":
    main()
