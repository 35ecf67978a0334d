"""Two differently coloured views of one crop, for a whole batch at once, on whichever device trains.

The context encoder and the target encoder must see the *same* region, else a token could not be asked to
predict its counterpart; only their colours may differ. So each crop is one box and one flip, resampled once
and then coloured twice.

Every random number comes from one CPU generator, for the global batch, before any pixel is touched
(`draw_views`). A process applies its rows of that draw (`make_views`): views depend neither on the device nor
on the number of processes.

Axes: B images, V crops of each, K = 2 colourings of each crop (context, target), S = 6 colour steps; H W are
the sides of the padded input, h w those of the view. A box is (top, left, height, width) in input pixels.

Source: arXiv 2502.18056 for the recipe; torchvision's v2 transforms for what each operation means.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

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
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    flip: float = 0.5  # probability
    colour: float = 0.6  # probability
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue
    jitter_p: float = 0.8  # probability
    grey: float = 0.1  # probability
    blur: float = 0.3  # probability
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # pixels, uniform

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

    def to(self, device: torch.device | str) -> "Views":
        return Views(*(x.to(device) for x in (self.boxes, self.flip, self.ops, self.amounts)))


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


def crop(
    images: UInt8[Tensor, "B 3 H W"],
    boxes: Int[Tensor, "B 4"],
    flip: Bool[Tensor, " B"],
    *,
    size: tuple[int, int],
) -> Float[Tensor, "B 3 h w"]:
    """Cut one box out of each image, resize it to `size` = (h, w), mirror where `flip`; pixels in [0, 1].

    Equals crop, then antialiased bicubic resize, then flip. Each is linear and separable, and so is their
    product: one (h, H) and one (w, W) matrix per image, two matrix products for the whole batch.

    Raises:
        ValueError: if a box leaves the padded images or is empty.
    """
    H, W = images.shape[-2:]
    start, extent = boxes[:, :2], boxes[:, 2:]
    if ((start < 0) | (extent < 1) | (start + extent > boxes.new_tensor([H, W]))).any():
        raise ValueError(
            f"a box is empty or leaves its {H} x {W} image; expected (top, left, height, width) within the "
            "image: check that `sizes` holds the (height, width) of this batch."
        )
    top, left, height, width = boxes.to(images.device, non_blocking=True).T
    flip = flip.to(images.device, non_blocking=True)
    down = _resampling(top, height, torch.zeros_like(flip), inputs=H, outputs=size[0])  # (B, h, H)
    across = _resampling(left, width, flip, inputs=W, outputs=size[1]).div_(255)  # (B, w, W)
    rows = rearrange(images.float(), "b c H W -> b (c H) W") @ across.mT
    return (down[:, None] @ rearrange(rows, "b (c H) w -> b c H w", c=3)).clamp_(0, 1)


def _resampling(
    start: Int[Tensor, " B"],
    extent: Int[Tensor, " B"],
    flip: Bool[Tensor, " B"],
    *,
    inputs: int,
    outputs: int,
) -> Float[Tensor, "B outputs inputs"]:
    """Weight of each input pixel in each output pixel along one axis, for the pixels [start, start + extent).

    Keys' cubic with a = -1/2, as in Pillow and in torch's `interpolate(antialias=True)`: when shrinking, the
    kernel widens by the shrink factor; at the interval's ends it is cut and renormalised.
    """
    start, extent = start[:, None], extent[:, None]
    at = torch.arange(outputs, device=start.device)
    at = torch.where(flip[:, None], outputs - 1 - at, at)
    step = extent / outputs  # input pixels per output pixel
    centre = start + (at + 0.5) * step - 0.5  # (B, outputs), in input pixels
    pixel = torch.arange(inputs, device=start.device)
    x = (pixel - centre[..., None]).div_(step.clamp(min=1)[..., None]).abs_()  # (B, outputs, inputs)
    # k(x) = p²(p - 1)/2 + q²(1 - 2q) with p = (2 - x)+ and q = (1 - x)+: both cubic pieces, without a branch.
    p, q = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    weights = (p * p).mul_(p.sub_(1)).mul_(0.5).addcmul_(q * q, 1 - 2 * q)
    weights *= ((pixel >= start) & (pixel < start + extent))[:, None]
    return weights.div_(weights.sum(-1, keepdim=True))


def colour(
    images: Float[Tensor, "B V 3 h w"], *, ops: Int[Tensor, "B V K S"], amounts: Float[Tensor, "B V K S"]
) -> Float[Tensor, "B V K 3 h w"]:
    """Colour each image in K ways; pixels in [0, 1] before and after, `ops` and `amounts` as in `Views`.

    At each step an operation runs once, on exactly the rows whose turn it is: idle rows cost nothing.
    Brightness, contrast, saturation and greyscale count as one operation, see `_mix`.

    Raises:
        RuntimeError: from torch, when blurring images with a side below 5 pixels.
    """
    B, V, K, S = ops.shape
    out = images.flatten(0, 1).repeat_interleave(K, 0)  # (B V K, 3, h, w), ours to overwrite
    ops, amounts = (rearrange(x.cpu(), "b v k s -> s (b v k)") for x in (ops, amounts))
    rest = 1 - amounts
    to_grey, to_mean = (ops == SATURATION) | (ops == GREY), ops == CONTRAST
    params = torch.stack([amounts, rest * to_grey, rest * to_mean], dim=-1)  # (S, B V K, 3)

    # Rows are grouped by kernel on the CPU and sent in two transfers, so that the device is never waited for.
    kind = torch.tensor([0, 0, 0, 1, 0, 2, 3])[ops]  # by OPS, then IDLE
    counts = F.one_hot(kind, 4).sum(1).tolist()
    rows = kind.argsort(1)  # (S, B V K)
    params = params.take_along_dim(rows[..., None], 1).to(images.device, non_blocking=True)
    rows = rows.to(images.device, non_blocking=True)
    for step in range(S):
        begin = 0
        for kernel, count in zip((_mix, _turn_hue, _blur), counts[step], strict=False):
            if count:
                turn = slice(begin, begin + count)
                images = out.index_select(0, rows[step, turn])
                out.index_copy_(0, rows[step, turn], kernel(images, params[step, turn]))
            begin += count
    return rearrange(out, "(b v k) c h w -> b v k c h w", b=B, v=V)


def _mix(images: Float[Tensor, "N 3 h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 h w"]:
    """Brightness, contrast, saturation, greyscale: a sum of the image, its grey self and its mean grey."""
    own, grey_share, mean_share = params.T[..., None, None, None]
    red, green, blue = images.split(1, dim=1)
    grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])  # (N, 1, h, w)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(grey.mul_(grey_share).add_(mean * mean_share), images, own).clamp_(0, 1)


def _turn_hue(images: Float[Tensor, "N 3 h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 h w"]:
    """Turn the hue by params[:, 0] of the circle, keeping HSV's value and saturation.

    On the hue circle, six units around, a channel is at its highest within 1 of its own place (red 0, green
    2, blue 4), at its lowest beyond 2, and linear between: so no sextant needs a case of its own.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    span = low.neg_().add_(high)
    from_green, from_blue = (blue - red).add_(span, alpha=2), (red - green).add_(span, alpha=4)
    hue = torch.where(high == red, green - blue, torch.where(high == green, from_green, from_blue))
    hue.div_(span.clamp(min=torch.finfo(span.dtype).tiny))  # grey pixels: 0 / tiny, and any hue will do
    hue.add_(6 * params[:, :1, None])
    places = torch.arange(0, 6, 2, device=hue.device)[:, None, None]
    away = hue[:, None] - (places - 3)  # (N, 3, h, w)
    away.remainder_(6).sub_(3).abs_()  # now the distance around the circle, in [0, 3]
    return away.sub_(1).clamp_(0, 1).mul_(span.neg_()[:, None]).add_(high[:, None])


