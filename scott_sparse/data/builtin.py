"""Published sets by name: through torchvision, elpv-dataset and Hugging Face datasets.

torchvision downloads a set where the network allows; otherwise one line says which files to put where.
"""

import bisect
import importlib.util
import inspect
import io
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

from scott_sparse.data.sources import Source, from_files, ranges, walk


class Named(NamedTuple):
    dataset: str  # its class in torchvision.datasets
    splits: dict[str, dict[str, Any]]  # our name of a split: the arguments that ask for it
    folder: str  # where torchvision keeps it, under --data-root
    contents: str


def _by_name(*names: str, **renamed: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": renamed.get(name, name)} for name in (*names, *renamed)}


_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_IMAGENETTE = {"train": {"split": "train", "size": "320px"}, "test": {"split": "val", "size": "320px"}}
_TRAIN_VAL_TEST = _by_name("train", "val", "test")
NAMED = {
    "flowers102": Named("Flowers102", _TRAIN_VAL_TEST, "flowers-102", "jpg/, imagelabels.mat and setid.mat"),
    "pets37": Named("OxfordIIITPet", _by_name("test", train="trainval"), "oxford-iiit-pet", "images/ and annotations/"),
    "imagenette": Named("Imagenette", _IMAGENETTE, "imagenette2-320", "train/ and val/"),
    "cifar10": Named("CIFAR10", _BY_FLAG, "cifar-10-batches-py", "data_batch_1 to _5, test_batch, batches.meta"),
    "cifar100": Named("CIFAR100", _BY_FLAG, "cifar-100-python", "train, test and meta"),
    "stl10": Named("STL10", _by_name("train", "test", unlabelled="unlabeled"), "stl10_binary", "the .bin files"),
    "food101": Named("Food101", _by_name("train", "test"), "food-101", "images/ and meta/"),
    "aircraft": Named("FGVCAircraft", _TRAIN_VAL_TEST, "fgvc-aircraft-2013b", "data/"),
    "dtd": Named("DTD", _TRAIN_VAL_TEST, "dtd", "dtd/images/, dtd/labels/ and dtd/imdb/"),
    "eurosat": Named("EuroSAT", {"train": {}}, "eurosat", "2750/ with a folder per class"),
    "fashion-mnist": Named("FashionMNIST", _BY_FLAG, "FashionMNIST", "raw/ with the four idx files"),
}

# Two sets of 100 ImageNet classes go by one name; 8 classes are in both.
IMAGENET100 = {
    # The usual list: Contrastive Multiview Coding (arXiv 1906.05849), imagenet100.txt of its code.
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


PUBLISHED = ("elpv", *IMAGENET100, *NAMED)


def published_source(name: str, *, root: Path) -> Source:
    """The set called `name`, one of PUBLISHED or hf:OWNER/NAME; files lie in, or are downloaded to, folders of `root`.

    Raises ValueError, naming the remedy, where it is not there and cannot be fetched.
    """
    if name in NAMED:
        return _torchvision(name, root)
    if name in IMAGENET100:
        return _imagenet100(name, root)
    return _elpv() if name == "elpv" else _hugging_face(name.removeprefix("hf:"))


def _imagenet100(data: str, root: Path) -> Source:
    wanted = IMAGENET100[data].split()
    folders = (root / data, root / "imagenet")
    for folder in folders:
        if all((folder / split / wnid).is_dir() for split in ("train", "val") for wnid in wanted):
            found = {
                split: [file for wnid in wanted for file in walk(folder / split / wnid)] for split in ("train", "val")
            }
            return from_files(folder, found)
    raise ValueError(
        f"--data {data} needs train/ and val/, each with the 100 folders {wanted[0]} ... {wanted[-1]} of ImageNet, in "
        f"{folders[0]} or {folders[1]}; put them there or name another --data-root."
    )


def _torchvision(data: str, root: Path) -> Source:
    from torchvision import datasets

    named = NAMED[data]
    dataset = getattr(datasets, named.dataset)
    loader = {"loader": Path} if "loader" in inspect.signature(dataset).parameters else {}  # a path is not opened

    def open_splits(*, download: bool) -> dict[str, Any]:
        return {name: dataset(root, download=download, **loader, **split) for name, split in named.splits.items()}

    try:
        parts = open_splits(download=False)
    except RuntimeError:  # torchvision's way to say that files are missing or not as published
        try:
            parts = open_splits(download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"--data {data} is not whole in {root / named.folder} and cannot be downloaded ({error}); put there "
                f"{named.contents}, or name another --data-root."
            ) from None
    if loader:
        pictures, labels = (list(column) for column in zip(*(example for part in parts.values() for example in part)))
    elif data == "pets37":  # files, but its class takes no loader
        pictures = [path for part in parts.values() for path in part._images]
        labels = [label for part in parts.values() for label in part._labels]
    else:
        pictures = Column(list(parts.values()), lambda example: example[0])
        targets = (part.targets if hasattr(part, "targets") else part.labels for part in parts.values())
        labels = [int(label) for part in targets for label in part]
    kept = (path for path in sorted((root / named.folder).rglob("*")) if path.is_file())
    files = pictures if isinstance(pictures, list) else list(kept)
    return _published(pictures, labels, ranges(parts), parts["train"].classes, files, root)


def _elpv() -> Source:
    """Electroluminescence of solar cells; the class is the probability, in per cent, that the cell is defective."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None:
        raise ValueError("--data elpv needs the package elpv-dataset: pip install elpv-dataset.")
    root = Path(package.submodule_search_locations[0], "data")
    rows = [line.split() for line in (root / "labels.csv").read_text().splitlines() if line]
    found = sorted({float(probability) for _, probability, _ in rows})
    labels = [found.index(float(probability)) for _, probability, _ in rows]
    files = [root / name for name, _, _ in rows]
    return _published(files, labels, {"train": range(len(files))}, [f"{100 * p:.0f} %" for p in found], files, root)


def _hugging_face(name: str) -> Source:
    """The image column and, where there is one, the class column of a data set in the Hub's formats."""
    try:
        import datasets
    except ImportError:
        raise ValueError(f"--data hf:{name} needs the package datasets: pip install datasets.") from None
    try:
        loaded = datasets.load_dataset(name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"--data hf:{name} cannot be loaded: {error}") from None
    features = loaded["train"].features if "train" in loaded else {}
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not images:
        raise ValueError(
            f"--data hf:{name} has the splits {', '.join(loaded)}, and in train the columns {', '.join(features)}; "
            "expected a split train with a column of images."
        )
    label = "label" if "label" in labels else labels[0] if labels else None
    ours = {"validation": "val", "valid": "val", "dev": "val", "unsupervised": "unlabelled", "unlabeled": "unlabelled"}
    parts = {}
    for split, part in loaded.items():
        split = ours.get(split, split)
        if split == "test" and label and max(part[label]) < 0:  # a contest's hidden labels
            split = "unlabelled"
        if split in ("train", "val", "test", "unlabelled"):
            parts[split] = part
    as_bytes = datasets.Image(decode=False)
    encoded = [part.select_columns(images[0]).cast_column(images[0], as_bytes) for part in parts.values()]
    return _published(
        Column(encoded, lambda row: _encoded(row[images[0]])),
        [x for part in parts.values() for x in part[label]] if label else None,
        ranges(parts),
        features[label].names if label else None,
        [Path(file["filename"]) for part in parts.values() for file in part.cache_files],
        Path(),
    )


def _encoded(image: dict[str, Any]) -> io.BytesIO | Path:
    return io.BytesIO(image["bytes"]) if image["bytes"] else Path(image["path"])


def _published(pictures, labels, splits, classes, files, root: Path) -> Source:
    if isinstance(pictures, list):
        names = [path.relative_to(root).as_posix() for path in pictures]
    else:
        names = [f"{split}/{i}" for split, part in splits.items() for i in range(len(part))]
    if labels and max(labels) >= len(classes):  # a part of a set: classes are numbered as in the whole, named as here
        present = sorted(set(labels))
        labels = [present.index(label) for label in labels]
    if classes:  # Imagenette's have several names each
        classes = tuple(name if isinstance(name, str) else name[0] for name in classes)
    return Source(pictures, names, labels, splits, classes, files)


class Column(Sequence):
    """One thing about each example of several data sets, laid one behind the other, looked up when asked for."""

    def __init__(self, parts: Sequence[Any], look: Callable[[Any], Any]):
        self.parts, self.look = parts, look
        self.ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int):
        part = bisect.bisect_right(self.ends, i)
        return self.look(self.parts[part][i - (self.ends[part] - len(self.parts[part]))])
