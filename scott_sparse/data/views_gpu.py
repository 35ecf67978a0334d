"""Views of a whole batch in a few kernels: what a GPU wants. The same numbers as `views_cpu`, but to rounding."""

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.data.views import BLUR_RADIUS, CONTRAST, GREY, IMAGENET_MEAN, IMAGENET_STD, LUMA, SATURATION, Views
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8


def make_views(
    cuts: UInt8[Tensor, "B V H W 3"], views: Views, *, size: tuple[int, int]
) -> tuple[Float[Tensor, "B V 3 h w"], Float[Tensor, "B 3 h w"]]:
    """As `views.make_views`."""
    B, V = views.flip.shape
    crops = resized(cuts.flatten(0, 1), views.boxes[..., 2:].flatten(0, 1), views.flip.flatten(), size=size)
    images = torch.cat([crops, crops.unflatten(0, (B, V))[:, 0]])
    ops, amounts = (torch.cat([x[:, :, 0].flatten(0, 1), x[:, 0, 1]]) for x in (views.ops, views.amounts))
    context, target = _normalise_(colour_(images, ops=ops, amounts=amounts)).split([B * V, B])
    return context.unflatten(0, (B, V)), target


def resize(
    cuts: UInt8[Tensor, "B H W 3"], extents: Int[Tensor, "B 2"], flip: Bool[Tensor, " B"], *, size: tuple[int, int]
) -> Float[Tensor, "B 3 h w"]:
    """`resized`, normalised."""
    return _normalise_(resized(cuts, extents, flip, size=size))


def resized(
    cuts: UInt8[Tensor, "B H W 3"],
    extents: Int[Tensor, "B 2"],
    flip: Bool[Tensor, " B"],
    *,
    size: tuple[int, int],
) -> Float[Tensor, "B 3 h w"]:
    """Resize each cut, (height, width) = `extents` at its top left, to `size` = (h, w), mirror where `flip`.

    Both are linear and separable, and so is their product: one (h, H) and one (w, W) matrix per image, two matrix
    products for the whole batch, whatever the sizes of its images.
    """
    height, width = extents.to(cuts.device, non_blocking=True).T
    flip = flip.to(cuts.device, non_blocking=True)
    down = _resampling(height, torch.zeros_like(flip), inputs=cuts.shape[1], outputs=size[0])  # (B, h, H)
    across = _resampling(width, flip, inputs=cuts.shape[2], outputs=size[1]).div_(255)  # (B, w, W)
    rows = rearrange(cuts, "b H W c -> b (c H) W").float() @ across.mT
    return (down[:, None] @ rearrange(rows, "b (c H) w -> b c H w", c=3)).clamp_(0, 1)


def _normalise_(images: Float[Tensor, "N 3 h w"]) -> Float[Tensor, "N 3 h w"]:
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]).to(images.device, non_blocking=True)[..., None, None]
    return images.sub_(mean).div_(std)


def _resampling(
    extent: Int[Tensor, " B"], flip: Bool[Tensor, " B"], *, inputs: int, outputs: int
) -> Float[Tensor, "B outputs inputs"]:
    """Weight of each input pixel in each output pixel along one axis, for the first `extent` input pixels.

    Keys' cubic with a = -1/2, as in Pillow and in torch's `interpolate(antialias=True)`: when shrinking, the
    kernel widens by the shrink factor; at the interval's ends it is cut and renormalised.
    """
    extent = extent[:, None]
    at = torch.arange(outputs, device=extent.device)
    at = torch.where(flip[:, None], outputs - 1 - at, at)
    step = extent / outputs  # input pixels per output pixel
    centre = (at + 0.5) * step - 0.5  # (B, outputs), in input pixels
    pixel = torch.arange(inputs, device=extent.device)
    x = (pixel - centre[..., None]).div_(step.clamp(min=1)[..., None]).abs_()  # (B, outputs, inputs)
    # k(x) = p²(p - 1)/2 + q²(1 - 2q) with p = (2 - x)+ and q = (1 - x)+: both cubic pieces, without a branch.
    p, q = (2 - x).clamp_(min=0), (1 - x).clamp_(min=0)
    weights = (p * p).mul_(p.sub_(1)).mul_(0.5).addcmul_(q * q, 1 - 2 * q)
    weights *= (pixel < extent)[:, None]
    return weights.div_(weights.sum(-1, keepdim=True))


def colour_(
    images: Float[Tensor, "N 3 h w"], *, ops: Int[Tensor, "N S"], amounts: Float[Tensor, "N S"]
) -> Float[Tensor, "N 3 h w"]:
    """Colour each image in place; pixels in [0, 1] before and after, `ops` and `amounts` as in `Views`.

    At each step an operation runs once, on exactly the rows whose turn it is: idle rows cost nothing.
    Brightness, contrast, saturation and greyscale count as one operation, see `_mix`.

    Raises:
        RuntimeError: from torch, when blurring images with a side below 5 pixels.
    """
    ops, amounts = ops.T.cpu(), amounts.T.cpu()  # (S, N)
    rest = 1 - amounts
    to_grey, to_mean = (ops == SATURATION) | (ops == GREY), ops == CONTRAST
    params = torch.stack([amounts, rest * to_grey, rest * to_mean], dim=-1)  # (S, N, 3)

    # Rows are grouped by kernel on the CPU and sent in two transfers, so that the device is never waited for.
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
    turned = hue.div_(6).add_(params[:, :1, None])
    places = torch.arange(3, device=hue.device)[:, None, None] / 3
    away = turned[:, None] - places  # (N, 3, h, w), in circles
    away.sub_(away.round()).abs_().mul_(6)  # now the distance around the circle in units, in [0, 3]
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
