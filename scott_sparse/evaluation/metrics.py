"""What a probe's answers are worth. All rates are in per cent."""

import dataclasses
import math

import torch

from scott_sparse.shapes import Float, Int, Tensor

TOP = 5


@dataclasses.dataclass(frozen=True)
class Scores:
    """The result of one probe on one set of n labelled images with K classes."""

    n: int
    top1: float
    top1_interval: tuple[float, float]
    """95 % Wilson interval: what n images leave open, not what another seed would give."""
    top5: float | None
    """None with five classes or fewer, where it would always be 100."""
    mean_per_class: float
    """Of the classes that occur: the number to quote for unbalanced sets (Pets, Flowers)."""
    per_class: list[float | None]
    """Recall; None for a class without an image."""
    confusion: list[list[int]]
    """(K, K) counts: rows are labels, columns answers."""

    def to_json(self) -> dict:
        return {name: _rounded(value) for name, value in dataclasses.asdict(self).items()}


def score(answers: Float[Tensor, "n K"], labels: Int[Tensor, " n"]) -> Scores:
    """Scores of logits or votes: the highest answers, of equal ones the first class, as in scikit-learn.

    -inf means "not an answer". Raises ValueError for a label outside [0, K), for NaN, and for no image at all.
    """
    n, classes = answers.shape
    check_labels(labels, classes, "labels to score")
    if n == 0:
        raise ValueError("there is no labelled image to score; check the split.")
    if answers.isnan().any():
        raise ValueError("a probe answered NaN: it diverged; try a smaller learning rate.")
    answers, labels = answers.cpu(), labels.cpu()
    pairs = labels * classes + answers.argmax(1)
    confusion = torch.bincount(pairs, minlength=classes**2).view(classes, classes)
    counts, right = confusion.sum(1), confusion.diag()
    own = answers.gather(1, labels[:, None])
    earlier = torch.arange(classes) < labels[:, None]
    before = ((answers > own) | ((answers == own) & earlier)).sum(1)
    hits = ((before < TOP) & (own[:, 0] > -math.inf)).sum().item()
    present = counts > 0
    recall = 100 * right / counts.clamp(min=1)
    return Scores(
        n=n,
        top1=100 * right.sum().item() / n,
        top1_interval=wilson(right.sum().item(), n),
        top5=100 * hits / n if classes > TOP else None,
        mean_per_class=recall[present].mean().item(),
        per_class=[rate if there else None for rate, there in zip(recall.tolist(), present.tolist())],
        confusion=confusion.tolist(),
    )


def wilson(right: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a proportion; z = 1.96 makes it 95 %.

    Unlike the normal approximation it stays inside [0, 100] and has a width at 0 and at 100 (E. B. Wilson, JASA 22:209,
    1927; recommended by Brown, Cai and DasGupta, Statistical Science 16:2, 2001).
    """
    rate, extra = right / n, z * z / n
    middle = (rate + extra / 2) / (1 + extra)
    half = z * math.sqrt(rate * (1 - rate) / n + extra / (4 * n)) / (1 + extra)
    return 100 * max(middle - half, 0.0), 100 * min(middle + half, 1.0)


def check_labels(labels: Int[Tensor, " n"], classes: int, what: str) -> None:
    """Raises ValueError when a label is outside [0, classes)."""
    if len(labels) and not (labels.min() >= 0 and labels.max() < classes):
        found = f"{int(labels.min())} to {int(labels.max())}"
        raise ValueError(f"{what} lie between {found}, expected 0 to {classes - 1}; use one data set for both.")


def check_fitting_set(features: Float[Tensor, "n ..."], labels: Int[Tensor, " n"], classes: int) -> None:
    """Raises ValueError for a label outside [0, classes), a class without an image, or a feature that is not finite."""
    check_labels(labels, classes, "labels to fit on")
    missing = (torch.bincount(labels, minlength=classes) == 0).nonzero()[:, 0].tolist()
    if missing:
        some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"no training image for {len(missing)} of {classes} classes ({some}); add some, or remove them."
        )
    check_finite(features)


def check_finite(features: Float[Tensor, "n ..."]) -> None:
    """Raises ValueError for NaN or inf; in chunks, as `isfinite` of everything would make copies of everything."""
    for chunk in features.split(16384):
        if not chunk.isfinite().all():
            raise ValueError("features are not finite: the encoder diverged, or its weights are damaged.")


def _rounded(value):
    """To two digits, more than any test set below 10,000 images resolves."""
    if isinstance(value, float):
        return round(value, 2)
    return [_rounded(x) for x in value] if isinstance(value, (list, tuple)) else value
