"""Frozen features: what they are, that they are extracted once, and the models held against ours."""

import dataclasses

import pytest
import timm
import torch
from conftest import TINY

from scott_sparse import Encoder
from scott_sparse.data.dataset import Images
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels, TimmModel, fingerprint
from scott_sparse.evaluation.features import BATCH, Features, eval_images, extract, kept
from scott_sparse.model.vit import layer_norm

SIZE = (16, 24)


@pytest.fixture
def encoder():
    return Encoder(dataclasses.replace(TINY, depth=3, patch_size=8)).eval()


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    sides = torch.randint(20, 40, (BATCH + 5, 2), generator=generator).tolist()
    return Images.of([torch.randint(0, 256, (h, w, 3), generator=generator, dtype=torch.uint8) for h, w in sides])


@torch.inference_mode()
def test_features_of_an_encoder(encoder, images):
    features = extract(FrozenEncoder(encoder), images, size=SIZE, tokens=True)
    whole = eval_images(images, torch.arange(len(images)), size=SIZE)
    tokens = layer_norm(encoder(whole))
    torch.testing.assert_close(features.mean, tokens.mean(1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features.tokens.float(), tokens, atol=5e-3, rtol=1e-3)
    assert features.pooled.shape == (BATCH + 5, 3, 32)  # all of its three blocks
    first = Encoder(dataclasses.replace(TINY, depth=1, patch_size=8)).eval()
    first.load_state_dict({k: v for k, v in encoder.state_dict().items() if k in first.state_dict()})
    torch.testing.assert_close(features.pooled[:, 0], layer_norm(first(whole)).mean(1), atol=1e-5, rtol=1e-5)


def test_pixels(images):
    features = extract(Pixels(8), images, size=SIZE, tokens=True)
    whole = eval_images(images, torch.arange(len(images)), size=SIZE)
    assert torch.equal(features.mean, whole.flatten(1))
    corner = whole[:, :, 8:16, 16:24].flatten(1)  # the last patch of 2 x 3
    assert features.tokens.shape == (len(images), 6, 192) and torch.equal(features.tokens[:, -1], corner.half())


def test_copies_are_crops_of_the_same_images(encoder, images):
    model = FrozenEncoder(encoder)
    n = len(images)
    whole = extract(model, images, size=SIZE).mean
    copies = extract(model, images, size=SIZE, copies=2).mean
    assert torch.equal(copies[:n], whole) and len(copies) == 3 * n
    one, two = copies[n : 2 * n], copies[2 * n :]
    assert not torch.isclose(one, two).all(1).any() and not torch.isclose(one, whole).all(1).any()
    assert torch.equal(extract(model, images, size=SIZE, copies=1).mean[n:], one)


def test_kept_features_are_not_made_again(tmp_path):
    made = []

    def make():
        made.append(1)
        return Features(torch.rand(5, 2, 3), torch.rand(5, 4, 3).half())

    path = tmp_path / "folder" / "features.safetensors"
    first, second = kept(path, make), kept(path, make)
    assert made == [1] and torch.equal(first.pooled, second.pooled) and torch.equal(first.tokens, second.tokens)


def test_fingerprints_follow_every_weight_and_the_form(encoder):
    first = fingerprint(FrozenEncoder(encoder))
    assert first == fingerprint(FrozenEncoder(encoder))
    encoder.mask_token.data[0, 0, 0] += 1e-6
    assert fingerprint(FrozenEncoder(encoder)) != first
    assert fingerprint(Pixels(8)) != fingerprint(torch.nn.Identity())


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_timm(name, monkeypatch):
    """Without its weights, which a test cannot download."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, pretrained, **rest: create(*a, pretrained=False, **rest))
    model = TimmModel(name)
    pixels = torch.rand(2, 3, *model.size)
    config = model.model.pretrained_cfg
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    theirs = (pixels - torch.tensor(config["mean"])[:, None, None]) / torch.tensor(config["std"])[:, None, None]
    with torch.inference_mode():
        pooled, tokens = model((pixels - mean) / std)
        torch.testing.assert_close(pooled[:, 0], model.model(theirs), atol=1e-4, rtol=1e-4)
    patch = 16 if "vit" in name else 32
    assert tokens.shape == (2, (-(-model.size[0] // patch)) ** 2, model.model.num_features)


def test_timm_mistakes(monkeypatch):
    with pytest.raises(ValueError, match="timm knows no such model"):
        TimmModel("resnet19")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="needs the package timm: pip install timm"):
        TimmModel("resnet18")
