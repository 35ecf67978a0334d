"""Which images pretraining and probes may use, under one of two protocols, and which a run was pretrained on.

clean (default): pretraining uses train, val and unlabelled images; a probe is trained on train, its settings are chosen
on val, and test is used once. Without a published val, a tenth of each class of train becomes val; without a published
test, a tenth of each class is set aside before that. Both tenths are chosen by a hash of the file's path, so that they
are the same on every machine.

paper, as in the runs of arXiv 2502.18056: pretraining uses all images, test included; a probe is trained on train and a
published val, and its settings are chosen on that val, or on test if no val was published.
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

from scott_sparse.data.images import Images
from scott_sparse.files import write_atomically
from scott_sparse.shapes import Int, Tensor

PRETRAIN_IMAGES = "pretrain_images.safetensors"  # in a run folder
Protocol = Literal["clean", "paper"]
Splits = Mapping[str, Sequence[int]]


def select_roles(protocol: Protocol, published: Splits, names: Sequence[str], labels: Sequence[int] | None) -> Splits:
    """Image numbers of the roles pretrain, train, val and test (empty if there is none) from the published splits."""
    train, unlabelled = published["train"], published.get("unlabelled", ())
    val, test = published.get("val", ()), published.get("test", ())
    if labels and not test:
        train, test = _hold_out_tenth(train, names, labels)
    if protocol == "paper":
        every = [*train, *val, *test, *unlabelled]
        return {"pretrain": every, "train": [*train, *val], "val": val or test, "test": test}
    if labels and not val:
        train, val = _hold_out_tenth(train, names, labels)
    return {"pretrain": [*train, *val, *unlabelled], "train": train, "val": val, "test": test}


def _hold_out_tenth(images: Iterable[int], names: Sequence[str], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """(rest, tenth) of the images: a tenth of each class, at least one image if the class has two, by a name's hash."""
    by_class: dict[int, list[int]] = defaultdict(list)
    for i in images:
        by_class[labels[i]].append(i)
    rest, tenth = [], []
    for members in by_class.values():
        members.sort(key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
        count = max(round(len(members) / 10), 1) if len(members) > 1 else 0
        tenth += members[:count]
        rest += members[count:]
    return sorted(rest), sorted(tenth)


def save_digests(folder: Path, images: Images) -> None:
    """Record in a run folder which images it was pretrained on, as their `digests`."""
    write_atomically(folder / PRETRAIN_IMAGES, save({"digests": images.digests}))


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
