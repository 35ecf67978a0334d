"""Random masks: which patches does the context encoder see?

A mask is `visible` (B, N), True where the context encoder sees the patch; the predictor predicts the others. All images
of a batch have *exactly* the same number n of visible patches, so that their tokens can be packed as (B, n, D).

Shape "block" (SCOTT, arXiv 2502.18056, after BEiT, arXiv 2106.08254): a union of random rectangles is *visible*, so
that the visible patches are connected and the hidden ones are their complement. Shape "uniform": the same number of
patches, each as likely as any other.
"""

import math

import torch

from scott_sparse.shapes import Bool, Tensor

__all__ = ["draw_visible", "visible_count"]

MIN_BLOCK_AREA = 16
ASPECT_RANGE = (0.3, 1 / 0.3)
MAX_ROUNDS = 64


def visible_count(patches: int, hide_ratio: float) -> int:
    """The number of visible patches, `ceil((1 - hide_ratio) * patches)`.

    Raises ValueError where hide_ratio is outside (0, 1) or hides no patch.
    """
    if not 0 < hide_ratio < 1:
        raise ValueError(f"hide_ratio {hide_ratio} is outside (0, 1); 0.6 hides 60 % of the patches.")
    count = math.ceil((1 - hide_ratio) * patches - 1e-9)  # 1 - 0.7 is 0.30000000000000004
    if count >= patches:
        raise ValueError(
            f"hide_ratio {hide_ratio} hides none of {patches} patches; expected at least {1 / patches:.3g}."
        )
    return count


def draw_visible(
    batch: int,
    grid: tuple[int, int],
    *,
    hide_ratio: float,
    shape: str = "block",
    generator: torch.Generator | None = None,
) -> Bool[Tensor, "B N"]:
    """Draw the masks of `batch` images on a patch grid (h, w), on the CPU.

    Each row has exactly `visible_count(h * w, hide_ratio)` True entries. Raises ValueError for an unknown `shape`, and
    as `visible_count`.
    """
    count = visible_count(grid[0] * grid[1], hide_ratio)
    if shape == "block":
        return _grow_blocks(batch, grid, count, generator)
    if shape == "uniform":
        return _top(torch.rand(batch, grid[0] * grid[1], generator=generator), count)
    raise ValueError(f"unknown mask shape {shape!r}; expected 'block' or 'uniform'.")


def _grow_blocks(batch: int, grid: tuple[int, int], count: int, generator) -> Tensor:
    """Add one random rectangle to every image in each round, for all images at once.

    A rectangle is accepted where it adds at least one patch and not more than are missing. Patches that are still
    missing after MAX_ROUNDS (a few, on unusual grids) are added at the borders of the blocks.
    """
    h, w = grid
    visible = torch.zeros(batch, h, w, dtype=torch.bool)
    rows, cols = torch.arange(h), torch.arange(w)
    low, high = (math.log(r) for r in ASPECT_RANGE)
    for _ in range(MAX_ROUNDS):
        missing = count - visible.sum((1, 2))
        if not missing.any():
            break
        u = torch.rand(4, batch, generator=generator)
        smallest = missing.clamp(max=MIN_BLOCK_AREA)
        area = smallest + u[0] * (missing - smallest)
        aspect = torch.exp(low + u[1] * (high - low))
        height = (area * aspect).sqrt().round().clamp(1, h)
        width = (area / aspect).sqrt().round().clamp(1, w)
        top = (u[2] * (h - height + 1)).floor()[:, None]
        left = (u[3] * (w - width + 1)).floor()[:, None]
        in_rows = (rows >= top) & (rows < top + height[:, None])
        in_cols = (cols >= left) & (cols < left + width[:, None])
        block = in_rows[:, :, None] & in_cols[:, None, :]
        added = (block & ~visible).sum((1, 2))
        accepted = (added > 0) & (added <= missing)
        visible |= block & accepted[:, None, None]
    return _fill_at_borders(visible, count, generator).flatten(1)


def _fill_at_borders(visible: Tensor, count: int, generator) -> Tensor:
    """Bring every image to `count` visible patches, by patches that border on visible ones."""
    while (visible.sum((1, 2)) < count).any():
        near = torch.nn.functional.max_pool2d(visible.float()[:, None], 3, stride=1, padding=1)[:, 0]
        # Ranks: visible (2..) over bordering (1..) over far (0..), at random within each.
        score = visible.float() + near + torch.rand(visible.shape, generator=generator)
        visible = _top(score.flatten(1), count).view_as(visible)
    return visible


def _top(score: Tensor, count: int) -> Tensor:
    """True at the `count` largest entries of each row."""
    chosen = score.topk(count, dim=1).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, chosen, True)
