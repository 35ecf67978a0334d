import os
import re

import pytest
import torch
import torch.nn.functional as F

from scott_sparse.data import petals as module
from scott_sparse.data.petals import CLASSES, SPLITS, petals, render


def knn_accuracy(bank, bank_labels, queries, labels):
    nearest = (F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T).topk(20, dim=1).indices
    return (bank_labels[nearest].mode(dim=1).values == labels).double().mean().item()


def test_random_bits_agree_with_python_integers():
    """The oracle has unbounded integers; the code has int64 that wrap and shift their sign in."""

    def scramble(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    # First output of SplitMix64 seeded with 0, as published with the generator.
    assert scramble(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF
    for seed in (0, 1, -5, 2**64 - 3, 12345678901234567890):
        key = scramble((scramble((scramble(seed % 2**64) + 1 + SPLITS.index("val")) % 2**64) + 7) % 2**64)
        expected = [scramble((key + (slot + 1) * 0x9E3779B97F4A7C15) % 2**64) for slot in range(5)]
        bits = module._Draws(torch.tensor([3, 7]), "val", seed).bits(0, 5)
        assert [word % 2**64 for word in bits[1].tolist()] == expected


def test_draws_are_uniform_and_unrelated():
    uniform = module._Draws(torch.arange(2000), "train", 0).uniform
    assert uniform.min() >= 0 and uniform.max() < 1
    assert (uniform.mean(0) - 0.5).abs().max() < 0.04 and (uniform.var(0) - 1 / 12).abs().max() < 0.01
    correlation = torch.corrcoef(uniform.T).fill_diagonal_(0)
    assert correlation.abs().max() < 0.13  # 33,000 pairs, standard error 0.022


def test_an_image_depends_on_seed_split_and_index_only():
    many = render(range(40), split="train")  # two chunks
    for indices in ([7], torch.tensor([35, 7, 7]), range(30, 33)):
        for together, alone in zip(many, render(indices, split="train"), strict=True):
            assert torch.equal(together[torch.as_tensor(list(indices))], alone)
    image = render([7], split="train")[0].float()
    for other in (render([7], split="test"), render([7], split="train", seed=1), render([32], split="train")):
        assert (image - other[0]).abs().mean() > 10


def test_no_flower_at_all():
    assert [tuple(part.shape) for part in render([], split="val", size=16)] == [
        (0, 3, 16, 16),
        (0, 16, 16),
        (0,),
    ]


def test_classes_are_balanced_and_differ():
    assert len(CLASSES) == len(set(CLASSES)) == 25
    labels = render(range(50), split="val", size=16)[2]
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [2] * len(CLASSES)


def test_masks_show_the_flower():
    images, masks, _ = render(range(100), split="train")
    assert images.dtype == masks.dtype == torch.uint8
    assert masks.unique().tolist() == [0, 1, 2]
    present = torch.stack([(masks == value).flatten(1).any(1) for value in range(3)], dim=1)
    assert present.all(1).double().mean() > 0.95
    assert 0.1 < (masks > 0).double().mean() < 0.5
    # What the mask calls petals is painted: it is lighter or darker than the background around it.
    grey = images.double().mean(1)
    mean = [(grey * (masks == value)).sum((1, 2)) / (masks == value).sum((1, 2)) for value in (0, 1)]
    contrast = (mean[1] - mean[0]).abs()
    assert contrast.quantile(0.1) > 20


def test_same_scene_at_every_size():
    small, small_masks, _ = render(range(50), split="test", size=64)
    large, large_masks, _ = render(range(50), split="test", size=128)
    quarters = F.one_hot(large_masks.long(), 3).permute(0, 3, 1, 2).float()
    shrunk = F.avg_pool2d(quarters, 2).argmax(1)
    assert (shrunk == small_masks).float().mean() > 0.97
    difference = F.avg_pool2d(large.float(), 2) - small
    assert difference.abs().mean() < 8  # of 255, noise included


def pixels(images):
    return images.flatten(1).float() / 255


def colours(images):
    return F.one_hot(images.long() // 64, 4).float().mean((2, 3)).flatten(1)


@pytest.mark.parametrize("features", [pixels, colours])
def test_looks_do_not_give_the_class_away(features):
    images, _, labels = render(range(1200), split="train", size=32)
    queries, query_labels = render(range(400), split="test", size=32)[::2]
    assert knn_accuracy(features(images), labels, features(queries), query_labels) < 0.12  # chance: 0.04


def test_cache_round_trip(tmp_path, monkeypatch):
    folder = tmp_path / "new" / "cache"
    drawn = petals("val", 30, seed=3, size=16, cache=folder)
    (file,) = folder.iterdir()
    assert file.name == f"petals-v{module.VERSION}-seed3-val-30x16.safetensors"

    calls = []

    def counted(indices, **key):
        calls.append(len(indices))
        return render(indices, **key)

    monkeypatch.setattr(module, "render", counted)
    for part, again, uncached in zip(
        drawn,
        petals("val", 30, seed=3, size=16, cache=folder),
        render(range(30), split="val", seed=3, size=16),
        strict=True,
    ):
        assert torch.equal(part, again) and torch.equal(part, uncached)
    assert calls == [1]  # only the last flower, to see that the file is current


@pytest.mark.parametrize("damage", ["torn", "empty", "garbage", "other shape", "no masks", "stale"])
def test_damaged_cache_is_drawn_anew(tmp_path, damage):
    drawn = petals("test", 30, size=16, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    images, masks, _ = drawn
    file.write_bytes(
        {
            "torn": whole[: len(whole) // 2],
            "empty": b"",
            "garbage": b"\x00" * 100,
            "other shape": module.save({"images": images[:, :, 1:].contiguous(), "masks": masks}),
            "no masks": module.save({"images": images}),
            "stale": module.save({"images": 255 - images, "masks": masks}),
        }[damage]
    )
    for part, again in zip(drawn, petals("test", 30, size=16, cache=tmp_path), strict=True):
        assert torch.equal(part, again)
    assert list(tmp_path.iterdir()) == [file] and file.read_bytes() == whole


def test_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="disk full"):
        petals("val", 2, size=16, cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written_costs_a_warning(tmp_path):
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="pass a writable folder"):
        images, _, _ = petals("val", 2, size=16, cache=tmp_path / "file" / "cache")
    assert torch.equal(images, petals("val", 2, size=16, cache=None)[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: render([0], split="valid"), "petals has no split 'valid'; choose one of train, val, test."),
        (lambda: petals("dev", 3, cache=None), "petals has no split 'dev'; choose one of train, val, test."),
        (lambda: petals("val", 0, cache=None), "a count of 1 or more, got 0."),
        (
            lambda: render([0], split="val", size=8),
            "8 pixels cannot be told apart; choose a size of 16 or more.",
        ),
        (lambda: render([3, -1], split="val"), "indices are a row of integers from 0 on"),
    ],
)
def test_mistakes_are_named_in_one_line(call, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call()
    assert "\n" not in str(error.value)
