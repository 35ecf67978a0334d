"""Folders in their three forms, honest splits, and one clear line for each mistake."""

import pytest
import torch
from PIL import Image

from scott_sparse.data import Images, open_data
from scott_sparse.petals import CLASSES
from scott_sparse.randomness import batch_indices, generator_at


def test_splits_with_class_folders(photos):
    root = photos({"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 1})
    data = open_data(str(root), short_side=32)
    assert data.classes == ("a", "b")
    assert len(data.train) == 13 and len(data.held_out) == 4  # pretraining may see val when there is a test
    assert data.held_out.labels.tolist() == [0, 0, 0, 1]


def test_val_is_held_out_when_there_is_no_test(photos):
    data = open_data(str(photos({"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 2})), short_side=32)
    assert len(data.train) == 9 and len(data.held_out) == 4


def test_class_folders_hold_out_a_tenth_of_each_class(photos):
    root = photos({"a": 20, "b": 10, "c": 3})
    data = open_data(str(root), short_side=32)
    assert data.held_out.labels.bincount().tolist() == [2, 1, 1]
    assert data.train.labels.bincount().tolist() == [18, 9, 2]
    again = open_data(str(root), short_side=32)
    assert torch.equal(again.held_out.pixels, data.held_out.pixels)
    rows = {bytes(data.train.batch(torch.tensor([i]))[0].numpy()) for i in range(len(data.train))}
    held = {bytes(data.held_out.batch(torch.tensor([i]))[0].numpy()) for i in range(len(data.held_out))}
    assert not rows & held


def test_any_folder_recursively_without_labels(photos):
    data = open_data(str(photos({".": 2, "2023": 3, "2024/sommer/köln": 4})), short_side=32)
    assert len(data.train) == 9 and data.classes is None and data.held_out is None and data.train.labels is None


def test_unlabelled_splits(photos):
    data = open_data(str(photos({"train": 4, "test": 2})), short_side=32)
    assert len(data.train) == 4 and len(data.held_out) == 2 and data.classes is None


def test_images_are_decoded_upright_rgb_and_shrunk(tmp_path):
    (tmp_path / "x").mkdir()
    wide = Image.new("RGB", (200, 100), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    wide.save(tmp_path / "x" / "0.jpg", exif=exif)
    Image.new("L", (30, 40), 128).save(tmp_path / "x" / "1.png")
    data = open_data(str(tmp_path), short_side=50)
    assert data.train.sizes.tolist() == [[100, 50], [40, 30]]
    pixels, sizes = data.train.batch(torch.tensor([1, 0]))
    assert pixels.shape == (2, 3, 100, 50) and sizes.tolist() == [[40, 30], [100, 50]]
    assert (pixels[0, :, :40, :30] == 128).all() and not pixels[0, :, 40:].any()
    assert pixels[1, 0].min() > 240 and pixels[1, 1].max() < 15


def test_batch_returns_what_went_in():
    images = [torch.randint(0, 256, (3, h, w)).byte() for h, w in ((4, 5), (7, 3), (1, 1))]
    pixels, sizes = Images.of(images).batch(torch.tensor([2, 1, 0]))
    for row, (h, w), image in zip(pixels, sizes.tolist(), reversed(images)):
        assert torch.equal(row[:, :h, :w], image)


def test_petals():
    data = open_data("petals", short_side=96)
    assert len(data.train) == 4000 and len(data.held_out) == 1000 and data.classes == CLASSES


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "no such folder"),
        (lambda root: root, "no image in"),
        (lambda root: (root / "notes.txt").write_text("x") and root, "no image in"),
    ],
)
def test_folders_without_images(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        open_data(str(make(tmp_path)), short_side=32)


def test_an_empty_class_folder_is_named(photos):
    root = photos({"a": 3, "b": 3})
    (root / "c").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*c holds no image"):
        open_data(str(root), short_side=32)


def test_an_unreadable_image_is_named(photos):
    root = photos({"a": 3, "b": 3})
    (root / "a" / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0 torn")
    with pytest.raises(ValueError, match=r"unreadable image .*torn\.jpg"):
        open_data(str(root), short_side=32)
