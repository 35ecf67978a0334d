"""The three heads learn where to look."""

import pytest
import torch
import torch.nn.functional as F

from scott_sparse.evaluation import attentive
from scott_sparse.evaluation.attentive import HEAD_TYPES, RATES, fit_attentive
from scott_sparse.evaluation.features import Features

CPU = torch.device("cpu")


def one_token_tells(n, seed, classes=3, tokens=9, dim=16):
    """Of nine tokens, one at a random place is marked and has the class; the others are noise of any class."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    other = torch.randint(0, classes, (n, tokens), generator=generator)
    place = torch.randint(0, tokens, (n,), generator=generator)
    shown = other.scatter(1, place[:, None], labels[:, None])
    x = 3 * F.one_hot(shown, dim).float() + 0.1 * torch.randn(n, tokens, dim, generator=generator)
    x[torch.arange(n), place, dim - 1] += 3
    return Features(x.mean(1, keepdim=True), x.half()), labels


@pytest.mark.parametrize("name", HEAD_TYPES)
def test_each_head_finds_the_token_that_tells(name, monkeypatch):
    monkeypatch.setattr(attentive, "HEAD_TYPES", {name: HEAD_TYPES[name]})
    features, labels = one_token_tells(600, 0)
    probe = fit_attentive(features, labels, classes=3, device=CPU, epochs=40, batch=30)
    held_out, expected = one_token_tells(90, 1)
    answers = probe.answers(held_out, range(len(probe.settings)))
    assert max((a.argmax(1) == expected).float().mean().item() for a in answers) == 1


def test_heads_are_trained_as_if_alone(monkeypatch):
    features, labels = one_token_tells(60, 0)
    together = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    assert len(together.settings) == 2 * 3 * len(RATES) and together.settings[-1]["epoch"] == 2
    # Without dropout, which draws for all of them from one stream, a head's path is its own.
    monkeypatch.setattr(attentive, "DROPOUT", 0.0)
    both = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    monkeypatch.setattr(attentive, "HEAD_TYPES", {"simple": HEAD_TYPES["simple"]})
    alone = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    (first,), (second,) = both.answers(features, [0]), alone.answers(features, [0])
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_the_same_twice_and_no_trace_in_the_global_generator():
    features, labels = one_token_tells(60, 0)
    before = torch.random.get_rng_state()
    first, second = (fit_attentive(features, labels, classes=3, device=CPU, epochs=1) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.answers(features, range(9)), second.answers(features, range(9))):
        assert torch.equal(a, b)


def test_mistakes():
    features, labels = one_token_tells(60, 0, dim=18)
    with pytest.raises(ValueError, match="18 wide, which does not divide into the 4 heads"):
        fit_attentive(features, labels, classes=3, device=CPU)
    with pytest.raises(ValueError, match="no training image for 1 of 4"):
        fit_attentive(features, labels, classes=4, device=CPU)
