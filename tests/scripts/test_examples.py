"""The examples run as they are, and are short."""

import json
import re
import runpy
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, write_photo

from scott_sparse import Encoder, EncoderConfig, save_encoder
from scott_sparse.model.preprocess import Preprocess

EXAMPLES = [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.sh")]


@pytest.fixture
def run(tmp_path):
    save_encoder(Encoder(TINY), tmp_path / "run", preprocess=Preprocess((32, 32)))
    return tmp_path / "run"


@pytest.fixture
def photos(tmp_path):
    for i in range(24):
        write_photo(tmp_path / "photos" / "ab"[i % 2] / f"<b>{i}.png", 40, 50, seed=i, channel=i % 2)
    return tmp_path / "photos"


@pytest.fixture
def example(monkeypatch, capsys):
    """A function that runs an example with arguments and returns what it printed."""

    def go(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return go


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_they_are_short(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("name", ["tokenizer_in_timm.py", "masking_policy.py", "resnet_stem.py"])
def test_models_train(name, example):
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", example(name))]
    assert len(losses) >= 2 and all(0 < loss < 10 for loss in losses)


def test_a_classifier(example, run, photos):
    assert example("classify_folder.py", run, photos) == "18 images to fit on; 100.0 % of 6 others are right\n"


def test_an_image_search(example, run, photos, tmp_path):
    example("image_search.py", run, photos, tmp_path / "search.html")
    page = (tmp_path / "search.html").read_text()
    images, vectors = (json.loads(text) for text in re.search(r"const images = (.*), vectors = (.*)", page).groups())
    assert len(images) == 24 and {image["name"] for image in images} == {f"<b>{i}.png" for i in range(24)}
    assert page.count("<b>") == 0 and images[0]["src"].startswith("data:image/jpeg;base64,")
    similarity = torch.tensor(vectors) @ torch.tensor(vectors).T
    assert similarity.shape == (24, 24) and similarity.diagonal().allclose(torch.ones(24), atol=0.01)


@pytest.mark.slow
def test_going_on(photos, tmp_path, clean_environment):
    """From a run that stands in for published weights."""
    environment = {**clean_environment, "OUT": str(tmp_path / "out"), "XDG_CACHE_HOME": str(tmp_path)}
    environment["PATH"] = f"{ROOT / '.venv' / 'bin'}:{environment['PATH']}"
    save_encoder(Encoder(EncoderConfig.named("demo", patch_size=8, stem_width=8)), tmp_path / "general")
    flags = ["--epochs", "1", "--image-size", "16", "--batch-size", "8", "--stem-width", "8", "--crops", "4"]
    command = ["bash", "examples/go_on.sh", photos, tmp_path / "general", *flags]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "starts from" in done.stdout and " start, 16 px" in done.stdout and " pretrained, 16 px" in done.stdout
