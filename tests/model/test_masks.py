"""Masks have the exact count, end on every grid, are drawn in one shape for a whole batch, and look like blocks."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import visible_by_loop

from scott_sparse.model.masks import draw_visible, visible_count

sides = st.integers(2, 32)


@settings(max_examples=150, deadline=None)
@given(h=sides, w=sides, percent=st.integers(1, 99), shape=st.sampled_from(["block", "uniform"]), seed=st.integers(0))
def test_every_mask_has_the_exact_count(h, w, percent, shape, seed):
    patches, ratio = h * w, percent / 100
    expected = -(-(100 - percent) * patches // 100)  # ceil in integers: an oracle without rounding
    if expected == patches:
        with pytest.raises(ValueError, match="hides none"):
            visible_count(patches, ratio)
        return
    visible = draw_visible(
        3, (h, w), hide_ratio=ratio, shape=shape, generator=torch.Generator().manual_seed(seed % 2**63)
    )
    assert visible.shape == (3, patches)
    assert visible.sum(1).tolist() == [expected] * 3


def test_every_grid_ends():
    for h in range(2, 33):
        for w in range(2, 33):
            for ratio in (0.25, 0.6):
                visible = draw_visible(2, (h, w), hide_ratio=ratio)
                assert visible.sum(1).tolist() == [math.ceil((1 - ratio) * h * w - 1e-9)] * 2


def test_paper_count():
    assert visible_count(196, 0.6) == 79
    assert visible_count(10, 0.7) == 3  # (1 - 0.7) * 10 is 3.0000000000000004 in binary


def test_blocks_hang_together_and_uniform_patches_do_not():
    def same_as_right_neighbour(shape):
        generator = torch.Generator().manual_seed(0)
        visible = draw_visible(200, (14, 14), hide_ratio=0.6, shape=shape, generator=generator).view(-1, 14, 14)
        return (visible[:, :, 1:] == visible[:, :, :-1]).float().mean().item()

    assert same_as_right_neighbour("block") > 0.8
    assert same_as_right_neighbour("uniform") == pytest.approx(0.4**2 + 0.6**2, abs=0.02)


def test_every_patch_is_visible_and_hidden_at_times():
    share = draw_visible(2000, (14, 14), hide_ratio=0.6, generator=torch.Generator().manual_seed(0)).float().mean(0)
    assert share.min() > 0.03 and share.max() < 0.8


def test_same_generator_same_masks():
    draws = [draw_visible(8, (7, 9), hide_ratio=0.5, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_ratio_outside_is_refused(ratio):
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        draw_visible(1, (4, 4), hide_ratio=ratio)


def test_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="expected 'block' or 'uniform'"):
        draw_visible(1, (4, 4), hide_ratio=0.5, shape="ring")


def test_blocks_are_drawn_as_one_by_one():
    """The same distribution as rectangle by rectangle in a Python loop."""
    grid, count, many = (14, 14), 79, 3000
    random.seed(0)
    together = draw_visible(many, grid, hide_ratio=0.6, generator=torch.Generator().manual_seed(0)).view(many, *grid)
    alone = torch.stack([visible_by_loop(*grid, count) for _ in range(many)]).view(many, *grid)

    def borders(visible):
        """Of each mask: pairs of neighbours of which one is visible, down and right; rows and columns that have any."""
        pairs = [visible.diff(dim=dim).flatten(1).sum(1) for dim in (1, 2)]
        return torch.stack([*pairs, visible.any(2).sum(1), visible.any(1).sum(1)], 1).double()

    a, b = borders(together), borders(alone)
    error = ((a.var(0) + b.var(0)) / many).sqrt()
    assert ((a.mean(0) - b.mean(0)).abs() < 4 * error).all()
    assert ((a.std(0) / b.std(0) - 1).abs() < 0.1).all()
    p, q = together.double().mean(0), alone.double().mean(0)
    assert ((p - q).abs() < 5 * ((p * (1 - p) + q * (1 - q)) / many).sqrt()).all()
    uniform = borders(draw_visible(many, grid, hide_ratio=0.6, shape="uniform").view(many, *grid))
    assert not ((uniform.mean(0) - b.mean(0)).abs() < 4 * error).any()  # which the test can tell
