"""Exported files give what the encoder gives, in programs that know nothing of this package."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import ROOT

from scott_sparse import Encoder, EncoderConfig, load_encoder, save_encoder
from scott_sparse.model import export as library
from scott_sparse.model.preprocess import Preprocess

SCOTT = EncoderConfig(dim=32, depth=2, heads=4, patch_size=8, stem_width=8, registers=2)
AS_IN_TIMM = EncoderConfig(
    dim=32, depth=1, heads=4, patch_size=8, tokenizer="patch", ffn="mlp", block="pre-norm", position_grid=4
)


def run_onnx(file):
    session = onnxruntime.InferenceSession(file)
    about = {name: parsed(text) for name, text in session.get_modelmeta().custom_metadata_map.items()}
    return about, lambda images: session.run(["features", "pooled"], {"images": images.numpy()})


def run_torch(file):
    extra = {"description.json": ""}
    graph = torch.export.load(file, extra_files=extra).module()
    return json.loads(extra["description.json"]), lambda images: [x.detach().numpy() for x in graph(images)]


def parsed(text):
    return json.loads(text) if text.startswith("{") else text


@pytest.mark.parametrize(
    "config, to",
    [
        (SCOTT, "onnx"),
        (dataclasses.replace(SCOTT, in_channels=1), "torch"),
        pytest.param(AS_IN_TIMM, "onnx", marks=pytest.mark.slow),
    ],
    ids=["onnx", "torch, grey", "learned positions, onnx"],
)
def test_files_for_other_programs(config, to, tmp_path, clean_environment):
    """The script runs by itself: pytest would check that sizes are integers, which in a graph they are not."""
    channels = config.in_channels
    preprocess = Preprocess((32, 32), (0.5,) * channels, (0.25,) * channels)
    save_encoder(Encoder(config), tmp_path, preprocess=preprocess)
    command = [sys.executable, "eval/export.py", str(tmp_path), *(["--to", to] if to == "torch" else [])]
    done = subprocess.run(command, cwd=ROOT, env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0 and " MB, equal to the encoder to " in done.stdout, done.stderr
    name, run = {"onnx": ("encoder.onnx", run_onnx), "torch": ("encoder.pt2", run_torch)}[to]
    about, graph = run(tmp_path / name)
    assert about["preprocess"] == json.loads(json.dumps(preprocess.to_json()))
    assert about["config"]["dim"] == 32 and "multiples of 8" in about["images"]
    encoder, generator = load_encoder(tmp_path), torch.Generator().manual_seed(2)
    for batch, height, width in ((1, 32, 32), (4, 16, 48), (2, 80, 16)):
        images = torch.randn(batch, channels, height, width, generator=generator)
        for got, expected in zip(graph(images), (encoder(images), encoder.pooled(images)), strict=True):
            np.testing.assert_allclose(got, expected.detach().numpy(), atol=1e-4)


def test_a_graph_that_differs_is_refused():
    encoder = Encoder(SCOTT).eval()
    with pytest.raises(ValueError, match=r"the exported graph differs from the encoder by .*, expected 0.0001"):
        library.largest_difference(encoder, lambda images: [2 * x for x in library.WholeImages(encoder)(images)])


def test_without_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match="package onnxruntime: pip install"):
        library.export_onnx(Encoder(SCOTT), tmp_path / "x.onnx")
