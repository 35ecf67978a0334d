"""Find the pictures of a data set and the split and class of each; no picture is opened here.

A folder has one of three layouts:
* `train/` and `val/` or `test/`, each with class folders or with images directly;
* class folders: `folder/class/photo.jpg`;
* images at any depth: no labels.

Splits keep the names under which they were published, with one exception: where there is only a `val` beside `train`,
as in ImageNet, results are reported on it, so that it is called `test` here.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from scott_sparse.data.readers import Picture, is_picture_file

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".jp2", ".avif"),
)


@dataclass(frozen=True)
class Source:
    """The pictures of a data set, not yet decoded, with what was published about them."""

    picture: Callable[[int], Picture]
    """Picture i: its path, an open file of bytes or a PIL image. Can be pickled, for workers that decode."""
    names: list[str]
    """Name of each picture, unique: its path relative to the source, or its split and number."""
    labels: list[int] | None
    """Class of each picture; -1 where it is not known. None: no picture has a class."""
    splits: Mapping[str, Sequence[int]]
    """Numbers of the pictures in `train` and, where they were published, in `val`, `test` and `unlabelled`."""
    classes: tuple[str, ...] | None
    """Class names by label."""
    files: Sequence[Path]
    """Files that hold the pictures; a change of their sizes or modification times makes decoded copies stale."""
    no_labels: str = "the data set has none"
    """Why no picture has a class, where that is so."""
    notes: tuple[str, ...] = ()
    """What else a user should read when a run starts."""


def folder_source(root: Path) -> Source:
    """The images in a folder.

    Raises ValueError if there is no image, or none in a class folder, which would silently drop a class; OSError if a
    folder may not be read.
    """
    folders = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    folders = folders if "train" in folders else {"train": root}
    files = {name: image_files(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        if not files[name]:
            raise ValueError(f"no image in {folder}; expected files ending in {', '.join(EXTENSIONS)}.")
    source = split_source(root, files)
    for name, folder in folders.items():
        filled = {file.parent for file in files[name]}
        for entry in sorted(folder.iterdir()) if source.classes else ():
            if entry.is_dir() and not entry.name.startswith(".") and entry not in filled:
                raise ValueError(f"class folder {entry} holds no image; add images or remove the folder.")
    return source


def split_source(root: Path, files: Mapping[str, list[Path]]) -> Source:
    """Files by split; their folders are the classes if each file lies in a folder directly below its split."""
    all_files = [file for split in files.values() for file in split]
    parts = [file.relative_to(root).parts for file in all_files]
    depth = 2 if len(files) == 1 else 3
    folders = sorted({part[-2] for part in parts}) if all(len(part) == depth for part in parts) else []
    classes = tuple(folders) if len(folders) > 1 else None
    label = {name: i for i, name in enumerate(folders)}
    labels = [label[part[-2]] for part in parts] if classes else None
    names = ["/".join(part) for part in parts]
    return Source(all_files.__getitem__, names, labels, split_ranges(files), classes, all_files)


def split_ranges(parts: Mapping[str, Sized]) -> dict[str, range]:
    """Picture numbers of splits that lie one after the other; a `val` without `test` is called `test`."""
    ends = list(accumulate(len(part) for part in parts.values()))
    names = ["test" if name == "val" and "test" not in parts else name for name in parts]
    return {name: range(end - len(part), end) for name, part, end in zip(names, parts.values(), ends)}


def image_files(folder: Path, ancestors: frozenset = frozenset()) -> list[Path]:
    """Every image file below a folder, sorted by path; names that begin with a dot are ignored.

    Links are followed, except to a folder that contains them, which would never end.
    """
    status = folder.stat()
    folder_id = (status.st_dev, status.st_ino)
    if folder_id in ancestors:
        return []
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            files += image_files(path, ancestors | {folder_id})
        elif is_picture_file(path):  # dangling links and pipes too: decoding reports them
            files.append(path)
    return files
