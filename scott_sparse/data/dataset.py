"""A data set as a protocol sees it: which images pretraining, a probe, its choices and its report may use.

`clean`, the default: pretraining sees train, val and unlabelled images; a probe is fitted on train, every choice is
made on val, and test is read once. Where no val was published it is a tenth of each class of train, where no test was,
a tenth is set aside first; both are chosen by a hash of the file's path, the same on every machine.

`paper`, as in the runs of arXiv 2502.18056: pretraining sees all images, test included; a probe is fitted on train
(with a published val), and chosen on that val, or on test where none was published.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from scott_sparse.cli import ADVANCED, UserErrors
from scott_sparse.data.builtin import PUBLISHED, published_source
from scott_sparse.data.cache import decode_once
from scott_sparse.data.petals import CACHE, CLASSES, petals
from scott_sparse.data.sources import Source, folder_source
from scott_sparse.shapes import Int, Tensor, UInt8

PETALS_COUNT = {"train": 4000, "val": 1000, "test": 1000}
Splits = dict[str, Sequence[int]]


@dataclass(frozen=True)
class DataConfig:
    """Which images, and where they are kept. Every field is a flag."""

    data: str | None = None
    """'petals' (drawn, embedded), a folder of images, a published set by name, or hf:OWNER/NAME."""
    protocol: Literal["clean", "paper"] = "clean"
    """clean: pretraining never sees a test image. paper: it sees all, as the paper's own runs did."""
    data_root: Annotated[Path, ADVANCED] = Path("data")
    """Where published sets lie, or are downloaded to."""
    cache: Literal["disk", "none"] = "disk"
    """disk: decode once, into a file. none: decode in every epoch, for sets larger than the disk."""
    cache_dir: Annotated[Path, ADVANCED] = CACHE
    """Folder of the decoded images."""
    ram_gib: Annotated[float, ADVANCED] = 8.0
    """Decoded images of up to this size are read into memory at once, larger ones when they are used."""
    skip_unreadable: bool = False
    """Leave out the images that cannot be read; otherwise they are listed, and nothing is started."""


class UnreadableImages(UserErrors):
    """Some images cannot be read; the message lists them, one a line."""

    def __init__(self, unreadable: dict[str, str], total: int, shown: int = 100):
        lines = unreadable_lines(unreadable)
        more = [f"... and {len(lines) - shown:,} more"] if len(lines) > shown else []
        remedy = "repair or remove them, or leave them out with --skip-unreadable"
        found = f"{len(lines):,} of {total:,} images cannot be read; {remedy}:"
        super().__init__("\n".join([found, *lines[:shown], *more]))


def unreadable_lines(unreadable: dict[str, str]) -> list[str]:
    """One line of printable text for each; names may hold line ends, and bytes that are no text."""
    names = (os.fsencode(name).decode(errors="backslashreplace") for name in unreadable)
    names = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in names)
    return [f"{name}: {why}" for name, why in zip(names, unreadable.values())]


@dataclass(frozen=True)
class Images:
    """Images of any sizes, read one at a time, and their labels."""

    read: Callable[[int], np.ndarray]
    """The picture in a row of the store, (h, w, 3)."""
    rows: Int[Tensor, " n"]
    """Of each image, in the store."""
    sizes: Int[Tensor, "n 2"]
    """Height and width in pixels."""
    labels: Int[Tensor, " n"] | None
    names: Sequence[str]

    @classmethod
    def of(
        cls, images: Sequence[UInt8[Tensor, "_ _ 3"]] | UInt8[Tensor, "n _ _ 3"], labels: Tensor | None = None
    ) -> "Images":
        """Images in memory: a list, or the rows of one tensor."""
        sizes = torch.tensor([image.shape[:2] for image in images])
        names = [str(i) for i in range(len(images))]
        return cls(_InMemory(images), torch.arange(len(images)), sizes, labels, names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Int[Tensor, " m"]) -> "Images":
        labels = None if self.labels is None else self.labels[indices]
        names = [self.names[i] for i in indices.tolist()]
        return Images(self.read, self.rows[indices], self.sizes[indices], labels, names)

    def cut(self, indices: Int[Tensor, " B"], boxes: Int[Tensor, "B V 4"]) -> UInt8[Tensor, "B V H W 3"]:
        """V boxes of each image, (top, left, height, width) in pixels, padded below and right to the largest.

        Cut before they are batched: an image of 1 x 5000 pixels does not make the whole batch that wide.
        """
        H, W = boxes[..., 2:].amax((0, 1)).tolist()
        padded = torch.zeros(*boxes.shape[:2], H, W, 3, dtype=torch.uint8)
        for views, row, of_image in zip(padded.numpy(), self.rows[indices].tolist(), boxes.tolist()):
            image = self.read(row)
            for view, (top, left, height, width) in zip(views, of_image):
                view[:height, :width] = image[top : top + height, left : left + width]
        return padded


def save_digests(folder: Path, images: Images) -> None:
    """Stand-in until the data room's is merged: writes pretrain_images.safetensors."""


@dataclass(frozen=True)
class _InMemory:
    images: Sequence[Tensor] | Tensor

    def __call__(self, i: int) -> np.ndarray:
        return self.images[i].numpy()


