"""Few-shot probe: logistic regression on 1, 5 and 10 labels per class, for five draws of them; nothing is chosen.

The penalty is scikit-learn's default, C = 1, and features are standardised with all training images, whose labels are
not used for it: so few labels leave none for a choice.
"""

import statistics
import time

import torch
import torch.nn.functional as F
from rich.console import Console

from scott_sparse.evaluation.labels import draw_shots
from scott_sparse.evaluation.linear import Scale, fit_newton
from scott_sparse.evaluation.metrics import Scores, score
from scott_sparse.evaluation.probe import ProbeConfig, load_probe_data, write_result
from scott_sparse.evaluation.report import make_table

SHOTS = (1, 5, 10)
DRAWS = 5


def run_few_shot(config: ProbeConfig) -> None:
    """Fit, score on test, write and print the result; a class with fewer images than shots gives all of them."""
    started = time.perf_counter()
    data = load_probe_data(config)
    if data is None:
        return
    labels, classes = data.train_labels, len(data.classes)
    scale = Scale.of(data.train.mean)
    train, test = scale(data.train.mean), scale(data.test.mean)

    def scores_of(shots: int, draw: int) -> Scores:
        rows = draw_shots(labels, torch.full((classes,), shots), draw)
        (layer,) = fit_newton(train[rows], labels[rows], classes=classes, penalties=(1 / len(rows),))
        return score(F.linear(test, *layer), data.test_labels)

    scores = {shots: [scores_of(shots, draw) for draw in range(DRAWS)] for shots in SHOTS}
    measures = ("top1", "top5", "mean_per_class")
    summary = {str(n): {name: _over_draws([getattr(s, name) for s in scores[n]]) for name in measures} for n in SHOTS}
    test_scores = {**scores[SHOTS[-1]][0].to_json(), "of": f"{SHOTS[-1]} shots, first draw"}
    result = {"shots": summary, "draws": DRAWS, "test": test_scores}
    write_result(config, "fewshot", data, result, seconds=time.perf_counter() - started)
    rows = [
        [n, *(f"{over['mean']:.1f} ± {over['spread']:.1f}" if over else "-" for over in measures.values())]
        for n, measures in summary.items()
    ]
    title = f"few-shot on {data.encoder.name} features, {len(data.test_labels):,} test images, {DRAWS} draws"
    Console().print(make_table(title, ("labels per class", "top-1", "top-5", "mean per class"), rows))


def _over_draws(values: list) -> dict | None:
    """Mean and standard deviation; None for a measure that has no value, top-5 of few classes."""
    if None in values:
        return None
    mean, deviation = statistics.mean(values), statistics.stdev(values)
    return {"mean": round(mean, 2), "spread": round(deviation, 2), "all": [round(value, 2) for value in values]}
