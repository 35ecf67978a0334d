"""Tables and figures: names are shown as they are, and pretraining's table is about val."""

import dataclasses

import torch
from conftest import TINY

from scott_sparse import Encoder
from scott_sparse.data.dataset import Images
from scott_sparse.evaluation import report

CLASSES = ("[red]", "$x_", "a|b")


def some_images(n):
    generator = torch.Generator().manual_seed(n)
    pixels = torch.randint(0, 256, (n, 20, 20, 3), generator=generator, dtype=torch.uint8)
    return Images.of(pixels, torch.arange(n) % 3)


def some_encoders():
    config = dataclasses.replace(TINY, patch_size=8)
    return Encoder(config).eval(), Encoder(config).eval()


def test_class_names_are_no_markup(tmp_path, capsys):
    confusion = [[3, 1, 0], [0, 4, 0], [0, 2, 2]]
    report.draw_confusion(tmp_path / "confusion.png", confusion, CLASSES)
    assert (tmp_path / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    scores = {"n": 12, "top1": 75.0, "top1_interval": [46.8, 91.1], "top5": None, "mean_per_class": 75.0}
    scores |= {"per_class": [75.0, 100.0, 50.0], "confusion": confusion}
    result = {"probe": "knn", "subject": "pretrained", "choice": {"k": 5}, "chosen_on": "val"}
    report.print_scores({**result, "val": scores, "test": scores, "classes": CLASSES})
    printed = capsys.readouterr().out
    assert all(name in printed for name in CLASSES) and "$x_ (2)" in printed and "k 5 chosen on val" in printed


def test_knn_report_and_table():
    train, val = some_images(12), some_images(6)
    accuracies = report.knn_report(train, val, *some_encoders(), size=(16, 16))
    assert list(accuracies) == ["pixels", "init", "pretrained"] and all(0 <= x <= 100 for x in accuracies.values())
    table = report.knn_table(accuracies, images=6, classes=3, terms=("MIM-JEPA",))
    assert table.row_count == 3 and str(table.title) == "k-NN on 6 val images, 3 classes (chance 33.3 %)"
    without = report.knn_report(train, None, *some_encoders(), size=(16, 16))
    assert without == {"pixels": None, "init": None, "pretrained": None}
