"""Drawn flowers: random numbers against an oracle, classes that only their geometry tells, and the data set."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from scott_sparse.data import petals as module
from scott_sparse.data.decode import pixel_digest
from scott_sparse.data.petals import CLASSES, SPLITS, petals_source, render


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
    small, small_masks, _ = render(range(30), split="test", size=64)
    large, large_masks, _ = render(range(30), split="test", size=128)
    quarters = F.one_hot(large_masks.long(), 3).permute(0, 3, 1, 2).float()
    shrunk = F.avg_pool2d(quarters, 2).argmax(1)
    assert (shrunk == small_masks).float().mean() > 0.97
    difference = F.avg_pool2d(large.float(), 2) - small
    assert difference.abs().mean() < 8  # of 255, noise included


@pytest.fixture(scope="module")
def flowers():
    """Images and labels to classify by, and to classify."""
    return render(range(1200), split="train", size=32)[::2], render(range(400), split="test", size=32)[::2]


def pixels(images):
    return images.flatten(1).float() / 255


def colours(images):
    return F.one_hot(images.long() // 64, 4).float().mean((2, 3)).flatten(1)


@pytest.mark.parametrize("features", [pixels, colours])
def test_looks_do_not_give_the_class_away(features, flowers):
    (images, labels), (queries, query_labels) = flowers
    assert knn_accuracy(features(images), labels, features(queries), query_labels) < 0.12  # chance: 0.04


def test_a_changed_pixel_needs_a_new_version():
    """Cached flowers are drawn again only if VERSION is raised: do that wherever these digests change."""
    drawn = {split: render([3], split=split, size=32)[0].numpy() for split in SPLITS}
    digests = {split: pixel_digest(image) % 2**32 for split, image in drawn.items()}
    assert (module.VERSION, digests) == (1, GOLDEN)


GOLDEN = {"train": 2130203591, "val": 2753592699, "test": 3100517187}


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(module, "SPLIT_SIZES", {"train": 40, "val": 3, "test": 35})


def test_the_data_set(few):
    source = petals_source(16)
    assert {split: len(part) for split, part in source.splits.items()} == module.SPLIT_SIZES
    assert len(source.names) == len(set(source.names)) == len(source.labels) == 78 and source.classes == CLASSES
    for split, numbers in source.splits.items():
        images, _, labels = render(range(len(numbers)), split=split, size=16)
        assert [source.labels[i] for i in numbers] == labels.tolist()
        for i, image in zip(numbers, images):
            assert np.array_equal(source.picture(i), image.permute(1, 2, 0))


def test_each_flower_is_drawn_once_by_any_number_of_threads(few, monkeypatch):
    drawn = []
    monkeypatch.setattr(module, "render", lambda indices, **of: drawn.extend(indices) or render(indices, **of))
    module._chunk.cache_clear()
    source = petals_source(17)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(source.picture, source.splits["train"]))
    assert sorted(drawn) == list(range(2 * module.CHUNK))


def test_flowers_can_be_sent_to_a_worker(few):
    source = petals_source(16)
    again = pickle.loads(pickle.dumps(source))
    assert again.names == source.names and np.array_equal(again.picture(45), source.picture(45))
