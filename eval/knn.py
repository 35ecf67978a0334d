"""k-NN accuracy of a run's frozen features on held-out images.

    python eval/knn.py runs/demo --data petals --image-size 48
    python eval/knn.py runs/photos --data PHOTOS --image-size 64

The bank is train, the queries are test; k = 20 is fixed, so nothing is chosen on either.
"""

import dataclasses
import sys

import torch
import tyro

from scott_sparse import load_encoder
from scott_sparse.data import DataConfig, open_data, short_side_for
from scott_sparse.features import mean_token_features
from scott_sparse.knn import knn_accuracy


@dataclasses.dataclass(frozen=True)
class Question:
    run: tyro.conf.Positional[str]
    """Run folder with encoder.safetensors, or a Hub repository owner/name."""
    image_size: int
    """Side in pixels, a multiple of the encoder's patch size."""
    source: DataConfig = DataConfig()


def main() -> None:
    question = tyro.cli(Question, config=(tyro.conf.OmitArgPrefixes,))
    try:
        print(f"{answer(question):.1f} %")
    except ValueError as mistake:
        sys.exit(f"error: {' '.join(str(mistake).split())}")


def answer(question: Question) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = load_encoder(question.run).to(device)
    size = (question.image_size, question.image_size)
    data = open_data(question.source, short_side=short_side_for(size))
    if data.classes is None:
        raise ValueError(f"--data {question.source.data} has no labels; expected class folders (see README).")
    bank, queries = (mean_token_features(encoder, part, size=size, device=device) for part in (data.fit, data.report))
    return knn_accuracy(bank, data.fit.labels, queries, data.report.labels)


if __name__ == "__main__":
    main()
