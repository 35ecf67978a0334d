"""Two differently coloured views of each crop, for a whole batch at once, on the device that trains.

The context encoder and the target encoder must see the *same* region, so that a token can be asked to predict its
counterpart; only their colours may differ. So each crop is one box and one flip, resized once and then coloured twice.

Every random number comes from one CPU generator, for the global batch, before any pixel is read (`draw_views`). A
process applies its rows of that draw (`make_views`): views depend neither on the device nor on the number of processes.

Axes: B images, V crops of each, K = 2 colourings of each crop (context, target), S = 6 colour steps; H W are the sides
of the padded crops, h w those of the views. A box is (top, left, height, width) in pixels of the image.

Source: arXiv 2502.18056 for the recipe; torchvision's v2 transforms for the meaning of each operation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.cli import ADVANCED
from scott_sparse.model.preprocess import IMAGENET_MEAN as IMAGENET_MEAN
from scott_sparse.model.preprocess import IMAGENET_STD as IMAGENET_STD
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8

OPS = ("brightness", "contrast", "saturation", "hue", "grey", "blur")  # `Views.ops` holds indices of this tuple
IDLE = len(OPS)
_, CONTRAST, SATURATION, HUE, GREY, _ = range(IDLE)
NEED_RGB = (SATURATION, HUE, GREY)

LUMA = (0.2989, 0.587, 0.114)  # ITU-R 601, to torchvision's digits
BLUR_RADIUS = 4  # pixels: a 9 x 9 kernel
BOX_TRIES = 10


@dataclass(frozen=True)
class ViewConfig:
    """How views are drawn at random; the defaults of the class are those of the paper."""

    crops: int = 1
    """Crops of each image, 1 or more. MIM-JEPA predicts the first; cross-crop terms compare all of them."""
    crop_scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest area of a crop as a share of its image, in (0, 1]; drawn uniformly."""
    crop_ratio: Annotated[tuple[float, float], ADVANCED] = (3 / 4, 4 / 3)
    """Smallest and largest width / height of a crop before it is resized; drawn log-uniformly."""
    flip: float = 0.5
    """Probability, 0 to 1, that a crop is mirrored left to right."""
    colour: float | Literal["auto"] = 0.6
    """Probability, 0 to 1, that the colours of a view are changed at all.
    If so, jitter, greyscale and blur are each applied with their own probability, in random order. auto: 1, and where
    the colours of the images do not go with their shapes, no crop keeps its colours and the jitter is stronger, as in
    the recipe colour-invariant."""
    plain_share: float = 0.0
    """Share of the crops, 0 to 1, that keep their colours whatever --colour is.
    Cross-crop terms compare these crops with each other only, through a projector of their own (arXiv 2008.05659)."""
    jitter: Annotated[tuple[float, float, float, float], ADVANCED] = (0.4, 0.4, 0.2, 0.1)
    """Strength s of the jitter of brightness, contrast, saturation (0 to 1) and hue (0 to 0.5), as in ColorJitter:
    factors are drawn from 1 - s to 1 + s, rotations of hue from -s to s of the circle."""
    jitter_p: Annotated[float, ADVANCED] = 0.8
    """Probability, 0 to 1, of jitter, given that the colours of a view are changed."""
    grey: Annotated[float, ADVANCED] = 0.1
    """Probability, 0 to 1, of greyscale, given that the colours of a view are changed."""
    blur: Annotated[float, ADVANCED] = 0.3
    """Probability, 0 to 1, of a Gaussian blur (9 x 9 kernel), given that the colours of a view are changed."""
    blur_sigma: Annotated[tuple[float, float], ADVANCED] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels of the view; drawn uniformly."""

    def __post_init__(self):
        """Raises ValueError for a value outside its range, naming field, value and range."""
        if self.crops < 1:
            raise ValueError(f"crops is {self.crops}; each image needs at least 1.")
        for name, upper in (("crop_scale", 1.0), ("crop_ratio", math.inf), ("blur_sigma", math.inf)):
            low, high = getattr(self, name)
            if not 0 < low <= high <= upper:
                raise ValueError(f"{name} is {(low, high)}; expected 0 < low <= high <= {upper}.")
        for name in ("flip", "colour", "plain_share", "jitter_p", "grey", "blur"):
            if getattr(self, name) != "auto" and not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a value between 0 and 1.")
        for name, strength, upper in zip(OPS[:4], self.jitter, (1, 1, 1, 0.5), strict=True):
            if not 0 <= strength <= upper:
                raise ValueError(f"jitter for {name} is {strength}; expected a value between 0 and {upper}.")

    @property
    def plain_crops(self) -> int:
        """How many of the crops keep their colours: the last ones, so that the crop that MIM-JEPA predicts does not."""
        return int(self.plain_share * self.crops)

    def decided(self, *, ignore_colours: bool) -> "ViewConfig":
        """With a number for `colour` auto; `ignore_colours`: the colours of all crops change, strongly."""
        return replace(self, colour=1.0, **(IGNORE_COLOURS if ignore_colours else {}))

    def refuse_ignored(self, defaults: dict[str, Any]) -> None:
        """Raise ValueError, for a value that differs from `defaults` although `colour` auto decides it."""
        for name, value in IGNORE_COLOURS.items() if self.colour == "auto" else ():
            if getattr(self, name) not in (value, defaults[name]):
                raise ValueError(f"--{name.replace('_', '-')} is decided by --colour auto; pass --colour 1 with it.")


# Of `ViewConfig`, for images whose colours say nothing.
IGNORE_COLOURS: dict[str, Any] = {"plain_share": 0.0, "jitter": (0.6, 0.6, 0.6, 0.5), "jitter_p": 1.0, "grey": 0.3}


@dataclass(frozen=True)
class Views:
    """All random choices of a batch of views; on the CPU, from which `make_views` sends what the device needs.

    Step s of a colouring applies `OPS[ops[s]]`, or nothing for `IDLE`, with `amounts[s]`: the factor for brightness,
    contrast and saturation; the rotation for hue (1 is the full circle); sigma in pixels for blur; 0 for greyscale,
    which is saturation 0.
    """

    boxes: Int[Tensor, "B V 4"]
    flip: Bool[Tensor, "B V"]
    ops: Int[Tensor, "B V K S"]
    amounts: Float[Tensor, "B V K S"]

    def __getitem__(self, rows: slice | Int[Tensor, " n"]) -> "Views":
        """The views of some of the images, such as a process's share of the global draw."""
        return Views(self.boxes[rows], self.flip[rows], self.ops[rows], self.amounts[rows])


