"""The online report: it says what happens, its numbers are comparable, it costs nothing but time, and sees no test."""

import json

import pretrain
import pytest
import timm
import torch
from conftest import TINY_RUN, run_pretraining
from PIL import Image
from safetensors.torch import load_file, save_file

from scott_sparse import Encoder, EncoderConfig, save_encoder
from scott_sparse.evaluation import report as final
from scott_sparse.evaluation import subject
from scott_sparse.model import pretrained as pretrained_weights
from scott_sparse.training import monitor


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """A function that runs train/pretrain.py; returns its run folder, what it printed and how it ended."""
    monkeypatch.setattr(pretrain, "draw_learned", lambda *_, **__: None)

    def go(data, *more):
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        code, printed = run_pretraining(*TINY_RUN, "--data", data, "--out", out, "--report-every", 1, *more)
        return out, printed, code

    return go


def reports(out):
    return [json.loads(line) for line in (out / "reports.jsonl").read_text().splitlines()]


@pytest.fixture
def labelled(photos):
    return photos({f"{split}/{name}": count for split, count in (("train", 20), ("test", 4)) for name in "abc"})


def test_reports_of_a_run_are_comparable(labelled, pretrained):
    """With each other whatever their distance, and with the table at the end: all train images are the bank."""
    flags = ("--epochs", 4)
    out, printed, _ = pretrained(labelled, *flags)
    rows = reports(out)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[0]["loss"] is None and rows[0]["ema_distance"] == 0 < rows[4]["ema_distance"]
    for row in rows:
        assert 0 <= row["knn"] <= 100 and row["knn_error"] > 0
        assert 1 <= row["rankme"] <= 96 and 1 <= row["lidar"] <= 96 and 0 < row["std"] <= 1.1
        assert -1 <= row["token_similarity"] <= 1
        assert row["knn_untrained"] == rows[0]["knn"] and row["knn_pixels"] == rows[0]["knn_pixels"]
    assert printed.count("k-NN on val ") == 5 and "bank" not in printed
    pixels, untrained = rows[0]["knn_pixels"], rows[0]["knn"]
    assert f" % (pixels {pixels:.1f}), RankMe" in printed
    assert printed.count(f" % (pixels {pixels:.1f}, untrained {untrained:.1f}), RankMe") == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["report_share"] > 0 and f"verdict: {summary['verdict']}" in printed
    accuracies = {"pixels": pixels, "init": untrained, "pretrained": rows[-1]["knn"]}
    assert summary["knn"] == {name: round(accuracy, 2) for name, accuracy in accuracies.items()}

    out, _, _ = pretrained(labelled, *flags, "--report-every", 2)
    for row, same in zip(reports(out), rows[::2], strict=True):
        assert {**row, "loss": 0, "verdict": ""} == {**same, "loss": 0, "verdict": ""}


def test_a_sample_is_named(labelled, pretrained, monkeypatch):
    monkeypatch.setattr(monitor, "MAX_BANK_IMAGES", 32)
    _, printed, _ = pretrained(labelled)
    assert printed.count(", bank: 32 of 54 images), RankMe") == 3
    monkeypatch.setattr(monitor, "MAX_QUERY_IMAGES", 4)
    _, printed, _ = pretrained(labelled)
    assert printed.count(", bank: 32 of 54 images, queries: 4 of 6 images), RankMe") == 3


def test_without_labels(photos, pretrained):
    out, printed, _ = pretrained(photos({".": 30}))
    assert [row["knn"] for row in reports(out)] == [None] * 3
    assert "RankMe" in printed and "k-NN" not in printed and "pixels" not in printed
    assert all(row["knn_pixels"] is row["knn_untrained"] is None for row in reports(out))


def test_without_labels_but_with_splits(photos, pretrained):
    out, _, code = pretrained(photos({"train": 20, "val": 8, "test": 8}))
    assert code is None and [row["knn"] for row in reports(out)] == [None] * 3


def test_weights_do_not_depend_on_reports(labelled, pretrained):
    more = ("--dropout", 0.1)
    with_reports, _, _ = pretrained(labelled, *more, "--report-every", 0.5)
    without, _, _ = pretrained(labelled, *more, "--report-every", 0)
    assert len(reports(with_reports)) > 3 and not (without / "reports.jsonl").exists()
    for file in ("encoder.safetensors", "context.safetensors"):
        for name, tensor in load_file(with_reports / file).items():
            assert torch.equal(tensor, load_file(without / file)[name]), name


