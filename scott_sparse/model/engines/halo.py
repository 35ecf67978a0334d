"""Each visible patch with a halo, the border that its windows reach into; then ordinary layers without padding.

The S visible patches are packed, (S, s, s, C) with s sites per side. A window of a strided convolution reads a few
sites beyond its patch: those of neighbouring patches where these are visible, zeros where they are hidden or beyond the
border of the image. Copied together they make a tile, (S, t, t, C), on which every layer is an ordinary one without
padding. Nothing is computed for hidden patches. A convolution has the precision that autocast asks for; on a CPU it is
one product of its windows with the kernel, elsewhere and in compiled graphs PyTorch's own.
"""

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch.autograd.function import once_differentiable

from scott_sparse.model.engines.dense import blur_downsample, conv_dtype, max_pool_2x2
from scott_sparse.model.sites import KERNEL, PADDING, REACH, ActiveSites
from scott_sparse.shapes import Float, Tensor


class Halo:
    """Works on packed patches (S, s, s, C). Has the interface of `engines.Engine`."""

    def __init__(self, active: ActiveSites):
        self.active, self.neighbours = active, active.neighbours()

    def enter(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "S P P 3"]:
        return self.active.gather(images)

    def conv(self, x: Float[Tensor, "S s s C"], kernel: Float[Tensor, "K C 7 7"]) -> Float[Tensor, "S s/2 s/2 K"]:
        """Under autocast both the product and its result have the precision of autocast."""
        dtype = conv_dtype(kernel)
        # The last window begins PADDING before the last but one site of the patch.
        tile = self.add_halo(x.to(dtype), PADDING, KERNEL - PADDING - 2)
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type != "cpu" or torch.compiler.is_compiling():
                tile = rearrange(tile, "s y x c -> s c y x")
                return rearrange(F.conv2d(tile, kernel.to(dtype), stride=2), "s k y x -> s y x k")
            return StridedConv.apply(tile, rearrange(kernel, "k c y x -> (y x c) k").to(dtype))

    def relu(self, x: Float[Tensor, "S s s C"]) -> Float[Tensor, "S s s C"]:
        return F.relu(x)

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
        distance, site = REACH + along_axis.div(side, rounding_mode="floor"), along_axis % side
        patch = self.neighbours[distance[:, None], distance]  # (t, t, S)
        row = (patch * side + site[:, None, None]) * side + site[:, None]
        rows = torch.cat([x.flatten(0, 2), x.new_zeros(side**2, x.shape[-1])])
        tile = rows.index_select(0, rearrange(row, "y x s -> (s y x)"))
        return rearrange(tile, "(s y x) c -> s y x c", y=len(along_axis), x=len(along_axis))


class StridedConv(torch.autograd.Function):
    """Product of the 7x7 windows, two sites apart, with the kernel: (S, t, t, C) and (49 C, K) to (S, o, o, K)."""

    @staticmethod
    def forward(ctx, tile: Float[Tensor, "S t t C"], kernel: Float[Tensor, "f K"]):
        windows = unfold(tile)
        ctx.save_for_backward(windows, kernel)
        ctx.tile_shape = tile.shape
        return (windows.flatten(0, 2).flatten(1) @ kernel).unflatten(0, windows.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Float[Tensor, "S o o K"]):  # pyright: ignore[reportIncompatibleMethodOverride]
        windows, kernel = ctx.saved_tensors
        rows, grad_tile = grad.flatten(0, 2), None
        grad_kernel = windows.flatten(0, 2).flatten(1).T @ rows
        if ctx.needs_input_grad[0]:
            grad_windows = (rows @ kernel.T).view(windows.shape).unflatten(-1, (KERNEL, -1))
            grad_tile = grad.new_zeros(ctx.tile_shape)
            until = 2 * windows.shape[1]
            for y, x in itertools.product(range(KERNEL), range(KERNEL)):
                grad_tile[:, y : y + until : 2, x : x + until : 2] += grad_windows[:, :, :, y, x]
        return grad_tile, grad_kernel


def unfold(tile: Float[Tensor, "S t t C"]) -> Float[Tensor, "S o o 7 f"]:
    """Windows of 7x7 sites, two sites apart; the seven sites of a window's row are contiguous: f = 7 C."""
    S, t, _, C = tile.shape
    o = (t - KERNEL) // 2 + 1
    strides = (t * t * C, 2 * t * C, 2 * C, t * C, 1)
    return tile.as_strided((S, o, o, KERNEL, KERNEL * C), strides).contiguous()
