"""Linear probe on frozen features; blocks (last or last four) and L2 penalty or learning rate are chosen on val.

accelerate launch eval/linear.py runs/demo --data petals
python eval/linear.py runs/demo --data petals --solver sgd --copies 4      # with four random crops of each image
"""

import dataclasses
import functools
from typing import Literal

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.linear import fit_linear
from scott_sparse.evaluation.probe import run_probe
from scott_sparse.evaluation.subject import LabelBudgetConfig, run_script


@dataclasses.dataclass(frozen=True)
class LinearConfig(LabelBudgetConfig):
    solver: Literal["newton", "sgd"] = "newton"
    """newton: fit to the optimum for each of 15 L2 penalties. sgd: train with each of 13 learning rates."""
    epochs: int = 100
    """Passes over the training features; for --solver sgd only."""
    copies: int = 0
    """Random crops of each training image to fit on, in addition to its centre crop."""


def main(config: LinearConfig) -> None:
    fit = functools.partial(fit_linear, solver=config.solver, epochs=config.epochs)
    run_probe(config, "linear", fit, copies=config.copies)


if __name__ == "__main__":
    run_script(LinearConfig, main)
