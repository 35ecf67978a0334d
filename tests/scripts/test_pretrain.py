"""The product as a user meets it: commands, run folders, mistakes, several processes."""

import json
import os
import subprocess
import sys

import pretrain
import pytest
import torch
from conftest import ROOT

from scott_sparse import load_encoder
from scott_sparse.training import recipe as recipes

TINY = ["--size", "demo", "--stem-width", "8", "--image-size", "32", "--batch-size", "8", "--log-every", "5"]


def run(arguments, monkeypatch, capsys):
    """train/pretrain.py in this process; returns (exit message or None, printed)."""
    monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
    try:
        pretrain.main()
        message = None
    except SystemExit as stop:
        message = str(stop.code)
    return message, capsys.readouterr().out


def command(arguments, environment):
    """A command as typed in a shell, from the project's root."""
    path = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    return subprocess.run(
        [*map(str, arguments)], cwd=ROOT, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=280
    )


def torchrun(processes):
    return ["torchrun", "--nproc_per_node", processes, "--master_port", 29500 + os.getpid() % 1000]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def labelled(photos):
    return photos({"train/a": 10, "train/b": 10, "test/a": 4, "test/b": 4})


def test_a_run_on_photos(labelled, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 3, "--tracker", "tensorboard"]
    message, printed = run(arguments, monkeypatch, capsys)
    assert message is None
    assert "MIM-JEPA" in printed and "pretrained with" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary["knn"]) == {"pixels", "init", "pretrained"}
    assert all(0 <= score <= 100 for score in summary["knn"].values())
    assert {"seconds", "images_per_second", "peak_memory_mib", "engine", "terms"} <= set(summary)
    assert summary["engine"] == "halo" and summary["steps"] == 6
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(6))
    assert {"loss", "mim", "ntxent", "lr", "weight_decay", "momentum"} <= set(lines[0])
    features = load_encoder(out)(torch.zeros(1, 3, 32, 32))
    assert features.shape == (1, 16, 96)
    assert (out / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "recipe.json").read_text())["source"]["data"] == str(labelled)
    assert summary["data"]["images"] == {"pretrain": 20, "train": 18, "test": 8}
    assert summary["data"]["protocol"] == "clean"
    assert 0 < summary["input_share"] < 1 and "waited for input" in printed
    assert list(out.rglob("events.out.tfevents*"))

    message, _ = run(arguments, monkeypatch, capsys)
    assert "holds a finished run" in message and "--overwrite" in message
    (out / "eval").mkdir()
    message, _ = run([*arguments, "--overwrite"], monkeypatch, capsys)
    assert not (out / "eval").exists()  # results of the weights that are gone
    assert message is None and [line["step"] for line in metrics(out)] == list(range(6))


def test_the_papers_recipe_in_miniature_without_labels(photos, tmp_path, monkeypatch, capsys):
    out, root = tmp_path / "run", photos({"x": 8})
    small = ["--size", "tiny", "--stem-width", 8, "--image-size", 32, 48, "--batch-size", 4]
    message, printed = run(
        ["flowers102", *small, "--epochs", 2, "--warmup-epochs", 1, "--data", root, "--out", out], monkeypatch, capsys
    )
    assert message is None
    summary = json.loads((out / "summary.json").read_text())
    assert summary["knn"] == {"pixels": None, "init": None, "pretrained": None}
    assert summary["terms"] == ["MIM-JEPA"] and "loss terms: MIM-JEPA" in printed
    assert "ntxent" not in metrics(out)[0]


def test_recipes_hold_the_published_values():
    paper = recipes.FLOWERS102
    assert (paper.sides, paper.encoder.dim, paper.encoder.depth, paper.encoder.heads) == ((224, 224), 384, 12, 4)
    assert (paper.epochs, paper.batch_size, paper.hide_ratio, paper.mask) == (300, 64, 0.6, "block")
    assert paper.objective.cross_crop_weight == 0 and paper.objective.context == "all"
    assert (paper.dropout, paper.attention_dropout, paper.drop_path) == (0.2, 0.1, 0.1)


def test_a_term_that_is_off_is_not_validated():
    for arguments in (
        ["demo", "--mim-weight", "0"],
        ["small-data", "--cross-crop-weight", "0", "--crops", "1"],
        ["flowers102", "--batch-size", "8", "--accumulate", "8"],
        ["flowers102", "--batch-size", "1"],
    ):
        assert len(recipes.parse(arguments)[1].objective.terms) == 1


