"""What encoder.json says of an encoder's images is the view with which the scripts evaluate it."""

import json

import pytest
import torch
from conftest import TINY, run_pretraining
from PIL import Image

from scott_sparse import Encoder, load_encoder, save_encoder
from scott_sparse.data.images import Images
from scott_sparse.evaluation.features import eval_images
from scott_sparse.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from scott_sparse.model.weights import CONFIG


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (48, 16)])
@pytest.mark.parametrize("sides", [(60, 90), (90, 60), (20, 33), (1, 50), (32, 32)])
def test_it_is_the_evaluations_view(sides, size):
    pixels = torch.randint(0, 256, (*sides, 3), dtype=torch.uint8)
    expected = eval_images(Images.of([pixels]), torch.tensor([0]), size=size)
    preprocess = Preprocess(size)
    torch.testing.assert_close(preprocess(Image.fromarray(pixels.numpy()))[None], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(preprocess(pixels.permute(2, 0, 1)[None]), expected, atol=1e-5, rtol=0)


def test_pictures_that_are_turned_or_not_rgb():
    pixels = torch.randint(0, 256, (40, 40, 3), dtype=torch.uint8)
    turned, grey = Image.fromarray(pixels.numpy()), Image.new("L", (40, 40), 255)
    turned.getexif()[0x0112] = 3  # upside down
    preprocess = Preprocess((40, 40))
    assert torch.equal(preprocess(turned), preprocess(pixels.permute(2, 0, 1).flip(1, 2)))
    white = (1 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(preprocess(grey)[:, 7, 7], white)


@pytest.mark.parametrize("image", [torch.rand(3, 8, 8), torch.zeros(8, 8, 3, dtype=torch.uint8), [[0]]])
def test_other_values_are_refused(image):
    with pytest.raises(ValueError, match="expected"):
        Preprocess((8, 8))(image)


def test_a_run_says_what_its_encoder_wants(photos, tmp_path):
    flags = ["--size", "demo", "--stem-width", 8, "--image-size", 16, 32, "--batch-size", 8, "--crops", 4]
    flags += ["--epochs", 1, "--report-every", 0, "--data", photos({"a": 8, "b": 8}), "--out", tmp_path / "run"]
    assert run_pretraining(*flags)[0] is None
    encoder = load_encoder(tmp_path / "run")
    assert encoder.preprocess == Preprocess((16, 32))
    entry = json.loads((tmp_path / "run" / CONFIG).read_text())["preprocess"]
    assert entry["channels"] == "RGB" and entry["value_range"] == [0, 1] and entry["interpolation"] == "bicubic"
    picture = Image.effect_noise((70, 50), 64)
    assert encoder(encoder.preprocess(picture)[None]).shape == (1, 8, 192 // 2)
    save_encoder(encoder, tmp_path / "again")
    assert load_encoder(tmp_path / "again").preprocess == encoder.preprocess


def test_an_encoder_without_the_entry_loads(tmp_path):
    save_encoder(Encoder(TINY), tmp_path)
    assert "preprocess" not in json.loads((tmp_path / CONFIG).read_text())
    assert load_encoder(tmp_path).preprocess is None


WRONG = [
    {"mean": ["0", "0", "0"]},
    {"std": [0.1, 0.1, 0.0]},
    {"image_size": 64},
    {"image_size": [64.0, 64.0]},
    {"x": 1},
]
WRONG += [{"channels": "BGR"}, {"mean": [float("nan")] * 3}, {"image_size": [2**40, 8]}]


@pytest.mark.parametrize("change", WRONG, ids=str)
def test_a_wrong_entry_is_refused(change, tmp_path):
    save_encoder(Encoder(TINY), tmp_path, preprocess=Preprocess((32, 32)))
    fields = json.loads((tmp_path / CONFIG).read_text())
    fields["preprocess"] |= change
    (tmp_path / CONFIG).write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"encoder.json: preprocess: {next(iter(change))}"):
        load_encoder(tmp_path)
