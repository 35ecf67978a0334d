"""The paper's attentive probe: three heads on all tokens, at three learning rates, kept at ten epochs, chosen on val.

accelerate launch eval/attentive.py runs/demo --data petals
accelerate launch eval/attentive.py RUN --data flowers102 --protocol paper --copies 4
"""

import dataclasses
import functools

from scott_sparse.evaluation.attentive import fit_attentive
from scott_sparse.evaluation.probe import Question, answer, ask


@dataclasses.dataclass(frozen=True)
class AttentiveQuestion(Question):
    epochs: int = 100
    copies: int = 0
    """Random crops of each image to fit on, besides the whole image."""


def main(question: AttentiveQuestion) -> None:
    fit = functools.partial(fit_attentive, epochs=question.epochs)
    answer(question, "attentive", fit, tokens=True, copies=question.copies)


if __name__ == "__main__":
    ask(AttentiveQuestion, main)