def test_forty_demo_steps_lower_the_loss(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    steps = 40 / (5000 // 16)
    arguments = ["--batch-size", 16, "--epochs", steps, "--warmup-epochs", steps / 6, "--out", out]
    monkeypatch.setattr(pretrain, "knn_report", lambda *a, **k: {"pixels": None, "init": None, "pretrained": None})
    message, _ = run(arguments, monkeypatch, capsys)
    assert message is None
    losses = [line["loss"] for line in metrics(out)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_accumulation_is_the_same_run(labelled, tmp_path, monkeypatch, capsys):
    """Four micro-batches of two images have the negatives and the projector's statistics of the batch of eight."""
    curves = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 4, "--warmup-epochs", 1]
        message, _ = run([*arguments, "--accumulate", parts], monkeypatch, capsys)
        assert message is None
        curves.append([[line[key] for key in ("loss", "mim", "ntxent", "gradient_norm")] for line in metrics(out)])
    assert len(curves[0]) == 8
    for step, (one, four) in enumerate(zip(*curves)):  # from the same to rounding, which training lets grow
        assert four == pytest.approx(one, rel=1e-4 if step else 1e-5)


@pytest.mark.parametrize("flags", [["--mixed_precision", "bf16"], ["--compile"]], ids=["bf16", "compile"])
def test_precision_and_compilation(flags, labelled, tmp_path, clean_environment):
    out = tmp_path / "run"
    launcher, script = (["accelerate", "launch"], ["train/pretrain.py"])
    if flags == ["--compile"]:  # the published objective: the fewest graphs to compile
        script += ["--compile", "--cross-crop-weight", 0.0, "--crops", 1, "--context", "all"]
    else:
        launcher += flags
    arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 0.5, "--warmup-epochs", 0]
    result = command([*launcher, *script, *arguments], clean_environment)
    assert result.returncode == 0, result.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert summary["mixed_precision"] == ("bf16" if "bf16" in flags else "no") and summary["steps"] == 1
    assert summary["loss"]["last"] > 0


@pytest.mark.parametrize("loss", ["sigreg", "ntxent"])
def test_two_processes_train_the_same_run(loss, labelled, tmp_path, clean_environment):
    """With NT-Xent the two accumulate as well: two micro-batches of two images each, against eight at once."""
    curves = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 5, "--warmup-epochs", 1]
        arguments += ["--cross-crop-loss", loss, "--lr", "1e-3"]
        arguments += ["--accumulate", 2] * (processes == 2 and loss == "ntxent")
        result = command([*torchrun(processes), "train/pretrain.py", *arguments], clean_environment)
        assert result.returncode == 0, result.stderr
        assert json.loads((out / "summary.json").read_text())["processes"] == processes
        curves.append([[line[key] for key in ("loss", "mim", loss)] for line in metrics(out)])
    assert len(curves[0]) == 10
    for step, (one, two) in enumerate(zip(*curves)):  # from the same to rounding, which training lets grow
        assert two == pytest.approx(one, rel=1e-4 if step else 1e-5)


SPOILT = """
import os, sys
sys.path.insert(0, "train")
import pretrain
real, calls = pretrain.target_features, []
def infinite_on_one(*arguments, **options):
    calls.append(1)
    return real(*arguments, **options) * (float("inf") if len(calls) == 4 and os.environ["RANK"] == "1" else 1)
pretrain.target_features = infinite_on_one
pretrain.main()
"""


def test_what_one_process_cannot_use_no_process_uses(labelled, tmp_path, clean_environment):
    """The second process's fourth loss is infinite, which leaves its gradient finite."""
    script, out = tmp_path / "spoilt.py", tmp_path / "run"
    script.write_text(SPOILT)
    arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 5, "--on-nonfinite", "skip"]
    result = command([*torchrun(2), script, *arguments], clean_environment)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(out) if line["loss"] is None] == [3]
    assert json.loads((out / "summary.json").read_text())["skipped"] == 1