def draw_views(sizes: Int[Tensor, "B 2"], config: ViewConfig, *, generator: torch.Generator) -> Views:
    """Draw the views of the global batch; `sizes` are (height, width) of each image in pixels, on the CPU.

    Raises ValueError if an image has no pixels, and for `colour` auto, which `choose_colours` decides.
    """
    if config.colour == "auto":
        raise ValueError("colour is auto; decide it by scott_sparse.data.colour.choose_colours first.")
    empty = (sizes < 1).any(1)
    if empty.any():
        raise ValueError(f"image {empty.int().argmax().item()} of the batch has no pixels; leave it out.")
    boxes = _draw_boxes(sizes, config, generator=generator)
    flip = torch.rand(boxes.shape[:2], generator=generator) < config.flip
    ops, amounts = _draw_colours((*boxes.shape[:2], 2), config, generator=generator)
    ops[:, config.crops - config.plain_crops :] = IDLE
    return Views(boxes, flip, ops, amounts)


def _draw_boxes(sizes: Int[Tensor, "B 2"], config: ViewConfig, *, generator: torch.Generator) -> Int[Tensor, "B V 4"]:
    """As torchvision's RandomResizedCrop: the first of ten candidates that fits, else the largest centred box."""
    H, W = rearrange(sizes.double(), "b side -> side b 1 1")
    shape = (len(sizes), config.crops, BOX_TRIES)
    area = _uniform(shape, *config.crop_scale, generator=generator) * H * W
    narrowest, widest = config.crop_ratio
    ratio = _uniform(shape, math.log(narrowest), math.log(widest), generator=generator).exp()
    height, width = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (height >= 1) & (height <= H) & (width >= 1) & (width <= W)

    any_fits = fits.any(-1, keepdim=True)
    first = fits.int().argmax(-1, keepdim=True)
    tallest_box, widest_box = (W / narrowest).round().clamp(min=1), (H * widest).round().clamp(min=1)
    height = torch.where(any_fits, height.gather(-1, first), torch.minimum(H, tallest_box))
    width = torch.where(any_fits, width.gather(-1, first), torch.minimum(W, widest_box))
    u = _uniform((2, *any_fits.shape), 0.0, 1.0, generator=generator)
    top = torch.where(any_fits, u[0] * (H - height + 1), (H - height) / 2).floor()
    left = torch.where(any_fits, u[1] * (W - width + 1), (W - width) / 2).floor()
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
    assert config.colour != "auto"
    group_on &= torch.rand((*shape, 1), generator=generator) < config.colour
    group_rank = torch.rand((*shape, 3), generator=generator).argsort(-1)
    jitter_rank = torch.rand((*shape, 4), generator=generator).argsort(-1)

    group = torch.tensor([0, 0, 0, 0, 1, 2])  # of each op
    rank = 4 * group_rank[..., group] + F.pad(jitter_rank, (0, 2))
    on = group_on[..., group]
    order = rank.masked_fill(~on, 12).argsort(-1)  # idle steps go last, so that few steps remain
    return order.masked_fill(~on.gather(-1, order), IDLE), amounts.gather(-1, order)


