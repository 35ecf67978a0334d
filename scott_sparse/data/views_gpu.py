"""Views of a whole batch in a few kernels, for a GPU. They equal those of `views_cpu` except for its rounding."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.data.views import BLUR_RADIUS, CONTRAST, GREY, LUMA, SATURATION
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8


def resize(
    crops: UInt8[Tensor, "B H W C"], extents: Int[Tensor, "B 2"], flip: Bool[Tensor, " B"], *, size: tuple[int, int]
) -> Float[Tensor, "B C h w"]:
    """Resize each crop, (height, width) = `extents` at its top left, to `size` and mirror it where `flip`; in [0, 1].

    Resizing and mirroring are linear and separable, and so is their product: one (h, H) and one (w, W) matrix for each
    image, and two matrix products for the whole batch, whatever the sizes of its images.
    """
    height, width = extents.to(crops.device, non_blocking=True).T
    flip = flip.to(crops.device, non_blocking=True)
    down = _resampling(height, torch.zeros_like(flip), inputs=crops.shape[1], outputs=size[0])  # (B, h, H)
    across = _resampling(width, flip, inputs=crops.shape[2], outputs=size[1]).div_(255)  # (B, w, W)
    rows = rearrange(crops, "b H W c -> b (c H) W").float() @ across.mT
    return (down[:, None] @ rearrange(rows, "b (c H) w -> b c H w", c=crops.shape[-1])).clamp_(0, 1)


def normalise(
    images: Float[Tensor, "N C h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "N C h w"]:
    """Minus `mean` by `std` of each channel, in place."""
    both = torch.tensor([tuple(mean), tuple(std)]).to(images.device, non_blocking=True)[..., None, None]
    return images.sub_(both[0]).div_(both[1])


def _resampling(
    extent: Int[Tensor, " B"], flip: Bool[Tensor, " B"], *, inputs: int, outputs: int
) -> Float[Tensor, "B outputs inputs"]:
    """Weight of each input pixel in each output pixel along one axis, for the first `extent` input pixels.

    Keys' cubic with a = -1/2, as in Pillow and in torch's `interpolate(antialias=True)`: for shrinking, the kernel is
    wider by the shrink factor; at the ends of the interval it is truncated and renormalised.
    """
    extent = extent[:, None]
    at = torch.arange(outputs, device=extent.device)
    at = torch.where(flip[:, None], outputs - 1 - at, at)
    step = extent / outputs  # input pixels per output pixel
    centre = (at + 0.5) * step - 0.5  # (B, outputs), in input pixels
    pixel = torch.arange(inputs, device=extent.device)
    x = (pixel - centre[..., None]).div_(step.clamp(min=1)[..., None]).abs_()  # (B, outputs, inputs)
    # k(x) = p²(p - 1)/2 + q²(1 - 2q) with p = (2 - x)+ and q = (1 - x)+: both cubic pieces without a branch.
    p, q = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    weights = (p * p).mul_(p.sub_(1)).mul_(0.5).addcmul_(q * q, 1 - 2 * q)
    weights *= (pixel < extent)[:, None]
    return weights.div_(weights.sum(-1, keepdim=True))


def colour(
    images: Float[Tensor, "N C h w"], *, ops: Int[Tensor, "N S"], amounts: Float[Tensor, "N S"]
) -> Float[Tensor, "N C h w"]:
    """Apply colour operations in place; pixels are in [0, 1] before and after, `ops` and `amounts` are as in `Views`.

    At each step, each kernel runs once, on the images that need it, so that idle images cost nothing. Brightness,
    contrast, saturation and greyscale share the kernel `_mix`. A blur of images with a side below 5 pixels raises
    RuntimeError (from torch).
    """
    ops, amounts = ops.T.cpu(), amounts.T.cpu()  # (S, N)
    rest = 1 - amounts
    to_grey, to_mean = (ops == SATURATION) | (ops == GREY), ops == CONTRAST
    params = torch.stack([amounts, rest * to_grey, rest * to_mean], dim=-1)  # (S, N, 3)

    # Rows are grouped by kernel on the CPU and sent in two transfers, so that the CPU never waits for the device.
    kind = torch.tensor([0, 0, 0, 1, 0, 2, 3])[ops]  # by OPS, then IDLE
    counts = F.one_hot(kind, 4).sum(1).tolist()
    rows = kind.argsort(1)  # (S, N)
    params = params.take_along_dim(rows[..., None], 1).to(images.device, non_blocking=True)
    rows = rows.to(images.device, non_blocking=True)
    for step, of_step in enumerate(counts):
        begin = 0
        for kernel, count in zip((_mix, _turn_hue, _blur), of_step, strict=False):
            if count:
                turn = slice(begin, begin + count)
                chosen = images.index_select(0, rows[step, turn])
                images.index_copy_(0, rows[step, turn], kernel(chosen, params[step, turn]))
            begin += count
    return images


def _mix(images: Float[Tensor, "N C h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N C h w"]:
    """Brightness, contrast, saturation, greyscale: weighted sums of the image, its grey version and its mean grey."""
    own, grey_share, mean_share = params.T[..., None, None, None]
    if images.shape[1] == 3:
        red, green, blue = images.split(1, dim=1)
        grey = (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])  # (N, 1, h, w)
    else:
        grey = images.mean(1, keepdim=True)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return torch.addcmul(grey.mul_(grey_share).add_(mean * mean_share), images, own).clamp_(0, 1)


def _turn_hue(images: Float[Tensor, "N 3 h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3 h w"]:
    """Rotate the hue by params[:, 0] of the circle, keeping value and saturation of HSV.

    On the hue circle, six units around, a channel is highest within 1 of its own place (red 0, green 2, blue 4), lowest
    beyond 2, and linear between: so no sextant needs a case of its own.
    """
    red, green, blue = images.unbind(1)
    high, low = images.amax(1), images.amin(1)
    span = low.neg_().add_(high)
    from_green, from_blue = (blue - red).add_(span, alpha=2), (red - green).add_(span, alpha=4)
    hue = torch.where(high == red, green - blue, torch.where(high == green, from_green, from_blue))
    hue.div_(span.clamp(min=torch.finfo(span.dtype).tiny))  # grey pixels: 0 / tiny, as any hue serves
    turned = hue.div_(6).add_(params[:, :1, None])
    places = torch.arange(3, device=hue.device)[:, None, None] / 3
    away = turned[:, None] - places  # (N, 3, h, w), in circles
    away.sub_(away.round()).abs_().mul_(6)  # now the distance around the circle in units, in [0, 3]
    return away.sub_(1).clamp_(0, 1).mul_(span.neg_()[:, None]).add_(high[:, None])


def _blur(images: Float[Tensor, "N C h w"], params: Float[Tensor, "N 3"]) -> Float[Tensor, "N C h w"]:
    """Gaussian blur with sigma = params[:, 0] pixels, kernel size 9, reflected borders."""
    offset = torch.arange(-BLUR_RADIUS, BLUR_RADIUS + 1, device=images.device)
    taps = (-((offset / params[:, :1]) ** 2) / 2).softmax(1).T[..., None, None, None]  # (9, N, 1, 1, 1)
    images = F.pad(images, (BLUR_RADIUS,) * 4, mode="reflect")
    # Sums of shifted images, as each has its own kernel; a grouped convolution is several times slower on a CPU.
    for dim in (2, 3):
        side = images.shape[dim] - 2 * BLUR_RADIUS
        shifted = [images.narrow(dim, start, side) for start in range(len(taps))]
        images = shifted[0] * taps[0]
        for part, tap in zip(shifted[1:], taps[1:], strict=True):
            images.addcmul_(part, tap)
    return images
