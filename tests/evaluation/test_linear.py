"""Linear probes against scikit-learn on the same features."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from scott_sparse.evaluation import linear
from scott_sparse.evaluation.features import Features
from scott_sparse.evaluation.linear import PENALTIES, RATES, Scale, fit_linear, fit_newton, fit_sgd

CPU = torch.device("cpu")


@pytest.fixture
def features():
    """Four blocks; the class shows in the third alone, so that the last one is not enough."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(600) % 5
    pooled = 1.5 * torch.randn(600, 4, 8, generator=generator) + 1
    pooled[:, 2] += 4 * F.one_hot(labels, 8)
    return Features(pooled, None), labels


def test_newton_equals_scikit_learn(features):
    x, labels = features[0].pooled.flatten(1), features[1]
    x = Scale.of(x)(x)
    for penalty, (weight, bias) in zip(PENALTIES, fit_newton(x, labels, classes=5)):
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


@pytest.mark.parametrize("solver", ["newton", "sgd"])
def test_a_sweep_covers_both_kinds_of_features(solver, features):
    probe = fit_linear(*features, classes=5, solver=solver, device=CPU, epochs=10)
    logits = probe.logits(features[0], range(len(probe.settings)))
    accuracies = [100 * (x.argmax(1) == features[1]).float().mean() for x in logits]
    by_kind = {kind: [a for a, s in zip(accuracies, probe.settings) if s["features"] == kind] for kind in linear.KINDS}
    assert len(by_kind["mean"]) == len(by_kind["last-4"]) >= 13
    assert max(by_kind["mean"]) < 50 < 85 < max(by_kind["last-4"])


def test_one_block_has_one_kind(features):
    one = Features(features[0].pooled[:, -1:], None)
    probe = fit_linear(one, features[1], classes=5, solver="newton", device=CPU)
    assert {setting["features"] for setting in probe.settings} == {"mean"}


def test_a_constant_dimension(features):
    pooled = features[0].pooled.clone()
    pooled[:, :, 0] = 7.0
    probe = fit_linear(Features(pooled, None), features[1], classes=5, solver="newton", device=CPU)
    for logits in probe.logits(Features(pooled, None), [0, 20]):
        assert logits.isfinite().all()


@pytest.mark.parametrize("constant", [False, True])
def test_wide_features_are_fitted_in_the_span_of_the_images(monkeypatch, constant):
    """It is the direct fit, in fewer dimensions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 5
    x = torch.randn(60, 200, generator=generator) * torch.logspace(0, -2, 200) + 0.5 * F.one_hot(labels, 200)
    x[40:50] = x[50:]  # repeated images, and fewer directions than images
    x = torch.zeros_like(x) if constant else Scale.of(x)(x)
    sizes = []

    def counted(start, *arguments, minimise=linear._minimise):
        sizes.append(start.shape[1])
        return minimise(start, *arguments)

    monkeypatch.setattr(linear, "_minimise", counted)
    direct = fit_newton(x, labels, classes=5)
    assert set(sizes) == {201}
    sizes.clear()
    monkeypatch.setattr(linear, "MAX_DIRECT_WIDTH", 100)
    rotated = fit_newton(x, labels, classes=5)
    assert max(sizes) <= 61
    for penalty, layer, expected in zip(PENALTIES, rotated, direct):
        logits, expected_logits = F.linear(x, *layer), F.linear(x, *expected)
        loss = F.cross_entropy(logits, labels) + penalty / 2 * layer.weight.square().sum()
        expected_loss = F.cross_entropy(expected_logits, labels) + penalty / 2 * expected.weight.square().sum()
        assert abs(loss - expected_loss) < 1e-5
        if penalty > 2e-5:  # below, float32 does not tell one minimum from its surroundings
            assert (logits - expected_logits).abs().max() < 0.02 * expected_logits.abs().max() + 0.005


def test_wide_features_take_few_steps(monkeypatch):
    """Products with the features, which are what a fit costs; L-BFGS took 1,400 on photos of 12,288 dimensions."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 10
    x = torch.randn(200, 3000, generator=generator) * torch.logspace(1, -2, 3000) + 0.3 * F.one_hot(labels, 3000)
    steps, softmax = [], torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *a: steps.append(1) or softmax(*a))
    fit_newton(Scale.of(x)(x), labels, classes=10)
    assert len(steps) < 6 * len(PENALTIES)