def _uniform(shape: Sequence[int], low: float, high: float, *, generator: torch.Generator) -> Float[Tensor, "..."]:
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def make_views(
    crops: UInt8[Tensor, "B V H W C"],
    views: Views,
    *,
    size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> tuple[Float[Tensor, "B V C h w"], Float[Tensor, "B C h w"]]:
    """The context views of all crops and the target view of each image's first crop, normalised; `size` is (h, w).

    What needs red, green and blue (saturation, hue, greyscale) is left out unless there are three channels. `mean` and
    `std`: of each channel, where values are 0 to 1.

    `crops` holds the boxes of `views` as they are in the images (`Images.crop`), padded below and right. Raises
    ValueError if `views` were drawn for another number of images, or for larger boxes.
    """
    if len(crops) != len(views.boxes):
        raise ValueError(f"crops of {len(crops)} images but views of {len(views.boxes)}; slice: views[first:last].")
    _check_statistics(mean, std, crops.shape[-1])
    B, V = views.flip.shape
    boxes, flip = views.boxes.flatten(0, 1), views.flip.flatten()
    backend, resized = _resize(crops.flatten(0, 1), boxes[:, 2:], flip, size=size)
    ops, amounts = (torch.cat([x[:, :, 0].flatten(0, 1), x[:, 0, 1]]) for x in (views.ops, views.amounts))
    if crops.shape[-1] != 3:
        ops = ops.masked_fill(torch.isin(ops, torch.tensor(NEED_RGB)), IDLE)
    images = backend.colour(torch.cat([resized, resized[::V]]), ops=ops, amounts=amounts)
    context, target = backend.normalise(images, mean, std).split([B * V, B])
    return context.unflatten(0, (B, V)), target


def resize(
    crops: UInt8[Tensor, "B H W C"],
    extents: Int[Tensor, "B 2"],
    flip: Bool[Tensor, " B"],
    *,
    size: tuple[int, int],
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Float[Tensor, "B C h w"]:
    """Views without colour changes: crops resized to `size` = (h, w), mirrored where `flip`, and normalised.

    `extents`: (height, width) in pixels of each crop, at the top left of its padding. Raises ValueError if an extent is
    empty or exceeds the padded crops.
    """
    _check_statistics(mean, std, crops.shape[-1])
    backend, resized = _resize(crops, extents, flip, size=size)
    return backend.normalise(resized, mean, std)


def _check_statistics(mean: Sequence[float], std: Sequence[float], channels: int) -> None:
    if not len(mean) == len(std) == channels:
        raise ValueError(f"images have {channels} channels; mean and std are of {len(mean)}, {len(std)}.")


def _resize(crops: Tensor, extents: Tensor, flip: Tensor, *, size: tuple[int, int]):
    """The module for the device of the crops (views one at a time on a CPU, a batch at a time elsewhere), and the
    resized crops in the form in which it colours and normalises them."""
    from scott_sparse.data import views_cpu, views_gpu

    H, W = crops.shape[1:3]
    if ((extents < 1) | (extents > extents.new_tensor([H, W]))).any():
        raise ValueError(
            f"an extent is empty or exceeds the {H} x {W} pixels of the crops; expected (height, width) of each crop."
        )
    backend = views_cpu if crops.device.type == "cpu" else views_gpu
    return backend, backend.resize(crops, extents, flip, size=size)
