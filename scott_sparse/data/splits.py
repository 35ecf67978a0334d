"""Which images pretraining and probes may use, under one of two protocols, and which a run was pretrained on.

clean (default): pretraining uses train, val and unlabelled images; a probe is trained on train, its settings are chosen
on val, and test is used once. Without a published val, a tenth of each class of train becomes val; without a published
test, a tenth of each class is set aside before that (`_hold_out_tenth`).

paper, as in the runs of arXiv 2502.18056: pretraining uses all images, test included; a probe is trained on train and a
published val, and its settings are chosen on that val, or on test if no val was published.

Probes use images with a label only. The others are pretrained on, except, under clean, those of a published test.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from scott_sparse.files import write_atomically
from scott_sparse.shapes import Int, Tensor

PRETRAIN_IMAGES = "pretrain_images.safetensors"  # in a run folder
FIRST_IS_TEST_BELOW = 50  # images of a class
Protocol = Literal["clean", "paper"]
Splits = Mapping[str, Sequence[int]]


def select_roles(protocol: Protocol, published: Splits, names: Sequence[str], labels: Sequence[int] | None) -> Splits:
    """Image numbers by role (empty if there is none) from the published splits.

    Roles are pretrain, train, val, test, and unlabelled_test: images of a published test with label -1. An image with
    label -1 is in no probe, so not in train, val or test. Without labels (None) these three are as published.
    """
    every = [i for split in ("train", "val", "test", "unlabelled") for i in published.get(split, ())]
    train, val, test = (
        [i for i in published.get(split, ()) if labels is None or labels[i] >= 0] for split in ("train", "val", "test")
    )
    unlabelled_test = [i for i in published.get("test", ()) if labels is not None and labels[i] < 0]
    if labels and not test:
        train, test = _hold_out_tenth("test", train, names, labels)
    if protocol == "paper":
        roles = {"pretrain": every, "train": [*train, *val], "val": val or test}
    else:
        if labels and not val:
            train, val = _hold_out_tenth("val", train, names, labels)
        unseen = {*test, *unlabelled_test}
        roles = {"pretrain": [i for i in every if i not in unseen], "train": train, "val": val}
    return {**roles, "test": test, "unlabelled_test": unlabelled_test}


def _hold_out_tenth(
    role: str, images: Iterable[int], names: Sequence[str], labels: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(rest, tenth) of the images: in the tenth is each image whose own hash, of role and name, is below a tenth.

    So that small classes have images in both parts, the first name of a class (of two, the shorter is first) is in the
    tenth of test if the class has 2 to 49 images, and in any tenth without another; an image that would leave nothing
    in the rest stays there.

    Stability: when images are added to a class of two or more, no image of the rest moves to the tenth of test (but one
    that was all the rest), so that what was pretrained on does not become a test image. An image of that tenth moves to
    the rest only if it was there as the first name, and an added name comes before it or the class grows to 50 images.
    """

    def hash_of(i: int) -> int:
        return int.from_bytes(hashlib.sha256(f"{role}\0".encode() + os.fsencode(names[i])).digest()[:8])

    by_class: dict[int, list[int]] = defaultdict(list)
    for i in images:
        by_class[labels[i]].append(i)
    rest, tenth = [], []
    for members in by_class.values():
        members.sort(key=lambda i: (len(names[i]), names[i]))
        chosen = {i for i in members if hash_of(i) < 2**64 // 10}
        if not chosen or (role == "test" and len(members) < FIRST_IS_TEST_BELOW):
            chosen.add(members[0])
        if len(chosen) == len(members):
            chosen.remove(members[-1])
        tenth += sorted(chosen)
        rest += [i for i in members if i not in chosen]
    return sorted(rest), sorted(tenth)


def save_digests(folder: Path, digests: Int[Tensor, " n"]) -> None:
    """Record in a run folder which images it was pretrained on, by their `Images.digests`."""
    write_atomically(folder / PRETRAIN_IMAGES, save({"digests": digests}))


def load_digests(folder: Path) -> Int[Tensor, " n"] | None:
    """Digests of the images that a run was pretrained on; None if its folder does not record them.

    Raises ValueError if the file is not one that `save_digests` wrote.
    """
    path = folder / PRETRAIN_IMAGES
    if not path.is_file():
        return None
    try:
        digests = load_file(path)["digests"]
    except (SafetensorError, KeyError):
        digests = torch.empty(0)
    if digests.dtype != torch.int64 or digests.ndim != 1:
        raise ValueError(f"{path} does not hold the digests of images, one int64 for each; remove it.")
    return digests
