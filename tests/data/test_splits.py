"""Protocols: pretraining and choices stay away from test images, and held-out tenths are the same everywhere."""

import itertools

import numpy as np
import pytest
import torch
from safetensors.torch import save

from scott_sparse.data.splits import load_digests, select_roles

PUBLISHED = [("train",), ("train", "test"), ("train", "val", "test"), ("train", "unlabelled")]


@pytest.mark.parametrize("published", PUBLISHED)
def test_protocols_keep_splits_apart(published):
    """Clean: only results use test images, and settings are chosen on images that no probe was trained on."""
    labels = [i % 7 for i in range(700)]
    names = [f"{i}.jpg" for i in range(700)]
    bounds = [700 * i // len(published) for i in range(len(published) + 1)]
    splits = {name: range(*pair) for name, pair in zip(published, itertools.pairwise(bounds))}
    clean = {role: set(part) for role, part in select_roles("clean", splits, names, labels).items()}
    assert not clean["test"] & (clean["pretrain"] | clean["train"] | clean["val"])
    assert not clean["train"] & clean["val"] and clean["train"] | clean["val"] <= clean["pretrain"]
    assert clean["pretrain"] | clean["test"] == set(range(700))
    paper = {role: set(part) for role, part in select_roles("paper", splits, names, labels).items()}
    assert paper["pretrain"] == set(range(700)) and not paper["train"] & paper["test"]
    assert paper["val"] == (set(splits["val"]) if "val" in splits else paper["test"])
    assert paper["val"] <= paper["train"] or "val" not in splits


def names_of(roles, names, role):
    return {names[i] for i in roles[role]}


def test_a_tenth_depends_on_names_alone():
    names, labels = [f"c{i % 3}/{i}.jpg" for i in range(3000)], [i % 3 for i in range(3000)]
    first = select_roles("clean", {"train": range(3000)}, names, labels)
    for role in ("test", "val"):
        assert all(70 < count < 130 for count in np.bincount([labels[i] for i in first[role]]))
    order = torch.randperm(3000).tolist()
    again = select_roles("clean", {"train": range(3000)}, [names[i] for i in order], [labels[i] for i in order])
    for role in ("train", "val", "test"):
        assert names_of(first, names, role) == {names[order[i]] for i in again[role]}
    # Pinned: the same images on every machine, for ever.
    assert sorted(names[i] for i in first["test"] if labels[i] == 0)[:3] == PINNED


PINNED = ["c0/1026.jpg", "c0/1140.jpg", "c0/1143.jpg"]


@pytest.mark.parametrize("size", [2, 3, 5, 10, 20, 49, 50, 200])
def test_every_class_of_two_has_a_test_image_and_one_to_train_on(size):
    names = [f"class {c}/{i}.jpg" for c in range(100) for i in range(size)]
    labels = [c for c in range(100) for _ in range(size)]
    roles = select_roles("clean", {"train": range(len(names))}, names, labels)
    for role in ("train", "test", *["val"] * (size > 5)):
        assert np.bincount([labels[i] for i in roles[role]], minlength=100).min() >= 1, role
    # A tenth, and in classes of fewer than 50 images one more.
    assert len(roles["test"]) / 100 == pytest.approx(size / 10 + 0.9 * (size < 50), abs=0.15 + size / 100)


def test_one_image_in_a_class_is_trained_on():
    names = [f"{i}/0.jpg" for i in range(100)]
    roles = select_roles("clean", {"train": range(100)}, names, list(range(100)))
    assert roles["train"] == list(range(100)) and not roles["test"] and not roles["val"]


@pytest.mark.parametrize("before", [3, 20, 60, 300])
@pytest.mark.parametrize("numbered", [True, False])
def test_images_that_are_added_leave_the_tenth_as_it_was(numbered, before):
    """No image that was pretrained on becomes a test image; nor the other way, where new names come after old ones."""
    after = before + before // 2
    random = torch.randperm(100 * after).tolist()
    names = [f"{c}/{i if numbered else f'{random[c * after + i]:06}'}.jpg" for c in range(100) for i in range(after)]
    labels = [c for c in range(100) for _ in range(after)]
    old = [c * after + i for c in range(100) for i in range(before)]
    first = select_roles("clean", {"train": old}, names, labels)
    again = select_roles("clean", {"train": range(len(names))}, names, labels)
    leaked = set(first["pretrain"]) & set(again["test"])
    assert len(leaked) <= 2 * (before == 3)  # where a class of three would else have had nothing to train on
    dropped = set(first["test"]) & set(again["pretrain"])
    crosses_50 = before < 50 <= after
    assert numbered <= (not dropped or crosses_50) and len(dropped) < 60


def test_images_without_a_label_only_pretrain():
    labels = [i % 3 - 1 for i in range(90)]
    names = [f"{i}.jpg" for i in range(90)]
    splits = {"train": range(50), "val": range(50, 60), "test": range(60, 80), "unlabelled": range(80, 90)}
    for published in (splits, {"train": range(90)}, {**splits, "test": [i for i in range(60, 80) if labels[i] < 0]}):
        for protocol in ("clean", "paper"):
            roles = select_roles(protocol, published, names, labels)
            assert all(labels[i] >= 0 for role in ("train", "val", "test") for i in roles[role])
            assert roles["test"] and roles["val"]
            unseen = {*roles["test"], *published.get("test", ())} if protocol == "clean" else set()
            assert set(roles["pretrain"]) == {i for part in published.values() for i in part} - unseen


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, save({"digests": torch.zeros(3)}), save({})])
def test_damaged_digests_are_refused(content, tmp_path):
    (tmp_path / "pretrain_images.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the digests of images"):
        load_digests(tmp_path)
