"""Linear probes against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from scott_sparse.evaluation import linear
from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.linear import PENALTIES, RATES, Scale, fit_lbfgs, fit_linear, fit_sgd

CPU = torch.device("cpu")


@pytest.fixture
def features():
    """Four blocks; the class shows in the third alone, so that the last one is not enough."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 5
    pooled = 1.5 * torch.randn(600, 4, 8, generator=generator) + 1
    pooled[:, 2] += 4 * F.one_hot(labels, 8)
    return Features(pooled, None), labels


def test_lbfgs_equals_scikit_learn(features):
    x, labels = features[0].pooled.flatten(1), features[1]
    x = Scale.of(x)(x)
    for penalty, (weight, bias) in zip(PENALTIES, fit_lbfgs(x, labels, classes=5)):
        theirs = LogisticRegression(C=1 / (len(x) * penalty), tol=1e-8, max_iter=5000).fit(x.numpy(), labels.numpy())
        ours = F.linear(x, weight, bias)
        expected = torch.from_numpy(theirs.decision_function(x.numpy())).float()
        ours, expected = (logits - logits.mean(1, keepdim=True) for logits in (ours, expected))  # defined up to that
        assert (ours - expected).abs().max() < 0.02 * expected.abs().max()
        assert np.mean(ours.argmax(1).numpy() == theirs.predict(x.numpy())) > 0.995
    assert len(PENALTIES) >= 13


def test_rates_side_by_side_are_rates_one_by_one(features, monkeypatch):
    x, labels = Scale.of(features[0].mean)(features[0].mean), features[1]
    together = fit_sgd(x, labels, classes=5, epochs=3)
    assert len(together) == len(RATES) >= 13
    for i in (0, 6, 9):
        monkeypatch.setattr(linear, "RATES", RATES[i : i + 1])
        (alone,) = fit_sgd(x, labels, classes=5, epochs=3)
        torch.testing.assert_close(together[i].weight, alone.weight, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_a_sweep_covers_both_kinds_of_features(solver, features):
    probe = fit_linear(*features, classes=5, solver=solver, device=CPU, epochs=10)
    right = [
        100 * (a.argmax(1) == features[1]).float().mean()
        for a in probe.answers(features[0], range(len(probe.settings)))
    ]
    by_kind = {kind: [r for r, s in zip(right, probe.settings) if s["features"] == kind] for kind in linear.KINDS}
    assert len(by_kind["mean"]) == len(by_kind["last-4"]) >= 13
    assert max(by_kind["mean"]) < 50 < 85 < max(by_kind["last-4"])


def test_one_block_has_one_kind(features):
    one = Features(features[0].pooled[:, -1:], None)
    probe = fit_linear(one, features[1], classes=5, solver="lbfgs", device=CPU)
    assert {setting["features"] for setting in probe.settings} == {"mean"}


def test_a_constant_dimension_does_no_harm(features):
    pooled = features[0].pooled.clone()
    pooled[:, :, 0] = 7.0
    probe = fit_linear(Features(pooled, None), features[1], classes=5, solver="lbfgs", device=CPU)
    for answers in probe.answers(Features(pooled, None), [0, 20]):
        assert answers.isfinite().all()


def test_a_missing_class_is_named(features):
    with pytest.raises(ValueError, match=r"no training image for 1 of 6 classes \(5\)"):
        fit_linear(*features, classes=6, solver="lbfgs", device=CPU)
