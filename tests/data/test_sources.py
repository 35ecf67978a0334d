"""Folders as they are found: layouts, links, class folders without images, folders that may not be read."""

import os
import pickle

import pytest

from scott_sparse.data.sources import folder_source


def test_pictures_labels_and_splits(photos):
    root = photos({"train/b": 2, "train/a": 1, "val/a": 1})
    source = folder_source(root)
    assert source.names == ["train/a/0.png", "train/b/0.png", "train/b/1.png", "val/a/0.png"]
    assert [source.picture(i) for i in range(4)] == source.files == [root / name for name in source.names]
    assert source.labels == [0, 1, 1, 0] and source.classes == ("a", "b")
    assert source.splits == {"train": range(3), "test": range(3, 4)}  # an only val is what results are reported on
    assert pickle.loads(pickle.dumps(source)).picture(3) == source.picture(3)


def test_an_empty_class_folder_is_named(photos):
    root = photos({"a": 3, "b": 3})
    (root / "c").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*c holds no image"):
        folder_source(root)


def test_links_are_followed_but_not_in_circles(photos):
    root = photos({"a": 3, "b": 3})
    elsewhere = photos({"more": 2}, name="elsewhere")
    (root / "linked").symlink_to(elsewhere, target_is_directory=True)
    (elsewhere / "back").symlink_to(root, target_is_directory=True)
    (root / "self").symlink_to(root / "self")
    names = [f"{name}/{i}.png" for name in "ab" for i in range(3)] + [f"linked/more/{i}.png" for i in range(2)]
    assert folder_source(root).names == names


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_forbidden_folder_is_not_passed_over(photos):
    root = photos({"a": 3, "b": 3})
    (root / "b").chmod(0)
    with pytest.raises(PermissionError):
        folder_source(root)
