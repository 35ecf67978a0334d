"""Labels and splits of the images of a folder from a table with named columns, one row an image.

A table is a CSV file (comma, semicolon or tab; UTF-8) or a file of JSON lines, as are `metadata.csv` and
`metadata.jsonl` in image folders of the Hugging Face Hub, which are found by name.
"""

import csv
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scott_sparse.data.sources import SPLIT_NAMES, SPLITS, Skipped, Source, rename_lone_val, some

METADATA = ("metadata.csv", "metadata.jsonl")
USUAL_COLUMNS = {
    "image": ("file_name", "filename", "file", "image", "path", "image_path"),
    "label": ("label", "class", "category"),
    "split": ("split",),
}
NO_LABEL = ("", "-1", "-1.0", "nan", "NaN")


def apply_tables(source: Source, root: Path, table: Path | None, columns: Mapping[str, str | None]) -> Source:
    """The source of the folder `root` with labels, and splits if there is a column of them, from a table.

    Without a `table`, those called METADATA in the folder and in the folders in it are used, if they have the columns.
    Images without a row have no label; where others have a split from the table, theirs is `unlabelled`.

    `columns`: name of the column of "image", "label" and "split"; None: the first of USUAL_COLUMNS that is there.

    Raises ValueError for a table that cannot be read or lacks a column, and for rows that do not fit the images.
    """
    folders = [root, *sorted({root / name.split("/")[0] for name in source.names if "/" in name[1:]})]
    metadata = [folder / name for folder in folders for name in METADATA if (folder / name).is_file()]
    if not table and not metadata and any(columns.values()):
        raise ValueError(f"a column is named, but no table; give --labels FILE, or put {METADATA[0]} in {root}.")
    index, notes, used = _index(source.names), list(source.notes), Counter()
    facts: dict[int, tuple[str | None, str | None]] = {}  # label and split by number of the image
    for path in [table] if table else metadata:
        names, rows = read_table(path)
        image, label, split = (_column(path, names, part, columns.get(part)) for part in USUAL_COLUMNS)
        if image is None or label is None:
            lacking = "image" if image is None else "label"
            if table:
                raise ValueError(f"{path} has the columns {some(names, 20)}; name one with --{lacking}-column.")
            notes.append(f"{path.name} not used, as none of its columns is called {USUAL_COLUMNS[lacking][0]}")
            continue
        images = _find(path, [str(row[image]).strip() for row in rows], index, root)
        contradicted = []
        for i, row in zip(images, rows):
            fact = _label(path, row[label]), split and _split(path, row[split])
            if i is not None and facts.setdefault(i, fact) != fact:
                contradicted.append(source.names[i])
        if contradicted:
            raise ValueError(
                f"{path} has rows that contradict each other, for {some(contradicted)}; remove one of each."
            )
        unused = f", {images.count(None):,} rows name files that are not used" if None in images else ""
        notes.append(f"labels from {path.name} (columns {some(filter(None, (image, label, split)))}{unused})")
        used[path.suffix.lower()] += path.is_relative_to(root)
    if not facts:
        return replace(source, notes=tuple(notes))

    classes = sorted({label for label, _ in facts.values() if label is not None})
    if all(label.isdecimal() for label in classes):
        classes.sort(key=int)
    number = {None: -1, **{label: i for i, label in enumerate(classes)}}
    every = [facts.get(i, (None, None)) for i in range(len(source.names))]
    splits = source.splits
    if any(split for _, split in every):
        by_split = {name: [] for name in SPLITS}
        for i, (_, split) in enumerate(every):
            by_split[split or "unlabelled"].append(i)
        if not by_split["train"]:
            raise ValueError(f"{table or metadata[0]} has no image in the split train.")
        splits = rename_lone_val({name: part for name, part in by_split.items() if part})
    return replace(
        source,
        labels=[number[label] for label, _ in every],
        classes=tuple(classes),
        splits=splits,
        notes=tuple(notes),
        skipped=Skipped(source.skipped.files - used, source.skipped.folders),
    )


def read_table(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Column names, and the rows by column name. Raises ValueError for what is no table in UTF-8."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("not every line is a JSON object")
            names = list(dict.fromkeys(name for row in rows for name in row))
        else:
            header = text.partition("\n")[0]
            lines = csv.reader(io.StringIO(text, newline=""), delimiter=max("\t,;", key=header.count), strict=True)
            names = [name.strip() for name in next(lines, [])]
            rows = []
            for fields in filter(None, lines):
                if len(fields) > len(names):
                    raise ValueError(f"line {lines.line_num} has {len(fields)} fields, the header {len(names)}")
                rows.append(dict(zip(names, fields)))
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a table in UTF-8: {error}.") from None
    return names, [{name: row.get(name, "") for name in names} for row in rows]


def _column(path: Path, names: Sequence[str], part: str, name: str | None) -> str | None:
    """The column called `name`, else the first with a usual name for this part of a row, in any case."""
    if name is not None and name not in names:
        raise ValueError(f"{path} has no column {name} (--{part}-column); it has {some(names, 20)}.")
    by_lower = {column.lower(): column for column in reversed(names)}
    return name or next((by_lower[usual] for usual in USUAL_COLUMNS[part] if usual in by_lower), None)


def _label(path: Path, value: Any) -> str | None:
    """The label as text; None for no label."""
    if isinstance(value, list | dict):
        raise ValueError(f"{path}: label {str(value)[:50]} is neither text nor a number; name another --label-column.")
    text = "" if value is None else str(value).strip()
    return None if text in NO_LABEL else text


def _split(path: Path, value: Any) -> str:
    split = SPLIT_NAMES.get(str(value).strip().lower())
    if split is None:
        raise ValueError(f"{path}: {value!r} is not the name of a split; expected one of {', '.join(SPLIT_NAMES)}.")
    return split


def _normalised(name: str) -> str:
    """macOS writes an accent as a character of its own, Windows another separator."""
    return unicodedata.normalize("NFC", os.path.normpath(name.replace("\\", "/")))


def _index(names: Sequence[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Numbers of images by path, and by path or name without folders or extension: -1 if several share it."""
    by_path = {_normalised(name): i for i, name in enumerate(names)}
    by_part: dict[str, int] = {}
    for path, i in by_path.items():
        for part in {os.path.basename(path), os.path.splitext(path)[0], os.path.splitext(os.path.basename(path))[0]}:
            by_part[part] = -1 if part in by_part else i
    return by_path, by_part


def _find(
    table: Path, values: Sequence[str], index: tuple[dict[str, int], dict[str, int]], root: Path
) -> list[int | None]:
    """Number of the image that each row of a table names; None for a file that exists but is not used.

    A name is a path in `root` or beside the table, or it is unique in `root` without its folders or its extension.
    """
    by_path, by_part = index
    folder = os.path.relpath(table.parent, root)
    numbers, missing, ambiguous = [], [], []
    for value in values:
        path = _normalised(os.path.relpath(value, root) if os.path.isabs(value) else value)
        beside = os.path.normpath(os.path.join(folder, path))
        number = by_path.get(path, by_path.get(beside, by_part.get(path)))
        if number == -1:
            ambiguous.append(value)
        elif number is None and not (value and ((root / path).is_file() or (root / beside).is_file())):
            missing.append(value)
        numbers.append(number)
    if missing:
        count = f"{len(missing):,} of {len(values):,} images"
        raise ValueError(f"{count} in {table} do not exist in {root}: {some(missing)}.")
    if ambiguous:
        count = f"{len(ambiguous):,} names in {table}"
        raise ValueError(f"{count} are those of several images: {some(ambiguous)}; give their paths in {root}.")
    return numbers
