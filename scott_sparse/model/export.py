"""An encoder as a graph for other programs: a program of torch.export, or ONNX. See eval/export.py."""

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scott_sparse.files import write_atomically
from scott_sparse.model.vit import Encoder, layer_norm
from scott_sparse.shapes import Float, Tensor

MAX_DIFFERENCE = 1e-4  # of the graph's outputs from the encoder's, relative to their norm
MAX_BATCH, MAX_SIDE = 4096, 8192  # images, pixels: what a graph is checked for when it is made
OUTPUTS = ("features", "pooled")


class WholeImages(nn.Module):
    """What is exported: features of all patches, and the vector of each image that probes see (`Encoder.pooled`)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Float[Tensor, "B C H W"]) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B D"]]:
        features = self.encoder(images)
        return features, layer_norm(features.float()).mean(1)


def exported_program(encoder: Encoder) -> torch.export.ExportedProgram:
    """A graph for any batch, and any height and width of two patches or more, in whole patches."""
    p, channels, dim = encoder.config.patch_size, encoder.config.in_channels, torch.export.Dim
    h, w = (p * dim(name, min=2, max=max(MAX_SIDE // p, 2)) for name in ("rows", "columns"))
    shapes = {0: dim("batch", min=1, max=MAX_BATCH), 2: h, 3: w}
    example = torch.zeros(2, channels, 4 * p, 3 * p)
    with torch.no_grad():
        return torch.export.export(WholeImages(encoder).eval(), (example,), dynamic_shapes=(shapes,))


def export_torch(encoder: Encoder, path: Path) -> float:
    """Write a file for `torch.export.load`, with `description` as its extra file description.json.

    Returns the largest relative difference of its outputs from the encoder's. Raises ValueError above `MAX_DIFFERENCE`.
    """
    program, buffer = exported_program(encoder), io.BytesIO()
    torch.export.save(program, buffer, extra_files={"description.json": json.dumps(description(encoder))})
    difference = largest_difference(encoder, program.module())
    write_atomically(path, buffer.getvalue())
    return difference


def export_onnx(encoder: Encoder, path: Path) -> float:
    """Write an ONNX file, with the fields of `description` in its metadata. Otherwise as `export_torch`.

    It is run by ONNX Runtime. Raises ValueError where the packages of the extra `export` are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as missing:
        raise ValueError(f"ONNX needs the package {missing.name}: pip install onnx onnxscript onnxruntime.") from None
    program = torch.onnx.export(
        exported_program(encoder), dynamo=True, verbose=False, input_names=["images"], output_names=OUTPUTS
    )
    assert program is not None
    for name, value in description(encoder).items():
        program.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    data = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})]

    difference = largest_difference(encoder, run)
    write_atomically(path, data)
    return difference


def description(encoder: Encoder) -> dict[str, Any]:
    """What a program must know that runs the graph: the preprocessing (see `Preprocess`), input and outputs."""
    config = encoder.config
    return {
        "preprocess": encoder.preprocess.to_json() if encoder.preprocess else None,
        "images": f"float32 (B, {config.in_channels}, H, W), preprocessed; H, W: multiples of {config.patch_size}, "
        "2 patches or more",
        "features": f"float32 (B, H * W / {config.patch_size**2}, {config.dim}), one row for each patch, row by row",
        "pooled": f"float32 (B, {config.dim}), one vector for each image: the mean of its features after a LayerNorm",
        "config": dataclasses.asdict(config),
    }


@torch.no_grad()
def largest_difference(encoder: Encoder, graph: Any) -> float:
    """Relative difference of a graph's outputs from the encoder's, over images of several sizes and batches.

    Raises ValueError above `MAX_DIFFERENCE`.
    """
    p, expected_of = encoder.config.patch_size, WholeImages(encoder).eval()
    own = encoder.preprocess.image_size if encoder.preprocess else (6 * p, 6 * p)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch, height, width in ((1, *own), (3, 2 * p, 5 * p), (2, 7 * p, 2 * p)):
        images = torch.randn(batch, encoder.config.in_channels, height, width, generator=generator)
        for got, expected in zip(graph(images), expected_of(images), strict=True):
            worst = max(worst, ((got - expected).norm() / expected.norm()).item())
    if not worst <= MAX_DIFFERENCE:
        raise ValueError(f"the exported graph differs from the encoder by {worst:.1e}, expected {MAX_DIFFERENCE:g}.")
    return worst
