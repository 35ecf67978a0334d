"""Features of any images, for other programs: one safetensors file, and the names of the images in its metadata.

    accelerate launch eval/extract.py runs/demo --data PHOTOS --file features.safetensors

Tensors: `embeddings` (n, D), the mean of the last block's tokens; `blocks` (n, L, D), the same of each of the last
four; with --patches also `patches` (n, N, D), half precision, row by row of the grid. Images are those that
pretraining would see and, where there is a test set, that (see --protocol); metadata: `names`, a JSON list, and
`image_size`.
"""

import dataclasses
import json
from pathlib import Path

import torch
from safetensors.torch import save

from scott_sparse.data.batches import default_workers
from scott_sparse.data.dataset import open_data, short_side_for
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.probe import Question, ask, open_subject
from scott_sparse.files import write_atomically


@dataclasses.dataclass(frozen=True)
class ExtractQuestion(Question):
    file: Path = Path("features.safetensors")
    patches: bool = False


def main(question: ExtractQuestion) -> None:
    state = process_state()
    subject = open_subject(question)
    data = open_data(question.source, short_side=short_side_for(subject.size))
    workers = default_workers(streamed=question.source.cache == "none", on_gpu=state.device.type == "cuda")
    model = subject.model.to(state.device).eval()
    parts = [data.pretrain]
    if data.test is not None:
        unseen = ~torch.isin(data.test.rows, data.pretrain.rows)
        parts += [data.test[unseen.nonzero()[:, 0]]] if unseen.any() else []
    found = [extract(model, part, size=subject.size, tokens=question.patches, workers=workers) for part in parts]
    if not state.is_main_process:
        return
    blocks = torch.cat([features.pooled for features in found])
    tensors = {"embeddings": blocks[:, -1].contiguous(), "blocks": blocks}
    if question.patches:
        tensors["patches"] = torch.cat([features.tokens for features in found])
    names = [name for part in parts for name in part.names]
    metadata = {"names": json.dumps(names), "image_size": json.dumps(subject.size)}
    write_atomically(question.file, save(tensors, metadata=metadata))
    print(f"{question.file}: {', '.join(f'{name} {tuple(tensor.shape)}' for name, tensor in tensors.items())}")


if __name__ == "__main__":
    ask(ExtractQuestion, main)
