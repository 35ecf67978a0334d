"""Metrics of classification, segmentation and anomaly detection; rates are in per cent."""

import dataclasses
import json
import math

import torch

from scott_sparse.shapes import Bool, Float, Int, Tensor

TOP_K = 5
BOOTSTRAP = 500  # samples


@dataclasses.dataclass(frozen=True)
class Scores:
    """Metrics on n labelled images of K classes."""

    n: int
    top1: float
    top1_interval: tuple[float, float]
    """95 % Wilson interval: the uncertainty from n test images, not that from the seed of training."""
    top5: float | None
    """None for five classes or fewer, where it would always be 100."""
    mean_per_class: float
    """Mean recall of the classes that occur; usual for unbalanced sets (Pets, Flowers)."""
    per_class: list[float | None]
    """Recall of each class; None for a class without an image."""
    confusion: list[list[int]]
    """(K, K) counts; rows are labels, columns predictions."""

    def to_json(self) -> dict:
        """Rates are rounded to two digits, more than a test set below 10,000 images resolves."""
        return json.loads(json.dumps(dataclasses.asdict(self)), parse_float=lambda number: round(float(number), 2))


def score(logits: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> Scores:
    """Metrics of logits or votes, -inf for a class that got none; of equal ones the first class counts, as in sklearn.

    Raises ValueError for a label outside [0, K), for NaN, and without images.
    """
    n, classes = logits.shape
    check_labels(labels, classes, "labels to score")
    if n == 0:
        raise ValueError("there is no labelled image to score; check the split.")
    if logits.isnan().any():
        raise ValueError("the probe's logits are NaN: it diverged; try a smaller learning rate.")
    logits, labels = logits.cpu(), labels.cpu()
    confusion = torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)
    counts, correct = confusion.sum(1), confusion.diag()
    own = logits.gather(1, labels[:, None])
    first_wins = (logits == own) & (torch.arange(classes) < labels[:, None])
    rank = ((logits > own) | first_wins).sum(1)
    top5_correct = int(((rank < TOP_K) & (own[:, 0] > -math.inf)).sum())
    recall = 100 * correct / counts.clamp(min=1)
    total = int(correct.sum())
    return Scores(
        n=n,
        top1=100 * total / n,
        top1_interval=wilson(total, n),
        top5=100 * top5_correct / n if classes > TOP_K else None,
        mean_per_class=recall[counts > 0].mean().item(),
        per_class=[rate if count else None for rate, count in zip(recall.tolist(), counts.tolist())],
        confusion=confusion.tolist(),
    )


def wilson(correct: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion, in per cent; z = 1.96 makes it 95 %.

    Unlike the normal approximation it stays inside [0, 100] and has a width at 0 and at 100 (E. B. Wilson, JASA 22:209,
    1927; recommended by Brown, Cai and DasGupta, Statistical Science 16:2, 2001).
    """
    rate, extra = correct / n, z * z / n
    middle = (rate + extra / 2) / (1 + extra)
    half = z * math.sqrt(rate * (1 - rate) / n + extra / (4 * n)) / (1 + extra)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def check_labels(labels: Int[Tensor, " n"], classes: int, what: str) -> None:
    """Raises ValueError if a label is outside [0, classes)."""
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        extent = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{what} lie between {extent}, expected 0 to {classes - 1}; use one data set for both.")


def check_finite(features: Float[Tensor, "n ..."]) -> None:
    """Raises ValueError for NaN or inf; in chunks, as `isfinite` of everything would make copies of everything."""
    for chunk in features.split(16384):
        if not chunk.isfinite().all():
            raise ValueError("features are not finite: the encoder diverged, or its weights are damaged.")


@dataclasses.dataclass(frozen=True)
class PixelScores:
    """Metrics of a segmentation into K classes, over the pixels of all images that are not ignored; in per cent."""

    miou: float
    """Mean over the classes that occur of intersection over union."""
    miou_interval: tuple[float, float]
    """95 % of bootstrap samples of the images."""
    iou: list[float | None]
    """Of each class; None where neither masks nor predictions have it."""
    accuracy: float
    """Share of the pixels that are right."""


def score_pixels(confusions: Int[Tensor, "n K K"]) -> PixelScores:
    """From the counts of each image; rows are classes in the mask, columns predictions."""
    total = confusions.sum(0).double()
    iou = _iou(total)
    generator, n = torch.Generator().manual_seed(0), len(confusions)
    samples = torch.randint(n, (BOOTSTRAP, n), generator=generator)
    counts = torch.zeros(BOOTSTRAP, n, dtype=torch.float64).scatter_add_(1, samples, torch.ones(BOOTSTRAP, n).double())
    means = _iou((counts @ confusions.flatten(1).double()).unflatten(1, total.shape)).nanmean(1)
    low, high = (100 * means.quantile(torch.tensor([0.025, 0.975]).double())).tolist()
    return PixelScores(
        miou=100 * iou.nanmean().item(),
        miou_interval=(low, high),
        iou=[None if value != value else 100 * value for value in iou.tolist()],
        accuracy=100 * (total.diag().sum() / total.sum()).item(),
    )


def _iou(confusion: Float[Tensor, "*B K K"]) -> Float[Tensor, "*B K"]:
    """NaN for a class that is in neither."""
    both = confusion.diagonal(dim1=-2, dim2=-1)
    return both / (confusion.sum(-1) + confusion.sum(-2) - both)


def auroc(scores: Float[Tensor, " n"], positive: Bool[Tensor, " n"]) -> float | None:
    """Area under the ROC curve in per cent: how often a positive scores higher than a negative, ties count half.

    None without positives or without negatives.
    """
    values, place = scores.unique(return_inverse=True)
    return auroc_of_counts(*(place[part].bincount(minlength=len(values)) for part in (~positive, positive)))


def auroc_of_counts(negatives: Int[Tensor, " k"], positives: Int[Tensor, " k"]) -> float | None:
    """`auroc` from how many negatives and positives have each of k scores, in ascending order."""
    total = negatives.sum().item() * positives.sum().item()
    if not total:
        return None
    lower = negatives.cumsum(0).double() - negatives / 2
    return 100 * (lower * positives).sum().item() / total
