"""train/pretrain.py as a user meets it: commands, run folders, mistakes, several processes."""

import json
import os
import re
import subprocess
import sys

import pretrain
import pytest
import torch
from conftest import ROOT, TINY_RUN, run_pretraining
from safetensors.torch import load_file

from scott_sparse import load_encoder
from scott_sparse.model.weights import load_predictor


def command(arguments, environment):
    """A command as typed in a shell, from the project's root."""
    path = os.pathsep.join([os.path.dirname(sys.executable), environment["PATH"]])
    return subprocess.run(
        [*map(str, arguments)], cwd=ROOT, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=280
    )


def torchrun(processes):
    return ["torchrun", "--nproc_per_node", processes, "--standalone"]


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def summary(out):
    return json.loads((out / "summary.json").read_text())


@pytest.fixture
def labelled(photos):
    return photos({"train/a": 10, "train/b": 10, "test/a": 4, "test/b": 4})


def test_a_run_on_photos(labelled, tmp_path):
    out = tmp_path / "run"
    arguments = [*TINY_RUN, "--data", labelled, "--out", out, "--epochs", 3, "--tracker", "tensorboard"]
    message, printed = run_pretraining(*arguments)
    assert message is None
    assert "MIM-JEPA" in printed and "pretrained with" in printed
    assert "k-NN on 3 val images" in printed and "test images" not in printed
    said = summary(out)
    assert set(said["knn"]) == {"pixels", "init", "pretrained"}
    assert all(0 <= score <= 100 for score in said["knn"].values())
    assert {"seconds", "images_per_second", "peak_memory_mib", "engine", "terms"} <= set(said)
    assert said["engine"] == "halo" and said["steps"] == 6
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(6))
    assert {"loss", "mim", "ntxent", "lr", "weight_decay", "momentum", "gradient_norm"} <= set(lines[0])
    assert load_encoder(out)(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 96)
    assert (out / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    assert json.loads((out / "recipe.json").read_text())["source"]["data"] == str(labelled)
    assert said["data"]["images"] == {
        "all": 28,
        "pretrain": 20,
        "train": 17,
        "val": 3,
        "test": 8,
        "unlabelled": 0,
        "unlabelled_test": 0,
    }
    assert "28 images, 2 classes (a, b), pretrain 20, train 17, val 3, test 8" in printed
    assert said["data"]["protocol"] == "clean"
    assert 0 < said["input_share"] < 1 and "waited for input" in printed
    assert list(out.rglob("events.out.tfevents*"))

    message, _ = run_pretraining(*arguments)
    assert "holds a finished run" in message and "--overwrite" in message
    (out / "eval").mkdir()
    message, _ = run_pretraining(*arguments, "--overwrite")
    assert not (out / "eval").exists()  # results of the weights that are gone
    assert message is None and [line["step"] for line in metrics(out)] == list(range(6))


def test_colour_auto_is_decided_by_the_images_and_kept_when_the_run_goes_on(photos, tmp_path):
    data, out = photos({"": 128}), tmp_path / "run"
    flags = [*TINY_RUN, "--crops", 4, "--plain-share", 0.5, "--colour", "auto", "--data", data, "--out", out]
    message, printed = run_pretraining("small-data", *flags, "--epochs", 0.5)
    views = json.loads((out / "recipe.json").read_text())["views"]
    said = re.search(r"--colour auto: images of similar .*; crops that keep their colours: (none|2 of 4)", printed)
    assert message is None and said and views["colour"] == 1
    assert views["plain_share"] == (0 if said[1] == "none" else 0.5)
    message, _ = run_pretraining("small-data", *flags, "--epochs", 1)
    assert message is None and [line["step"] for line in metrics(out)] == list(range(16))
    message, _ = run_pretraining("small-data", *flags, "--epochs", 2, "--colour", 0.5)
    assert "was started with other settings (views.colour was 1.0, now 0.5)" in message


def test_the_papers_recipe_in_miniature_without_labels(photos, tmp_path):
    out, root = tmp_path / "run", photos({"x": 8})
    small = ["--size", "tiny", "--stem-width", 8, "--image-size", 32, 48, "--batch-size", 4, "--report-every", 0]
    message, printed = run_pretraining(
        "flowers102", *small, "--epochs", 2, "--warmup-epochs", 1, "--data", root, "--out", out
    )
    assert message is None
    assert summary(out)["knn"]["pretrained"] is None and "k-NN" not in printed
    assert summary(out)["terms"] == ["MIM-JEPA"] and "loss terms: MIM-JEPA" in printed
    assert "mim" in metrics(out)[0] and "ntxent" not in metrics(out)[0]


def test_one_photo_per_class_is_enough_to_train(photos, tmp_path):
    """There is no image to set aside for val, so that there is no table; the encoder is written all the same."""
    root, out = photos(dict.fromkeys("abcdef", 1)), tmp_path / "run"
    message, printed = run_pretraining(*TINY_RUN, "--data", root, "--out", out, "--epochs", 1, "--batch-size", 2)
    assert message is None and "k-NN" not in printed
    assert summary(out)["knn"]["pretrained"] is None and summary(out)["steps"] == 3
    load_encoder(out)


def test_what_follows_training_cannot_cost_its_weights(labelled, tmp_path, monkeypatch):
    """The table fails once; the same command then writes the rest, and trains nothing again."""
    out, real = tmp_path / "run", pretrain.knn_report
    arguments = [*TINY_RUN, "--data", labelled, "--out", out]

    def fail(*_, **__):
        raise AttributeError("a fault of ours")

    monkeypatch.setattr(pretrain, "knn_report", fail)
    with pytest.raises(AttributeError):
        run_pretraining(*arguments)
    weights = load_file(out / "encoder.safetensors")
    assert (out / "context.safetensors").exists()
    load_predictor(out)
    assert not (out / "summary.json").exists()
    monkeypatch.setattr(pretrain, "knn_report", real)
    monkeypatch.setattr(pretrain, "update_target", fail)
    message, printed = run_pretraining(*arguments)
    assert message is None and "resuming after step 4 of 4" in printed
    assert summary(out)["steps"] == 4 and len(metrics(out)) == 4
    assert all(torch.equal(tensor, weights[name]) for name, tensor in load_file(out / "encoder.safetensors").items())


@pytest.mark.slow
def test_forty_demo_steps_lower_the_loss(tmp_path, monkeypatch):
    out = tmp_path / "run"
    steps = 40 / (5000 // 16)
    arguments = ["--batch-size", 16, "--epochs", steps, "--warmup-epochs", steps / 6, "--report-every", 0, "--out", out]
    monkeypatch.setattr(pretrain, "knn_report", lambda *_, **__: dict.fromkeys(("pixels", "init", "pretrained")))
    message, _ = run_pretraining(*arguments)
    assert message is None
    losses = [line["loss"] for line in metrics(out)]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])


