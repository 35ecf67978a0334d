"""Data sets as they are opened: layouts, roles, what identifies images, and one clear line for each mistake."""

import json
import os
import pickle
from dataclasses import replace

import pytest
import torch
from conftest import write_photo
from PIL import Image

from scott_sparse.data import petals
from scott_sparse.data.dataset import DataConfig, UnreadableImages, open_data, open_some
from scott_sparse.data.decode import pixel_digest
from scott_sparse.data.images import Images
from scott_sparse.data.splits import load_digests, save_digests


def opened(root, tmp_path, *, short_side=32, **config):
    return open_data(DataConfig(data=str(root), cache_dir=tmp_path / "kept", **config), short_side=short_side)


def counts(data):
    return [len(part or ()) for part in (data.pretrain, data.train, data.val, data.test)]


FORMS = {
    # name: folders, then numbers of images to pretrain, train, validate and test on under clean and under paper
    "train, val, test": (
        {"train/a": 5, "train/b": 4, "val/a": 2, "val/b": 2, "test/a": 3, "test/b": 1},
        (13, 9, 4, 4),
        (17, 13, 4, 4),
    ),
    "train, test": ({"train/a": 20, "train/b": 10, "test/a": 3, "test/b": 1}, (30, 27, 3, 4), (34, 30, 4, 4)),
    "train, val": ({"train/a": 20, "train/b": 10, "val/a": 3, "val/b": 1}, (30, 27, 3, 4), (34, 30, 4, 4)),
    "class folders": ({"a": 20, "b": 10, "c": 3}, (27, 22, 5, 6), (33, 27, 6, 6)),
    "one class": ({"only": 7}, (7, 7, 0, 0), (7, 7, 0, 0)),
    "no labels": ({".": 9}, (9, 9, 0, 0), (9, 9, 0, 0)),
    "no labels, splits": ({"train": 4, "test": 2}, (4, 4, 0, 2), (6, 4, 2, 2)),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_and_protocols(form, photos, tmp_path):
    folders, clean, paper = FORMS[form]
    root = photos(folders)
    data = opened(root, tmp_path)
    assert tuple(counts(data)) == clean
    assert tuple(counts(opened(root, tmp_path, protocol="paper"))) == paper
    labelled = form not in ("one class", "no labels", "no labels, splits")
    assert (data.classes is not None) == labelled and (data.train.labels is not None) == labelled
    assert data.test_duplicates == 0 and data.unreadable == {}


def test_images_are_shrunk_to_the_short_side(tmp_path):
    write_photo(tmp_path / "x" / "0.png", 200, 100)
    write_photo(tmp_path / "x" / "1.png", 30, 40)
    data = opened(tmp_path / "x", tmp_path, short_side=50)
    assert data.pretrain.sizes.tolist() == [[100, 50], [30, 40]]


def test_crop_returns_the_boxes_padded():
    images = [torch.randint(0, 256, (h, w, 3)).byte() for h, w in ((4, 5), (7, 3), (1, 5000))]
    boxes = torch.tensor([[[0, 7, 1, 4], [0, 0, 1, 1]], [[2, 1, 5, 2], [0, 0, 7, 3]]])
    crops = Images.of(images).crop(torch.tensor([2, 1]), boxes)
    assert crops.shape == (2, 2, 7, 4, 3)  # as large as the largest box, not as the largest image
    for image_crops, image, image_boxes in zip(crops, (images[2], images[1]), boxes.tolist()):
        for crop, (top, left, height, width) in zip(image_crops, image_boxes):
            assert torch.equal(crop[:height, :width], image[top : top + height, left : left + width])
            assert not crop[height:].any() and not crop[:, width:].any()


def test_a_part_of_the_images_is_their_rows():
    images = Images.of([torch.full((2, i + 1, 3), i).byte() for i in range(5)], torch.arange(5))
    part = images[torch.tensor([4, 1])][torch.tensor([1, 0])]
    assert part.labels.tolist() == [1, 4] and part.names == ["1", "4"] and part.sizes.tolist() == [[2, 2], [2, 5]]
    assert (part.crop(torch.tensor([1]), torch.tensor([[[0, 0, 2, 5]]])) == 4).all()
    assert part.digests.tolist() == [pixel_digest(part.read(row)) for row in (1, 4)]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_decoded_in_advance_or_when_asked_for_is_the_same(cache, photos, tmp_path):
    data = opened(photos({"a": 12, "b": 12}), tmp_path, cache=cache)
    boxes = torch.tensor([[[0, 0, 20, 20]]]).expand(len(data.pretrain), 1, 4)
    pixels = data.pretrain.crop(torch.arange(len(data.pretrain)), boxes)
    other = opened(tmp_path / "photos", tmp_path)
    assert torch.equal(pixels, other.pretrain.crop(torch.arange(len(other.pretrain)), boxes))
    assert data.fingerprint == other.fingerprint


@pytest.fixture
def few_petals(monkeypatch):
    monkeypatch.setattr(petals, "SPLIT_SIZES", {"train": 50, "val": 25, "test": 30})


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_petals(cache, few_petals, tmp_path):
    data = open_data(DataConfig(data="petals", cache=cache, cache_dir=tmp_path), short_side=40)
    assert counts(data) == [75, 50, 25, 30] and data.classes == petals.CLASSES and data.test_duplicates == 0
    assert data.test.labels.tolist() == [i % 25 for i in range(30)]
    images, _, _ = petals.render(range(30), split="test", size=64)
    boxes = torch.tensor([0, 0, 64, 64]).expand(30, 1, 4)
    assert torch.equal(data.test.crop(torch.arange(30), boxes)[:, 0], images.permute(0, 2, 3, 1))
    assert data.test.digests.tolist() == [pixel_digest(image) for image in images.permute(0, 2, 3, 1).numpy()]


def test_some_petals_are_drawn_as_large_as_asked_for(tmp_path):
    """The same flowers as those of the whole set, evenly spaced over val; no file is written."""
    images, classes = open_some(DataConfig(data="petals", cache_dir=tmp_path / "unused"), 3, short_side=20)
    assert images.names == [f"v{petals.VERSION}/val/{i}" for i in (0, 499, 999)] and classes == petals.CLASSES
    assert images.labels.tolist() == [0, 24, 24] and images.sizes.tolist() == [[20, 20]] * 3
    drawn = petals.render([499], split="val", size=20)[0][0].permute(1, 2, 0)
    assert (images.read(1) == drawn.numpy()).all() and not (tmp_path / "unused").exists()


def test_pretrained_images_are_recognised_in_another_folder(photos, tmp_path):
    data = opened(photos({"train/a": 5, "train/b": 5, "test/a": 3, "test/b": 3}), tmp_path)
    assert load_digests(tmp_path) is None
    save_digests(tmp_path, data.pretrain.digests)
    (tmp_path / "photos").rename(tmp_path / "moved")
    again, known = opened(tmp_path / "moved", tmp_path), load_digests(tmp_path)
    assert torch.equal(known, data.pretrain.digests) and len(known.unique()) == 10
    assert torch.isin(again.train.digests, known).all() and not torch.isin(again.test.digests, known).any()


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize("name", ["photos", "petals"])
def test_images_can_be_sent_to_a_worker(name, cache, few_petals, photos, tmp_path):
    root = photos({"a": 12, "b": 12}) if name == "photos" else name
    images = opened(root, tmp_path, cache=cache).pretrain
    again, boxes = pickle.loads(pickle.dumps(images)), torch.tensor([[[0, 0, 20, 20]]])
    assert torch.equal(again.crop(torch.tensor([17]), boxes), images.crop(torch.tensor([17]), boxes))


def test_a_test_image_in_the_training_set_is_counted(photos, tmp_path):
    root = photos({"train/a": 5, "train/b": 5, "test/a": 3, "test/b": 3})
    (root / "train" / "b" / "copy.png").write_bytes((root / "test" / "a" / "1.png").read_bytes())
    assert opened(root, tmp_path).test_duplicates == 1
    assert opened(root, tmp_path, protocol="paper").test_duplicates == 0  # there it is seen by intent


def test_the_fingerprint_follows_pixels_and_labels_not_places(photos, tmp_path):
    root = photos({"a": 12, "b": 12})
    first = opened(root, tmp_path).fingerprint
    moved = root.rename(tmp_path / "moved")
    assert opened(moved, tmp_path).fingerprint == first
    write_photo(moved / "b" / "0.png", 50, 50, seed=99)
    assert opened(moved, tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: root / "nowhere", "no such folder; expected a folder of images, hf:OWNER/NAME, petals, elpv"),
        (lambda root: root, "no image in"),
        (lambda root: (root / "notes.txt").write_text("x") and root, "no image in"),
        (lambda root: (root / "train").mkdir() or root, r"no image in .*train"),
    ],
)
def test_folders_without_images(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        opened(make(tmp_path), tmp_path)


def test_no_images_named():
    with pytest.raises(ValueError, match="--data needs a folder"):
        open_data(DataConfig(), short_side=32)


@pytest.fixture
def spoilt(photos):
    """Eight good images; a torn, an empty, a dangling, a textual one and a pipe."""
    root = photos({"a": 4, "b": 4})
    Image.new("RGB", (64, 64), "red").save(root / "a" / "torn.jpg")
    (root / "a" / "torn.jpg").write_bytes((root / "a" / "torn.jpg").read_bytes()[:300])
    (root / "a" / "empty.png").touch()
    (root / "b" / "dangling.png").symlink_to(root / "gone.png")
    (root / "b" / "text.jpg").write_text("not an image")
    os.mkfifo(root / "b" / "pipe.jpg")
    return root


BAD = {"a/torn.jpg", "a/empty.png", "b/dangling.png", "b/text.jpg", "b/pipe.jpg"}


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_unreadable_images_stop_with_the_list(cache, spoilt, tmp_path):
    for _ in range(2):  # from the files, then from the cache
        with pytest.raises(UnreadableImages) as error:
            opened(spoilt, tmp_path, cache=cache)
        first, *rest = str(error.value).splitlines()
        assert first.startswith("5 of 13 images cannot be read") and "--skip-unreadable" in first
        assert {line.split(": ")[0] for line in rest} == BAD and all(line.split(": ")[1] for line in rest)


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_unreadable_images_are_left_out_when_asked_to(cache, spoilt, tmp_path):
    data = opened(spoilt, tmp_path, cache=cache, skip_unreadable=True)
    assert set(data.unreadable) == BAD
    seen = {*data.pretrain.names, *data.test.names}
    assert seen == {f"{name}/{i}.png" for name in "ab" for i in range(4)}
    assert data.pretrain.sizes.min() > 0


def test_some_images_of_which_two_cannot_be_read(spoilt):
    config = DataConfig(data=str(spoilt / "a"))
    with pytest.raises(UnreadableImages, match="2 of 6 images cannot be read"):
        open_some(config, 6, short_side=20)
    images, classes = open_some(replace(config, skip_unreadable=True), 6, short_side=20)
    assert images.names == [f"{i}.png" for i in range(4)] and classes is None and len(images.sizes) == 4


def test_nothing_readable_stops_in_any_case(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "0.jpg").touch()
    with pytest.raises(UnreadableImages, match="1 of 1 images"):
        opened(tmp_path / "x", tmp_path, skip_unreadable=True)


def test_a_long_list_is_cut(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(150):
        (tmp_path / "x" / f"{i}.jpg").touch()
    with pytest.raises(UnreadableImages) as error:
        opened(tmp_path / "x", tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 102 and lines[-1] == "... and 50 more"


def test_names_in_any_script(tmp_path):
    root = tmp_path / "x"
    names = ["花/été.png", "花/كلب.png", "ζώα/🐈.png", "ζώα/with\nnewline.png", "ζώα/'quotes' & co.png"]
    for name in names:
        write_photo(root / name, 20, 20)
    torn = os.fsencode(root / "ζώα") + b"/not-utf8-\xff.png"
    with open(torn, "wb"):
        pass
    with pytest.raises(UnreadableImages) as error:
        opened(root, tmp_path)
    assert r"ζώα/not-utf8-\xff.png" in str(error.value) and str(error.value).encode()
    data = opened(root, tmp_path, skip_unreadable=True)
    assert {*data.pretrain.names, *data.test.names} == set(names) and json.dumps(list(data.unreadable))
