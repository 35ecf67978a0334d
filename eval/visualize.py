"""What an encoder sees, as pictures: tokens.png, attention.png and similarity.png, in RUN/pictures or --out.

python eval/visualize.py runs/demo --data petals
python eval/visualize.py runs/photos --data PHOTOS --image-size 448 --images 4

A column for each image. tokens.png: the first three principal components of the patches of all images as red, green and
blue, before and after pretraining; equal colours mean similar features. Then those of the foreground alone: the patches
on one side of the first component, which is an object where all images show one, and any half of the patches elsewhere.
attention.png: how much attention each patch receives in the last block, by head. similarity.png: cosine similarity of
the patches A, B, ... of the first image to all patches of all images.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import checkout  # noqa: F401 - first
import torch
import tyro

from scott_sparse.data.dataset import DataConfig, open_some
from scott_sparse.evaluation.subject import ProbeConfig, open_encoder, run_script
from scott_sparse.evaluation.visualize import Point, draw_attention, draw_similarity, draw_tokens, titles_of


@dataclasses.dataclass(frozen=True)
class VisualizeConfig:
    run: tyro.conf.Positional[str]
    """Run folder of train/pretrain.py."""
    source: DataConfig = DataConfig()
    weights: Literal["target", "context"] = "target"
    """Which encoder of the run: the EMA target, or the context encoder, which the optimizer trained."""
    images: int = 8
    """How many images, evenly spaced over val (without labels, over those to pretrain on)."""
    image_size: int | tuple[int, int] | None = None
    """Side, or height and width, of the images in pixels. Default: twice that of training.
    The larger, the smaller the part of the scene that a patch shows: details and outlines rather than objects."""
    stride: int | None = None
    """Pixels between tokens, a divisor of the patch size; below it patches overlap, at more time. Default: halved
    until there are 40 rows, at most twice."""
    points: tuple[Point, ...] = ((0.5, 0.5), (0.3, 0.5), (0.1, 0.1))
    """Patches of similarity.png: pairs of places in the first image, down and across, from 0 to 1."""
    out: Path | None = None
    """Folder for the pictures. Default: RUN/pictures."""


def main(config: VisualizeConfig) -> None:
    def open_at(image_size, init=None):
        return open_encoder(ProbeConfig(config.run, init, weights=config.weights, image_size=image_size))

    if config.images < 1:
        raise ValueError(f"images {config.images} must be 1 or more.")
    encoder = open_at(config.image_size)
    height, width = encoder.size
    size = (height, width) if config.image_size else (2 * height, 2 * width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    before, after = open_at(size, "random"), open_at(size)
    name = "untrained" if before.name == "random" else before.name
    encoders = {name: before.model.to(device), after.name: after.model.to(device)}
    images, classes = open_some(encoder.source(config.source), config.images, short_side=2 * max(size))
    out = config.out or Path(config.run, "pictures")
    out.mkdir(parents=True, exist_ok=True)
    how = {"size": size, "titles": titles_of(images, classes)}
    tokens = draw_tokens(out / "tokens.png", images, encoders, stride=config.stride, **how)
    draw_similarity(out / "similarity.png", images, tokens, points=config.points, **how)
    draw_attention(out / "attention.png", images, after.model, stride=config.stride, **how)
    grid = " x ".join(map(str, tokens[after.name].shape[1:3]))
    print(f"{out}: tokens.png, similarity.png, attention.png; {grid} tokens, images of {size[0]} x {size[1]} pixels")


if __name__ == "__main__":
    run_script(VisualizeConfig, main)
