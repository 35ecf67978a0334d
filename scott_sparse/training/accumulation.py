"""Gradient accumulation with the loss of the whole batch (GradCache, arXiv 2101.06983).

The cross-crop term compares all images of a batch: the negatives of NT-Xent, the test of SIGReg and the statistics of
the projector. The mean of its values in A micro-batches is therefore not its value in the batch. So a first pass
without gradient computes the pooled features of all micro-batches, and the pass with gradient through each of them
computes the term of the whole batch (`MIMJEPA.forward` with `cached`). Both passes must draw the same dropout
(`seed_dropout`).
"""

from collections.abc import Iterable

import torch
from torch import nn

from scott_sparse.randomness import seed_at
from scott_sparse.shapes import Bool, Float, Tensor


def seed_dropout(seed: int, step: int, process: int, number: int) -> None:
    """Seed what the model draws in micro-batch `number` of an optimizer step, in one process of a run with a seed."""
    torch.manual_seed(seed_at(seed, "dropout", step, process, *([number] if number else [])))


@torch.no_grad()
def cache_pooled(
    model: nn.Module,
    micro_batches: Iterable[tuple[Float[Tensor, "B V C H W"], Bool[Tensor, "B V N"]]],
    accelerator,
    *,
    seed: int,
    step: int,
) -> Float[Tensor, "A R D"]:
    """Pooled features of the R = B * V crops of each of this process's A micro-batches (images, visible) of a step.

    `accelerator`: the `accelerate.Accelerator` that wrapped the model.
    """
    pooled = []
    for number, (images, visible) in enumerate(micro_batches):
        seed_dropout(seed, step, accelerator.process_index, number)
        with accelerator.autocast():
            pooled.append(model(images, visible, pooled_only=True)["pooled"])
    return torch.stack(pooled)
