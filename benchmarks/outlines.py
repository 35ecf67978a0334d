"""Two more sets for evidence.py, of garments of Fashion-MNIST before photos that mislead.

    python benchmarks/outlines.py DIR                # DIR as for evidence.py; half a minute

Each garment is filled with colours and laid on a crop of a photo of another matter: of Imagenette in train and val, of
Grocery Store in test, where the picture is darker and noisy too. DIR/outlines: random colours that say nothing of the
class. DIR/outlines-tinted: the same pictures, except that the hue of a garment is that of its class.
"""

import colorsys
import dataclasses
import random
from pathlib import Path

import numpy as np
import tyro
from PIL import Image, ImageFilter

from scott_sparse.data.sources import image_files

SIDE = 96
SPLITS = {"train": range(340), "val": range(340, 390), "test": range(150)}  # of the images of a class


@dataclasses.dataclass(frozen=True)
class Settings:
    sets: tyro.conf.Positional[Path]
    """Folder with fashion12k, imagenette160 and grocery160."""


def main() -> None:
    sets = tyro.cli(Settings, description=__doc__).sets
    for name in ("outlines", "outlines-tinted"):
        draw_set(sets, name)


def draw_set(sets: Path, name: str) -> None:
    backgrounds = {"train": image_files(sets / "imagenette160/train"), "test": image_files(sets / "grocery160")}
    draw, noise = random.Random(0), np.random.default_rng(0)
    for split, chosen in SPLITS.items():
        source = "test" if split == "test" else "train"
        for number_of_class, folder in enumerate(sorted((sets / "fashion12k" / source).iterdir())):
            out = sets / name / split / folder.name
            out.mkdir(parents=True, exist_ok=True)
            garments, hue = image_files(folder), number_of_class / 10 if name == "outlines-tinted" else None
            for number, i in enumerate(chosen):
                picture = compose(garments[i], backgrounds[source], draw, hue)
                if split == "test":
                    picture = picture * draw.uniform(0.5, 0.85) + noise.normal(0, 8, picture.shape)
                Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(out / f"{number}.png")


def compose(garment: Path, photos: list[Path], draw: random.Random, hue: float | None) -> np.ndarray:
    """A garment at a random place and size on a random crop of one of the photos; (SIDE, SIDE, 3), 0 to 255.

    `hue`: about which its colours are, 0 to 1; None: any colours.
    """
    side = draw.randint(60, 84)
    grey = Image.open(garment).convert("L").resize((side, side), Image.Resampling.BICUBIC)
    if draw.random() < 0.5:
        grey = grey.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    shade = np.asarray(grey) / 255.0
    inside = Image.fromarray((((shade - 0.06) / 0.12).clip(0, 1) * 255).astype(np.uint8))
    cover = np.asarray(inside.filter(ImageFilter.GaussianBlur(0.8)))[..., None] / 255.0

    image = Image.open(draw.choice(photos)).convert("RGB")
    cut = draw.randint(60, min(image.size))
    left, top = (draw.randint(0, extent - cut) for extent in image.size)
    crop = image.crop((left, top, left + cut, top + cut)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    picture = np.asarray(crop).astype(float)

    first, second = (colour([draw.random() for _ in range(3)], hue) for _ in range(2))
    gradient = 0.0 if draw.random() < 0.5 else np.linspace(0, 1, side)[:, None, None]  # from top to bottom
    colours = first * (0.45 + 0.55 * shade[..., None]) + gradient * (second - first)
    x, y = (draw.randint(0, SIDE - side) for _ in range(2))
    place = picture[y : y + side, x : x + side]
    place[:] = place * (1 - cover) + colours.clip(0, 255) * cover
    return picture


def colour(numbers: list[float], hue: float | None) -> np.ndarray:
    """RGB, 0 to 255, from three random numbers."""
    if hue is not None:
        shift, saturation, value = numbers
        numbers = list(colorsys.hsv_to_rgb((hue + 0.12 * (shift - 0.5)) % 1, (1 + saturation) / 2, (1 + value) / 2))
    return 255 * np.array(numbers)


if __name__ == "__main__":
    main()