def test_accumulation_is_the_same_run(labelled, tmp_path):
    """Four micro-batches of two images have the negatives and the projector's statistics of the batch of eight."""
    curves = []
    for parts in (1, 4):
        out = tmp_path / str(parts)
        message, _ = run_pretraining(*TINY_RUN, "--data", labelled, "--out", out, "--accumulate", parts)
        assert message is None
        curves.append([[line[key] for key in ("loss", "mim", "ntxent", "gradient_norm")] for line in metrics(out)])
    assert len(curves[0]) == 4
    for step, (one, four) in enumerate(zip(*curves)):  # from the same to rounding, which training lets grow
        assert four == pytest.approx(one, rel=1e-4 if step else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--mixed_precision", "bf16"], ["--compile"]], ids=["bf16", "compile"])
def test_precision_and_compilation(flags, labelled, tmp_path, clean_environment):
    out = tmp_path / "run"
    launcher, script = (["accelerate", "launch"], ["train/pretrain.py"])
    if flags == ["--compile"]:  # the published objective: the fewest graphs to compile
        script += ["--compile", "--cross-crop-weight", 0.0, "--context", "all"]
    else:
        launcher += flags
    arguments = [*TINY_RUN, "--data", labelled, "--out", out, "--epochs", 0.5, "--warmup-epochs", 0]
    result = command([*launcher, *script, *arguments], clean_environment)
    assert result.returncode == 0, result.stderr
    assert summary(out)["mixed_precision"] == ("bf16" if "bf16" in flags else "no") and summary(out)["steps"] == 1
    assert summary(out)["loss"]["last"] > 0


@pytest.mark.parametrize("loss", ["ntxent", pytest.param("sigreg", marks=pytest.mark.slow)])
def test_two_processes_train_the_same_run(loss, labelled, tmp_path, clean_environment):
    """With NT-Xent the two accumulate as well: two micro-batches of two images each, against eight at once."""
    flags = [*TINY_RUN, "--data", labelled, "--epochs", 3, "--cross-crop-loss", loss, "--lr", "1e-3"]
    message, _ = run_pretraining(*flags, "--out", tmp_path / "1")
    assert message is None
    flags += ["--out", tmp_path / "2", "--accumulate", 2 if loss == "ntxent" else 1]
    result = command([*torchrun(2), "train/pretrain.py", *flags], clean_environment)
    assert result.returncode == 0, result.stderr
    assert [summary(tmp_path / name)["processes"] for name in "12"] == [1, 2]
    curves = [[[line[key] for key in ("loss", "mim", loss)] for line in metrics(tmp_path / name)] for name in "12"]
    assert len(curves[0]) == 6
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


@pytest.mark.slow
def test_what_one_process_cannot_use_no_process_uses(labelled, tmp_path, clean_environment):
    """The second process's fourth loss is infinite, which leaves its gradient finite."""
    script, out = tmp_path / "spoilt.py", tmp_path / "run"
    script.write_text(SPOILT)
    arguments = [*TINY_RUN, "--data", labelled, "--out", out, "--epochs", 5, "--on-nonfinite", "skip"]
    result = command([*torchrun(2), script, *arguments], clean_environment)
    assert result.returncode == 0, result.stderr
    assert [line["step"] for line in metrics(out) if line["loss"] is None] == [3]
    assert summary(out)["skipped"] == 1


MISSING = """
import os, sys
sys.path.insert(0, "train")
import pretrain
from scott_sparse.training import run
real = run.open_data
def missing_on_one(*arguments, **options):
    if os.environ["RANK"] == "1":
        raise ValueError("no such folder here")
    return real(*arguments, **options)
run.open_data = missing_on_one
pretrain.main()
"""


@pytest.mark.slow
def test_a_mistake_of_one_node_is_printed_once(labelled, tmp_path, clean_environment):
    script, out = tmp_path / "missing.py", tmp_path / "run"
    script.write_text(MISSING)
    result = command([*torchrun(2), script, *TINY_RUN, "--data", labelled, "--out", out], clean_environment)
    assert result.returncode != 0 and result.stderr.count("no such folder here") == 1
    assert "error: process 1 on " in result.stderr and not out.exists()


MISTAKES = {
    "unknown size": (["--size", "huge"], "unknown size 'huge'; expected one of demo, tiny"),
    "image side": (["--image-size", "225", "--patch-size", "16"], "image side 225 is not a multiple of patch_size 16"),
    "patch size": (["--patch-size", "5", "--image-size", "50"], "patch_size 5 has no SCOTT stem"),
    "old engine": (["--engine", "tiles"], "expected one of auto, dense, halo, spconv; tiles is called halo now"),
    "no folder": (["--data", "nowhere"], "nowhere: no such folder"),
    "no data": (["small-data"], "--data needs a folder of images"),
    "accumulate": (["--accumulate", "7"], "does not divide"),
    "no such set": (["--data", "flowers103"], "flowers103: no such folder; expected a folder of images, hf:OWNER/NAME"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_in_one_line(name, tmp_path):
    arguments, expected = MISTAKES[name]
    out = tmp_path / "run"
    message, _ = run_pretraining(*arguments, "--out", out)
    assert message is not None and message.startswith("error: ") and expected in message
    assert "\n" not in message
    assert not out.exists()


def test_a_batch_larger_than_the_data_set(labelled, tmp_path):
    message, _ = run_pretraining(*TINY_RUN, "--data", labelled, "--out", tmp_path / "run", "--batch-size", 24)
    assert "batch_size 24 is larger than the data set (20 images to train on); use --batch-size 20 or less" in message


def test_unreadable_images_stop_or_are_left_out(labelled, tmp_path):
    (labelled / "train" / "a" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    (labelled / "train" / "b" / "empty.jpg").touch()
    out = tmp_path / "run"
    arguments = [*TINY_RUN, "--data", labelled, "--out", out, "--epochs", 1]
    message, _ = run_pretraining(*arguments)
    assert message.startswith("error: 2 of 30 images cannot be read") and not out.exists()
    assert len(message.splitlines()) == 3 and "train/a/torn.jpg: " in message
    message, printed = run_pretraining(*arguments, "--skip-unreadable")
    assert message is None and "2 images cannot be read and are left out" in printed
    listed = (out / "unreadable.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in listed] == ["train/a/torn.jpg", "train/b/empty.jpg"]
    assert summary(out)["data"]["unreadable"] == 2


def test_streaming_is_the_same_run(labelled, tmp_path):
    """Decoded in every epoch by workers, or once: the images are the same, so the losses are."""
    curves = []
    for flags in ((), ("--cache", "none", "--workers", 2)):
        out = tmp_path / str(len(curves))
        message, _ = run_pretraining(*TINY_RUN, "--data", labelled, "--out", out, *flags)
        assert message is None
        curves.append([line["loss"] for line in metrics(out)])
    assert curves[0] == curves[1] and len(curves[0]) == 4


@pytest.mark.parametrize("make", ["empty", "no images", "empty class"])
def test_bad_folders_end_in_one_line(make, photos, tmp_path):
    root = photos({"a": 3, "b": 3} if make == "empty class" else {})
    if make == "empty class":
        (root / "c").mkdir()
    elif make == "no images":
        (root / "notes.txt").write_text("nothing to see")
    out = tmp_path / "run"
    message, _ = run_pretraining("--data", root, "--out", out)
    assert message.startswith("error: ") and ("no image in" in message or "holds no image" in message)
    assert "\n" not in message and not out.exists()


def test_spconv_where_it_cannot_work(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "scott_sparse.model.engines.spconv.spconv_failure", lambda device: "spconv does not import (gone)"
    )
    out = tmp_path / "run"
    message, _ = run_pretraining("--engine", "spconv", "--out", out)
    assert "engine spconv cannot work here: spconv does not import (gone)" in message and not out.exists()


def test_an_import_changes_nothing_and_a_mistake_leaves_no_traceback(tmp_path, clean_environment):
    """In a process of its own: settings of the allocator are made by main() alone."""
    code = (
        "import os, sys; sys.path.insert(0, 'train'); import pretrain\n"
        "assert 'THP_MEM_ALLOC_ENABLE' not in os.environ\n"
        "try: pretrain.main()\n"
        "finally: assert os.environ['THP_MEM_ALLOC_ENABLE'] == '1'\n"
    )
    arguments = [sys.executable, "-c", code, "--size", "huge", "--out", tmp_path / "run"]
    result = command(arguments, clean_environment)
    assert result.returncode == 1 and "unknown size 'huge'" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()