@dataclass(frozen=True)
class Data:
    """The images of a source in the roles that a protocol gives them."""

    pretrain: Images
    train: Images
    """What a probe is fitted on: the bank of its neighbours."""
    val: Images | None
    """What every choice is made on, if there are labels."""
    test: Images | None
    """What the result is read from, once: test, if there is one or there are labels."""
    classes: tuple[str, ...] | None
    """Names by label; None without labels."""
    unreadable: dict[str, str]
    """Images left out, and why."""
    test_duplicates: int
    """Images of `test` that are in `pretrain` pixel for pixel, under another name."""
    fingerprint: str
    """A hash of what is in each role: pixels and labels."""


def short_side_for(sides: tuple[int, int]) -> int:
    """Shorter side to decode to for views of `sides` pixels: twice a small view, as crops enlarge; 256 for 224."""
    return max(min(2 * max(sides), 256), round(max(sides) * 256 / 224))


def open_data(config: DataConfig, *, short_side: int) -> Data:
    """Find the images, decode them or find them decoded, and give out the roles.

    Images with a shorter side above `short_side` pixels are shrunk to it.

    Raises:
        UnreadableImages: with the list of the images that cannot be read, unless `skip_unreadable`.
        ValueError: where there are no such images, or their decoded form cannot be kept.
    """
    if config.data is None:
        raise ValueError("no images are named: --data needs a folder of images, a published set or petals.")
    if config.data == "petals":
        return _petals(config, short_side)
    source = find_source(config.data, root=config.data_root)
    decoded = decode_once(
        source,
        title=config.data if not Path(config.data).is_dir() else str(Path(config.data).resolve()),
        short_side=short_side,
        keep_pixels=config.cache == "disk",
        folder=config.cache_dir,
        read_ahead=int(config.ram_gib * 2**30),
    )
    unreadable = {source.names[i]: reason for i, reason in decoded.unreadable.items()}
    if unreadable and (not config.skip_unreadable or len(unreadable) == len(source.names)):
        raise UnreadableImages(unreadable, len(source.names))
    labels = torch.tensor(source.labels) if source.labels else None
    images = Images(decoded.read, torch.arange(len(source.names)), decoded.sizes, labels, source.names)
    roles = select(config.protocol, source.splits, source.names, source.labels)
    roles = {role: [i for i in part if i not in decoded.unreadable] for role, part in roles.items()}
    return _data(images, roles, source.classes, decoded.digests, unreadable)


def find_source(data: str, *, root: Path) -> Source:
    """The source that a word for --data names. Raises ValueError where there is none, OSError where it is forbidden."""
    if data in PUBLISHED or data.startswith("hf:"):
        return published_source(data, root=root)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        names = ", ".join(("petals", *PUBLISHED))
        raise ValueError(f"--data {data}: no such folder; expected a folder of images, hf:OWNER/NAME, {names}.")
    return folder_source(folder)


def select(protocol: str, published: Splits, names: Sequence[str], labels: Sequence[int] | None) -> Splits:
    """The images of each role (`Data`'s pretrain, train, val, test; empty where there is none) under a protocol."""
    train, unlabelled = published["train"], published.get("unlabelled", ())
    val, test = published.get("val", ()), published.get("test", ())
    if labels and not test:
        train, test = _tenth(train, names, labels)
    if protocol == "paper":
        every = [*train, *val, *test, *unlabelled]
        return {"pretrain": every, "train": [*train, *val], "val": val or test, "test": test}
    if labels and not val:
        train, val = _tenth(train, names, labels)
    return {"pretrain": [*train, *val, *unlabelled], "train": train, "val": val, "test": test}


def _tenth(images: Iterable[int], names: Sequence[str], labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Split a tenth off each class, at least one image of two, by a hash of the names."""
    by_class = defaultdict(list)
    for i in images:
        by_class[labels[i]].append(i)
    rest, tenth = [], []
    for members in by_class.values():
        members.sort(key=lambda i: hashlib.sha256(os.fsencode(names[i])).digest())
        count = max(round(len(members) / 10), 1) if len(members) > 1 else 0
        tenth += members[:count]
        rest += members[count:]
    return sorted(rest), sorted(tenth)


def _petals(config: DataConfig, short_side: int) -> Data:
    splits, drawn, start = {}, [], 0
    for name, count in PETALS_COUNT.items():
        drawn.append(petals(name, count, size=max(64, short_side // 2), cache=config.cache_dir))
        splits[name] = range(start, start + count)
        start += count
    images = Images.of(
        torch.cat([images.permute(0, 2, 3, 1) for images, _, _ in drawn]), torch.cat([labels for *_, labels in drawn])
    )
    roles = select(config.protocol, splits, images.names, images.labels.tolist())
    return _data(images, roles, CLASSES, torch.arange(start), {})


def _data(images: Images, roles: Splits, classes, digests: Int[Tensor, " n"], unreadable: dict[str, str]) -> Data:
    parts = {role: images[torch.tensor(part)] if part else None for role, part in roles.items()}
    if not (parts["pretrain"] and parts["train"]):
        raise ValueError("no training image is left without the unreadable ones; repair some of them.")
    of = digests.tolist()
    seen = set(roles["pretrain"])
    contents = {of[i] for i in seen}
    test_duplicates = sum(i not in seen and of[i] in contents for i in roles["test"])
    fingerprint = hashlib.blake2b(digest_size=16)
    for role in ("pretrain", "train", "val", "test"):
        labels = images.labels.tolist() if classes else [None] * len(images)
        fingerprint.update(repr([(of[i], labels[i]) for i in roles[role]]).encode())
    return Data(
        **parts,
        classes=classes,
        unreadable=unreadable,
        test_duplicates=test_duplicates,
        fingerprint=fingerprint.hexdigest(),
    )
