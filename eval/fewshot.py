"""Few-shot probe: logistic regression on 1, 5 and 10 labels per class, five draws of them each; nothing is chosen.

    accelerate launch eval/fewshot.py runs/demo --data petals

The penalty is scikit-learn's default (C = 1), and features are standardised with all training images, labels unseen:
with so few labels there is none to spare for a choice.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from scott_sparse.distributed import process_state
from scott_sparse.evaluation.linear import Scale, fit_lbfgs
from scott_sparse.evaluation.metrics import Scores, check_fitting_set, score
from scott_sparse.evaluation.probe import Frozen, Question, ask, frozen_features, write
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Int, Tensor

SHOTS = (1, 5, 10)
DRAWS = 5


def main(question: Question) -> None:
    started = time.perf_counter()
    frozen = frozen_features(question)
    if not process_state().is_main_process:
        return
    check_fitting_set(frozen.train.mean, frozen.train_labels, len(frozen.data.classes))
    scale = Scale.of(frozen.train.mean)
    fit, test = scale(frozen.train.mean), scale(frozen.test.mean)
    results = {shots: [few_shot(frozen, fit, test, shots, draw) for draw in range(DRAWS)] for shots in SHOTS}
    shown = {
        str(shots): {
            measure: _mean_and_spread([getattr(s, measure) for s in scores])
            for measure in ("top1", "top5", "mean_per_class")
        }
        for shots, scores in results.items()
    }
    last = results[SHOTS[-1]][0]
    result = {"shots": shown, "draws": DRAWS, "test": {**last.to_json(), "of": f"{SHOTS[-1]} shots, first draw"}}
    write(question, "fewshot", frozen, result, seconds=time.perf_counter() - started)
    table = Table(
        title=f"few-shot on {frozen.subject.name} features, {len(frozen.data.test):,} test images, {DRAWS} draws"
    )
    for column in ("labels per class", "top-1", "spread", "top-5", "mean per class"):
        table.add_column(column, justify="right")
    for shots, row in shown.items():
        top5 = "-" if row["top5"] is None else f"{row['top5']['mean']:.1f}"
        per_class = f"{row['mean_per_class']['mean']:.1f}"
        table.add_row(shots, f"{row['top1']['mean']:.1f}", f"± {row['top1']['spread']:.1f}", top5, per_class)
    Console().print(table)


def few_shot(frozen: Frozen, fit: Float[Tensor, "n C"], test: Float[Tensor, "m C"], shots: int, draw: int) -> Scores:
    """Fit on `shots` images of each class, all of them where a class has fewer, and score on test."""
    labels, classes = frozen.train_labels, len(frozen.data.classes)
    rows = draw_shots(labels, shots, draw)
    (layer,) = fit_lbfgs(fit[rows], labels[rows], classes=classes, penalties=(1 / len(rows),))
    return score(F.linear(test, *layer), frozen.data.test.labels)


def draw_shots(labels: Int[Tensor, " n"], shots: int, draw: int) -> Int[Tensor, " m"]:
    """Images of a draw: of each class the first `shots` in a random order, so that five include those of one."""
    order = torch.randperm(len(labels), generator=generator_at("shots", draw))
    return torch.cat([order[labels[order] == label][:shots] for label in labels.unique()])


def _mean_and_spread(values: list[float | None]) -> dict | None:
    if values[0] is None:
        return None
    spread = statistics.stdev(values)
    return {"mean": round(statistics.mean(values), 2), "spread": round(spread, 2), "all": [round(v, 2) for v in values]}


if __name__ == "__main__":
    ask(Question, main)
