"""An encoder as one file for other programs: ONNX, or a program of torch.export; any batch and image size.

    python eval/export.py runs/demo                     # runs/demo/encoder.onnx
    python eval/export.py runs/demo --to torch          # runs/demo/encoder.pt2, for torch.export.load

Input `images` (B, C, H, W), outputs `features` (B, N, D) and `pooled` (B, D). How images are preprocessed is in the
file's metadata. The file is compared with the encoder before it is written.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import checkout  # noqa: F401 - first
import tyro

from scott_sparse.evaluation.subject import run_script
from scott_sparse.model.export import export_onnx, export_torch
from scott_sparse.model.weights import load_encoder


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    run: tyro.conf.Positional[str]
    """Run folder of train/pretrain.py, or a repository OWNER/NAME of the Hugging Face Hub."""
    to: Literal["onnx", "torch"] = "onnx"
    """onnx: for ONNX Runtime and others. torch: for torch.export.load."""
    weights: Literal["target", "context"] = "target"
    """Which encoder of the run: the EMA target, or the context encoder, which the optimizer trained."""
    file: Path | None = None
    """File to write. Default: encoder.onnx or encoder.pt2 in the run folder."""


def main(config: ExportConfig) -> None:
    encoder = load_encoder(config.run, weights=config.weights)
    folder = Path(config.run)
    export, name = {"onnx": (export_onnx, "encoder.onnx"), "torch": (export_torch, "encoder.pt2")}[config.to]
    path = config.file or (folder if folder.is_dir() else Path()) / name
    difference = export(encoder, path)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, equal to the encoder to {difference:.1e} (relative)")


if __name__ == "__main__":
    run_script(ExportConfig, main)
