"""Images of a data set, decoded, in the roles that a protocol gives them (see `splits`)."""

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from scott_sparse.cli import ADVANCED, UserErrors
from scott_sparse.data.builtin import PUBLISHED, published_source
from scott_sparse.data.cache import CACHE_DIR, decode_once, decode_some
from scott_sparse.data.hub import hub_source
from scott_sparse.data.images import Images, evenly_spaced
from scott_sparse.data.petals import CHUNK, petals_source
from scott_sparse.data.readers import Selection
from scott_sparse.data.sources import Source, counts, folder_source, printable, some
from scott_sparse.data.splits import Splits, select_roles
from scott_sparse.data.tables import apply_tables


@dataclass(frozen=True)
class DataConfig:
    """Which images to use, and where decoded images are kept."""

    data: str | None = None
    """Images to use: a folder of images, petals (drawn flowers, no download), hf:NAME[:CONFIG][:COLUMN] of the
    Hugging Face Hub, or a published data set by name: flowers102, pets37, cifar10, ... (an unknown name lists all)."""
    protocol: Literal["clean", "paper"] = "clean"
    """clean: pretraining never sees a test image.
    paper: pretraining sees all images, test included, as in the paper's own runs."""
    data_root: Annotated[Path, ADVANCED] = Path("data")
    """Folder in which published data sets lie, or to which they are downloaded."""
    cache: Literal["disk", "none"] = "disk"
    """disk: decode each image once, into a file in --cache-dir (1 byte a pixel and channel).
    none: decode images again in every epoch, for data sets larger than the disk."""
    cache_dir: Annotated[Path, ADVANCED] = CACHE_DIR
    """Folder in which decoded images (and the features of evaluations) are kept between runs."""
    ram_gib: Annotated[float, ADVANCED] = 8.0
    """Decoded images of at most this total size, in GiB, are read into memory when a run starts, larger ones later."""
    page: Annotated[int, ADVANCED] = 0
    """Which page to use of pictures with several, such as multi-page TIFFs, from 0."""
    channels: int | None = None
    """Channels of the images. 3: RGB, of grey pictures too. 1: grey, of coloured ones too. Another number: all bands of
    pictures that have so many, such as multispectral TIFFs (in one page, or a page each), or as many by --bands.
    Default: 3; in evaluation those of the encoder."""
    bands: Annotated[tuple[int, ...], ADVANCED] = ()
    """Which bands to use of pictures with several, from 0: one as grey, three as red, green and blue, or as many as
    --channels. A picture of one band stays grey. Without this flag, pictures of four bands or more are refused, unless
    they are RGB with alpha or CMYK and say so, or --channels asks for their bands."""
    skip_unreadable: bool = False
    """Leave out images that cannot be read. Otherwise they are listed, and the run does not start."""
    list: Path | None = None
    """Text file with one image path a line, absolute or in the folder of --data: only these images are used."""
    labels: Path | None = None
    """Table (CSV, TSV, JSON lines) with a row for each image of the folder of --data: its path and its class. Default:
    metadata.csv or metadata.jsonl in the folder, else the class of an image is its folder."""
    image_column: Annotated[str | None, ADVANCED] = None
    """Column of --labels that names the image. Default: file_name, or another usual name."""
    label_column: Annotated[str | None, ADVANCED] = None
    """Column of --labels, or of a set hf:NAME, that names the class. Default: label, class or category."""
    split_column: Annotated[str | None, ADVANCED] = None
    """Column of --labels that says train, val or test. Default: split, if there is such a column."""

    @property
    def selection(self) -> Selection:
        """What to read of each picture. Raises ValueError for --page, --bands and --channels out of range."""
        return Selection(self.page, self.bands, 3 if self.channels is None else self.channels)


class UnreadableImages(UserErrors):
    """Some images cannot be read; the message lists them, one per line."""

    def __init__(self, unreadable: dict[str, str], total: int, shown: int = 100):
        lines = unreadable_lines(unreadable)
        more = [f"... and {len(lines) - shown:,} more"] if len(lines) > shown else []
        remedy = "repair or remove them, or leave them out with --skip-unreadable"
        first = f"{len(lines):,} of {total:,} images cannot be read; {remedy}:"
        super().__init__("\n".join([first, *lines[:shown], *more]))


