"""Attentive probe: each head learns which token to weigh."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.evaluation import attentive
from scott_sparse.evaluation.attentive import HEAD_TYPES, HEADS, RATES, CrossHead, fit_attentive
from scott_sparse.evaluation.features import Features

CPU = torch.device("cpu")


def one_informative_token(n, seed, classes=3, tokens=9, dim=16):
    """Of nine tokens, one at a random place is marked and shows the class; the others show random classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    other = torch.randint(0, classes, (n, tokens), generator=generator)
    place = torch.randint(0, tokens, (n,), generator=generator)
    shown = other.scatter(1, place[:, None], labels[:, None])
    x = 3 * F.one_hot(shown, dim).float() + 0.1 * torch.randn(n, tokens, dim, generator=generator)
    x[torch.arange(n), place, dim - 1] += 3
    return Features(x.mean(1, keepdim=True), x.half()), labels


@pytest.mark.parametrize("name", HEAD_TYPES)
def test_each_head_finds_the_informative_token(name, monkeypatch):
    monkeypatch.setattr(attentive, "HEAD_TYPES", {name: HEAD_TYPES[name]})
    monkeypatch.setattr(attentive, "RATES", RATES[-1:])
    features, labels = one_informative_token(600, 0)
    probe = fit_attentive(features, labels, classes=3, device=CPU, epochs=40, batch=30)
    held_out, expected = one_informative_token(90, 1)
    logits = probe.logits(held_out, range(len(probe.settings)))
    assert max((x.argmax(1) == expected).float().mean().item() for x in logits) == 1


def test_cross_attention_is_that_of_keys_and_values_of_all_tokens():
    torch.manual_seed(0)
    head, tokens = CrossHead(16, 3).eval(), 2 * torch.randn(5, 9, 16) + 1
    torch.nn.init.uniform_(head.tokens_norm.weight, 0.5, 2)
    torch.nn.init.normal_(head.tokens_norm.bias)
    torch.nn.init.normal_(head.query)
    torch.nn.init.normal_(head.key_value.weight)  # else all tokens are weighed almost equally
    keys_values = head.key_value(head.tokens_norm(tokens))
    key, value = rearrange(keys_values, "b n (two h d) -> two b h n d", two=2, h=HEADS)
    query = rearrange(head.query_proj(head.query), "(h d) -> h 1 d", h=HEADS).expand(5, -1, -1, -1)
    attended = rearrange(F.scaled_dot_product_attention(query, key, value), "b h 1 d -> b (h d)")
    x = head.norm(head.query + head.proj(attended))
    expected = head.classify(head.last_norm(x + head.ffn(x)))
    torch.testing.assert_close(head(tokens), expected, atol=1e-5, rtol=1e-4)


def test_heads_are_trained_as_if_alone(monkeypatch):
    features, labels = one_informative_token(60, 0)
    together = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    assert len(together.settings) == 2 * 3 * len(RATES) and together.settings[-1]["epoch"] == 2
    # Without dropout, which draws for all of them from one stream, a head's path is its own.
    monkeypatch.setattr(attentive, "DROPOUT", 0.0)
    both = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    monkeypatch.setattr(attentive, "HEAD_TYPES", {"simple": HEAD_TYPES["simple"]})
    alone = fit_attentive(features, labels, classes=3, device=CPU, epochs=2)
    (first,), (second,) = both.logits(features, [0]), alone.logits(features, [0])
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_logits_are_averaged_over_crops(monkeypatch):
    """One crop of each image an epoch: eight equal crops train the head of one, and give its logits."""
    monkeypatch.setattr(attentive, "HEAD_TYPES", {"simple": HEAD_TYPES["simple"]})
    one, labels = one_informative_token(60, 0)
    equal = Features(one.pooled, one.tokens.repeat_interleave(8, 0))
    single, eight = (fit_attentive(x, labels, classes=3, device=CPU, epochs=2) for x in (one, equal))
    (expected,), (logits,) = single.logits(one, [5]), eight.logits(equal, [5])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    # The informative token in one crop of two, noise in the other: 2 * i and 2 * i + 1 are of image i.
    mixed = Features(one.pooled, torch.stack([one.tokens, torch.zeros_like(one.tokens)], 1).flatten(0, 1))
    (blank,) = single.logits(Features(one.pooled, torch.zeros_like(one.tokens)), [5])
    (logits,) = single.logits(mixed, [5])
    torch.testing.assert_close(logits, (expected + blank) / 2, atol=1e-5, rtol=1e-4)


def test_same_result_twice_without_touching_the_global_generator():
    features, labels = one_informative_token(60, 0)
    before = torch.random.get_rng_state()
    first, second = (fit_attentive(features, labels, classes=3, device=CPU, epochs=1) for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    for a, b in zip(first.logits(features, range(9)), second.logits(features, range(9))):
        assert torch.equal(a, b)


def test_width_that_does_not_divide():
    features, labels = one_informative_token(60, 0, dim=18)
    with pytest.raises(ValueError, match="tokens of width 18 do not divide into the 4 heads"):
        fit_attentive(features, labels, classes=3, device=CPU)
