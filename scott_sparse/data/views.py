"""Two differently coloured views of one crop, for a whole batch at once, on whichever device trains.

The context encoder and the target encoder must see the *same* region, else a token could not be asked to
predict its counterpart; only their colours may differ. So each crop is one box and one flip, resampled once
and then coloured twice.

Every random number comes from one CPU generator, for the global batch, before any pixel is touched
(`draw_views`). A process applies its rows of that draw (`make_views`): views depend neither on the device nor
on the number of processes.

Axes: B images, V crops of each, K = 2 colourings of each crop (context, target), S = 6 colour steps; H W are
the sides of the padded cuts, h w those of the view. A box is (top, left, height, width) in pixels of the image.

Source: arXiv 2502.18056 for the recipe; torchvision's v2 transforms for what each operation means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.cli import ADVANCED
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

OPS = ("brightness", "contrast", "saturation", "hue", "grey", "blur")  # `Views.ops` holds indices into this
IDLE = len(OPS)
_, CONTRAST, SATURATION, HUE, GREY, _ = range(IDLE)

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, to torchvision's digits
BLUR_RADIUS = 4  # kernel 9
BOX_TRIES = 10


@dataclass(frozen=True)
class ViewConfig:
    """The distribution of views; the defaults are the paper's.

    With probability `colour` a colouring applies, in random order, those of its three groups that come up:
    jitter (`jitter_p`; its four parts in random order too), greyscale (`grey`) and Gaussian blur of kernel 9
    (`blur`). Otherwise it leaves the crop as it is.

    Raises:
        ValueError: for a value outside its range, naming field, value and range.
    """

    crops: int = 1  # V
    crop_scale: tuple[float, float] = (0.2, 1.0)  # share of the image's area, uniform
    crop_ratio: Annotated[tuple[float, float], ADVANCED] = (3 / 4, 4 / 3)  # width / height, log-uniform
    flip: float = 0.5  # probability
    colour: float = 0.6  # probability
    jitter: Annotated[tuple[float, float, float, float], ADVANCED] = (0.4, 0.4, 0.2, 0.1)  # as OPS
    jitter_p: Annotated[float, ADVANCED] = 0.8  # probability
    grey: Annotated[float, ADVANCED] = 0.1  # probability
    blur: Annotated[float, ADVANCED] = 0.3  # probability
    blur_sigma: Annotated[tuple[float, float], ADVANCED] = (0.1, 2.0)  # pixels, uniform

    def __post_init__(self):
        if self.crops < 1:
            raise ValueError(f"crops is {self.crops}; each image needs at least 1.")
        for name, upper in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= upper:
                raise ValueError(f"{name} is {(low, high)}; expected 0 < low <= high <= {upper}.")
        for name in ("flip", "colour", "jitter_p", "grey", "blur"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; a probability lies between 0 and 1.")
        for name, strength, upper in zip(OPS[:4], self.jitter, (1, 1, 1, 0.5), strict=True):
            if not 0 <= strength <= upper:
                raise ValueError(f"jitter for {name} is {strength}; expected a value between 0 and {upper}.")


@dataclass(frozen=True)
class Views:
    """All that is random about a batch of views.

    Step s of a colouring applies `OPS[ops[s]]`, or nothing for `IDLE`, with `amounts[s]`: the factor for
    brightness, contrast and saturation; the turn for hue (1 is the full circle); sigma in pixels for blur; 0
    for greyscale, which is saturation 0.

    `make_views` reads them on the CPU, where they are drawn, and sends what the device needs.
    """

    boxes: Int[Tensor, "B V 4"]
    flip: Bool[Tensor, "B V"]
    ops: Int[Tensor, "B V K S"]
    amounts: Float[Tensor, "B V K S"]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> "Views":
        """The views of some images only: a process's share of the global draw."""
        return Views(self.boxes[rows], self.flip[rows], self.ops[rows], self.amounts[rows])


def draw_views(sizes: Int[Tensor, "B 2"], config: ViewConfig, *, generator: torch.Generator) -> Views:
    """Draw the views of the global batch; `sizes`: (height, width) of each image in pixels, on the CPU.

    Raises:
        ValueError: if an image has no pixels.
    """
    empty = (sizes < 1).any(1)
    if empty.any():
        raise ValueError(f"image {empty.int().argmax().item()} of the batch has no pixels; leave it out.")
    boxes = _draw_boxes(sizes, config, generator=generator)
    flip = torch.rand(boxes.shape[:2], generator=generator) < config.flip
    ops, amounts = _draw_colours((*boxes.shape[:2], 2), config, generator=generator)
    return Views(boxes, flip, ops, amounts)


