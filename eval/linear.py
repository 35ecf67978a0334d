"""Linear probe on frozen features: mean tokens of the last block or of the last four, penalty or rate chosen on val.

accelerate launch eval/linear.py runs/demo --data petals
python eval/linear.py runs/demo --data petals --solver sgd --copies 4      # with four random crops of each image
"""

import dataclasses
import functools
from typing import Literal

from scott_sparse.evaluation.linear import fit_linear
from scott_sparse.evaluation.probe import Question, answer, ask


@dataclasses.dataclass(frozen=True)
class LinearQuestion(Question):
    solver: Literal["lbfgs", "sgd"] = "lbfgs"
    """lbfgs: to the optimum for 15 L2 penalties. sgd: 13 learning rates in one pass over the data."""
    epochs: int = 100
    """Of sgd."""
    copies: int = 0
    """Random crops of each image to fit on, besides the whole image."""


def main(question: LinearQuestion) -> None:
    fit = functools.partial(fit_linear, solver=question.solver, epochs=question.epochs)
    answer(question, "linear" if question.solver == "lbfgs" else "linear-sgd", fit, copies=question.copies)


if __name__ == "__main__":
    ask(LinearQuestion, main)
