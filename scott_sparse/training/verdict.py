"""What the reports of a run say in a few words, and what to try if it does worse than what it started from."""

import math
from collections.abc import Mapping, Sequence

from scott_sparse.training.health import Health
from scott_sparse.training.recipe import Recipe

PATIENCE_REPORTS = 3  # without an improvement, until a run is called stalled
COLLAPSED_SHARE = 1 / 4  # of the highest RankMe so far
EQUAL_STD = 1e-3  # of unit-length features times the root of their width: an untrained encoder has .2 to .4
SETTLED_REPORTS = 2  # after warm-up: features often get worse before they get better
MIM_TURN, MIM_GAIN = 100_000, 300_000  # image passes until the published recipe turns, until it is above its start

ADVICE = {  # by the first words of a verdict
    "starting": "Too early to tell: features often get worse before they get better. Wait for the next reports.",
    "learning": "The features are getting better. While the curves still rise, more --epochs may gain more.",
    "stalled": "More of the same is unlikely to help. Evaluate the encoder as it is, or change what it learns from: "
    "more crops (--crops), more images, another learning rate (--lr).",
    "collapsing": "The features of different images become equal. Stop the run, and start it again with a lower --lr, "
    "a longer --warmup-epochs or a cross-crop term (--cross-crop-weight 0.5 --crops 8).",
    "worse than": "k-NN does better without the training. It compares mean tokens alone: look at the linear and "
    "attentive probes too before giving the encoder up.",
    "no better than": "k-NN does as well without the training. It compares mean tokens alone: look at the linear and "
    "attentive probes too before giving the encoder up.",
}


def advice(words: str) -> str:
    """What to do about a verdict, in a sentence or two."""
    return next((text for start, text in ADVICE.items() if words.startswith(start)), "")


def verdict(
    reports: Sequence[Health], *, warmup_epochs: float = 0.0, remedy: str = "", start: str = "untrained"
) -> str:
    """Either "starting", "learning", or "stalled", "collapsing" or "worse than" a baseline with more, in one line.

    Collapsing: the features of all images are equal, or RankMe is below a quarter of its highest value in this run.
    Worse than untrained (`start` is its name), or than raw pixels: k-NN was so in the last two reports, both after
    warm-up, and is not at a new height; `remedy` (`what_to_try`) follows. Before that, such a run is starting. Stalled:
    in the last three reports neither k-NN has improved by its standard error, nor LiDAR or the loss by one per cent.
    """
    now, highest = reports[-1], max(reports, key=lambda report: report.rankme)
    if now.rankme < COLLAPSED_SHARE * highest.rankme:
        return f"collapsing: RankMe fell from {highest.rankme:.0f} to {now.rankme:.0f}"
    if now.std < EQUAL_STD:
        return f"collapsing: the features of all images are equal (standard deviation {now.std:.2g})"
    settled = [report for report in reports[1:] if report.epoch > warmup_epochs][-SETTLED_REPORTS:]
    rising = len(reports) > 1 and _knn(now)[0] > sum(max(map(_knn, reports[:-1])))
    worse = [] if rising else _worse_than(now, start)
    lasting = [name for name in worse if all(name in _worse_than(report, start) for report in settled)]
    if lasting and len(settled) == SETTLED_REPORTS:
        return f"worse than {' and '.join(lasting)} so far{remedy}"
    if worse:
        return "starting"
    earlier, recent = reports[:-PATIENCE_REPORTS], reports[-PATIENCE_REPORTS:]
    if not earlier:
        return "learning" if len(reports) > 1 else "starting"
    improved = [max(r.lidar for r in recent) > 1.01 * max(r.lidar for r in earlier)]
    losses_before, losses_since = ([r.loss for r in part if r.loss is not None] for part in (earlier, recent))
    improved.append(not losses_before or min(losses_since, default=math.inf) < 0.99 * min(losses_before))
    measures = "LiDAR nor the loss"
    if now.knn is not None:
        improved.append(max(map(_knn, recent))[0] > sum(max(map(_knn, earlier))))
        measures = f"k-NN, {measures}"
    return (
        "learning" if any(improved) else f"stalled: neither {measures} has improved since epoch {earlier[-1].epoch:g}"
    )


def final_verdict(
    so_far: str, knn: Mapping[str, float | None], *, n: int, remedy: str, start: str = "untrained"
) -> str:
    """The verdict on a finished run, by the verdict of its last report and the accuracies of `knn_report` on n images.

    Only a run that ends above both baselines is "learning".
    """
    accuracy, untrained, pixels = (knn[name] for name in ("pretrained", "init", "pixels"))
    if accuracy is None or untrained is None or pixels is None or so_far.startswith("collapsing"):
        return so_far
    baselines = {start: untrained, "raw pixels": pixels}
    worse = worse_than(baselines, accuracy, standard_error(accuracy, n))
    level = [name for name, baseline in baselines.items() if baseline >= accuracy and name not in worse]
    ranks = {"worse than": worse, "no better than": level}
    if worse or level:
        return ", ".join(f"{rank} {' and '.join(names)}" for rank, names in ranks.items() if names) + remedy
    return so_far if so_far.startswith("stalled") else "learning"


def worse_than(baselines: Mapping[str, float | None], accuracy: float, error: float) -> list[str]:
    """Names of the baselines that an accuracy is below, by more than the standard error of the difference.

    That is √2 times the error of one accuracy if the two are independent, and less here, where they are of the same
    images: noise alone seldom makes a run worse.
    """
    return [name for name, other in baselines.items() if other is not None and other - accuracy > 2**0.5 * error]


def _worse_than(report: Health, start: str) -> list[str]:
    return worse_than({start: report.knn_untrained, "raw pixels": report.knn_pixels}, *_knn(report))


def _knn(report: Health) -> tuple[float, float]:
    """Accuracy and its standard error; 0 without labels."""
    return report.knn or 0.0, report.knn_error or 0.0


def standard_error(accuracy: float, n: int) -> float:
    """Of an accuracy on n images, both in per cent; one more right and one more wrong answer keep it above 0."""
    share = (accuracy / 100 * n + 1) / (n + 2)
    return 100 * (share * (1 - share) / n) ** 0.5


def what_to_try(recipe: Recipe, images: int) -> str:
    """What has helped other runs that did worse than a baseline (benchmarks/EVIDENCE.md), to follow the verdict.

    `images`: how many the run is pretrained on.
    """
    if recipe.objective.cross_crop_weight:
        half = "--plain-share 0.5 --colour 1 --crops 8 (the colours of half of the crops change)"
        other = "the recipe colour-invariant (the colours of all crops change), --plain-share 0 --colour 0 (of none)"
        return f"; try {other if recipe.views.plain_crops else half}, or the recipe mim-jepa (no crops are compared)"
    passes, longer = round(recipe.epochs * images), f"--epochs {math.ceil(MIM_GAIN / images)}"
    if passes < MIM_TURN and recipe.ema_momentum:
        turn = f"MIM-JEPA alone with a target that follows slowly turns at about {MIM_TURN:,} image passes"
        return f"; {turn}, this run has {passes:,}: try the recipe mim-jepa, or {longer}"
    return "; try eval/attentive.py, as MIM-JEPA alone learns in the tokens, or --cross-crop-weight 0.5 --crops 8"
