"""benchmarks/peers.py as a user runs it; what trains needs lightly, which is an extra."""

import contextlib
import functools
import io
import json
import sys
from unittest import mock

import peers
import pytest
import torch
from PIL import Image

TRAINED = [name for name in peers.METHODS if name.startswith(("simclr", "dino", "mae", "supervised"))]


def run_peers(*arguments: object) -> tuple[object, str]:
    """How the script ended (None or a message), and what it printed."""
    printed, code = io.StringIO(), None
    with mock.patch.object(sys, "argv", ["peers.py", *map(str, arguments)]), contextlib.redirect_stdout(printed):
        try:
            peers.main()
        except SystemExit as end:
            code = end.code
    return code, printed.getvalue()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name the data"),
        (("petals", "--only", "simclr-vit", "byol"), "unknown methods ['byol']; expected some of: pixels"),
        (("petals", "--seconds", "ten"), "seconds"),
        (("nowhere",), "no such folder" if peers.timm else "lightly is missing"),
    ],
)
def test_mistakes_end_in_one_line(arguments, message, tmp_path):
    code, _ = run_peers(*arguments, "--results", tmp_path / "rows.jsonl")
    assert message in str(code) and "\n" not in str(code)


def test_tables_have_a_row_per_method_and_the_spread_over_seeds(tmp_path):
    rows = [
        {"data": "photos", "seconds": 600.0, "method": "mae-vit", "seed": seed, **dict.fromkeys(peers.MEASURES, value)}
        for seed, value in ((0, 10.0), (1, 20.0))
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (*rows, {**rows[0], "method": "pixels"})))
    _, printed = run_peers("--tables", "--results", file)
    header, _, pixels, mae = printed.strip().splitlines()
    assert header.startswith("| photos, 600 CPU s | seeds | knn_val | knn_test |")
    assert pixels.startswith("| pixels | 1 | 10.0 |") and mae.startswith("| mae-vit | 2 | 15.0 ± 7.1 |")


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_parameter_gets_a_gradient(name):
    pytest.importorskip("lightly")
    method = peers.METHODS[name](3)
    pixels = torch.randint(0, 255, (4, 80, 90, 3), dtype=torch.uint8).numpy()
    views = [torch.stack(of_view) for of_view in zip(*(method.transform(Image.fromarray(image)) for image in pixels))]
    method.train().loss(views, torch.tensor([0, 1, 2, 0])).backward()
    without = [
        name for name, parameter in method.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert [name for name in without if not name.endswith("net.mask_token")] == []  # lightly's ViT has it for others
    pooled, tokens = method.encoder.eval()(torch.randn(2, 3, 64, 64))
    assert pooled.shape[::2] == tokens.shape[::2] == (2, method.encoder.width)


def test_a_finished_row_is_not_run_again(photos, tmp_path, monkeypatch):
    pytest.importorskip("lightly")
    monkeypatch.setitem(peers.PROBES, "attentive", functools.partial(peers.fit_attentive, epochs=1))
    data = photos({f"{split}/{name}": 8 for split in ("train", "test") for name in "abc"})
    names, file = ["pixels", "simclr-vit", "supervised-resnet18"], tmp_path / "rows.jsonl"
    arguments = [data, "--only", *names, "--seconds", 0.5, "--results", file, "--cache-dir", tmp_path / "cache"]
    assert run_peers(*arguments)[0] is None
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["method"] for row in rows] == names and set(peers.MEASURES) < set.intersection(*map(set, rows))
    assert str(tmp_path) not in file.read_text()
    assert all(row["cpu_seconds"] >= 0.5 and row["images_seen"] == row["steps"] * row["batch_size"] for row in rows[1:])
    assert rows[1]["batch_size"] == 24 > rows[2]["batch_size"]  # val has labels, which supervised training does not use
    assert run_peers(*arguments) == (None, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.SCRIPTS)
def test_our_scripts_use_up_the_same_time(name, photos, tmp_path, monkeypatch):
    pytest.importorskip("lightly")
    monkeypatch.setitem(peers.PROBES, "attentive", functools.partial(peers.fit_attentive, epochs=1))
    data, file = photos({f"{split}/{name}": 60 for split in ("train", "test") for name in "abc"}), tmp_path / "rows"
    arguments = [data, "--only", name, "--seconds", 40, "--results", file, "--cache-dir", tmp_path / "cache"]
    assert run_peers(*arguments)[0] is None
    assert 20 < json.loads(file.read_text())["cpu_seconds"] < 80
