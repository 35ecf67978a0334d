"""Images of good parts, and of good and defective ones to test on, with masks of the defects where there are some.

* A folder in the layout of MVTec AD: train/good, test/good, test/DEFECT, and masks in ground_truth/DEFECT, whose names
  are those of the images, with or without _mask. Or any data set with labels of which one is called good.
* Two folders, of good images and of test images, the latter with or without folders good and DEFECT; masks by --masks.
* `elpv`: electroluminescence images of solar cells; those that are defective with probability 0 are good, those with a
  third are left out.
* `petals`: flowers, and flowers with a drawn scratch, a drawn spot or a missing petal, and the exact mask of it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from scott_sparse.data.dataset import Data, DataConfig, open_data, open_source
from scott_sparse.data.images import Images
from scott_sparse.data.petals import render
from scott_sparse.data.segmentation import read_png
from scott_sparse.data.sources import Source, image_files, some, split_ranges
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Tensor, UInt8

GOOD = ("good", "ok", "normal", "0 %")
UNDECIDED = ("33 %",)  # of elpv
LAYOUT = "expected train/good, test/good and test/DEFECT (masks in ground_truth/DEFECT), or --good and --test FOLDER"
DRAWN_DEFECTS = ("scratch", "spot", "missing petal")
DRAWN = {"train/good": 1000, "test/good": 200, **{f"test/{kind}": 100 for kind in DRAWN_DEFECTS}}
LEAST_SHARE = 0.01  # of the image that a missing petal leaves open


@dataclass(frozen=True)
class Inspection:
    """Good images to learn from, and test images."""

    data: Data
    """Of which `train` and `test` are used, as they are here."""
    kinds: list[str | None]
    """Of each test image: "good", the name of its defect, or None where nothing says it."""
    read_mask: Callable[[str], UInt8[np.ndarray, "H W"]] | None
    """Where a test image is defective, by its name; None where there are no masks."""


def open_inspection(
    config: DataConfig, *, good: Path | None, test: Path | None, masks: Path | None, short_side: int
) -> Inspection:
    """`good`, `test` and `masks` are folders, in place of a data set.

    Raises ValueError without good or without test images, for defective images without a mask where others have one,
    and as `open_data`.
    """
    if (good is None) != (test is None) or (good is not None and config.data is not None):
        raise ValueError(f"give --data, or both --good and --test; for --data {LAYOUT}.")
    if masks is not None and good is None:
        raise ValueError("--masks belongs to --good and --test; with --data masks lie in its folder ground_truth.")
    if config.data == "petals":
        source = drawn_source(max(64, short_side // 2))
        data = open_source(source, config, title="petals with defects", short_side=short_side)
        return Inspection(data, _kinds(data.test), functools.partial(drawn_mask, side=int(data.train.sizes[0, 0])))
    if good is not None and test is not None:
        source = _two_folders(good, test)
        data = open_source(source, config, title=str(good.resolve()), short_side=short_side)
    else:
        data = open_data(config, short_side=short_side)
        masks = Path(config.data or "", "ground_truth").expanduser()
        masks = masks if masks.is_dir() else None
    if data.test is None:
        raise ValueError(f"--data {config.data} has no test images; {LAYOUT}.")
    data, kinds = _by_class(data, str(config.data)) if data.classes else (data, _kinds(data.test))
    if masks is None:
        return Inspection(data, kinds, None)
    return _with_masks(data, kinds, masks)


def _two_folders(good: Path, test: Path) -> Source:
    """Under the names that the images would have in one folder."""
    parts = {}
    for split, folder in (("train", good), ("test", test)):
        parts[split] = image_files(folder) if folder.is_dir() else []
        if not parts[split]:
            raise ValueError(f"--{'good' if split == 'train' else 'test'} {folder}: no image there; {LAYOUT}.")
    names = [f"train/good/{file.relative_to(good).as_posix()}" for file in parts["train"]]
    names += [f"test/{file.relative_to(test).as_posix()}" for file in parts["test"]]
    files = [*parts["train"], *parts["test"]]
    return Source(files.__getitem__, names, None, split_ranges(parts), None, files)


def _kinds(images: Images | None) -> list[str | None]:
    """By the folder below the split: test/scratch/000.png."""
    assert images is not None
    folders = [Path(name).parts[1:-1] for name in images.names]
    return [None if not inside else "good" if inside[0].lower() in GOOD else inside[0] for inside in folders]


def _by_class(data: Data, name: str) -> tuple[Data, list[str | None]]:
    """Of labelled images: the good ones of train; of test what is decided."""
    assert data.classes is not None and data.test is not None
    assert data.train.labels is not None and data.test.labels is not None
    good = [label for label, of_label in enumerate(data.classes) if of_label.lower() in GOOD]
    if not good:
        raise ValueError(f"--data {name} has no class called good, but {some(data.classes)}; {LAYOUT}.")
    is_good = torch.isin(data.train.labels, torch.tensor(good))
    decided = torch.tensor([data.classes[label] not in UNDECIDED for label in data.test.labels.tolist()])
    test = data.test[decided.nonzero()[:, 0]]
    assert test.labels is not None
    kinds = ["good" if label in good else data.classes[label] for label in test.labels.tolist()]
    return replace(data, train=data.train[is_good.nonzero()[:, 0]], test=test), [*kinds]


def _with_masks(data: Data, kinds: list[str | None], masks: Path) -> Inspection:
    """A test image without a mask is good where no folder says what it is."""
    assert data.test is not None
    inside = [Path(*Path(name).parts[1:]) for name in data.test.names]

    def find(image: Path) -> Path | None:
        candidates = (masks / image.with_name(f"{image.stem}{ending}.png") for ending in ("_mask", ""))
        return next(filter(Path.is_file, candidates), None)

    found = {name: find(path) for name, path in zip(data.test.names, inside)}
    kinds = [kind or ("defect" if found[name] else "good") for name, kind in zip(data.test.names, kinds)]
    missing = [path for path, name, kind in zip(inside, found, kinds) if kind != "good" and not found[name]]
    if missing:
        raise ValueError(
            f"{len(missing):,} of {len(kinds):,} test images are defective and have no mask in {masks} "
            f"({some(missing)}); expected {masks / missing[0].parent / missing[0].stem}_mask.png."
        )
    return Inspection(data, kinds, lambda name: _read_mask(found[name]))


def _read_mask(path: Path | None) -> UInt8[np.ndarray, "H W"]:
    assert path is not None
    return (read_png(path) > 0).astype(np.uint8)


def drawn_source(side: int) -> Source:
    """Flowers of `side` pixels, good and with defects, in the layout of MVTec AD."""
    names = [f"{folder}/{i}" for folder, count in DRAWN.items() for i in range(count)]
    splits = split_ranges({"train": range(DRAWN["train/good"]), "test": range(len(names) - DRAWN["train/good"])})
    return Source(functools.partial(_drawn_picture, names, side), names, None, splits, None, files=())


def drawn_mask(name: str, *, side: int) -> UInt8[np.ndarray, "side side"]:
    """1 where the flower of that name is defective."""
    return _drawn(name, side)[1].numpy()


def _drawn_picture(names: list[str], side: int, i: int) -> Image.Image:
    return Image.fromarray(_drawn(names[i], side)[0].permute(1, 2, 0).contiguous().numpy())


def _drawn(name: str, side: int) -> tuple[UInt8[Tensor, "3 side side"], UInt8[Tensor, "side side"]]:
    split, kind, number = name.split("/")
    folders = [folder for folder in DRAWN if folder.startswith(split)]
    index = int(number) + sum(
        DRAWN[folder] for folder in folders[: folders.index(f"{split}/{kind}")]
    )  # no flower twice
    if kind == "good":
        return render([index], split=split, size=side)[0][0], torch.zeros(side, side, dtype=torch.uint8)
    return draw_defect(index, kind, split=split, size=side)


def draw_defect(
    index: int, kind: str, *, split: str = "test", size: int = 64
) -> tuple[UInt8[Tensor, "3 side side"], UInt8[Tensor, "side side"]]:
    """A flower of petals with a defect, one of `DRAWN_DEFECTS`, and the mask, 1 where the defect is seen.

    A pure function of its arguments; at another size it is the same picture at another resolution.
    """
    if kind == "missing petal":
        while _missing_petal(index, split, 64)[1].float().mean() < LEAST_SHARE:  # behind a leaf, or too narrow
            index += sum(DRAWN.values())
        return _missing_petal(index, split, size)
    image, _, _ = render([index], split=split, size=size)
    on_flower = render([index], split=split, size=64)[1][0].nonzero()
    generator = generator_at("defect", kind, index)
    a, b, c, d = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    down, across = (on_flower[int(a * len(on_flower))] + 0.5) / 32 - 1  # in [-1, 1], as in petals
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    y, x = grid[:, None] - down, grid[None, :] - across
    angle = torch.tensor(b * torch.pi)
    along, aside = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    if kind == "scratch":
        bend = aside - (c - 0.5) * along.square()
        distance = torch.maximum(bend.abs() - 0.03, along.abs() - (0.3 + 0.3 * d))
    else:
        distance = (along.square() + (aside * (1 + c)).square()).sqrt() - (0.13 + 0.07 * d)
    cover = (0.5 - distance * size / 2).clamp(0, 1)
    tone = _contrasting(image[0], cover)
    painted = torch.lerp(image[0].double(), tone, 0.8 * cover)
    return painted.round().to(torch.uint8), (cover > 0.5).to(torch.uint8)


def _contrasting(image: UInt8[Tensor, "3 side side"], cover: Float[Tensor, "side side"]) -> Float[Tensor, "3 1 1"]:
    """Dark brown over what is light, nearly white over what is dark."""
    is_light = (image.double() * cover).sum() > 110 * 3 * cover.sum()
    return torch.tensor([50.0, 35.0, 25.0] if is_light else [235.0, 235.0, 225.0], dtype=torch.float64)[:, None, None]


def _missing_petal(index: int, split: str, size: int) -> tuple[Tensor, Tensor]:
    _, whole, _ = render([index], split=split, size=size)
    image, left, _ = render([index], split=split, size=size, petal_missing=True)
    return image[0], ((whole[0] == 1) & (left[0] == 0)).to(torch.uint8)