def unreadable_lines(unreadable: dict[str, str]) -> list[str]:
    """One printable line for each image."""
    return [f"{printable(name)}: {reason}" for name, reason in unreadable.items()]


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
    unlabelled_test: Images | None
    """Published test images without a label, where others have one: in no probe, and under clean not pretrained on."""
    classes: tuple[str, ...] | None
    """Class names by label; None without labels."""
    unreadable: dict[str, str]
    """Names of images that were left out, and why."""
    test_duplicates: int
    """How many images of `test` are in `pretrain` pixel for pixel under another name."""
    fingerprint: str
    """A hash of the pixels and labels in each role."""
    about: dict[str, Any]
    """How the data set was understood, and what of it is not used, for JSON; `describe` says it in a line."""

    def describe(self) -> str:
        """One line for the start of a run: images, classes, roles, and everything that is left out."""
        about = self.about
        images, files, folders = about["images"], about["files_passed_over"], about["folders_not_used"]
        classes = f"{len(self.classes):,} classes ({some(self.classes)})" if self.classes else None
        parts = [
            f"{images['all']:,} images",
            classes or f"no labels, because {about['no_labels']}",
            *(f"{role} {images[role]:,}" for role in ("pretrain", "train", "val", "test")),
            *([f"{sum(files.values()):,} files passed over ({counts(Counter(files))})"] if files else []),
            *([f"folders not used: {some(folders, 10)}"] if folders else []),
        ]
        return "; ".join([", ".join(parts), *about["notes"]])


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
    if config.data == "petals":
        short_side = max(64, short_side // 2)
    source, folder = _find(config, flower_side=short_side)
    title = str((config.list or folder).resolve()) if folder else str(config.data)
    return open_source(source, config, title=title, short_side=short_side)


def open_source(source: Source, config: DataConfig, *, title: str, short_side: int) -> Data:
    """The same for a source that is found already; `title` names the file of its decoded copies."""
    every, unreadable, notes = decode_once(
        source,
        title=title,
        short_side=short_side,
        selection=config.selection,
        keep_pixels=config.cache == "disk" or config.data == "petals",  # drawing a flower costs more than reading it
        folder=config.cache_dir,
        read_ahead_bytes=int(config.ram_gib * 2**30),
    )
    reasons = {source.names[i]: reason for i, reason in unreadable.items()}
    if unreadable and (not config.skip_unreadable or len(unreadable) == len(every)):
        raise UnreadableImages(reasons, len(every))
    roles = select_roles(config.protocol, source.splits, source.names, source.labels)
    roles = {role: [i for i in part if i not in unreadable] for role, part in roles.items()}
    return _data(every, roles, replace(source, notes=(*source.notes, *notes)), reasons)


def open_some(config: DataConfig, count: int, *, short_side: int) -> tuple[Images, tuple[str, ...] | None]:
    """`count` images, evenly spaced over val (without labels, over those to pretrain on), and the class names.

    No other image is decoded, and nothing is written. Flowers of petals are drawn with `short_side` pixels. Raises as
    `open_data`.
    """
    source, _ = _find(config, flower_side=short_side, chunk=1)
    roles = select_roles(config.protocol, source.splits, source.names, source.labels)
    candidates = roles["val"] or roles["pretrain"]
    chosen = [candidates[i] for i in evenly_spaced(len(candidates), count).tolist()]
    images, unreadable = decode_some(source, chosen, short_side=short_side, selection=config.selection)
    if unreadable and (not config.skip_unreadable or len(unreadable) == len(chosen)):
        raise UnreadableImages({source.names[i]: reason for i, reason in unreadable.items()}, len(chosen))
    return images, source.classes


def _find(config: DataConfig, *, flower_side: int, chunk: int = CHUNK) -> tuple[Source, Path | None]:
    """The source that the flags name, with the labels that they name, and its folder if it is one."""
    if config.data is None:
        raise ValueError("no images are named: --data needs a folder of images, a published set or petals.")
    columns = {"image": config.image_column, "label": config.label_column, "split": config.split_column}
    folder = None if _is_named_set(config.data) else Path(config.data).expanduser()
    if config.data.startswith("hf:"):
        columns.pop("label")  # which the data set has
    if folder is None and (config.list or config.labels or any(columns.values())):
        raise ValueError(f"--list and --labels describe the images of a folder; --data {config.data} is none.")
    for flag, path in (("list", config.list), ("labels", config.labels)):
        if path and not path.is_file():
            raise ValueError(f"--{flag} {path}: no such file.")
    if config.data == "petals":
        source = petals_source(flower_side, chunk=chunk)
    else:
        source = find_source(config.data, root=config.data_root, listed=config.list, label_column=config.label_column)
    if folder:
        source = apply_tables(source, folder, config.labels, columns)
    return _without_useless_labels(source), folder


def find_source(data: str, *, root: Path, listed: Path | None = None, label_column: str | None = None) -> Source:
    """The source that the value of --data names, except petals, and --list. Raises as `open_data`."""
    if data.startswith("hf:"):
        return hub_source(data.removeprefix("hf:"), label_column=label_column)
    if data in PUBLISHED:
        return published_source(data, root=root)
    folder = Path(data).expanduser()
    if not folder.is_dir():
        names = ", ".join(("petals", *PUBLISHED))
        raise ValueError(f"--data {data}: no such folder; expected a folder of images, hf:OWNER/NAME, {names}.")
    return folder_source(folder, listed=listed)


def _is_named_set(data: str) -> bool:
    return data in ("petals", *PUBLISHED) or data.startswith("hf:")


def _without_useless_labels(source: Source) -> Source:
    """The source, without labels if its training images are not of two classes at least, which a probe needs."""
    labels, classes = source.labels, source.classes
    if labels is None or classes is None:
        return source
    known = [classes[label] for label in {labels[i] for i in source.splits["train"]} - {-1}]
    if len(known) > 1:
        return source
    why = f"all training images are of one class, {some(known)}" if known else "no training image has one"
    return replace(source, labels=None, classes=None, no_labels=why)


def _data(every: Images, roles: Splits, source: Source, unreadable: dict[str, str]) -> Data:
    parts = {role: every[torch.tensor(part)] if part else None for role, part in roles.items()}
    pretrain, train, val, test, unlabelled_test = parts.values()
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
    return Data(
        pretrain,
        train,
        val,
        test,
        unlabelled_test,
        classes=source.classes,
        unreadable=unreadable,
        test_duplicates=test_duplicates,
        fingerprint=fingerprint.hexdigest(),
        about=_about(source, roles, images=len(every) - len(unreadable)),
    )


def _about(source: Source, roles: Splits, *, images: int) -> dict[str, Any]:
    pretrain = set(roles["pretrain"])
    unseen = [source.names[i] for i in roles["unlabelled_test"] if i not in pretrain]
    unlabelled = [source.names[i] for i in roles["pretrain"] if source.labels and source.labels[i] < 0]
    notes = list(source.notes)
    if unseen:
        notes.append(f"test images without a label, not used: {len(unseen):,} ({some(unseen)})")
    if unlabelled:
        notes.append(f"images without a label, in no probe: {len(unlabelled):,} ({some(unlabelled)})")
    folders = {str(folder): count for folder, count in source.skipped.folders.items()}
    return {
        "images": {"all": images, **{role: len(part) for role, part in roles.items()}, "unlabelled": len(unlabelled)},
        "classes": len(source.classes or ()),
        "no_labels": None if source.classes else source.no_labels,
        "files_passed_over": dict(source.skipped.files.most_common()),
        "folders_not_used": [f"{name} ({count:,} images)" if count else name for name, count in folders.items()],
        "notes": notes,
    }
