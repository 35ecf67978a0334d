"""Data sets in the formats of the Hugging Face Hub: which splits, images and labels to use of them."""

import functools
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset

from scott_sparse.data.readers import Picture, Unreadable
from scott_sparse.data.sources import SPLIT_NAMES, Source, rename_lone_val

LABEL_COLUMNS = ("label", "labels", "class", "category", "target")  # of strings or integers


def hub_source(spec: str, *, label_column: str | None = None) -> Source:
    """The data set NAME[:CONFIG][:COLUMN]: a repository of the Hub or a folder, its configuration, its image column.

    Labels are classes, strings or integers. An image whose label is null or negative has label -1, and in val and test,
    as of a challenge, becomes one of the split unlabelled, which is pretrained on.

    Raises ValueError, saying what to do, if the set cannot be loaded, or if configuration or column have to be chosen.
    """
    loaded, column = _load(spec)
    import datasets

    features = next(iter(loaded.values())).features
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if "train" not in map(str.lower, loaded) or not columns:
        raise ValueError(
            f"--data hf:{spec} has the splits {', '.join(loaded)} and the columns {', '.join(features)}; expected a "
            "split train with a column of images."
        )
    column = column or (columns[0] if len(columns) == 1 else "image")
    if column not in columns:
        raise ValueError(
            f"--data hf:{spec}: no column of images is called {column}; name one of {', '.join(columns)}, as "
            f"in hf:{spec.split(':')[0]}:{columns[0]}."
        )
    label_column = _label_column(features, label_column)
    names: list[str] = []
    values: list[Any] = []
    splits: dict[str, list[int]] = {}
    encoded, unused = [], []
    for name, part in loaded.items():
        split = SPLIT_NAMES.get(name.lower())
        if split is None:
            unused.append(f"{name} ({len(part):,} images)")
            continue
        labels_of_part = list(part[label_column]) if label_column else []
        for i in range(len(part)):
            hidden = split in ("val", "test") and label_column and not _is_known(labels_of_part[i])
            splits.setdefault("unlabelled" if hidden else split, []).append(len(names) + i)
        names += [f"{name}/{i}" for i in range(len(part))]
        values += labels_of_part
        encoded.append(part.select_columns(column).cast_column(column, datasets.Image(decode=False)))
    labels, classes = _labels(values, features[label_column]) if label_column else (None, None)
    notes = [f"images from the column {column}" + (f", labels from the column {label_column}" if label_column else "")]
    return Source(
        functools.partial(_picture, ConcatDataset(encoded), column),
        names,
        labels,
        rename_lone_val(dict[str, Sequence[int]](splits)),
        classes,
        files=[Path(file["filename"]) for part in loaded.values() for file in part.cache_files],
        no_labels=f"column {label_column} holds no classes"
        if label_column
        else f"no column is called {LABEL_COLUMNS[0]}",
        notes=(*notes, *[f"splits not used: {', '.join(unused)}"] * bool(unused)),
    )


def _load(spec: str) -> tuple[Mapping[str, Any], str | None]:
    """The splits, and the column of images if one is named."""
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise ValueError(f"--data hf:{spec} needs the package datasets: pip install datasets.") from None
    name, *rest = spec.split(":")
    if len(rest) > 2:
        raise ValueError(
            f"--data hf:{spec}: expected hf:NAME, hf:NAME:CONFIG, hf:NAME:COLUMN or hf:NAME:CONFIG:COLUMN."
        )
    try:
        if any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json")):  # written by save_to_disk
            saved: Any = datasets.load_from_disk(name)
            return saved if isinstance(saved, dict) else {"train": saved}, rest[-1] if rest else None
        if len(rest) == 1 and rest[0] not in datasets.get_dataset_config_names(name):
            rest = ["", *rest]  # a column
        config, column = (*rest, "", "")[:2]
        loaded: Any = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, DatasetsError) as error:
        raise ValueError(f"--data hf:{spec} cannot be loaded: {error}") from None
    return loaded, column or None


def _label_column(features: Mapping[str, Any], named: str | None) -> str | None:
    """The named column, else `label` or another of LABEL_COLUMNS, else the first column of classes."""
    import datasets

    kinds = ("int", "uint", "bool", "float", "string", "large_string")
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    values = [name for name, feature in features.items() if isinstance(feature, datasets.Value)]
    usable = [*classes, *(name for name in values if features[name].dtype.startswith(kinds))]
    if named and named not in usable:
        raise ValueError(
            f"--label-column {named}: no column of classes, strings or integers; the set has {', '.join(usable)}."
        )
    usual = [name for wanted in LABEL_COLUMNS for name in usable if name.lower() == wanted]
    return named or next(iter([*usual, *classes]), None)


def _is_known(label: str | int | float | None) -> bool:
    return label not in (None, "") and (isinstance(label, str) or label >= 0)  # NaN is not


def _labels(values: Iterable[Any], feature: Any) -> tuple[list[int] | None, tuple[str, ...] | None]:
    """Labels and names of the classes; (None, None) if no label is known, or if they are measurements."""
    known = {value for value in values if _is_known(value)}
    if not known or any(value != int(value) for value in known if isinstance(value, float)):
        return None, None
    if isinstance(next(iter(known)), float):  # pandas makes them of integers of which some are missing
        known = {int(value) for value in known}
    names = getattr(feature, "names", None)  # of a ClassLabel, whose values are numbers of classes
    classes = range(len(names)) if names else sorted(known)
    number = {value: i for i, value in enumerate(classes)}
    return [number.get(value, -1) for value in values], tuple(names or map(str, classes))


def _picture(encoded: ConcatDataset[Any], column: str, i: int) -> Picture:
    image = encoded[i][column]
    if image is None or not (image["bytes"] or image["path"]):
        raise Unreadable("no picture: null")
    return io.BytesIO(image["bytes"]) if image["bytes"] else Path(image["path"])
