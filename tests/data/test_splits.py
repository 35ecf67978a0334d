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


def test_a_tenth_is_stratified_and_depends_on_names_alone():
    names, labels = [f"c{i % 3}/{i}.jpg" for i in range(300)], [i % 3 for i in range(300)]
    first = select_roles("clean", {"train": range(300)}, names, labels)
    assert np.bincount([labels[i] for i in first["test"]]).tolist() == [10, 10, 10]
    assert np.bincount([labels[i] for i in first["val"]]).tolist() == [9, 9, 9]
    order = torch.randperm(300).tolist()
    again = select_roles("clean", {"train": range(300)}, [names[i] for i in order], [labels[i] for i in order])
    for role in ("train", "val", "test"):
        assert {names[i] for i in first[role]} == {names[order[i]] for i in again[role]}
    # Pinned: the same images on every machine, for ever.
    assert sorted(names[i] for i in first["test"] if labels[i] == 0)[:3] == PINNED


PINNED = ["c0/117.jpg", "c0/156.jpg", "c0/18.jpg"]


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, save({"digests": torch.zeros(3)}), save({})])
def test_damaged_digests_are_refused(content, tmp_path):
    (tmp_path / "pretrain_images.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="does not hold the digests of images"):
        load_digests(tmp_path)