@pytest.mark.parametrize("protocol", ["clean", "paper"])
def test_never_of_test_images(protocol, labelled, pretrained, monkeypatch):
    """Neither reports nor the table. Under the paper protocol val is test here: no k-NN; training sees all images."""
    extract, seen = monitor.extract, set()

    def watched(model, images, **options):
        seen.update(images.names)
        return extract(model, images, **options)

    for module in (monitor, final):
        monkeypatch.setattr(module, "extract", watched)
    out, printed, code = pretrained(labelled, "--protocol", protocol)
    assert seen and code is None
    if protocol == "clean":
        assert not any(name.startswith("test/") for name in seen) and reports(out)[0]["knn"] is not None
    else:
        assert reports(out)[0]["knn"] is None and "k-NN" not in printed


def test_stop_on_collapse(labelled, pretrained, monkeypatch):
    """Of an encoder whose features are made the same for all images at epoch 2."""
    examine = monitor.OnlineReport.examine

    def collapse(self, epoch):
        if epoch >= 2:
            for p in self.target.parameters():
                p.data.zero_()
        return examine(self, epoch)

    monkeypatch.setattr(monitor.OnlineReport, "examine", collapse)
    out, printed, code = pretrained(labelled, "--epochs", 4, "--stop-on-collapse")
    assert code.startswith("error: collapsing: RankMe fell from ") and "at epoch 2; stopped" in code
    assert len(reports(out)) == 3 and not (out / "encoder.safetensors").exists()
    out, printed, code = pretrained(labelled, "--epochs", 4)
    assert code is None and "collapsing: RankMe fell" in printed
    assert json.loads((out / "summary.json").read_text())["verdict"].startswith("collapsing")


def test_a_run_that_ends_below_its_start_says_so(tmp_path, pretrained, monkeypatch):
    """Noise with a faint tint by class, which an untrained encoder sees best; the target is made random at reports."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 20), ("val", 25), ("test", 2)):
        for channel, name in enumerate("abc"):
            for i in range(count):
                pixels = torch.randint(0, 200, (40, 40, 3), generator=generator)
                pixels[..., channel] += 10
                path = tmp_path / "photos" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.byte().numpy()).save(path)
    examine = monitor.OnlineReport.examine

    def spoil(self, epoch):
        if epoch:
            torch.manual_seed(1)
            for p in self.target.parameters():
                p.data.normal_()
        return examine(self, epoch)

    monkeypatch.setattr(monitor.OnlineReport, "examine", spoil)
    out, printed, code = pretrained(tmp_path / "photos", "--epochs", 3)
    words = json.loads((out / "summary.json").read_text())["verdict"]
    remedy = "; try --plain-share 0.5 --colour 1 --crops 8 (the colours of half of the crops change)"
    remedy += ", or the recipe mim-jepa (no crops are compared)"
    assert code is None and words == f"worse than untrained{remedy}"
    assert printed.count("starting") == 2 and "learning" not in printed
    assert reports(out)[-1]["verdict"] == f"worse than untrained so far{remedy}"
    assert f"{reports(out)[-1]['verdict']} epoch" in printed and f"verdict: {words}" in printed


@pytest.mark.parametrize("kind", ["timm", "run"])
def test_a_run_that_starts_from_weights(kind, labelled, pretrained, tmp_path, monkeypatch):
    """k-NN is watched against the start, which is the features of the weights that it was given."""
    if kind == "timm":
        shape = {"img_size": 32, "patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}  # those of --size demo
        monkeypatch.setattr(pretrained_weights, "HEAD_WIDTH", 32)
        model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **shape)
        save_file(model.state_dict(), tmp_path / "vit.safetensors")
        init, flags = tmp_path / "vit.safetensors", ("--tokenizer", "patch")
    else:
        init, flags = pretrained(labelled)[0] / "encoder.safetensors", ("--seed", 1)
    flags = (*flags, "--init", init, "--lr", 1e-30, "--lr-start", 1e-30, "--lr-final", 1e-30)
    out, printed, code = pretrained(labelled, *flags)
    assert code is None and f"{init}: loaded tokenizer (" in printed
    rows = reports(out)
    assert f", start {rows[0]['knn']:.1f}), RankMe" in printed and "untrained" not in printed
    assert "the start, " in printed and "encoder at initialisation" not in printed
    start = subject.open_encoder(subject.ProbeConfig(run=str(out), init="random"))
    assert start.name == "start"
    for name, tensor in load_file(out / "encoder.safetensors").items():
        torch.testing.assert_close(tensor, start.model.encoder.state_dict()[name], atol=1e-12, rtol=1e-6)


def test_a_start_of_another_size(labelled, pretrained, tmp_path):
    save_encoder(Encoder(EncoderConfig.named("demo", patch_size=8)), tmp_path / "general")
    _, _, code = pretrained(labelled, "--init", tmp_path / "general", "--size", "tiny")
    assert code.endswith("expected (192, 12, 3) as --size says: use --size demo.")
