"""The reference engine: convolve the zero-filled map, then set what is not active to zero.

It is also the path where everything is visible (`active` is None).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from scott_sparse.model.sites import ActiveSites
from scott_sparse.shapes import Float, Tensor


class Dense:
    """Works on dense maps (B, C, H, W) that are zero at hidden sites. Has the interface of `engines.Engine`."""

    def __init__(self, active: ActiveSites | None):
        self.active = active

    def enter(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return mask_pixels(images, self.active).contiguous(memory_format=torch.channels_last)

    def conv(
        self,
        x: Float[Tensor, "B C H W"],
        kernel: Float[Tensor, "K C k k"],
        bias: Float[Tensor, " K"] | None = None,
        *,
        stride: int,
        padding: int,
    ) -> Float[Tensor, "B K h w"]:
        dtype = conv_dtype(kernel)
        bias = None if bias is None else bias.to(dtype)
        return mask_sites(F.conv2d(x.to(dtype), kernel.to(dtype), bias, stride, padding), self.active)

    def pool(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        return mask_sites(max_blur_pool(x), self.active)

    def elementwise(self, x: Float[Tensor, "B C H W"], function: Callable[[Tensor], Tensor]):
        return function(x)

    def rows(self, x: Float[Tensor, "B C H W"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "B C H W"]:
        if self.active is None:
            rows = rearrange(x, "b c h w -> (b h w) c")
            return rearrange(function(rows), "(b h w) c -> b c h w", h=x.shape[2], w=x.shape[3])
        patches = self.active.gather(x)
        return self.active.scatter(function(patches.flatten(0, 2)).view(patches.shape))

    def leave(self, x: Float[Tensor, "B D h w"]) -> Float[Tensor, "S D"]:
        return rearrange(x, "b d h w -> (b h w) d") if self.active is None else self.active.gather(x).flatten(0, 2)


def conv_dtype(kernel: Float[Tensor, "K C k k"]) -> torch.dtype:
    """The precision in which to convolve: that of autocast, else that of the kernel."""
    device_type = kernel.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else kernel.dtype


def mask_sites(dense: Float[Tensor, "B C H W"], active: ActiveSites | None) -> Float[Tensor, "B C H W"]:
    """Set every inactive site of a finite map to zero, by a product, which is faster than `torch.where`."""
    if active is None:
        return dense
    return dense * active.dense_map(dense.shape[-2] // active.grid[0]).to(dense.dtype)


def mask_pixels(images: Float[Tensor, "B C H W"], active: ActiveSites | None) -> Float[Tensor, "B C H W"]:
    """Set every hidden pixel to zero, also where it is nan or inf."""
    if active is None:
        return images
    return torch.where(active.dense_map(images.shape[-2] // active.grid[0]), images, 0)


def max_blur_pool(dense: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H/2 W/2"]:
    """Maximum over 2x2 with stride 1, then the 3x3 binomial blur with stride 2 (arXiv 1904.11486, section 3).

    The map of maxima has H-1 x W-1 sites; the blur pads it with one zero on each side.
    """
    return blur_downsample(max_pool_2x2(dense), padding=1)


def max_pool_2x2(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H-1 W-1"]:
    """Maximum over 2x2 with stride 1. On a CPU at least in fp32: bf16 takes twice as long."""
    return F.max_pool2d(x if x.is_cuda else x.to(torch.promote_types(x.dtype, torch.float32)), 2, stride=1)


def blur_downsample(x: Float[Tensor, "B C H W"], *, padding: int) -> Float[Tensor, "B C h w"]:
    """Each channel convolved with [1 2 1] x [1 2 1] / 16, stride 2."""
    tap = 0.5 - (torch.arange(3, dtype=x.dtype, device=x.device) - 1).abs() / 4  # a copy from the CPU would wait
    kernel = repeat(tap[:, None] * tap, "y x -> c 1 y x", c=x.shape[1])
    # On a CPU the backward pass of a depthwise convolution in bf16 takes ten times as long as in fp32. The autocast of
    # a GPU stays as it is.
    with torch.autocast("cpu", enabled=False):
        return F.conv2d(x, kernel, stride=2, padding=padding, groups=x.shape[1])
