"""Metrics against scikit-learn, and the interval against published figures."""

import warnings

import pytest
import torch
from sklearn import metrics

from scott_sparse.evaluation.metrics import auroc, check_finite, score, score_pixels, wilson


def test_scores_equal_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 8, (500,), generator=generator)
    labels[labels == 6] = 2  # a class without an image
    logits = torch.randn(500, 8, generator=generator) + torch.nn.functional.one_hot(labels, 8)
    scores = score(logits, labels)
    predictions = logits.argmax(1)
    assert scores.n == 500 and scores.top1 == pytest.approx(100 * metrics.accuracy_score(labels, predictions))
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(8))
    assert scores.top5 == pytest.approx(100 * top5)
    with warnings.catch_warnings(action="ignore"):
        balanced = metrics.balanced_accuracy_score(labels, predictions)
    assert scores.mean_per_class == pytest.approx(100 * balanced)
    assert scores.confusion == metrics.confusion_matrix(labels, predictions, labels=range(8)).tolist()
    assert scores.per_class[6] is None and len(scores.per_class) == 8


def test_a_class_without_votes_is_not_predicted():
    logits = torch.full((2, 7), -torch.inf)
    logits[:, 3] = 1.0
    scores = score(logits, torch.tensor([3, 5]))
    assert scores.top1 == 50 and scores.top5 == 50
    assert score(torch.eye(3), torch.arange(3)).top5 is None


@pytest.mark.parametrize(  # Newcombe, Statistics in Medicine 17:857, 1998, table I, method 3
    "right, n, low, high", [(81, 263, 25.53, 36.62), (15, 148, 6.24, 16.05), (0, 20, 0, 16.11), (1, 29, 0.61, 17.18)]
)
def test_wilson(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=0.01)


def test_mistakes():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="lie between 0 to 3, expected 0 to 2"):
        score(logits, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="no labelled image"):
        score(logits[:0], torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="it diverged"):
        score(logits / 0, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="not finite"):
        check_finite(torch.full((2, 5), torch.inf))


def test_auroc_is_that_of_scikit_learn():
    scores, positive = torch.randint(5, (50,)).float(), torch.rand(50) < 0.3  # with ties
    assert auroc(scores, positive) == pytest.approx(100 * metrics.roc_auc_score(positive, scores))
    assert auroc(scores, torch.zeros(50, dtype=torch.bool)) is None


def test_iou_is_that_of_scikit_learn():
    labels, predictions = torch.randint(3, (4, 90)), torch.randint(3, (4, 90))
    cells = (4 * a + b for a, b in zip(labels, predictions))
    confusions = torch.stack([torch.bincount(cell, minlength=16).view(4, 4) for cell in cells])
    scores = score_pixels(confusions)
    expected = 100 * metrics.jaccard_score(labels.flatten(), predictions.flatten(), average=None)
    assert scores.iou[:3] == pytest.approx(expected.tolist()) and scores.iou[3] is None  # a class that does not occur
    assert scores.miou == pytest.approx(expected.mean())
    low, high = scores.miou_interval
    assert low < scores.miou < high
    assert scores.accuracy == pytest.approx(100 * (labels == predictions).double().mean().item())
