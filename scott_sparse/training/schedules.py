"""Learning rate, weight decay and EMA momentum as pure functions of the optimizer step.

Step n (from 0) trains with the values at n + 1, as in the paper's code: the first update is never made at the starting
value. Nothing here has state, so a resumed run needs none.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Schedules:
    """Three curves over `total_steps` optimizer steps (arXiv 2502.18056, appendix)."""

    total_steps: int
    warmup_steps: int
    lr: float
    lr_start: float
    lr_final: float
    flat_fraction: float
    """Share of the steps after warm-up that stay at `lr` before the cosine."""
    weight_decay: tuple[float, float]
    momentum: tuple[float, float]

    def lr_at(self, step: int) -> float:
        """Linear warm-up from `lr_start`, flat, then a cosine to `lr_final`."""
        at = min(step + 1, self.total_steps)
        if at < self.warmup_steps:
            return _between(self.lr_start, self.lr, at / self.warmup_steps)
        flat_until = self.warmup_steps + self.flat_fraction * (self.total_steps - self.warmup_steps)
        if at <= flat_until:
            return self.lr
        progress = (at - flat_until) / (self.total_steps - flat_until)
        return _between(self.lr_final, self.lr, (1 + math.cos(math.pi * progress)) / 2)

    def weight_decay_at(self, step: int) -> float:
        return _between(*self.weight_decay, min(step + 1, self.total_steps) / self.total_steps)

    def momentum_at(self, step: int) -> float:
        return _between(*self.momentum, min(step + 1, self.total_steps) / self.total_steps)


def _between(start: float, end: float, fraction: float) -> float:
    return start + fraction * (end - start)
