"""Images in memory: decoded once to uint8, never again.

A source is the embedded set `petals` or a folder in one of three forms:
* `train/`, and `val/` or `test/`, each with class folders or plain images;
* class folders (`folder/class/image.jpg`): a tenth of each class is held out, chosen by a hash of the file's path;
* any folder of images, recursively: no labels.
Pretraining sees `train` (with `val` where there is also a `test`) and never a held-out image; it never needs labels.
"""

import dataclasses
import hashlib
import os
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from scott_sparse.petals import CLASSES, petals
from scott_sparse.shapes import Int, Tensor, UInt8

EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"}
PETALS_COUNT = {"train": 4000, "val": 1000, "test": 1000}


@dataclasses.dataclass(frozen=True)
class Images:
    """Decoded images of any sizes in one flat buffer, with labels where they are known."""

    pixels: UInt8[Tensor, " bytes"]
    sizes: Int[Tensor, "n 2"]
    labels: Int[Tensor, " n"] | None

    @classmethod
    def of(
        cls, images: list[UInt8[Tensor, "3 _ _"]] | UInt8[Tensor, "n 3 _ _"], labels: Int[Tensor, " n"] | None = None
    ) -> "Images":
        """Copy a list of images, or the rows of one tensor, into a buffer."""
        sizes = torch.tensor([image.shape[1:] for image in images])
        return cls(torch.cat([image.flatten() for image in images]), sizes, labels)

    def __len__(self) -> int:
        return len(self.sizes)

    def batch(self, indices: Int[Tensor, " B"]) -> tuple[UInt8[Tensor, "B 3 H W"], Int[Tensor, "B 2"]]:
        """Images padded with zeros at the bottom and right to a common size, and their true (H, W)."""
        sizes = self.sizes[indices]
        padded = torch.zeros(len(indices), 3, *sizes.amax(0).tolist(), dtype=torch.uint8)
        for row, index in zip(padded, indices.tolist()):
            h, w = self.sizes[index].tolist()
            start = int(self._starts[index])
            row[:, :h, :w] = self.pixels[start : start + 3 * h * w].view(3, h, w)
        return padded, sizes

    def __post_init__(self):
        lengths = 3 * self.sizes.prod(1)
        object.__setattr__(self, "_starts", lengths.cumsum(0) - lengths)


@dataclasses.dataclass(frozen=True)
class Data:
    """What pretraining sees, what is held out from it, and the names of the classes (None without labels)."""

    train: Images
    held_out: Images | None
    classes: tuple[str, ...] | None


def short_side_for(sides: tuple[int, int]) -> int:
    """Shorter side to decode to for views of `sides` pixels: twice a small view, as crops enlarge; 256 for 224."""
    return max(min(2 * max(sides), 256), round(max(sides) * 256 / 224))


def open_data(source: str, *, short_side: int) -> Data:
    """Read `petals` or a folder; images with a shorter side above `short_side` pixels are shrunk to it.

    Raises ValueError where there is no such folder, no image in it, an empty class folder, or an unreadable file.
    """
    if source == "petals":
        return _open_petals(short_side)
    root = Path(source).expanduser()
    if not root.is_dir():
        raise ValueError(f"--data {source}: no such folder; expected 'petals' or a folder of images.")
    if (root / "train").is_dir():
        splits = {name: _find_images(root / name) for name in ("train", "val", "test") if (root / name).is_dir()}
    else:
        splits = {"train": _find_images(root)}
    classes = _classes(splits)
    if "test" in splits:
        train, held_out = splits["train"] + splits.get("val", []), splits["test"]
    elif "val" in splits:
        train, held_out = splits["train"], splits["val"]
    elif classes:
        train, held_out = _hold_out_a_tenth(splits["train"])
    else:
        train, held_out = splits["train"], []
    return Data(
        train=_decode(train, classes, short_side),
        held_out=_decode(held_out, classes, short_side) if held_out else None,
        classes=classes,
    )


def _open_petals(short_side: int) -> Data:
    split = {}
    for name in ("train", "test"):
        images, _, labels = petals(name, PETALS_COUNT[name], size=max(64, short_side // 2))
        split[name] = Images.of(images, labels)
    return Data(split["train"], split["test"], CLASSES)


def _find_images(root: Path) -> list[tuple[Path, Path]]:
    """(root, path relative to root) of every image below `root`, sorted; hidden files and folders are passed over."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        found += [(root, path.relative_to(root)) for path in paths if path.suffix.lower() in EXTENSIONS]
    if not found:
        raise ValueError(f"no image in {root}; expected files ending in {', '.join(sorted(EXTENSIONS))}.")
    return found


def _classes(splits: dict[str, list[tuple[Path, Path]]]) -> tuple[str, ...] | None:
    """Names of the class folders if every image lies in one, None otherwise. An empty class folder is a mistake."""
    files = [file for split in splits.values() for file in split]
    if any(len(relative.parts) != 2 for _, relative in files):
        return None
    for split in splits.values():
        root, filled = split[0][0], {relative.parts[0] for _, relative in split}
        for folder in sorted(root.iterdir()):
            if folder.is_dir() and not folder.name.startswith(".") and folder.name not in filled:
                raise ValueError(f"class folder {folder} holds no image; add images or remove the folder.")
    names = sorted({relative.parts[0] for _, relative in files})
    return tuple(names) if len(names) > 1 else None


def _hold_out_a_tenth(files: list[tuple[Path, Path]]) -> tuple[list, list]:
    """Split off a tenth of each class by a hash of the relative path: the same on every machine, in any order."""
    by_class = defaultdict(list)
    for root, relative in files:
        by_class[relative.parts[0]].append((root, relative))
    train, held_out = [], []
    for members in by_class.values():
        members.sort(key=lambda file: hashlib.sha256(file[1].as_posix().encode()).digest())
        tenth = max(round(len(members) / 10), 1) if len(members) > 1 else 0
        held_out += members[:tenth]
        train += members[tenth:]
    return sorted(train), sorted(held_out)


def _decode(files: list[tuple[Path, Path]], classes: tuple[str, ...] | None, short_side: int) -> Images:
    def decode(file):
        path = file[0] / file[1]
        try:
            return _decode_file(path, short_side)
        except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            return f"{path} ({error or type(error).__name__})"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(decode, files))
    unreadable = [image for image in images if isinstance(image, str)]
    if unreadable:
        more = f" and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise ValueError(f"unreadable image {unreadable[0]}{more}; remove or repair the file.")
    labels = torch.tensor([classes.index(relative.parts[0]) for _, relative in files]) if classes else None
    return Images.of(images, labels)


def _decode_file(path: Path, short_side: int) -> UInt8[Tensor, "3 H W"]:
    with Image.open(path) as image:
        image.draft("RGB", (short_side, short_side))  # JPEG only: decode at a fraction not below the wanted size
        image = ImageOps.exif_transpose(image).convert("RGB")
        scale = short_side / min(image.size)
        if scale < 1:
            size = [max(round(side * scale), short_side) for side in image.size]
            image = image.resize(size, Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