MISTAKES = {
    "unknown recipe": (["flowers"], "unknown recipe 'flowers'; expected one of: demo"),
    "unknown field": (["--hide-ration", "0.5"], "unknown option --hide-ration; did you mean --hide-ratio?"),
    "unknown size": (["--size", "huge"], "unknown size 'huge'; expected one of demo, tiny"),
    "image side": (["--image-size", "225", "--patch-size", "16"], "image side 225 is not a multiple of patch_size 16"),
    "patch size": (["--patch-size", "5", "--image-size", "50"], "patch_size 5 has no SCOTT stem"),
    "hide ratio 0": (["--hide-ratio", "0"], r"hide_ratio 0.0 is outside (0, 1)"),
    "hide ratio 1": (["--hide-ratio", "1"], r"hide_ratio 1.0 is outside (0, 1)"),
    "no folder": (["--data", "nowhere"], "nowhere: no such folder"),
    "no data": (["small-data"], "--data needs a folder of images"),
    "batch size": (["--batch-size", "6000"], "batch_size 6000 is larger than the data set (5000 images"),
    "accumulate": (["--accumulate", "7"], "does not divide"),
    "one crop": (["--crops", "1"], "cross_crop_weight 0.5 compares crops of an image, but crops is 1; use --crops 2"),
    "one image": (["--batch-size", "1"], "ntxent compares images, but batch_size is 1"),
    "ignored": (
        ["--cross-crop-loss", "sigreg", "--temperature", "0.1"],
        "temperature 0.1 has no effect: it is for NT-Xent",
    ),
    "ignored depth": (
        ["--mim-weight", "0", "--predictor-depth", "2"],
        "predictor_depth 2 has no effect: it is for MIM-JEPA, the loss is NT-Xent; leave it at 1",
    ),
    "old engine": (["--engine", "tiles"], "expected one of auto, dense, halo, spconv; tiles is called halo now"),
    "tokenizer": (["--tokenizer", "conv"], "unknown tokenizer 'conv'; expected one of scott, patch"),
    "temperature": (["--temperature", "0"], "temperature 0.0 must be positive"),
    "not a number": (["--epochs", "many"], "--epochs"),
    "crop scale": (["--crop-scale", "0.5", "2.0"], "crop_scale is (0.5, 2.0)"),
    "workers": (["--workers", "-1"], "workers -1 must be 0 or more"),
    "no such set": (["--data", "flowers103"], "flowers103: no such folder; expected a folder of images, hf:OWNER/NAME"),
    "warm-up": (["--warmup-epochs", "99"], "must be less than epochs"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, tmp_path, monkeypatch, capsys):
    arguments, expected = MISTAKES[name]
    out = tmp_path / "run"
    message, _ = run([*arguments, "--out", out], monkeypatch, capsys)
    assert message is not None and message.startswith("error: ") and expected in message
    assert "\n" not in message
    assert not out.exists()


def test_unreadable_images_stop_or_are_left_out(labelled, tmp_path, monkeypatch, capsys):
    (labelled / "train" / "a" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (labelled / "train" / "b" / "empty.jpg").touch()
    out = tmp_path / "run"
    arguments = [*TINY, "--data", labelled, "--out", out, "--epochs", 1, "--warmup-epochs", 0]
    message, _ = run(arguments, monkeypatch, capsys)
    assert message.startswith("error: 2 of 30 images cannot be read") and not out.exists()
    assert len(message.splitlines()) == 3 and "train/a/torn.jpg: " in message
    message, printed = run([*arguments, "--skip-unreadable"], monkeypatch, capsys)
    assert message is None and "2 images cannot be read and are left out" in printed
    listed = (out / "unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["train/a/torn.jpg", "train/b/empty.jpg"]
    assert json.loads((out / "summary.json").read_text())["data"]["unreadable"] == 2


def test_streaming_is_the_same_run(labelled, tmp_path, monkeypatch, capsys):
    """Decoded in every epoch by workers, or once: the images are the same, so the losses are."""
    curves = []
    for flags in ((), ("--cache", "none", "--workers", 2)):
        out = tmp_path / str(len(curves))
        message, _ = run([*TINY, "--data", labelled, "--out", out, "--epochs", 2, *flags], monkeypatch, capsys)
        assert message is None
        curves.append([line["loss"] for line in metrics(out)])
    assert curves[0] == curves[1] and len(curves[0]) == 4


@pytest.mark.parametrize("make", ["empty", "no images", "empty class"])
def test_bad_folders_end_in_one_line(make, photos, tmp_path, monkeypatch, capsys):
    root = photos({"a": 3, "b": 3} if make == "empty class" else {})
    if make == "empty class":
        (root / "c").mkdir()
    elif make == "no images":
        (root / "notes.txt").write_text("nothing to see")
    out = tmp_path / "run"
    message, _ = run(["--data", root, "--out", out], monkeypatch, capsys)
    assert message.startswith("error: ") and ("no image in" in message or "holds no image" in message)
    assert "\n" not in message and not out.exists()


def test_spconv_where_it_cannot_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "scott_sparse.model.engines.spconv.spconv_failure", lambda device: "spconv does not import (gone)"
    )
    out = tmp_path / "run"
    message, _ = run(["--engine", "spconv", "--out", out], monkeypatch, capsys)
    assert "engine spconv cannot work here: spconv does not import (gone)" in message and not out.exists()


def test_a_mistake_in_the_shell_leaves_no_traceback(tmp_path, clean_environment):
    result = command(
        [sys.executable, "train/pretrain.py", "--size", "huge", "--out", tmp_path / "run"], clean_environment
    )
    assert result.returncode != 0 and "unknown size 'huge'" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
