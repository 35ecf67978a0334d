"""Features of any images for other programs: one safetensors file with the names of the images in its metadata.

    accelerate launch eval/extract.py runs/demo --data PHOTOS --file features.safetensors

Images: those that pretraining would use and those of the test split. Tensors: `embeddings` (n, D), the mean token of
the last block; `blocks` (n, L, D), that of each of the last four; with --patches `patches` (n, N, D), the tokens of the
last block in half precision, row by row of the patch grid. Metadata, as JSON: `names`, a list, `image_size`, `crops`.
"""

import dataclasses
from pathlib import Path

import checkout  # noqa: F401 - first
import torch

from scott_sparse.data.dataset import open_data, short_side_for
from scott_sparse.evaluation.features import export_features
from scott_sparse.evaluation.subject import ProbeConfig, open_encoder, run_script


@dataclasses.dataclass(frozen=True)
class ExtractConfig(ProbeConfig):
    file: Path = Path("features.safetensors")
    """File to write."""
    patches: bool = False
    """Write the tokens of all patches as well."""


def main(config: ExtractConfig) -> None:
    encoder = open_encoder(config)
    data = open_data(encoder.source(config.source), short_side=short_side_for(encoder.size))
    parts = [data.pretrain]
    for test in (data.test, data.unlabelled_test):
        if test is not None:  # under the paper protocol `pretrain` holds it already
            rest = (~torch.isin(test.rows, data.pretrain.rows)).nonzero()[:, 0]
            parts += [test[rest]] if len(rest) else []
    how = {"size": encoder.size, "crops": config.crops, "tokens": config.patches, "workers": config.workers}
    export_features(config.file, encoder.model, parts, **how)


if __name__ == "__main__":
    run_script(ExtractConfig, main)