def _draw_boxes(sizes: Int[Tensor, "B 2"], config: ViewConfig, *, generator: torch.Generator) -> Int[Tensor, "B V 4"]:
    """torchvision's RandomResizedCrop: the first of ten candidates that fits, else a centred largest box."""
    H, W = rearrange(sizes.double(), "b side -> side b 1 1")
    shape = (len(sizes), config.crops, BOX_TRIES)
    area = _uniform(shape, *config.crop_scale, generator=generator) * H * W
    narrowest, widest = config.crop_ratio
    ratio = _uniform(shape, math.log(narrowest), math.log(widest), generator=generator).exp()
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height >= 1) & (height <= H) & (width >= 1) & (width <= W)

    found = fits.any(-1, keepdim=True)
    first = fits.int().argmax(-1, keepdim=True)
    tallest_box, widest_box = (W / narrowest).round().clamp(min=1), (H * widest).round().clamp(min=1)
    height = torch.where(found, height.gather(-1, first), torch.minimum(H, tallest_box))
    width = torch.where(found, width.gather(-1, first), torch.minimum(W, widest_box))
    u = _uniform((2, *found.shape), 0.0, 1.0, generator=generator)
    top = torch.where(found, u[0] * (H - height + 1), (H - height) / 2).floor()
    left = torch.where(found, u[1] * (W - width + 1), (W - width) / 2).floor()
    return torch.cat([top, left, height, width], dim=-1).long()  # (B, V, 4)


def _draw_colours(
    shape: Sequence[int], config: ViewConfig, *, generator: torch.Generator
) -> tuple[Int[Tensor, "B V K S"], Float[Tensor, "B V K S"]]:
    strength = torch.tensor(config.jitter)
    low, high = 1 - strength, 1 + strength
    low[HUE], high[HUE] = -strength[HUE], strength[HUE]
    jitter = low + (high - low) * torch.rand((*shape, 4), generator=generator)
    sigma = _uniform((*shape, 1), *config.blur_sigma, generator=generator).float()
    amounts = torch.cat([jitter, torch.zeros(*shape, 1), sigma], dim=-1)  # in the order of OPS

    chance = torch.tensor([config.jitter_p, config.grey, config.blur])
    group_on = torch.rand((*shape, 3), generator=generator) < chance
    group_on &= torch.rand((*shape, 1), generator=generator) < config.colour
    group_rank = torch.rand((*shape, 3), generator=generator).argsort(-1)
    jitter_rank = torch.rand((*shape, 4), generator=generator).argsort(-1)

    group = torch.tensor([0, 0, 0, 0, 1, 2])  # of each op
    rank = 4 * group_rank[..., group] + F.pad(jitter_rank, (0, 2))
    on = group_on[..., group]
    order = rank.masked_fill(~on, 12).argsort(-1)  # what does not come up goes last, so that steps are few
    return order.masked_fill(~on.gather(-1, order), IDLE), amounts.gather(-1, order)


def _uniform(shape: Sequence[int], low: float, high: float, *, generator: torch.Generator) -> Float[Tensor, "..."]:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def make_views(
    cuts: UInt8[Tensor, "B V H W 3"], views: Views, *, size: tuple[int, int]
) -> tuple[Float[Tensor, "B V 3 h w"], Float[Tensor, "B 3 h w"]]:
    """The context views of all crops and the target view of the first, normalised, `size` = (h, w).

    `cuts` holds the boxes of `views` as they are in the images, padded below and right to a common size.

    Raises:
        ValueError: if `views` were drawn for another number of images, or for larger boxes.
    """
    if len(cuts) != len(views.boxes):
        raise ValueError(f"cuts of {len(cuts)} images but views of {len(views.boxes)}; slice: views[first:last].")
    _check_extents(cuts, views.boxes[..., 2:])
    return _on(cuts.device).make_views(cuts, views, size=size)


def _on(device: torch.device):
    """How views are made on a device: one by one on a CPU, a batch at a time elsewhere."""
    from scott_sparse.data import views_cpu, views_gpu

    return views_cpu if device.type == "cpu" else views_gpu


def _check_extents(cuts: UInt8[Tensor, "*N H W 3"], extents: Int[Tensor, "*N 2"]) -> None:
    H, W = cuts.shape[-3:-1]
    if ((extents < 1) | (extents > extents.new_tensor([H, W]))).any():
        raise ValueError(
            f"an extent is empty or exceeds the {H} x {W} pixels of the cuts; expected (height, width) of each cut."
        )


def center_crop_boxes(sizes: Int[Tensor, "B 2"], *, size: tuple[int, int]) -> Int[Tensor, "B 4"]:
    """The largest centred box of the aspect ratio of `size` in each image of (height, width) = `sizes`."""
    aspect = torch.tensor(size)
    scale = (sizes / aspect).amin(1, keepdim=True)
    extents = torch.minimum((scale * aspect).round().long().clamp(min=1), sizes)
    return torch.cat([(sizes - extents) // 2, extents], dim=1)


def resize(
    cuts: UInt8[Tensor, "B H W 3"], extents: Int[Tensor, "B 2"], flip: Bool[Tensor, " B"], *, size: tuple[int, int]
) -> Float[Tensor, "B 3 h w"]:
    """Views without colours: each cut's (height, width) = `extents` at its top left, mirrored where `flip`; normalised.

    Raises:
        ValueError: if an extent is empty or exceeds the padded cuts.
    """
    _check_extents(cuts, extents)
    return _on(cuts.device).resize(cuts, extents, flip, size=size)
