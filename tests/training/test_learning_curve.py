"""eval/learning_curve.py as a user runs it, on tiny runs; the answer in words."""

import dataclasses
import json
import re
import subprocess
import sys

import learning_curve
import pytest
from conftest import ROOT, TINY_RUN
from PIL import Image

from scott_sparse.data.colour import choose_colours
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.evaluation.subject import run_script
from scott_sparse.training.learning_curve import CurveConfig, Point, answer, run_curve
from scott_sparse.training.recipe import parse
from scott_sparse.training.run import prepare_run

PRETRAIN = " ".join(map(str, TINY_RUN[: TINY_RUN.index("--epochs")])) + " --report-every 0"


def flags(data, out, *more):
    cache = ["--cache-dir", out.parent / "cache", "--data", data, "--out", out]
    return list(map(str, [*cache, f"--pretrain={PRETRAIN}", "--epochs", 1, *more]))


def refusal(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["learning_curve.py", *arguments])
    with pytest.raises(SystemExit) as end:
        run_script(CurveConfig, learning_curve.main)
    return str(end.value.code)


@pytest.mark.slow
def test_a_curve_is_drawn_and_its_parts_are_not_run_again(photos, tmp_path, clean_environment):
    data = photos({f"{split}/{name}": 32 for split in ("train", "test") for name in "ab"})
    command = [
        sys.executable,
        ROOT / "eval" / "learning_curve.py",
        *flags(data, tmp_path / "curve", "--shares", ".5", "1"),
    ]

    def run():
        return subprocess.run(list(map(str, command)), env=clean_environment, capture_output=True, text=True)

    first = run()
    assert first.returncode == 0, first.stdout + first.stderr
    assert "plan: 2 runs of 8 steps take 0:00:" in first.stdout
    curve = json.loads((tmp_path / "curve" / "learning_curve.json").read_text())
    assert first.stdout.strip().endswith(curve["answer"]) and curve["answer"].startswith("Pretraining on all 64 images")
    assert [point["images"] for point in curve["pretrained"]] == [32, 64] and curve["steps"] == 8
    for images in (32, 64):
        summary = json.loads((tmp_path / "curve" / f"images-{images}" / "summary.json").read_text())
        assert summary["steps"] == 8
    Image.open(tmp_path / "curve" / "learning_curve.png").verify()
    again = run()
    assert "plan:" not in again.stdout and "top-1" not in again.stdout and curve["answer"] in again.stdout


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--shares", "1", ".5"), "must increase within (0, 1]"),
        (("--shares", ".5", "1.5"), "must increase within (0, 1]"),
        (("--shares", ".1", "1"), "share 0.1 is 3 images, fewer than --batch-size 8"),
        (("nothing",), "unknown recipe 'nothing'"),
        (("--pretrain=--init timm:x",), "leave it out of --pretrain"),
    ],
)
def test_mistakes_end_in_one_line(more, message, photos, tmp_path, monkeypatch):
    data = photos({f"{split}/{name}": 16 for split in ("train", "test") for name in "ab"})
    said = refusal(monkeypatch, *flags(data, tmp_path / "curve", *more))
    assert message in said and said.startswith("error: ") and "\n" not in said


def test_images_without_labels_and_a_folder_of_another_curve_are_refused(photos, tmp_path, monkeypatch):
    assert "needs labels" in refusal(monkeypatch, *flags(photos({"": 16}), tmp_path / "curve"))
    data = photos({f"{split}/{name}": 16 for split in ("train", "test") for name in "ab"}, "labelled")
    run = tmp_path / "curve" / "images-32"
    run.mkdir(parents=True)
    (run / "summary.json").write_text(json.dumps({"steps": 4, "data": {"fingerprint": "another"}}))
    said = refusal(monkeypatch, *flags(data, tmp_path / "curve", "--shares", "1"))
    assert "is of other images or another number of steps; choose another --out" in said


