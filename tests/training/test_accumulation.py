"""Accumulated gradients are those of the whole batch, also of a loss that compares all its images."""

import contextlib
import dataclasses
import types

import pytest
import torch
from conftest import TINY

from scott_sparse import MIMJEPA, ObjectiveConfig, draw_visible
from scott_sparse.model.jepa import insert_live
from scott_sparse.model.losses import draw_projections, masked_smooth_l1
from scott_sparse.training.accumulation import cache_pooled, seed_dropout

GRID, IMAGES, CROPS, PLAIN_CROPS = (2, 3), 8, 5, 2
ONE_PROCESS = types.SimpleNamespace(process_index=0, autocast=contextlib.nullcontext)
NTXENT = ObjectiveConfig(predictor_depth=1, context="visible", cross_crop_weight=0.7, projector=(16, 8))
SIGREG = dataclasses.replace(NTXENT, cross_crop_loss="sigreg")
OBJECTIVES = {
    "ntxent": NTXENT,
    "sigreg": SIGREG,
    "ntxent alone, context all": dataclasses.replace(NTXENT, context="all", mim_weight=0.0),
}


def batch():
    """images, visible, targets and SIGReg's projections of a whole batch."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(IMAGES, CROPS, 3, 32, 48, generator=generator)
    visible = draw_visible(IMAGES * CROPS, GRID, hide_ratio=0.5, generator=generator).unflatten(0, (IMAGES, CROPS))
    targets = torch.randn(IMAGES, 6, TINY.dim, generator=generator)
    return images, visible, targets, draw_projections(8, 16, generator=generator)


def accumulated(model, parts):
    """Gradient by parameter, and terms, of a step in `parts` micro-batches, as train/pretrain.py takes it."""
    images, visible, targets, projections = batch()
    chunks = list(zip(images.chunk(parts), visible.chunk(parts), targets.chunk(parts)))
    cached = cache_pooled(model, ((x, seen) for x, seen, _ in chunks), ONE_PROCESS, seed=0, step=5)
    sums = {}
    for number, (x, seen, wanted) in enumerate(chunks):
        seed_dropout(0, 5, 0, number)
        terms = model(x, seen, wanted, projections, cached=cached, number=number)
        (terms["loss"] / parts).backward()
        sums = {name: sums.get(name, 0) + value.item() / parts for name, value in terms.items()}
    return {name: p.grad for name, p in model.named_parameters()}, sums


def at_once(model, parts):
    """The same with every micro-batch in one graph, from the model's parts: what memory does not allow."""
    images, visible, targets, projections = batch()
    pooled, terms = [], {"mim": torch.zeros(())}
    for number, (x, seen, wanted) in enumerate(zip(images.chunk(parts), visible.chunk(parts), targets.chunk(parts))):
        seed_dropout(0, 5, 0, number)
        features = model.context_features(x.flatten(0, 1), seen.flatten(0, 1))
        pooled.append(model.pooled(features, seen.flatten(0, 1)))
        if model.predictor is not None:
            first = model.insert_mask_tokens(features.unflatten(0, seen.shape[:2])[:, 0], seen[:, 0])
            terms["mim"] = terms["mim"] + masked_smooth_l1(model.predictor(first, GRID), wanted, hidden=~seen[:, 0])
    terms["mim"] = terms["mim"] / parts
    terms |= model.cross_crop(torch.cat(pooled).unflatten(0, (-1, CROPS)), projections)
    loss = sum(weight * terms[name] for name, weight in model.objective.weights.items())
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, {"loss": loss.item()}


def fresh(objective, **rates):
    torch.manual_seed(0)
    return MIMJEPA(dataclasses.replace(TINY, **rates), objective, plain_crops=PLAIN_CROPS).train()


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if gradient is not None:
            assert (found[name] - gradient).norm() <= 2e-5 * gradient.norm() + 1e-7, name


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_micro_batches_give_the_gradient_of_the_batch(objective, parts):
    images, visible, targets, projections = batch()
    model = fresh(objective)
    terms = model(images, visible, targets, projections)
    terms["loss"].backward()
    found, sums = accumulated(fresh(objective), parts)
    assert_close(found, {name: p.grad for name, p in model.named_parameters()})
    assert sums == pytest.approx({name: value.item() for name, value in terms.items()}, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_dropout_is_the_same_in_both_passes(objective):
    """Dropout differs from that of a whole batch; what it drops, it drops in the cached features as well."""
    rates = {"dropout": 0.2, "attention_dropout": 0.1, "drop_path": 0.3}
    found, sums = accumulated(fresh(objective, **rates), 4)
    expected, loss = at_once(fresh(objective, **rates), 4)
    assert_close(found, expected)
    assert sums["loss"] == pytest.approx(loss["loss"], rel=1e-5)


def test_live_features_keep_their_value_to_the_bit():
    cached = torch.randn(3, 4, 5)
    live = cached[1].clone().requires_grad_()
    whole = insert_live(cached, 1, live)
    assert torch.equal(whole, cached.flatten(0, 1))
    whole.sum().backward()
    assert torch.equal(live.grad, torch.full((4, 5), 3.0))


def test_the_first_micro_batch_is_seeded_as_a_step_without_accumulation():
    draws = []
    for number in (0, 0, 1):
        seed_dropout(7, 3, 1, number)
        draws.append(torch.rand(4))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
