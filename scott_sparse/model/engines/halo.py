"""Each visible patch with a halo, the border that its windows reach into; then ordinary layers without padding.

The S visible patches are packed, (S, s, s, C) with s sites per side. A window of a strided convolution reads a few
sites beyond its patch: those of neighbouring patches where these are visible, zeros where they are hidden or beyond the
border of the image. Copied together they make a tile, (S, t, t, C), on which every layer is an ordinary one without
padding. Nothing is computed for hidden patches. A convolution has the precision that autocast asks for; on a CPU it is
one product of its windows with the kernel, elsewhere and in compiled graphs PyTorch's own.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.autograd.function import once_differentiable

from scott_sparse.model.engines.dense import blur_downsample, conv_dtype, max_pool_2x2
from scott_sparse.model.sites import ActiveSites
from scott_sparse.shapes import Float, Tensor


class Halo:
    """Works on packed patches (S, s, s, C). Has the interface of `engines.Engine`."""

    def __init__(self, active: ActiveSites):
        self.active = active

    def enter(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "S P P C"]:
        return self.active.gather(images)

    def conv(
        self,
        x: Float[Tensor, "S s s C"],
        kernel: Float[Tensor, "K C k k"],
        bias: Float[Tensor, " K"] | None = None,
        *,
        stride: int,
        padding: int,
    ) -> Float[Tensor, "S o o K"]:
        """Under autocast both the product and its result have the precision of autocast."""
        dtype = conv_dtype(kernel)
        # The last window begins `padding` before the last but (stride - 1) site of the patch.
        tile = self.add_halo(x.to(dtype), padding, kernel.shape[-1] - padding - stride)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type != "cpu" or torch.compiler.is_compiling():
                tile = rearrange(tile, "s y x c -> s c y x")
                x = rearrange(F.conv2d(tile, kernel.to(dtype), stride=stride), "s k y x -> s y x k")
            else:
                flat = rearrange(kernel, "k c y x -> (y x c) k").to(dtype)
                x = StridedConv.apply(tile, flat, kernel.shape[-1], stride)
            return x if bias is None else x + bias.to(dtype)

    def elementwise(self, x: Float[Tensor, "S s s C"], function: Callable[[Tensor], Tensor]):
        return function(x)

    def rows(self, x: Float[Tensor, "S s s C"], function: Callable[[Tensor], Tensor]) -> Float[Tensor, "S s s C"]:
        return function(x.flatten(0, 2)).view(x.shape)

    def pool(self, x: Float[Tensor, "S s s C"]) -> Float[Tensor, "S s/2 s/2 C"]:
        side, (h, w) = x.shape[1], self.active.grid
        tile = self.add_halo(x, 1, 1)
        maximum = max_pool_2x2(rearrange(tile, "s y x c -> s c y x"))  # sites -1 .. side-1 of the map of maxima
        # Beyond the border of the image there are no maxima, but the zero padding of the blur.
        inside = maximum.new_ones(2, len(self.active), side + 1)
        for axis, (position, length) in zip(inside, ((self.active.patch // w, h), (self.active.patch % w, w))):
            axis[:, 0] = position > 0
            axis[:, -1] = position < length - 1
        maximum = maximum * (inside[0, :, :, None] * inside[1, :, None, :])[:, None]
        return rearrange(blur_downsample(maximum, padding=0), "s c y x -> s y x c")

    def leave(self, x: Float[Tensor, "S 1 1 D"]) -> Float[Tensor, "S D"]:
        return x.flatten(0, 2)

    def add_halo(self, x: Float[Tensor, "S s s C"], before: int, after: int) -> Float[Tensor, "S t t C"]:
        """Packed patches to tiles, with `before` more sites above and to the left, `after` more below and to the right.

        Each site of a tile is a row of `x`, or of the patch of zeros behind them, which stands for every neighbour that
        is hidden or beyond the border. The backward pass adds up the copies of a site.
        """
        side = x.shape[1]
        along_axis = torch.arange(-before, side + after, device=x.device)
        reach = -(-max(before, after, 0) // side)
        distance, site = reach + along_axis.div(side, rounding_mode="floor"), along_axis % side
        patch = self.active.neighbours(reach)[distance[:, None], distance]  # (t, t, S)
        row = (patch * side + site[:, None, None]) * side + site[:, None]
        rows = torch.cat([x.flatten(0, 2), x.new_zeros(side**2, x.shape[-1])])
        tile = rows.index_select(0, rearrange(row, "y x s -> (s y x)"))
        return rearrange(tile, "(s y x) c -> s y x c", y=len(along_axis), x=len(along_axis))


class StridedConv(torch.autograd.Function):
    """Product of the k x k windows, `stride` sites apart, with the kernel: (S, t, t, C), (k k C, K) to (S, o, o, K)."""

    @staticmethod
    def forward(ctx, tile: Float[Tensor, "S t t C"], kernel: Float[Tensor, "f K"], side: int, stride: int):
        windows = unfold(tile, side, stride)
        ctx.save_for_backward(windows, kernel)
        ctx.tile_shape, ctx.stride = tile.shape, stride
        return (windows.flatten(0, 2).flatten(1) @ kernel).unflatten(0, windows.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "S o o K"]):  # pyright: ignore[reportIncompatibleMethodOverride]
        windows, kernel = ctx.saved_tensors
        rows, grad_tile = grad.flatten(0, 2), None
        grad_kernel = windows.flatten(0, 2).flatten(1).T @ rows
        if ctx.needs_input_grad[0]:
            side, stride = windows.shape[3], ctx.stride
            grad_windows = (rows @ kernel.T).view(windows.shape).unflatten(-1, (side, -1))
            grad_tile = grad.new_zeros(ctx.tile_shape)
            until = stride * windows.shape[1]
            for y, x in itertools.product(range(side), range(side)):
                into = grad_tile[:, y : y + until : stride, x : x + until : stride]
                into += grad_windows[:, :, :, y, x]
        return grad_tile, grad_kernel, None, None


def unfold(tile: Float[Tensor, "S t t C"], side: int, stride: int) -> Float[Tensor, "S o o k f"]:
    """Windows of k = `side` sites a side, `stride` apart; the sites of a window's row are contiguous: f = k C."""
    S, t, _, C = tile.shape
    o = (t - side) // stride + 1
    strides = (t * t * C, stride * t * C, stride * C, t * C, 1)
    return tile.as_strided((S, o, o, side, side * C), strides).contiguous()
