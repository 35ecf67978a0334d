"""Attentive probe on frozen tokens: three heads, at three learning rates, stored at ten epochs, chosen on val.

accelerate launch eval/attentive.py runs/demo --data petals
accelerate launch eval/attentive.py RUN --data flowers102 --protocol paper --copies 4
"""

import dataclasses
import functools

import checkout  # noqa: F401 - first

from scott_sparse.evaluation.attentive import fit_attentive
from scott_sparse.evaluation.probe import run_probe
from scott_sparse.evaluation.subject import LabelBudgetConfig, run_script


@dataclasses.dataclass(frozen=True)
class AttentiveConfig(LabelBudgetConfig):
    epochs: int = 100
    """Passes over the training features."""
    copies: int = 0
    """Random crops of each training image to fit on, in addition to its centre crop."""


def main(config: AttentiveConfig) -> None:
    fit = functools.partial(fit_attentive, epochs=config.epochs)
    run_probe(config, "attentive", fit, tokens=True, copies=config.copies)


if __name__ == "__main__":
    run_script(AttentiveConfig, main)
