"""A batch is a function of (seed, step), whatever the number of processes and workers."""

import dataclasses
import os

import pytest
import torch

from scott_sparse.data import batches
from scott_sparse.data.batches import Batches, load
from scott_sparse.data.dataset import DataConfig, open_data
from scott_sparse.data.images import Images
from scott_sparse.data.views import ViewConfig, make_views
from scott_sparse.randomness import batch_indices, generator_at


def make(images, **changes):
    settings = {"grid": (4, 4), "hide_ratio": 0.5, "mask_shape": "block", "batch_size": 8, "seed": 3}
    return Batches(images, ViewConfig(crops=2), **{**settings, **changes})


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    sides = torch.randint(20, 60, (30, 2), generator=generator).tolist()
    return Images.of([torch.randint(0, 256, (h, w, 3), generator=generator).byte() for h, w in sides])


def rows(parts):
    """Each image's crops without padding, masks and views: they do not depend on the rest of the batch."""
    for part in parts:
        for i, boxes in enumerate(part.views.boxes):
            crops = [crop[:h, :w] for crop, (_, _, h, w) in zip(part.crops[i], boxes.tolist())]
            yield [*crops, part.visible[i], part.views.flip[i], part.views.ops[i], part.views.amounts[i]]


def same(first, second):
    first, second = list(first), list(second)
    assert len(first) == len(second) == 8
    for one, other in zip(first, second):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("processes", "accumulate"), [(2, 1), (1, 4), (2, 2), (4, 2)])
def test_any_number_of_processes_gets_the_same_global_batch(processes, accumulate, images):
    for step in (0, 5):
        whole = make(images)[step]
        shares = [make(images, processes=processes, process=p, accumulate=accumulate)[step] for p in range(processes)]
        assert all(len(share) == accumulate for share in shares)
        same(rows(whole), rows(part for parts in zip(*shares) for part in parts))


@pytest.mark.parametrize("workers", [1, 2])
def test_any_number_of_workers_gives_the_same_batches_in_order(workers, photos, tmp_path):
    for cache in ("disk", "none"):
        root = photos({"a": 10, "b": 10})
        config = DataConfig(data=str(root), cache_dir=tmp_path / "kept", cache=cache)
        batches = make(open_data(config, short_side=40).pretrain)
        before = torch.get_rng_state()
        loaded = list(load(batches, range(3, 9), workers=workers, pin=False))
        assert len(loaded) == 6 and torch.equal(torch.get_rng_state(), before)
        for step, parts in zip(range(3, 9), loaded):
            same(rows(parts), rows(batches[step]))


def test_seed_and_step_change_everything(images):
    first = make(images)[0][0]
    for other in (make(images)[1][0], make(images, seed=4)[0][0]):
        assert not torch.equal(first.visible, other.visible)
        assert not torch.equal(first.views.boxes, other.views.boxes)


def test_a_batch_makes_views_of_the_right_images(images):
    batches = make(images)
    (part,) = batches[2]
    indices = batch_indices(2, images=30, batch=8, seed=3)
    context, target = make_views(part.crops, part.views, size=(16, 16))
    assert context.shape == (8, 2, 3, 16, 16) and target.shape == (8, 3, 16, 16)
    top, left, height, width = part.views.boxes[5, 1].tolist()
    box = images.read(int(indices[5]))[top : top + height, left : left + width]
    assert torch.equal(part.crops[5, 1, :height, :width], torch.tensor(box))


def test_a_very_long_image_does_not_widen_the_batch(images):
    long = Images.of([torch.zeros(1, 5000, 3).byte(), *(torch.zeros(40, 40, 3).byte() for _ in range(29))])
    (part,) = make(long, batch_size=30)[0]
    assert part.crops.shape[2] <= 40 and part.crops.shape[3] <= 40


def test_a_failing_worker_says_what_it_could_not_read(photos, tmp_path):
    root = photos({"a": 10, "b": 10})
    config = DataConfig(data=str(root), cache_dir=tmp_path, cache="none")
    batches = make(open_data(config, short_side=40).pretrain)
    for file in (root / "a").iterdir():
        file.unlink()
    loader = load(batches, range(4), workers=2, pin=False)
    with pytest.raises(ValueError, match=r"a/\d\.png could be read when the run began, and now: "):
        list(loader)


def test_an_epoch_sees_every_image_once_and_is_a_function_of_seed_and_step():
    steps = [batch_indices(step, images=10, batch=3, seed=1) for step in range(6)]
    for epoch in (steps[:3], steps[3:]):
        assert len(set(torch.cat(epoch).tolist())) == 9  # drop_last
    assert not torch.equal(torch.cat(steps[:3]), torch.cat(steps[3:]))
    assert torch.equal(steps[4], batch_indices(4, images=10, batch=3, seed=1))
    assert not torch.equal(steps[0], batch_indices(0, images=10, batch=3, seed=2))


def test_streams_are_unrelated():
    draws = {
        tuple(torch.rand(3, generator=generator_at(*key)).tolist())
        for key in ((0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1))
    }
    assert len(draws) == 4


def test_pinning_keeps_what_the_cpu_reads(images):
    (part,) = make(images)[0]
    assert {field.name for field in dataclasses.fields(part)} == {"crops", "views", "visible"}


@pytest.mark.parametrize("processes", [1, 2])
def test_short_shared_memory_takes_workers_away(processes, monkeypatch, capsys):
    """A container's default of 64 MiB: fewer workers or none and one line, instead of a run that hangs."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    item = torch.zeros(5 * 2**20, dtype=torch.uint8)  # with two ahead and a margin a worker needs 15 MiB

    class Items(torch.utils.data.Dataset):
        def __getitem__(self, step):
            return item

    items = Items()
    for free, fitting in ((None, 6), (2**30, 6), (64 * 2**20, 4 // processes), (10 * 2**20, 0)):
        monkeypatch.setattr(batches, "free_shared_bytes", lambda free=free: free)
        assert batches.workers_that_fit(items, range(8), 6) == fitting
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == (fitting < 6)
        assert fitting == 6 or (f"note: {fitting} instead of 6 workers" in lines[0] and "--shm-size" in lines[0])
    assert torch.equal(next(batches.load(items, range(8), workers=2, pin=False)), item)
    assert batches.workers_that_fit(items, range(8), 0) == 0 and batches.workers_that_fit(items, range(0), 6) == 6
    assert capsys.readouterr().err.count("note: 0 instead of 2 workers") == 1


def test_free_shared_memory_is_that_of_the_machine():
    free = batches.free_shared_bytes()
    assert (free is None) == (not os.path.isdir("/dev/shm")) and (free is None or free >= 0)
