"""Find the pictures of a data set and the split and class of each; no picture is opened here.

Layout of a folder, names of splits in any case (SPLIT_NAMES):
* Splits, `train/` and for example `valid/` or `Test/`, if no other folder with images stands beside them, or if train
  and another split hold a class folder of the same name. Otherwise `train/` is a class like the folders beside it.
* The class of an image is the first folder below its split, or below the data folder, however deep the file lies. An
  image beside the class folders has label -1.

Splits keep the names under which they were published, with one exception: where there is only a `val` beside `train`,
as in ImageNet, results are reported on it, so that it is called `test` here.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import TypeVar

from scott_sparse.data.readers import Picture, is_picture_file, picture_extensions

T = TypeVar("T")
SPLITS = ("train", "val", "test", "unlabelled")
SPLIT_NAMES = {  # in lower case: name of the split here
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("unlabelled", "unlabeled", "unsupervised"), "unlabelled"),
}
# Thumbnails, bins and leftovers of archives; like names that begin with a dot, they are not searched.
SYSTEM_FOLDERS = ("@eadir", "#recycle", "$recycle.bin", "__macosx", "lost+found", "system volume information")


@dataclass(frozen=True)
class Skipped:
    """What is in a folder and not used."""

    files: Counter[str] = field(default_factory=Counter)
    """Number of files by extension, or by what else they are."""
    folders: dict[Path, int] = field(default_factory=dict)
    """Folders of which no file is used, and how many images are in them; of nested folders only the outermost."""


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
    skipped: Skipped = field(default_factory=Skipped)


def folder_source(root: Path, *, listed: Path | None = None) -> Source:
    """The images in a folder, or those of them that a text file lists, one path a line.

    Raises ValueError if there is no image; if a split or a class folder is empty, which would silently drop it; if
    there are splits without train; and if listed files do not exist. OSError if a folder may not be read.
    """
    skipped = Skipped()
    files = listed_files(listed, root) if listed else image_files(root, skipped)
    empty = [folder for folder in skipped.folders if folder.parent == root and folder.name.lower() in SPLIT_NAMES]
    if empty or not files:
        others = f" but {counts(skipped.files)}" if skipped.files else ""
        expected = f"expected files ending in {', '.join(sorted(picture_extensions()))}"
        raise ValueError(f"no image in {empty[0] if empty else listed or root}{others}; {expected}.")
    paths = [_parts(file, root) for file in files]
    splits, notes = _split_folders(root, paths)
    by_split: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for file, path in zip(files, paths):
        if not splits:
            by_split["train"].append(file)
        elif len(path) <= 1:  # beside the splits
            by_split["unlabelled"].append(file)
        elif path[0] in splits:
            by_split[splits[path[0]]].append(file)
        else:
            skipped.folders[root / path[0]] = skipped.folders.get(root / path[0], 0) + 1
    source = split_source(root, {name: part for name, part in by_split.items() if part}, class_depth=bool(splits))
    class_parents = [root / name for name in splits] or [root]
    for folder, images in skipped.folders.items():
        if source.classes and not images and folder.parent in class_parents and not any(folder.iterdir()):
            raise ValueError(f"class folder {folder} holds no image; add images or remove the folder.")
    folders = {folder.relative_to(root): images for folder, images in skipped.folders.items()}
    return replace(source, notes=notes, skipped=Skipped(skipped.files, folders))


def _split_folders(root: Path, paths: Sequence[tuple[str, ...]]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Split by folder, empty where folders are classes, and what to note. `paths`: the parts of each image's path."""
    folders = sorted({path[0] for path in paths if len(path) > 1})
    splits = {folder: SPLIT_NAMES[folder.lower()] for folder in folders if folder.lower() in SPLIT_NAMES}
    others = [folder for folder in folders if folder not in splits]
    if splits and others:
        classes: dict[str, set[str]] = {split: set() for split in SPLITS}
        for path in paths:
            if len(path) > 2 and path[0] in splits:
                classes[splits[path[0]]].add(path[1])
        if classes["train"] & (classes["val"] | classes["test"]):
            return splits, ()
        return {}, (f"taken as class, not as split, as {others[0]} stands beside: {some(splits)}",)
    if "train" in splits.values():
        return splits, ()
    if len(splits) > 1:
        raise ValueError(f"{root} holds {', '.join(splits)} but no train; rename one, or name one as --data.")
    return {}, ()


