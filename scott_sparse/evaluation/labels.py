"""Fewer labels: the same number or share of training images of each class, drawn by a seed alone."""

import re
from collections.abc import Sequence

import torch

from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Int, Tensor

EXAMPLES = "a share of each class (10%) or a number of images of each class (5)"


def draw_shots(labels: Int[Tensor, " n"], shots: Int[Tensor, " K"], draw: int) -> Int[Tensor, " m"]:
    """Indices of the first `shots` images of each class, of K, in a random order: five include the one of one shot.

    A class with fewer images gives all of them.
    """
    order = torch.randperm(len(labels), generator=generator_at("shots", draw))
    return torch.cat([order[labels[order] == label][:count] for label, count in enumerate(shots.tolist())])


def draw_labels(labels: Int[Tensor, " n"], budget: str, classes: Sequence[str], *, seed: int) -> Int[Tensor, " m"]:
    """Indices of the training images whose labels are used, in their order; a larger budget includes a smaller one.

    Raises ValueError for a budget that is neither a share nor a number, and for one that leaves a class without image.
    """
    match = re.fullmatch(r"(\d+|\d*\.\d+)(%?)", budget)
    number = float(match[1]) if match else 0.0
    if not match or number == 0 or (number > 100 if match[2] else not number.is_integer()):
        raise ValueError(f"label_budget {budget!r} is neither {EXAMPLES}.")
    counts = torch.bincount(labels, minlength=len(classes))
    shots = (counts * number / 100).round().long() if match[2] else torch.full_like(counts, int(number))
    empty = [str(classes[label]) for label in ((shots == 0) & (counts > 0)).nonzero()[:, 0].tolist()]
    if empty:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise ValueError(
            f"label_budget {budget} leaves no image of {len(empty)} of {len(classes)} classes ({names}); use a larger "
            "share, or --label-budget 1 for one image of each class."
        )
    return draw_shots(labels, shots, seed).sort().values
