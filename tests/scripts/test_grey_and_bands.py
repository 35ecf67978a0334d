"""Grey scans and stacks of bands: pretrained, reported, drawn, loaded and evaluated without becoming RGB."""

import json
import sys

import extract
import finetune
import knn
import label_next
import numpy as np
import pytest
import torch
import visualize
from conftest import TINY_RUN, run_pretraining
from PIL import Image

from scott_sparse import load_encoder
from scott_sparse.evaluation.subject import run_script


def write(path, channels, seed, label):
    values = np.random.default_rng(seed).integers(0, 200, (40, 44, channels)).astype(np.uint8)
    values[..., label % channels] += 55
    path.parent.mkdir(parents=True, exist_ok=True)
    if channels == 1:
        Image.fromarray(values[..., 0] if label else values[..., 0] // 2).save(path.with_suffix(".png"))
    else:
        tifffile = pytest.importorskip("tifffile")
        deep = values.astype(np.uint16) * 16  # 12 bits, a page for each band
        tifffile.imwrite(path.with_suffix(".tif"), np.moveaxis(deep, 2, 0), photometric="minisblack")


@pytest.mark.parametrize("channels", [1, 13])
def test_from_files_to_results(channels, tmp_path, monkeypatch, capsys):
    for label in range(2):
        for number in range(12):
            folder = "test" if number < 3 else "train"
            write(tmp_path / "data" / folder / f"class{label}" / str(number), channels, 100 * label + number, label)
    out = tmp_path / "run"
    flags = [*TINY_RUN, "--report-every", 1, "--channels", channels, "--data", tmp_path / "data", "--out", out]
    failure, printed = run_pretraining("small-data", *flags)
    assert failure is None, failure
    assert "pixels" in printed and (out / "tokens.png").read_bytes()[:4] == b"\x89PNG"

    encoder = load_encoder(out)
    assert encoder.config.in_channels == channels and encoder.tokenizer.kernels[0].shape[1] == channels
    fields = json.loads((out / "encoder.json").read_text())["preprocess"]
    assert fields["channels"] == {1: "grey", 13: "13 bands"}[channels]
    assert len(encoder.preprocess.mean) == channels and 0.3 < encoder.preprocess.mean[0] < 0.6
    pixels = torch.randint(256, (2, channels, 50, 60), dtype=torch.uint8)
    assert encoder(encoder.preprocess(pixels)).isfinite().all()

    def run(script, config, *arguments):
        cache = ["--cache-dir", tmp_path / "cache", "--data", tmp_path / "data"]
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, (out, *cache, *arguments))])
        run_script(config, script)

    for init in ([], ["--init", "pixels"], ["--init", "random"]):
        run(knn.main, knn.LabelBudgetConfig, *init)
    assert len(list((out / "eval").glob("knn*.json"))) == 3
    run(extract.main, extract.ExtractConfig, "--file", tmp_path / "features.safetensors", "--crops", 8)
    run(visualize.main, visualize.VisualizeConfig, "--images", 2)
    run(label_next.choose_next, label_next.LabelNextConfig, "--count", 2)
    run(finetune.run_finetune, finetune.FinetuneConfig, "--epochs", 1, "--points", 1, "--mixup", 0.2, "--erase", 1)
    (tuned,) = (out / "eval" / "finetune").iterdir()
    assert load_encoder(tuned).preprocess == encoder.preprocess
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(knn.main, knn.LabelBudgetConfig, "--channels", 3)
    assert f"--channels 3: {out} takes {channels}; leave the flag out" in str(end.value)


def test_statistics_can_be_given(tmp_path):
    for number in range(10):
        write(tmp_path / "data" / str(number), 1, number, 0)
    flags = [*TINY_RUN, "--data", tmp_path / "data", "--out", tmp_path / "run"]
    failure, _ = run_pretraining("small-data", *flags, "--channels", 1, "--mean", 0.5, "--std", 0.25)
    assert failure is None, failure
    assert load_encoder(tmp_path / "run").preprocess.statistics == {"mean": (0.5,), "std": (0.25,)}
    for wrong in (["--mean", 0.5], ["--mean", 0.5, 0.5, "--std", 1, 1], ["--mean", 0.5, "--std", 0]):
        failure, _ = run_pretraining("small-data", *flags, "--channels", 1, *wrong, "--overwrite")
        assert "--mean and --std need 1 values each (--channels), std above 0" in failure
