"""AdamW as the paper uses it, in one kernel: matrices alone decay, and rates follow pure schedules at each step."""

import torch
from torch import nn

from scott_sparse.training.schedules import Schedules


def adamw(model: nn.Module, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> torch.optim.AdamW:
    """Two groups: matrices and kernels decay; 1-D parameters and biases do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    free = [p for name, p in named if p.ndim <= 1 or name.endswith("bias")]
    decayed = [p for name, p in named if not (p.ndim <= 1 or name.endswith("bias"))]
    groups = [{"params": decayed, "decays": True}, {"params": free, "decays": False}]
    return torch.optim.AdamW(groups, betas=betas, eps=eps, fused=True)


def set_schedules(optimizer: torch.optim.Optimizer, schedules: Schedules, step: int) -> None:
    """Learning rate and weight decay of optimizer step `step` (from 0)."""
    for group in optimizer.param_groups:
        group["lr"] = schedules.lr_at(step)
        group["weight_decay"] = schedules.weight_decay_at(step) if group["decays"] else 0.0
