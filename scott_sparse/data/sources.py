"""Where pictures lie and which split each belongs to; none is opened here.

A folder comes in one of three forms:
* `train/` and `val/` or `test/` in it, each with class folders or plain images;
* class folders: `folder/class/photo.jpg`;
* any folder of images, recursively: no labels.

Splits keep the names under which they were published, with one exception: where there is only a `val` beside `train`,
as with ImageNet, it is what everyone reports on, so here it is called `test`.
"""

import dataclasses
from collections.abc import Sequence, Sized
from itertools import accumulate
from pathlib import Path
from typing import Any

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Pictures and what was published about them."""

    pictures: Sequence[Any]
    """Paths, or what stands for a picture: an open file of bytes or a PIL image."""
    names: list[str]
    """Of each picture: its path relative to the source, or split and number. Unique."""
    labels: list[int] | None
    """Class of each picture; -1 where it is not known."""
    splits: dict[str, Sequence[int]]
    """Pictures of `train`, and of `val`, `test` and `unlabelled` where they were published."""
    classes: tuple[str, ...] | None
    files: Sequence[Path]
    """The files that hold the pictures: their sizes and times tell whether anything has changed."""


def folder_source(root: Path) -> Source:
    """One of the three forms. A class folder without an image is a mistake that would silently cost a class.

    Raises ValueError for that and for a folder without images; OSError for a folder that may not be read.
    """
    nested = (root / "train").is_dir()
    folders = [root / name for name in ("train", "val", "test") if (root / name).is_dir()] if nested else [root]
    found = {folder.name if nested else "train": walk(folder) for folder in folders}
    for folder, files in zip(folders, found.values()):
        if not files:
            raise ValueError(f"no image in {folder}; expected files ending in {', '.join(EXTENSIONS)}.")
    source = from_files(root, found)
    for folder, files in zip(folders, found.values()):
        filled = {file.parent for file in files}
        for entry in sorted(folder.iterdir()) if source.classes else ():
            if entry.is_dir() and not entry.name.startswith(".") and entry not in filled:
                raise ValueError(f"class folder {entry} holds no image; add images or remove the folder.")
    return source


def from_files(root: Path, found: dict[str, list[Path]]) -> Source:
    """Files by split; their classes are the folders, if every file lies in one directly below its split."""
    files = [file for split in found.values() for file in split]
    parts = [file.relative_to(root).parts for file in files]
    depth = 2 if len(found) == 1 else 3
    folders = sorted({part[-2] for part in parts}) if all(len(part) == depth for part in parts) else []
    classes = tuple(folders) if len(folders) > 1 else None
    number = {name: i for i, name in enumerate(folders)}
    labels = [number[part[-2]] for part in parts] if classes else None
    return Source(files, ["/".join(part) for part in parts], labels, ranges(found), classes, files)


def ranges(parts: dict[str, Sized]) -> dict[str, range]:
    """Splits as ranges of numbers, when their parts lie one behind the other; an only `val` is called `test`."""
    ends = list(accumulate(len(part) for part in parts.values()))
    names = ["test" if name == "val" and "test" not in parts else name for name in parts]
    return {name: range(end - len(part), end) for name, part, end in zip(names, parts.values(), ends)}


def walk(folder: Path, above: frozenset = frozenset()) -> list[Path]:
    """Every image file below a folder, sorted by path; what begins with a dot is passed over.

    Links are followed, but not back into a folder on the way here, which would never end.
    """
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found += walk(path, above | {here})
        elif path.suffix.lower() in EXTENSIONS:  # dangling links and pipes too: they are reported when opened
            found.append(path)
    return found
