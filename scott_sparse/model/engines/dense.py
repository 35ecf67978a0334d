"""The oracle: convolve the zero-filled map, then zero what is not active. Also the path where everything is visible."""

import torch
import torch.nn.functional as F
from einops import repeat

from scott_sparse.model.sites import PADDING, ActivePatches
from scott_sparse.shapes import Float, Tensor


def dense_strided_conv(
    images: Float[Tensor, "B C H W"], weight: Float[Tensor, "K C 7 7"], active: ActivePatches | None
) -> Float[Tensor, "B K h w"]:
    """7x7 stride-2 padding-3 convolution without bias. `active` None: everything is."""
    return restrict(F.conv2d(images, weight, stride=2, padding=PADDING), active)


def restrict(dense: Float[Tensor, "B C H W"], active: ActivePatches | None) -> Float[Tensor, "B C H W"]:
    """Zero every inactive site of a dense map."""
    if active is None:
        return dense
    return dense * active.active_map(dense.shape[-2] // active.grid[0]).to(dense.dtype)


def hide(images: Float[Tensor, "B C H W"], active: ActivePatches | None) -> Float[Tensor, "B C H W"]:
    """`restrict` of what may hold nan or inf where it is hidden: none survives as nan * 0. A product is faster."""
    if active is None:
        return images
    return torch.where(active.active_map(images.shape[-2] // active.grid[0]), images, 0)


def max_blur_pool(dense: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H/2 W/2"]:
    """Maximum over 2x2, stride 1, then the 3x3 binomial blur with stride 2 (arXiv 1904.11486, section 3).

    The maximum map has H-1 x W-1 sites; the blur pads it with one zero on each side.
    """
    return binomial(highest(dense), padding=1)


def highest(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H-1 W-1"]:
    """Maximum over 2x2, stride 1. On a CPU no narrower than fp32: bf16 takes twice as long."""
    return F.max_pool2d(x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32)), 2, stride=1)


def binomial(x: Float[Tensor, "B C H W"], *, padding: int) -> Float[Tensor, "B C h w"]:
    """[1 2 1] x [1 2 1] / 16 on each channel, stride 2."""
    tap = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = repeat(tap[:, None] * tap, "y x -> c 1 y x", c=x.shape[1])
    # On a CPU the way back through a depthwise convolution in bf16 takes ten times as long as in fp32. A GPU's autocast
    # stays as it is.
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
