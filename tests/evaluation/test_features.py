"""Frozen features, their cache, and the encoders they come from."""

import dataclasses

import pytest
import timm
import torch
from conftest import TINY

from scott_sparse import Encoder
from scott_sparse.data.dataset import Images
from scott_sparse.data.views import IMAGENET_MEAN, IMAGENET_STD, resize
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels, TimmModel, fingerprint
from scott_sparse.evaluation.features import BATCH, Features, cached_features, eval_images, extract
from scott_sparse.model.crops import fixed_crops
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


@torch.inference_mode()
def test_features_averaged_over_crops(encoder, images):
    """Against a loop over images; tokens are those of each crop. A user's own tensors give the same."""
    features = extract(FrozenEncoder(encoder), images, size=SIZE, crops=8, tokens=True)
    assert features.pooled.shape == (len(images), 3, 32) and features.tokens.shape == (8 * len(images), 6, 32)
    boxes, mirrored = fixed_crops(images.sizes, size=SIZE, crops=8)
    for i in (0, 1, len(images) - 1):
        crops = [images.crop(torch.tensor([i]), box[None, None])[0] for box in boxes[i]]
        views = [
            resize(crop, box[None, 2:], flip[None], size=SIZE) for crop, box, flip in zip(crops, boxes[i], mirrored)
        ]
        tokens = torch.stack([layer_norm(encoder(view))[0] for view in views])
        torch.testing.assert_close(features.mean[i], tokens.mean((0, 1)), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.tokens[8 * i : 8 * i + 8].float(), tokens, atol=5e-3, rtol=1e-3)
        whole = torch.from_numpy(images.read(i)).permute(2, 0, 1)[None] / 255
        whole = (whole - torch.tensor(IMAGENET_MEAN)[:, None, None]) / torch.tensor(IMAGENET_STD)[:, None, None]
        ours = encoder.pooled(whole, size=SIZE, crops=8)[0]
        torch.testing.assert_close(ours, features.mean[i], atol=0.05, rtol=0)  # pixels here are not rounded to bytes


@pytest.fixture
def cache(tmp_path):
    """A function that asks for features under one name and says how often they have been made so far."""
    made = []
    path = tmp_path / "folder" / "features.safetensors"

    def make():
        made.append(Features(torch.rand(5, 2, 3), torch.rand(5, 4, 3).half()))
        return made[-1]

    return path, lambda: (cached_features(path, make), len(made))


def test_features_are_made_once(cache):
    (first, _), (second, made) = cache[1](), cache[1]()
    assert made == 1 and torch.equal(first.pooled, second.pooled) and torch.equal(first.tokens, second.tokens)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_file_is_replaced(cache, damage):
    path, ask = cache
    ask()
    path.write_bytes(damage(path.read_bytes()))
    assert ask()[1] == 2
    assert ask()[1] == 2  # the new file is whole


def test_a_full_disk_does_not_lose_the_features(cache, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("scott_sparse.evaluation.features.write_atomically", full)
    features, _ = cache[1]()
    assert features.pooled.shape == (5, 2, 3)
    assert "warning: features are not cached" in capsys.readouterr().err


def test_fingerprints_follow_every_weight_and_the_config(encoder):
    first = fingerprint(FrozenEncoder(encoder))
    assert first == fingerprint(FrozenEncoder(encoder))
    for change in ({"heads": 2}, {"registers": 0}):
        other = Encoder(dataclasses.replace(encoder.config, **change))
        other.load_state_dict(encoder.state_dict(), strict=False)
        assert fingerprint(FrozenEncoder(other)) != first
    same_weights = Encoder(encoder.config, engine="dense")
    same_weights.load_state_dict(encoder.state_dict())
    assert fingerprint(FrozenEncoder(same_weights)) == first
    encoder.mask_token.data[0, 0, 0] += 1e-6
    assert fingerprint(FrozenEncoder(encoder)) != first


def test_patch_sizes_have_different_fingerprints():
    """SCOTT's stems for 8 and 16 have the same weights."""
    encoders = []
    for patch_size in (8, 16):
        torch.manual_seed(0)
        config = dataclasses.replace(TINY, patch_size=patch_size)
        encoders.append(FrozenEncoder(Encoder(config)))
    for (name, ours), theirs in zip(encoders[0].state_dict().items(), encoders[1].state_dict().values()):
        assert torch.equal(ours, theirs), name
    assert fingerprint(encoders[0]) != fingerprint(encoders[1])
    assert fingerprint(Pixels(8)) != fingerprint(Pixels(16))


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
    first = fingerprint(model)
    model.description["pretrained_cfg"]["mean"] = (0.1, 0.2, 0.3)
    assert fingerprint(model) != first
    patch = 16 if "vit" in name else 32
    assert tokens.shape == (2, (-(-model.size[0] // patch)) ** 2, model.model.num_features)


def test_timm_mistakes(monkeypatch):
    with pytest.raises(ValueError, match="unknown to timm"):
        TimmModel("resnet19")
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(ValueError, match="needs the package timm: pip install timm"):
        TimmModel("resnet18")
