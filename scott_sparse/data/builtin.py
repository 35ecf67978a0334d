"""Published data sets by name, through torchvision and elpv-dataset.

torchvision downloads a missing set if the network allows; otherwise the error says which files to put where.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset

from scott_sparse.data.readers import Picture
from scott_sparse.data.sources import Source, image_files, split_ranges, split_source


class Published(NamedTuple):
    dataset: str  # class name in torchvision.datasets
    splits: dict[str, dict[str, Any]]  # name of a split here: arguments of the class that select it
    folder: str  # where torchvision keeps it, under --data-root
    contents: str  # what that folder holds


def _splits(*names: str, **renamed: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": renamed.get(name, name)} for name in (*names, *renamed)}


_TRAIN_FLAG = {"train": {"train": True}, "test": {"train": False}}
_IMAGENETTE = {"train": {"split": "train", "size": "320px"}, "test": {"split": "val", "size": "320px"}}
_TRAIN_VAL_TEST = _splits("train", "val", "test")
_TRAINVAL_TEST = _splits("test", train="trainval")
TORCHVISION_SETS = {
    "flowers102": Published("Flowers102", _TRAIN_VAL_TEST, "flowers-102", "jpg/, imagelabels.mat and setid.mat"),
    "pets37": Published("OxfordIIITPet", _TRAINVAL_TEST, "oxford-iiit-pet", "images/ and annotations/"),
    "imagenette": Published("Imagenette", _IMAGENETTE, "imagenette2-320", "train/ and val/"),
    "cifar10": Published("CIFAR10", _TRAIN_FLAG, "cifar-10-batches-py", "data_batch_1 to _5, test_batch, batches.meta"),
    "cifar100": Published("CIFAR100", _TRAIN_FLAG, "cifar-100-python", "train, test and meta"),
    "stl10": Published("STL10", _splits("train", "test", unlabelled="unlabeled"), "stl10_binary", "the .bin files"),
    "food101": Published("Food101", _splits("train", "test"), "food-101", "images/ and meta/"),
    "aircraft": Published("FGVCAircraft", _TRAIN_VAL_TEST, "fgvc-aircraft-2013b", "data/"),
    "dtd": Published("DTD", _TRAIN_VAL_TEST, "dtd", "dtd/images/, dtd/labels/ and dtd/imdb/"),
    "eurosat": Published("EuroSAT", {"train": {}}, "eurosat", "2750/ with a folder per class"),
    "fashion-mnist": Published("FashionMNIST", _TRAIN_FLAG, "FashionMNIST", "raw/ with the four idx files"),
}

# Two sets of 100 ImageNet classes are called ImageNet-100; 8 classes are in both.
IMAGENET100 = {
    # The common list: Contrastive Multiview Coding (arXiv 1906.05849), imagenet100.txt of its code.
    "imagenet100": """
        n01558993 n01692333 n01729322 n01735189 n01749939 n01773797 n01820546 n01855672 n01978455 n01980166 n01983481
        n02009229 n02018207 n02085620 n02086240 n02086910 n02087046 n02089867 n02089973 n02090622 n02091831 n02093428
        n02099849 n02100583 n02104029 n02105505 n02106550 n02107142 n02108089 n02109047 n02113799 n02113978 n02114855
        n02116738 n02119022 n02123045 n02138441 n02172182 n02231487 n02259212 n02326432 n02396427 n02483362 n02488291
        n02701002 n02788148 n02804414 n02859443 n02869837 n02877765 n02974003 n03017168 n03032252 n03062245 n03085013
        n03259280 n03379051 n03424325 n03492542 n03494278 n03530642 n03584829 n03594734 n03637318 n03642806 n03764736
        n03775546 n03777754 n03785016 n03787032 n03794056 n03837869 n03891251 n03903868 n03930630 n03947888 n04026417
        n04067472 n04099969 n04111531 n04127249 n04136333 n04229816 n04238763 n04336792 n04418357 n04429376 n04435653
        n04485082 n04493381 n04517823 n04589890 n04592741 n07714571 n07715103 n07753275 n07831146 n07836838 n13037406
        n13040303
    """,
    # The animals of the SCOTT paper's own runs: src/data/datasets/imagenet100.py of its code.
    "imagenet100-animals": """
        n01440764 n01443537 n01484850 n01491361 n01494475 n01496331 n01498041 n01514668 n01514859 n01531178 n01537544
        n01560419 n01582220 n01592084 n01601694 n01608432 n01614925 n01622779 n01630670 n01632458 n01632777 n01644900
        n01664065 n01665541 n01667114 n01667778 n01675722 n01677366 n01685808 n01687978 n01693334 n01695060 n01698640
        n01728572 n01729322 n01729977 n01734418 n01735189 n01739381 n01740131 n01742172 n01749939 n01751748 n01753488
        n01755581 n01756291 n01770081 n01770393 n01773157 n01773549 n01773797 n01774384 n01774750 n01775062 n01776313
        n01795545 n01796340 n01798484 n01806143 n01818515 n01819313 n01820546 n01824575 n01828970 n01829413 n01833805
        n01843383 n01847000 n01855672 n01860187 n01877812 n01883070 n01910747 n01914609 n01924916 n01930112 n01943899
        n01944390 n01950731 n01955084 n01968897 n01978287 n01978455 n01984695 n01985128 n01986214 n02002556 n02006656
        n02007558 n02011460 n02012849 n02013706 n02018207 n02018795 n02027492 n02028035 n02037110 n02051845 n02058221
        n02077923
    """,
}

PUBLISHED = ("elpv", *IMAGENET100, *TORCHVISION_SETS)


def published_source(name: str, *, root: Path) -> Source:
    """The data set `name`, one of PUBLISHED, whose files lie in, or are downloaded to, `root`.

    Raises ValueError, saying what to do, if the set is not there and cannot be downloaded.
    """
    if name in TORCHVISION_SETS:
        return _torchvision(name, root)
    if name in IMAGENET100:
        return _imagenet100(name, root)
    return _elpv()


def _imagenet100(name: str, root: Path) -> Source:
    wnids = IMAGENET100[name].split()
    folders = (root / name, root / "imagenet")
    for folder in folders:
        parts = {split: [folder / split / wnid for wnid in wnids] for split in ("train", "val")}
        if all(part.is_dir() for split in parts.values() for part in split):
            files = {split: [file for part in parts[split] for file in image_files(part)] for split in parts}
            return split_source(folder, files)
    raise ValueError(
        f"--data {name} needs train/ and val/, each with the 100 folders {wnids[0]} ... {wnids[-1]} of ImageNet, in "
        f"{folders[0]} or {folders[1]}; put them there or name another --data-root."
    )


def _torchvision(name: str, root: Path) -> Source:
    from torchvision import datasets

    published = TORCHVISION_SETS[name]
    dataset = getattr(datasets, published.dataset)
    # Sets of files take a function that opens a path: this one returns the path, so that no picture is decoded here.
    loader = {"loader": Path} if "loader" in inspect.signature(dataset).parameters else {}

    def open_splits(*, download: bool) -> dict[str, Any]:
        return {split: dataset(root, download=download, **loader, **of) for split, of in published.splits.items()}

    try:
        parts = open_splits(download=False)
    except RuntimeError:  # torchvision's error for files that are missing or have another checksum
        try:
            parts = open_splits(download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--data {name} is not complete in {root / published.folder} and cannot be downloaded ({error}); put "
                f"there {published.contents}, or name another --data-root."
            ) from None
    splits, classes = split_ranges(parts), parts["train"].classes
    if loader:
        files, labels = (list(column) for column in zip(*(example for part in parts.values() for example in part)))
    elif name == "pets37":  # a set of files whose class takes no loader
        files, labels = ([x for part in parts.values() for x in getattr(part, of)] for of in ("_images", "_labels"))
    else:  # arrays in memory
        columns = (part.targets if hasattr(part, "targets") else part.labels for part in parts.values())
        labels = [int(label) for column in columns for label in column]
        picture = functools.partial(_first, ConcatDataset(parts.values()))
        files = [path for path in sorted((root / published.folder).rglob("*")) if path.is_file()]
        return _source(labels, splits, classes, files, picture=picture)
    return _source(labels, splits, classes, files, root=root)


def _elpv() -> Source:
    """Electroluminescence images of solar cells; the class is the probability in per cent that a cell is defective."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None or not package.submodule_search_locations:
        raise ValueError("--data elpv needs the package elpv-dataset: pip install elpv-dataset.")
    root = Path(package.submodule_search_locations[0], "data")
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line]
    probabilities = [float(probability) for _, probability, _ in rows]
    levels = sorted(set(probabilities))
    labels = [levels.index(probability) for probability in probabilities]
    files = [root / name for name, _, _ in rows]
    classes = [f"{100 * level:.0f} %" for level in levels]
    return _source(labels, {"train": range(len(files))}, classes, files, root=root)


def _first(examples: ConcatDataset[Any], i: int) -> Picture:
    return examples[i][0]


def _source(
    labels: list[int] | None,
    splits: Mapping[str, range],
    classes: Sequence | None,
    files: list[Path],
    *,
    root: Path | None = None,
    picture: Callable[[int], Picture] | None = None,
) -> Source:
    """A source whose pictures are the files, which lie below `root`, or are what `picture` returns."""
    if root is not None:
        names = [file.relative_to(root).as_posix() for file in files]
    else:
        names = [f"{split}/{i}" for split, part in splits.items() for i in range(len(part))]
    if labels and classes and max(labels) >= len(classes):  # part of a set: labels of the whole, names of the part
        present = sorted(set(labels))
        labels = [present.index(label) for label in labels]
    # Classes of Imagenette have several names each.
    class_names = tuple(name if isinstance(name, str) else name[0] for name in classes) if classes else None
    return Source(picture or files.__getitem__, names, labels, splits, class_names, files)
