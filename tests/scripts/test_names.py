"""Names as people give them, in classes, files, data and run folders, through every script: no traceback, no markup."""

import json
import os
import sys
from pathlib import Path

import attentive
import extract
import fewshot
import knn
import label_next
import linear
import pytest
import table
import torch
from conftest import TINY_RUN, run_pretraining, write_photo
from safetensors import safe_open

from scott_sparse.evaluation import report
from scott_sparse.evaluation.probe import file_name
from scott_sparse.evaluation.subject import run_script

NAMES = [
    *("[bold]", "[/red]", "[link=x]", "$x_", "$\\frac{$", "a|b", "`c`", "*d*", "50 %", "{e}", ":smile:", "<b>&amp;"),
    *("🌸", "👩‍👩‍👧", "قطة", "חתול", "猫", "ねこ", "고양이", "แมว", "e\u0301", "\u202eabc", "two\nlines", "tab\there"),
    os.fsdecode(b"latin-\xe9"),
]
FOLDERS = [name for name in NAMES if "/" not in name]
SCRIPTS = {
    "knn": (knn.main, knn.LabelBudgetConfig, []),
    "linear": (linear.main, linear.LinearConfig, []),
    "attentive": (attentive.main, attentive.AttentiveConfig, ["--epochs", "2"]),
    "fewshot": (fewshot.run_few_shot, fewshot.ProbeConfig, []),
    "extract": (extract.main, extract.ExtractConfig, ["--file", "features.safetensors"]),
    "label_next": (label_next.choose_next, label_next.LabelNextConfig, ["--count", "60"]),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on classes of all names, in a data and a run folder of awkward names."""
    root = tmp_path_factory.mktemp("names")
    for label, name in enumerate(FOLDERS):
        for i in range(10):
            path = root / "[/data] $|猫" / name / f"{FOLDERS[i]}.png"
            write_photo(path, 16, 16, seed=20 * label + i, channel=label % 3)
    data, out = root / "[/data] $|猫", root / "[/run] $|ねこ:smile:"
    failure, printed = run_pretraining(*TINY_RUN, "--image-size", 16, "--report-every", 1, "--data", data, "--out", out)
    assert failure is None and "[/run] $|ねこ:smile:" in printed
    return data, out


def main(monkeypatch, script, config, *arguments):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    run_script(config, script)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script(script, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, out = run
    function, config, flags = SCRIPTS[script]
    main(monkeypatch, function, config, out, "--data", data, "--cache-dir", tmp_path, *flags)
    printed = capsys.readouterr().out
    printed.encode()  # as a terminal would
    if script == "extract":
        with safe_open("features.safetensors", "pt") as file:
            names = json.loads(file.metadata()["names"])
        assert len(names) == 10 * len(FOLDERS) and any(Path(name).parent.name == "[bold]" for name in names)
        return
    if script == "label_next":
        assert (out / "eval" / f"label-next-{file_name(str(data))}.csv").read_bytes().count(b".png") == 60
        return
    (path,) = (out / "eval").glob(f"{script}*.json")
    assert json.loads(path.read_text())["classes"] == sorted(FOLDERS)
    assert path.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    main(monkeypatch, table.main, table.TableConfig, out)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert "[/run] $\\|ねこ:smile:" in lines[2] and len({line.replace("\\|", "").count("|") for line in lines}) == 1


@pytest.mark.filterwarnings("error")
def test_every_name_in_tables_and_figures(tmp_path, capsys):
    count = len(NAMES)
    confusion = torch.eye(count).long().tolist()
    report.draw_confusion(tmp_path / "confusion.png", confusion, NAMES)
    scores = {"n": count, "top1": 100.0, "top1_interval": [90.0, 100.0], "top5": 100.0, "mean_per_class": 100.0}
    scores |= {"per_class": [100.0] * count, "confusion": confusion}
    result = {"probe": "[/knn]", "subject": "x", "choice": {"k": 5}, "chosen_on": "val", "val": scores, "test": scores}
    shown = ""
    for start in range(0, count, report.WORST_CLASSES):  # the table lists so many
        recalls = [0.0 if start <= i < start + report.WORST_CLASSES else 100.0 for i in range(count)]
        report.print_scores({**result, "test": {**scores, "per_class": recalls}, "classes": NAMES})
        shown += capsys.readouterr().out
    shown.encode()
    plain = [name for name in NAMES if name.isprintable() and name.isascii()]
    assert len(plain) > 10 and all(name in shown for name in (*plain, "猫", "قطة", "🌸", "latin-\\xe9", "two\\nlines"))