def split_source(root: Path, files: Mapping[str, list[Path]], *, class_depth: int = 1) -> Source:
    """Files by split; the class of each is the folder `class_depth` levels below `root`, if its path has one there."""
    all_files = [file for split in files.values() for file in split]
    paths = [_parts(file, root) for file in all_files]
    folders = [path[class_depth] if len(path) > class_depth + 1 else None for path in paths]
    classes = tuple(sorted({folder for folder in folders if folder is not None}))
    label = {None: -1} | {name: i for i, name in enumerate(classes)}
    labels = [label[folder] for folder in folders] if classes else None
    names = ["/".join(path) if path else os.path.relpath(file, root) for file, path in zip(all_files, paths)]
    why = "no image lies in a class folder"
    return Source(all_files.__getitem__, names, labels, split_ranges(files), classes or None, all_files, why)


def _parts(file: Path, root: Path) -> tuple[str, ...]:
    """Folders and name of a file below `root`; nothing for a file elsewhere, which only a list can name."""
    depth = len(root.parts)
    return file.parts[depth:] if file.parts[:depth] == root.parts else ()


def split_ranges(parts: Mapping[str, Sized]) -> dict[str, range]:
    """Picture numbers of splits that lie one after the other; a `val` without `test` is called `test`."""
    ends = accumulate(len(part) for part in parts.values())
    return rename_lone_val({name: range(end - len(part), end) for (name, part), end in zip(parts.items(), ends)})


def rename_lone_val(splits: dict[str, T]) -> dict[str, T]:
    """The splits, with a `val` that has no `test` beside it called `test`."""
    return {"test" if name == "val" and "test" not in splits else name: part for name, part in splits.items()}


def image_files(folder: Path, skipped: Skipped | None = None, ancestors: frozenset = frozenset()) -> list[Path]:
    """Every image file below a folder, sorted by path; what else is there is added to `skipped`.

    Names that begin with a dot and SYSTEM_FOLDERS are not searched. Links are followed, except to a folder that
    contains them, which would never end.
    """
    skipped = Skipped() if skipped is None else skipped
    status = folder.stat()
    folder_id = (status.st_dev, status.st_ino)
    if folder_id in ancestors:
        return []
    files = []
    for path in sorted(folder.iterdir()):
        hidden, extension = path.name.startswith("."), path.suffix.lower()
        if path.is_dir():
            inside = Skipped(skipped.files)
            searched = not hidden and path.name.lower() not in SYSTEM_FOLDERS
            images = image_files(path, inside, ancestors | {folder_id}) if searched else []
            skipped.folders.update(inside.folders if images else {path: 0})
            files += images
        elif is_picture_file(path) and not hidden:  # dangling links and pipes too: decoding reports them
            files.append(path)
        elif is_picture_file(path) or not hidden:
            skipped.files["hidden" if hidden else extension or "without extension"] += 1
    return files


def listed_files(text: Path, root: Path) -> list[Path]:
    """The files that a text file names, one path a line, relative to `root` or absolute, sorted and each once.

    Raises ValueError for names of no file.
    """
    lines = (line.rstrip("\r") for line in os.fsdecode(text.read_bytes()).removeprefix("\ufeff").split("\n"))
    inside = (os.path.relpath(root / line, root) for line in lines if line.strip())
    files = sorted({Path(os.path.abspath(root / name)) if name.startswith("..") else root / name for name in inside})
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise ValueError(f"{len(missing):,} of {len(files):,} files listed in {text} do not exist: {some(missing)}.")
    return files


def printable(name: str) -> str:
    """One line of text; names of files may hold line breaks, and bytes that are not text."""
    name = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few names, and dots for the others."""
    texts = [printable(str(name)) for name in names]
    return ", ".join([*texts[:shown], *["..."] * (len(texts) > shown)])


def counts(files: Counter[str]) -> str:
    """20 .heic, 10 without extension"""
    return some((f"{count:,} {kind}" for kind, count in files.most_common()), shown=5)