@pytest.mark.parametrize(
    ("probe", "changed", "message"),
    [
        ("linear", {}, None),
        ("linear", {"data_fingerprint": "another"}, "linear.py failed with exit code 3"),
        ("linear", {"image_size": [64, 64]}, "linear.py failed with exit code 3"),
        ("linear", {"settings": {"crops": 8}}, "linear.py failed with exit code 3"),
        ("finetune", {"data_fingerprint": "another"}, "finetune.py failed with exit code 3"),
        ("finetune", {"settings": {"epochs": 9.0}}, "finetune.py failed with exit code 3"),
        ("recipe", {"lr": 7.0}, "is of other settings (lr was 7.0, now 0.003); choose another --out"),
    ],
)
def test_results_are_used_again_where_images_and_settings_are_the_same(probe, changed, message, photos, tmp_path):
    """Of a run and probes as their scripts leave them; here these scripts fail."""
    data = photos({f"{split}/{name}": 16 for split in ("train", "test") for name in "ab"})
    scripts, out = tmp_path / "scripts", tmp_path / "curve"
    source = DataConfig(data=str(data), cache_dir=tmp_path / "cache")
    pretrain = f"{PRETRAIN} --colour auto"
    config = CurveConfig(source=source, out=out, epochs=1.0, shares=(1.0,), pretrain=pretrain)
    _, recipe = parse(["small-data", *flags(data, out)[:4], *pretrain.split(), "--epochs", "1"])
    opened = open_data(source, short_side=short_side_for((32, 32)))
    recipe = dataclasses.replace(recipe, views=choose_colours(recipe.views, opened.pretrain)[0])
    score = {"top1": 50.0, "top1_interval": [40.0, 60.0]}
    common = {"data_fingerprint": opened.fingerprint, "protocol": "clean", "image_size": [32, 32], "test": score}
    seen = {"epochs": 4 * 8 / len(opened.train), "batch_size": 8}
    files = {
        "summary": {"steps": 4, "data": {"fingerprint": opened.fingerprint}},
        "recipe": {"recipe": "small-data", **recipe.to_json()},
        "eval/linear-photos-1": {"subject": "pretrained", "settings": {}, **common},
        "eval/linear-photos-random-1": {"subject": "random", "settings": {}, **common},
        "eval/finetune-photos-1": {"subject": "random", "settings": seen, **common},
    }
    for name, content in files.items():
        path = out / "images-32" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**content, **(changed if probe in name else {})}))
    (scripts / "eval").mkdir(parents=True)
    for name in ("linear", "finetune"):
        (scripts / "eval" / f"{name}.py").write_text("raise SystemExit(3)")
    if message is None:
        run_curve(config, scripts)
        assert json.loads((out / "learning_curve.json").read_text())["pretrained"][0]["top1"] == 50
    else:
        with pytest.raises(ValueError, match=re.escape(message)):
            run_curve(config, scripts)


def test_a_share_is_of_the_images_to_pretrain_on_alone_and_nested(photos, tmp_path):
    data, rows = photos({f"{split}/{name}": 16 for split in ("train", "test") for name in "ab"}), {}
    for share in ("1", ".5", ".25"):
        command = ["small-data", *TINY_RUN, "--share", share, "--data", data, "--cache-dir", tmp_path / "cache"]
        run = prepare_run(*parse(list(map(str, command))))
        rows[share] = set(run.data.pretrain.rows.tolist())
        assert len(run.data.test) == 32 and len(run.data.train) > 16
    assert [len(own) for own in rows.values()] == [32, 16, 8] and rows["1"] > rows[".5"] > rows[".25"]
    with pytest.raises(ValueError, match=r"share 1.5 is outside \(0, 1\]"):
        parse(["small-data", "--data", "petals", "--share", "1.5"])


def test_more_images_help_where_the_last_step_gained_more_than_test_can_be_wrong_by():
    few, many = Point(500, 50.0, (48.0, 52.0)), Point(1000, 60.0, (58.0, 62.0))
    untrained, supervised = Point(0, 30.0, (28.0, 32.0)), Point(900, 57.5, (55.5, 59.5))
    said = answer([few, many], untrained, supervised)
    assert said == (
        "Pretraining on all 1,000 images gains 30.0 points over the untrained encoder and 2.5 over supervised training "
        "(± 2.0); from 500 to 1,000 images it gained 10.0 (± 2.8): more images would help."
    )
    assert "would not help measurably" in answer([Point(500, 59.0, (57.0, 61.0)), many], untrained, supervised)
