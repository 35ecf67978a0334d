"""The paper's schedules at step + 1; the fused AdamW has the numbers of the plain one, and can skip a step."""

import copy

import pytest
import torch
from torch import nn

from scott_sparse.training.optim import Schedules, adamw, nonfinite_flag, poison_if_nonfinite

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


def trained(model, optimizer, steps=5):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return list(model.parameters())


def test_one_kernel_gives_the_numbers_of_the_loop():
    fast = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8), nn.Linear(8, 4))
    slow = copy.deepcopy(fast)
    optimizer = adamw(fast)
    for group in optimizer.param_groups:
        group.update(lr=1e-2, weight_decay=0.1 if group["decays"] else 0.0)
    plain = torch.optim.AdamW(
        [{**group, "params": []} for group in optimizer.param_groups], lr=1e-2, fused=False, foreach=False
    )
    names = {id(p): name for name, p in fast.named_parameters()}
    for group, other in zip(plain.param_groups, optimizer.param_groups):
        group["params"] = [dict(slow.named_parameters())[names[id(p)]] for p in other["params"]]
        group["fused"] = False
    for ours, theirs in zip(trained(fast, optimizer), trained(slow, plain)):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing():
    model = nn.Linear(4, 3)
    optimizer = adamw(model)
    trained(model, optimizer, 2)
    before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for number, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[number][name]) for name, tensor in moments.items())
    optimizer.found_inf = torch.zeros(())
    trained(model, optimizer, 1)
    assert not torch.equal(model.weight, before["weight"])


def test_a_loss_that_is_not_finite_makes_its_gradient_so():
    """An infinite target may leave the gradient of the loss finite, here 1; of a finite loss nothing changes."""
    weight = torch.tensor(2.0, requires_grad=True)
    for target, expected in ((1.0, 1.0), (torch.inf, torch.nan)):
        (gradient,) = torch.autograd.grad(poison_if_nonfinite(weight + target), weight)
        assert torch.equal(gradient.isnan(), torch.tensor(expected).isnan()) and (gradient == 1 or gradient.isnan())
    finite, infinite = torch.tensor(1.0), torch.tensor(torch.inf)
    assert nonfinite_flag(finite, infinite, scaled=False) == 1 == nonfinite_flag(infinite, finite, scaled=True)
    assert nonfinite_flag(finite, infinite, scaled=True) == 0 == nonfinite_flag(infinite, finite, scaled=False)
