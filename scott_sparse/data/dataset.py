"""Images of a data set, decoded, in the roles that a protocol gives them (see `splits`)."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from scott_sparse.cli import UserErrors
from scott_sparse.data.builtin import PUBLISHED, published_source
from scott_sparse.data.cache import CACHE_DIR, decode_once
from scott_sparse.data.hub import hub_source
from scott_sparse.data.images import Images
from scott_sparse.data.petals import petals_source
from scott_sparse.data.readers import Selection
from scott_sparse.data.sources import Source, folder_source
from scott_sparse.data.splits import Splits, select_roles


@dataclass(frozen=True)
class DataConfig:
    """Which images to use, and where decoded images are kept. Every field is a flag."""

    data: str | None = None
    """Images to use: a folder of images, petals (drawn flowers, no download), hf:NAME[:CONFIG][:COLUMN] of the
    Hugging Face Hub, or a published data set by name: flowers102, pets37, cifar10, ... (an unknown name lists all)."""
    protocol: Literal["clean", "paper"] = "clean"
    """clean: pretraining never sees a test image.
    paper: pretraining sees all images, test included, as in the paper's own runs."""
    data_root: Path = Path("data")
    """Folder in which published data sets lie, or to which they are downloaded."""
    cache: Literal["disk", "none"] = "disk"
    """disk: decode each image once, into a file in --cache-dir (3 bytes a pixel).
    none: decode images again in every epoch, for data sets larger than the disk."""
    cache_dir: Path = CACHE_DIR
    """Folder in which decoded images (and the features of evaluations) are kept between runs."""
    ram_gib: float = 8.0
    """Decoded images of at most this total size, in GiB, are read into memory when a run starts, larger ones later."""
    page: int = 0
    """Which page to use of pictures with several, such as multi-page TIFFs, from 0."""
    bands: tuple[int, ...] = ()
    """Which bands to use of pictures with several, from 0: one as grey, or three as red, green and blue.
    A picture of one band stays grey. Without this flag, pictures of four bands or more are refused, unless they are
    RGB with alpha or CMYK and say so."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read. Otherwise they are listed, and the run does not start."""


class UnreadableImages(UserErrors):
    """Some images cannot be read; the message lists them, one per line."""

    def __init__(self, unreadable: dict[str, str], total: int, shown: int = 100):
        lines = unreadable_lines(unreadable)
        more = [f"... and {len(lines) - shown:,} more"] if len(lines) > shown else []
        remedy = "repair or remove them, or leave them out with --skip-unreadable"
        first = f"{len(lines):,} of {total:,} images cannot be read; {remedy}:"
        super().__init__("\n".join([first, *lines[:shown], *more]))


def unreadable_lines(unreadable: dict[str, str]) -> list[str]:
    """One printable line for each image; names of files may hold line breaks, and bytes that are not text."""
    names = (os.fsencode(name).decode(errors="backslashreplace") for name in unreadable)
    names = ("".join(c if c.isprintable() else repr(c)[1:-1] for c in name) for name in names)
    return [f"{name}: {reason}" for name, reason in zip(names, unreadable.values())]


@dataclass(frozen=True)
class Data:
    """The images of a data set in the roles that a protocol gives them."""

    pretrain: Images
    train: Images
    """Images that a probe is trained on: the bank of k-NN."""
    val: Images | None
    """Images that settings are chosen on; None without labels."""
    test: Images | None
    """Images that results are reported on, once; None without labels and without a published test split."""
    classes: tuple[str, ...] | None
    """Class names by label; None without labels."""
    unreadable: dict[str, str]
    """Names of images that were left out, and why."""
    test_duplicates: int
    """How many images of `test` are in `pretrain` pixel for pixel under another name."""
    fingerprint: str
    """A hash of the pixels and labels in each role."""
    notes: tuple[str, ...] = ()
    """What a user should read when a run starts, such as the range of 16-bit values."""


def short_side_for(sides: tuple[int, int]) -> int:
    """Shorter side, in pixels, to decode to for views of `sides`: 256 for 224, and up to twice a small view, which a
    crop would otherwise enlarge."""
    return max(min(2 * max(sides), 256), round(max(sides) * 256 / 224))


def open_data(config: DataConfig, *, short_side: int) -> Data:
    """Find the images, decode them or open their decoded copies, and assign the roles.

    Images with a shorter side above `short_side` pixels are resized to it.

    Raises:
        UnreadableImages: listing the images that cannot be read, unless `skip_unreadable`.
        ValueError: if there are no such images, or their decoded copies cannot be kept.
        OSError: if a folder may not be read.
    """
    if config.data is None:
        raise ValueError("no images are named: --data needs a folder of images, a published set or petals.")
    if config.data == "petals":
        short_side = max(64, short_side // 2)
        source = petals_source(short_side)
    else:
        source = find_source(config.data, root=config.data_root)
    every, unreadable, notes = decode_once(
        source,
        title=config.data if not Path(config.data).is_dir() else str(Path(config.data).resolve()),
        short_side=short_side,
        selection=Selection(config.page, config.bands),
        keep_pixels=config.cache == "disk" or config.data == "petals",  # drawing a flower costs more than reading it
        folder=config.cache_dir,
        read_ahead_bytes=int(config.ram_gib * 2**30),
    )
    reasons = {source.names[i]: reason for i, reason in unreadable.items()}
    if unreadable and (not config.skip_unreadable or len(unreadable) == len(every)):
        raise UnreadableImages(reasons, len(every))
    roles = select_roles(config.protocol, source.splits, source.names, source.labels)
    roles = {role: [i for i in part if i not in unreadable] for role, part in roles.items()}
    return _data(every, roles, source.classes, reasons, (*source.notes, *notes))


def find_source(data: str, *, root: Path) -> Source:
    """The source that the value of --data names, except petals. Raises as `open_data`."""
    if data.startswith("hf:"):
        return hub_source(data.removeprefix("hf:"))
    if data in PUBLISHED:
        return published_source(data, root=root)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        names = ", ".join(("petals", *PUBLISHED))
        raise ValueError(f"--data {data}: no such folder; expected a folder of images, hf:OWNER/NAME, {names}.")
    return folder_source(folder)


def _data(
    every: Images, roles: Splits, classes: tuple[str, ...] | None, unreadable: dict[str, str], notes: tuple[str, ...]
) -> Data:
    parts = {role: every[torch.tensor(part)] if part else None for role, part in roles.items()}
    pretrain, train, val, test = (parts[role] for role in ("pretrain", "train", "val", "test"))
    if pretrain is None or train is None:
        raise ValueError("no training image is left without the unreadable ones; repair some of them.")
    test_duplicates = 0
    if test is not None:
        copies = torch.isin(test.digests, pretrain.digests) & ~torch.isin(test.rows, pretrain.rows)
        test_duplicates = int(copies.sum())
    fingerprint = hashlib.blake2b(digest_size=16)
    for part in (pretrain, train, val, test):
        digests = part.digests.tolist() if part else []
        labels = part.labels.tolist() if part and part.labels is not None else [None] * len(digests)
        fingerprint.update(repr(list(zip(digests, labels))).encode())
    return Data(pretrain, train, val, test, classes, unreadable, test_duplicates, fingerprint.hexdigest(), notes)
