"""The fused AdamW: the numbers of the plain one, and nothing at all where it is told that a step was not finite."""

import copy

import torch
from torch import nn

from scott_sparse.training.optim import adamw


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