def _blur(images: Float[Tensor, "N 3 h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 h w"]:
    """Gaussian blur with sigma = params[:, 0] pixels, kernel 9, reflected borders."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    taps = (-((offset / params[:, :1]) ** 2) / 2).softmax(1).T[..., None, None, None]  # (9, N, 1, 1, 1)
    images = F.pad(images, (BLUR_RADIUS,) * 4, mode="reflect")
    # Shifted sums, as each image has its own kernel: a grouped convolution is several times slower on a CPU.
    for dim in (2, 3):
        side = images.shape[dim] - 2 * BLUR_RADIUS
        shifted = [images.narrow(dim, start, side) for start in range(len(taps))]
        images = shifted[0] * taps[0]
        for part, tap in zip(shifted[1:], taps[1:], strict=True):
            images.addcmul_(part, tap)
    return images


def normalise(images: Float[Tensor, "*N 3 h w"]) -> Float[Tensor, "*N 3 h w"]:
    """From [0, 1] to zero mean and unit variance per channel, over ImageNet."""
    moments = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(images.device, non_blocking=True)
    mean, std = moments[..., None, None]
    return torch.addcmul(-mean / std, images, 1 / std)


def make_views(
    images: UInt8[Tensor, "B 3 H W"], views: Views, *, size: tuple[int, int]
) -> tuple[Float[Tensor, "B V 3 h w"], Float[Tensor, "B V 3 h w"]]:
    """Apply `views` to a batch padded at bottom and right; (context, target), normalised, `size` = (h, w).

    Raises:
        ValueError: if `views` were drawn for another number of images or for larger ones.
    """
    if len(images) != len(views.boxes):
        raise ValueError(f"{len(images)} images but views of {len(views.boxes)}; slice: views[first:last].")
    V = views.boxes.shape[1]
    images = repeat(images, "b c h w -> (b v) c h w", v=V)
    crops = crop(images, views.boxes.flatten(0, 1), views.flip.flatten(), size=size)
    crops = rearrange(crops, "(b v) c h w -> b v c h w", v=V)
    context, target = colour(crops, ops=views.ops, amounts=views.amounts).unbind(2)
    return normalise(context), normalise(target)


def whole(
    images: UInt8[Tensor, "B 3 H W"], sizes: Int[Tensor, "B 2"], *, size: tuple[int, int]
) -> Float[Tensor, "B 3 h w"]:
    """The evaluation view, normalised: the largest centred box of the output's aspect ratio, resized.

    Raises:
        ValueError: if `sizes`, (height, width) of each image in pixels, on the CPU, exceed the padded images.
    """
    aspect = torch.tensor(size)
    scale = (sizes / aspect).amin(1, keepdim=True)
    extent = torch.minimum((scale * aspect).round().long().clamp(min=1), sizes)
    boxes = torch.cat([(sizes - extent) // 2, extent], dim=1)
    return normalise(crop(images, boxes, torch.zeros(len(sizes), dtype=torch.bool), size=size))
