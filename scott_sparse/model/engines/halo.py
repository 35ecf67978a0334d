"""Halo tiles: each visible patch with the border that its windows reach into, then one matrix product per layer.

The S visible patches are packed, (S, s, s, C) with s sites per side. A window of a strided convolution reads a few
sites beyond its patch: those of neighbouring patches where they are visible, zeros where they are hidden or beyond the
image. Copied together they make a tile, (S, t, t, C), in which every layer is an ordinary one without padding. Nothing
is computed for hidden patches, a convolution is one product of its windows with the kernel, in whatever precision the
device multiplies fastest, and the way back is made of gathers alone.
"""

import itertools

import torch
from einops import rearrange
from torch.autograd.function import once_differentiable

from scott_sparse.model.engines.dense import binomial, highest
from scott_sparse.model.sites import KERNEL, PADDING, REACH, ActivePatches
from scott_sparse.shapes import Float, Tensor


def strided_conv_tiles(
    x: Float[Tensor, "S s s C"], weight: Float[Tensor, "K C 7 7"], active: ActivePatches
) -> Float[Tensor, "S s/2 s/2 K"]:
    """7x7 stride-2 convolution without bias: `F.conv2d(dense, weight, stride=2, padding=3)` at the active sites.

    Under autocast in autocast's precision, with a result in it.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    # The last window begins PADDING before the patch's last but one site.
    tile = Halo.apply(x.to(dtype), active, PADDING, KERNEL - PADDING - 2)
    with torch.autocast(kind, enabled=False):
        return StridedConv.apply(tile, rearrange(weight, "k c y x -> (y x c) k").to(dtype))


def max_blur_pool_tiles(x: Float[Tensor, "S s s C"], active: ActivePatches) -> Float[Tensor, "S s/2 s/2 C"]:
    """`dense.max_blur_pool` of the zero-filled map at the active sites."""
    side, (h, w) = x.shape[1], active.grid
    tile = Halo.apply(x, active, 1, 1).permute(0, 3, 1, 2)
    maximum = highest(tile)  # sites -1 .. side-1 of the maximum map
    # What lies beyond the image's own maximum map is the blur's padding.
    inside = maximum.new_ones(2, len(active), side + 1)
    for along, (at, end) in zip(inside, ((active.patch // w, h), (active.patch % w, w))):
        along[:, 0] = at > 0
        along[:, -1] = at < end - 1
    maximum = maximum * (inside[0, :, :, None] * inside[1, :, None, :])[:, None]
    return binomial(maximum, padding=0).permute(0, 2, 3, 1)


class Halo(torch.autograd.Function):
    """Tiles of packed patches: `before` sites more above and to the left, `after` more below and to the right."""

    @staticmethod
    def forward(ctx, x: Float[Tensor, "S s s C"], active: ActivePatches, before: int, after: int):
        ctx.active, ctx.pieces = active, pieces(x.shape[1], before, after)
        ctx.centre = slice(before, before + x.shape[1])
        sides = (x.shape[1] + before + after,) * 2
        tile = x.new_empty(len(x), *sides, x.shape[-1])
        padded = with_zero_row(x)
        for (down, ys, ty), (right, xs, tx) in itertools.product(ctx.pieces, ctx.pieces):
            if down == right == 0:
                tile[:, ty, tx] = x
            else:
                tile[:, ty, tx] = padded[:, ys, xs][active.neighbours[REACH + down, REACH + right]]
        return tile

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Float[Tensor, "S t t C"]):
        """A site's gradient comes from its own tile and, as neighbours are neighbours of each other, from theirs."""
        grad = upstream[:, ctx.centre, ctx.centre].clone(memory_format=torch.contiguous_format)
        for (down, ys, ty), (right, xs, tx) in itertools.product(ctx.pieces, ctx.pieces):
            if down or right:
                from_tile = with_zero_row(upstream[:, ty, tx])
                grad[:, ys, xs] += from_tile[ctx.active.neighbours[REACH - down, REACH - right]]
        return grad, None, None, None


class StridedConv(torch.autograd.Function):
    """Windows of 7x7 sites, two apart, times the kernel: tiles (S, t, t, C) and (49 C, K) to (S, o, o, K)."""

    @staticmethod
    def forward(ctx, tile: Float[Tensor, "S t t C"], kernel: Float[Tensor, "f K"]):
        windows = unfold(tile)
        ctx.save_for_backward(windows, kernel)
        ctx.tile = tile.shape
        return (windows.flatten(0, 2).flatten(1) @ kernel).unflatten(0, windows.shape[:3])

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Float[Tensor, "S o o K"]):
        windows, kernel = ctx.saved_tensors
        rows, grad_tile = upstream.flatten(0, 2), None
        grad_kernel = windows.flatten(0, 2).flatten(1).T @ rows
        if ctx.needs_input_grad[0]:
            of_windows = (rows @ kernel.T).view(windows.shape).unflatten(-1, (KERNEL, -1))
            grad_tile = upstream.new_zeros(ctx.tile)
            until = 2 * windows.shape[1]
            for y, x in itertools.product(range(KERNEL), range(KERNEL)):
                grad_tile[:, y : y + until : 2, x : x + until : 2] += of_windows[:, :, :, y, x]
        return grad_tile, grad_kernel


def unfold(tile: Float[Tensor, "S t t C"]) -> Float[Tensor, "S o o 7 f"]:
    """Windows of 7x7 sites, two apart; a window's row of seven sites lies together in memory: f = 7 C."""
    S, t, _, C = tile.shape
    o = (t - KERNEL) // 2 + 1
    strides = (t * t * C, 2 * t * C, 2 * C, t * C, 1)
    return tile.as_strided((S, o, o, KERNEL, KERNEL * C), strides).contiguous()


def pieces(side: int, before: int, after: int) -> list[tuple[int, slice, slice]]:
    """Along one axis: (patches away, which of its sites, where they go in the tile)."""
    found = []
    for away in range(-REACH, REACH + 1):
        low, high = max(away * side, -before), min((away + 1) * side, side + after)
        if low < high:
            found.append((away, slice(low - away * side, high - away * side), slice(low + before, high + before)))
    return found


def with_zero_row(x: Float[Tensor, "S a b C"]) -> Float[Tensor, "R a b C"]:
    """One patch of zeros behind the others: what hidden neighbours, and those beyond the border, look like."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])
