"""The online report: that it says what happens, costs the run nothing but time, and never looks at test."""

import json
import sys

import pretrain
import pytest
import torch
from safetensors.torch import load_file

from scott_sparse.training import monitor as online

TINY = ["small-data", "--crops", "2", "--size", "demo", "--stem-width", "8", "--image-size", "32", "--batch-size", "8"]


@pytest.fixture
def pretrained(tmp_path, monkeypatch, capsys):
    """A function that runs train/pretrain.py; returns its run folder, what it printed and how it ended."""

    def go(data, *more):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        arguments = [*TINY, "--data", data, "--cache-dir", tmp_path / "cache", "--out", out, *more]
        monkeypatch.setattr(sys, "argv", ["pretrain.py", *map(str, arguments)])
        try:
            pretrain.main()
            code = None
        except SystemExit as end:
            code = end.code
        return out, capsys.readouterr().out, code

    return go


def reports(out):
    return [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]


@pytest.fixture
def labelled(photos):
    return photos({f"{split}/{name}": count for split, count in (("train", 20), ("test", 4)) for name in "abc"})


def test_a_report_every_n_epochs(labelled, pretrained):
    out, printed, _ = pretrained(labelled, "--epochs", 4, "--report-every", 2)
    found = reports(out)
    assert [report["epoch"] for report in found] == [0, 2, 4]
    assert found[0]["loss"] is None and found[0]["ema_distance"] == 0 < found[2]["ema_distance"]
    for report in found:
        assert 0 <= report["knn"] <= 100 and report["knn_error"] > 0
        assert 1 <= report["rankme"] <= 96 and 1 <= report["lidar"] <= 96 and 0 < report["std"] <= 1.1
        assert -1 <= report["token_similarity"] <= 1
    assert " ".join(printed.split()).count("k-NN on val") == 3 and ": learning" in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["verdict"] == found[-1]["verdict"] and summary["report_share"] > 0


def test_without_labels(photos, pretrained):
    out, printed, _ = pretrained(photos({".": 30}), "--epochs", 2, "--report-every", 1)
    assert [report["knn"] for report in reports(out)] == [None] * 3
    assert "RankMe" in printed and "k-NN on val" not in printed


def test_without_labels_but_with_splits(photos, pretrained):
    out, _, code = pretrained(photos({"train": 20, "val": 8, "test": 8}), "--epochs", 2, "--report-every", 1)
    assert code is None and [report["knn"] for report in reports(out)] == [None] * 3


def test_weights_do_not_depend_on_reports(labelled, pretrained):
    more = ("--epochs", 2, "--dropout", 0.1)
    with_reports, _, _ = pretrained(labelled, *more, "--report-every", 0.5)
    without, _, _ = pretrained(labelled, *more, "--report-every", 0)
    assert len(reports(with_reports)) > 3 and not (without / "reports.jsonl").exists()
    for file in ("encoder.safetensors", "context.safetensors"):
        for name, tensor in load_file(with_reports / file).items():
            assert torch.equal(tensor, load_file(without / file)[name]), name


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_never_of_test_images(protocol, labelled, pretrained, monkeypatch):
    """Under the paper protocol val is test here, so that there is no k-NN; pretraining itself sees all images."""
    extract, seen = online.extract, set()

    def watched(model, images, **options):
        seen.update(images.names)
        return extract(model, images, **options)

    monkeypatch.setattr(online, "extract", watched)
    out, _, _ = pretrained(labelled, "--epochs", 2, "--report-every", 1, "--protocol", protocol)
    assert seen
    if protocol == "clean":
        assert not any(name.startswith("test/") for name in seen) and reports(out)[0]["knn"] is not None
    else:
        assert reports(out)[0]["knn"] is None


def test_stop_on_collapse(labelled, pretrained, monkeypatch):
    """Of an encoder whose features are made the same for all images at epoch 2."""
    examine = online.OnlineReport.examine

    def collapse(self, epoch):
        if epoch >= 2:
            for p in self.target.parameters():
                p.data.zero_()
        return examine(self, epoch)

    monkeypatch.setattr(online.OnlineReport, "examine", collapse)
    more = ("--epochs", 4, "--report-every", 1)
    out, printed, code = pretrained(labelled, *more, "--stop-on-collapse")
    assert code.startswith("error: collapsing: RankMe fell from ") and "at epoch 2; stopped" in code
    assert len(reports(out)) == 3 and not (out / "encoder.safetensors").exists()
    out, printed, code = pretrained(labelled, *more)
    assert code is None and "collapsing: RankMe fell" in " ".join(printed.split())
    assert json.loads((out / "summary.json").read_text())["verdict"].startswith("collapsing")
