"""Masks have the exact count, end on every grid, are drawn in one shape for a whole batch, and look like blocks."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scott_sparse.masks import draw_visible, visible_count

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
