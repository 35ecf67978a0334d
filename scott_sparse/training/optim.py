"""AdamW as the paper uses it, its schedules as pure functions of the step, and how a step with nan or inf is left out.

Step n (from 0) trains with the values of the schedules at n + 1, as in the paper's code: the first update is never made
at the starting value. Nothing here has state, so a resumed run needs none.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import nn

from scott_sparse.shapes import Float, Tensor


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Learning rate, weight decay and EMA momentum over `total_steps` optimizer steps (arXiv 2502.18056, appendix)."""

    total_steps: int
    warmup_steps: int
    lr: float
    lr_start: float
    lr_final: float
    flat_fraction: float
    """Share of the steps after warm-up that stay at `lr` before the cosine."""
    weight_decay: tuple[float, float]
    """First and last value."""
    momentum: tuple[float, float]
    """First and last value."""

    def lr_at(self, step: int) -> float:
        """Linear warm-up from `lr_start`, constant at `lr`, then a cosine to `lr_final`."""
        at = min(step + 1, self.total_steps)
        if at < self.warmup_steps:
            return _between(self.lr_start, self.lr, at / self.warmup_steps)
        flat_until = self.warmup_steps + self.flat_fraction * (self.total_steps - self.warmup_steps)
        if at <= flat_until:
            return self.lr
        progress = (at - flat_until) / (self.total_steps - flat_until)
        return _between(self.lr_final, self.lr, (1 + math.cos(math.pi * progress)) / 2)

    def weight_decay_at(self, step: int) -> float:
        """Linear from the first to the last value."""
        return _between(*self.weight_decay, min(step + 1, self.total_steps) / self.total_steps)

    def momentum_at(self, step: int) -> float:
        """Linear from the first to the last value."""
        return _between(*self.momentum, min(step + 1, self.total_steps) / self.total_steps)

    def at(self, step: int) -> dict[str, float]:
        """All values of a step by name, for the log."""
        names = ("lr", "weight_decay", "momentum")
        return {name: getattr(self, f"{name}_at")(step) for name in names}


def _between(start: float, end: float, fraction: float) -> float:
    return start + fraction * (end - start)


def adamw(
    model: nn.Module,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    lr_scale: Callable[[str], float] = lambda _: 1.0,
) -> torch.optim.AdamW:
    """Fused AdamW in groups: matrices and kernels decay; 1-D parameters and biases do not.

    `lr_scale`: from the name of a parameter to a factor of its learning rate; a group for each factor.
    """
    groups: dict[tuple[bool, float], dict] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            key = (not (p.ndim <= 1 or name.endswith("bias")), lr_scale(name))
            groups.setdefault(key, {"params": [], "decays": key[0], "lr_scale": key[1]})["params"].append(p)
    return torch.optim.AdamW([groups[key] for key in sorted(groups, reverse=True)], betas=betas, eps=eps, fused=True)


def set_schedules(optimizer: torch.optim.Optimizer, schedules: Schedules, step: int) -> None:
    """Set the learning rate and weight decay of optimizer step `step` (from 0)."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr_scale"] * schedules.lr_at(step)
        group["weight_decay"] = schedules.weight_decay_at(step) if group["decays"] else 0.0


def poison_if_nonfinite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The loss, with a gradient of nan where it is nan or inf (by itself the gradient may be finite then).

    The gradient is averaged over all processes, so that all of them learn of the loss of one without another message.
    """
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def nonfinite_flag(loss: Float[Tensor, ""], gradient_norm: Float[Tensor, ""], *, scaled: bool) -> Float[Tensor, ""]:
    """1.0 where a step's gradient, averaged over all processes, has a nan or inf, else 0.0; no wait for the device.

    `scaled`: gradients under fp16's loss scaling may overflow, and the scaler leaves such steps out: the loss decides.
    """
    return (~torch.isfinite(loss if scaled else gradient_norm)).float()
