"""Features of any images for other programs: one safetensors file with the names of the images in its metadata.

    accelerate launch eval/extract.py runs/demo --data PHOTOS --file features.safetensors

Images are those that pretraining would use and those of the test split, if there is one (see --protocol). Tensors:
`embeddings` (n, D), the mean token of the last block; `blocks` (n, L, D), that of each of the last four blocks;
`patches` (n, N, D) with --patches, the tokens of the last block in half precision, row by row of the patch grid.
Metadata: `names`, a JSON list, and `image_size`.
"""

import dataclasses
from pathlib import Path

import torch

from scott_sparse.data.batches import default_workers
from scott_sparse.data.dataset import open_data, short_side_for
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.features import export_features
from scott_sparse.evaluation.subject import ProbeConfig, open_encoder, run_script


@dataclasses.dataclass(frozen=True)
class ExtractConfig(ProbeConfig):
    file: Path = Path("features.safetensors")
    """File to write."""
    patches: bool = False
    """Write the tokens of all patches as well."""


def main(config: ExtractConfig) -> None:
    device = process_state().device or torch.device("cpu")
    encoder = open_encoder(config)
    data = open_data(config.source, short_side=short_side_for(encoder.size))
    parts = [data.pretrain]
    if data.test is not None:  # under the paper protocol `pretrain` holds it already
        rest = (~torch.isin(data.test.rows, data.pretrain.rows)).nonzero()[:, 0]
        parts += [data.test[rest]] if len(rest) else []
    workers = default_workers(streamed=config.source.cache == "none", on_gpu=device.type == "cuda")
    model = encoder.model.to(device).eval()
    export_features(config.file, model, parts, size=encoder.size, patches=config.patches, workers=workers)


if __name__ == "__main__":
    run_script(ExtractConfig, main)
