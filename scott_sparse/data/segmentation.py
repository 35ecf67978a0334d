"""Images with a mask that holds the class of each pixel, for semantic segmentation.

* `petals`: drawn with the flowers; background, petals, centre.
* `pets37`: the trimaps of Oxford-IIIT Pet; background, pet. Its third value, the undecided border, is ignored.
* A folder with images/ and masks/, at its top or below split folders (train/images/a.jpg, train/masks/a.png, or
  images/train/a.jpg, masks/train/a.png). A mask is an indexed or grey PNG of its image's shape; its values are class
  numbers from 0, and `IGNORE` where no class counts. classes.txt in the folder may name the classes, one a line.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track

from scott_sparse.data.dataset import Data, DataConfig, open_data, open_source
from scott_sparse.data.images import Images
from scott_sparse.data.petals import petals_mask
from scott_sparse.data.sources import SPLIT_NAMES, SPLITS, Source, image_files, printable, some, split_ranges
from scott_sparse.model.crops import fixed_crops
from scott_sparse.shapes import Tensor, UInt8

IGNORE = 255
ReadMask = Callable[[str], UInt8[np.ndarray, "H W"]]
_PETS = np.array([IGNORE, 1, 0, IGNORE], dtype=np.uint8)  # of the trimaps' values 1 pet, 2 background, 3 border


@dataclass(frozen=True)
class Segmentation:
    """A data set with masks."""

    data: Data
    read_mask: ReadMask
    """Mask of an image by its name, in the size of its file or another of that shape."""
    classes: tuple[str, ...] | None
    """Class names by value; None: not named."""


def open_segmentation(config: DataConfig, *, short_side: int) -> Segmentation:
    """Raises ValueError for a data set without masks, images without one, and as `open_data`."""
    if config.data == "petals":
        data = open_data(config, short_side=short_side)
        side = int(data.train.sizes[0, 0])
        return Segmentation(data, functools.partial(petals_mask, size=side), ("background", "petals", "centre"))
    if config.data == "pets37":
        trimaps = config.data_root / "oxford-iiit-pet" / "annotations" / "trimaps"
        data = open_data(config, short_side=short_side)
        if not trimaps.is_dir():
            raise ValueError(f"--data pets37 has no masks: put the data set's annotations/trimaps/ in {trimaps}.")

        def trimap(name: str) -> UInt8[np.ndarray, "H W"]:
            return _PETS[read_png(trimaps / f"{Path(name).stem}.png")]

        return Segmentation(data, trimap, ("background", "pet"))
    folder = Path(config.data or "").expanduser()
    if config.data is None or not folder.is_dir():
        raise ValueError(f"--data {config.data}: expected petals, pets37, or a folder with images/ and masks/.")
    source = _pairs(folder)
    names = folder / "classes.txt"
    return Segmentation(
        open_source(source, config, title=str(folder.resolve()), short_side=short_side),
        lambda name: read_png(_mask_of(folder, folder / name)),
        tuple(names.read_text(encoding="utf-8").split("\n")) if names.is_file() else None,
    )


def _pairs(folder: Path) -> Source:
    by_split: dict[str, list[Path]] = {name: [] for name in SPLITS}
    for file in image_files(folder):
        parts = file.relative_to(folder).parts[:-1]
        if "images" in parts:
            by_split[next((SPLIT_NAMES[p.lower()] for p in parts if p.lower() in SPLIT_NAMES), "train")].append(file)
    files = [file for part in by_split.values() for file in part]
    missing = [file.relative_to(folder) for file in files if not _mask_of(folder, file).is_file()]
    if not by_split["train"] or missing:
        found = f"{len(missing):,} of {len(files):,} images have no mask ({some(missing)})" if missing else "no images/"
        raise ValueError(
            f"--data {folder}: {found}; expected images/NAME.jpg with masks/NAME.png, at the top, or in train/ and "
            "where they exist val/ and test/."
        )
    names = [file.relative_to(folder).as_posix() for file in files]
    # Of one class each: without published splits a tenth is held out for test and another for val, as of a class.
    splits = split_ranges({name: part for name, part in by_split.items() if part})
    return Source(files.__getitem__, names, [0] * len(files), splits, None, files, "only pixels have one")


def _mask_of(folder: Path, image: Path) -> Path:
    parts = list(image.relative_to(folder).with_suffix(".png").parts)
    parts[parts.index("images")] = "masks"
    return folder.joinpath(*parts)


def read_png(path: Path) -> UInt8[np.ndarray, "H W"]:
    """The values of an indexed, grey or binary PNG. Raises ValueError for another, or a damaged one."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L", "1"):
                raise ValueError(f"mode {image.mode}, expected an indexed (P) or grey (L) PNG that holds class numbers")
            return np.array(image).astype(np.uint8)
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"mask {path} cannot be read: {' '.join(str(error).split())}.") from None


def read_masks(images: Images, read: ReadMask, *, size: tuple[int, int], what: str) -> UInt8[Tensor, "n H W"]:
    """The masks of images as `eval_images` crops and resizes these; a pixel has the value nearest to its centre.

    Raises ValueError for a mask of another aspect ratio than its image.
    """
    masks = torch.empty(len(images), *size, dtype=torch.uint8)
    for i, name in enumerate(track(images.names, description=f"masks of {what}", transient=True)):
        mask = read(name)
        (high, wide), (image_high, image_wide) = mask.shape, images.sizes[i].tolist()
        if abs(high * image_wide - wide * image_high) > max(mask.shape):  # beyond the rounding of a resized image
            found = f"{high} x {wide} pixels, its image {image_high} x {image_wide}"
            raise ValueError(f"the mask of {printable(name)} has {found} (upright); give both the same shape.")
        top, left, height, width = fixed_crops(torch.tensor([mask.shape]), size=size)[0][0, 0].tolist()
        rows, columns = (
            first + np.floor((np.arange(count) + 0.5) * extent / count).astype(int)
            for first, count, extent in ((top, size[0], height), (left, size[1], width))
        )
        masks[i] = torch.from_numpy(mask[rows[:, None], columns])
    return masks


def class_names(masks: Mapping[str, UInt8[Tensor, "n H W"]], names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the classes in the masks of `train`, by value; their numbers where they have no names.

    Raises ValueError for a single class, for one that is in another role but not in train, and for a role without any.
    """
    present = {role: set(part.unique().tolist()) - {IGNORE} for role, part in masks.items()}
    if len(present["train"]) < 2:
        raise ValueError(
            f"the training masks hold class {some(sorted(present['train'])) or 'none'} alone ({IGNORE} is ignored); a "
            "second one is needed: where 255 marks the object, write 1 instead."
        )
    for role, classes in present.items():
        if not classes:
            raise ValueError(
                f"all pixels in the masks of {role} are {IGNORE}, which is ignored; move some images there."
            )
        if missing := sorted(classes - present["train"]):
            remedy = "move some images that show it to train"
            raise ValueError(f"class {some(missing)} is in masks of {role} but in none of train; {remedy}.")
    count = max(present["train"]) + 1
    named = [name.strip() for name in names or ()]
    return tuple(named[i] if i < len(named) and named[i] else str(i) for i in range(count))
