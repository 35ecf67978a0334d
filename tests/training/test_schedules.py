"""The paper's three curves, evaluated at step + 1."""

import dataclasses

import pytest

from scott_sparse.training.recipe import SMALL_DATA
from scott_sparse.training.schedules import Schedules

PAPER = Schedules(
    total_steps=3000, warmup_steps=400, lr=5e-4, lr_start=1e-6, lr_final=1e-5, flat_fraction=0.72,
    weight_decay=(0.04, 0.4), momentum=(0.996, 1.0),
)  # fmt: skip


def test_learning_rate():
    assert PAPER.lr_at(0) == pytest.approx(1e-6 + (5e-4 - 1e-6) / 400)  # never the starting value itself
    assert PAPER.lr_at(199) == pytest.approx((1e-6 + 5e-4) / 2)
    assert PAPER.lr_at(399) == 5e-4
    flat_until = 400 + 0.72 * 2600
    assert PAPER.lr_at(int(flat_until) - 1) == 5e-4
    assert PAPER.lr_at(int((flat_until + 3000) / 2) - 1) == pytest.approx((5e-4 + 1e-5) / 2, rel=1e-2)
    assert PAPER.lr_at(2999) == pytest.approx(1e-5)
    curve = [PAPER.lr_at(step) for step in range(3000)]
    assert curve[:400] == sorted(curve[:400]) and curve[400:] == sorted(curve[400:], reverse=True)


def test_linear_curves_end_where_they_should():
    assert PAPER.weight_decay_at(0) == pytest.approx(0.04 + 0.36 / 3000)
    assert PAPER.weight_decay_at(2999) == pytest.approx(0.4)
    assert PAPER.momentum_at(2999) == pytest.approx(1.0)


def test_without_warm_up_or_decay():
    flat = Schedules(1, 0, 1e-3, 0.0, 0.0, 1.0, (0.0, 0.0), (0.9, 0.9))
    assert flat.lr_at(0) == 1e-3


def test_rates_follow_batch_and_length():
    """Adam's rate goes with the root of the batch, warm-up and the target's window with the length of the run."""
    short = dataclasses.replace(SMALL_DATA, epochs=5.0).schedules(100)
    assert short.warmup_steps == 50 and short.lr == SMALL_DATA.lr
    assert short.momentum_at(0) == short.momentum_at(499) == pytest.approx(1 - 1 / (0.04 * 500))
    large = dataclasses.replace(SMALL_DATA, epochs=10.0, batch_size=256).schedules(25)
    assert large.warmup_steps == 25 and large.lr == pytest.approx(2 * SMALL_DATA.lr)
    assert large.momentum_at(0) == pytest.approx(1 - 1 / 10)
    assert dataclasses.replace(SMALL_DATA, epochs=0.1).schedules(10).momentum_at(0) == 0  # a step: the target copies
    fixed = dataclasses.replace(SMALL_DATA, lr_batch=None, batch_size=256, momentum=(0.9, 1.0), warmup_epochs=1.0)
    assert fixed.schedules(25).lr == SMALL_DATA.lr and fixed.schedules(25).warmup_steps == 25
    assert fixed.schedules(25).momentum == (0.9, 1.0)
