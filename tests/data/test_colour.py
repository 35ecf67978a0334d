"""Whether colours go with shapes: drawn sets whose answer is known, and the statistic against a plain computation."""

import colorsys
import dataclasses

import numpy as np
import pytest
import torch

from scott_sparse.data.colour import ColourAgreement, choose_colours, colour_agreement
from scott_sparse.data.images import Images
from scott_sparse.data.petals import render
from scott_sparse.data.views import draw_views
from scott_sparse.training.recipe import RECIPES

SMALL_DATA, COLOUR_INVARIANT = (RECIPES[name][1].views for name in ("small-data", "colour-invariant"))


def gratings(count, hue_of, *, size=32, seed=0):
    """Stripes at a random angle in two shades of a hue, `hue_of(angle, random hue)`, both 0 to 1; on clutter."""
    draw, images = np.random.default_rng(seed), []
    y, x = np.mgrid[:size, :size] / size
    for _ in range(count):
        angle, other, phase = draw.random(3)
        wave = np.sin(25 * (x * np.cos(np.pi * angle) + y * np.sin(np.pi * angle)) + 6 * phase) > 0
        hue, (low, high) = hue_of(angle, other), draw.uniform(0.2, 1, 2)
        shades = np.array([colorsys.hsv_to_rgb(hue % 1, 0.8, value) for value in (low, high)])
        picture = 255 * shades[wave.astype(int)] + draw.normal(0, 5, (size, size, 3))
        images.append(torch.from_numpy(picture.clip(0, 255).astype(np.uint8)))
    return Images.of(images)


@pytest.mark.parametrize(
    ("hue_of", "independent"),
    [
        (lambda angle, other: other, True),
        (lambda angle, other: angle, False),
        (lambda angle, other: angle if other < 0.3 else other, False),  # of a third of the images
    ],
)
def test_colours_that_go_with_shapes_are_told_from_those_that_do_not(hue_of, independent):
    agreement = colour_agreement(gratings(1000, hue_of))
    assert agreement.independent == independent and agreement.images == 1000
    views, why = choose_colours(SMALL_DATA, gratings(1000, hue_of))
    kept = "none" if independent else "4 of 8"
    assert why == f"--colour auto: {agreement}; crops that keep their colours: {kept}"
    assert views == (COLOUR_INVARIANT if independent else dataclasses.replace(SMALL_DATA, colour=1.0))


def test_colours_of_petals_say_nothing():
    images, _, _ = render(range(1000), split="train", size=64)
    agreement = colour_agreement(Images.of(images.permute(0, 2, 3, 1).contiguous()))
    assert agreement.mean == pytest.approx(0.5, abs=3 * agreement.error) and agreement.independent


def test_a_few_images_are_no_evidence_of_independence():
    assert not colour_agreement(gratings(60, lambda angle, other: other)).independent
    for count in (2, 7):
        assert not colour_agreement(gratings(count, lambda angle, other: other)).independent


def test_agreement_is_the_share_of_images_that_are_less_similar_in_colour(monkeypatch):
    """With shapes and colours of one number each, where half of the pairs tie."""
    shapes, hues = torch.rand(40, 3), torch.nn.functional.one_hot(torch.arange(40) % 2, 3).float()
    monkeypatch.setattr("scott_sparse.data.colour._gradients", lambda picture: shapes[picture[0, 0, 0]])
    monkeypatch.setattr("scott_sparse.data.colour._hues", lambda picture: hues[picture[0, 0, 0]])
    images = Images.of([torch.full((8, 8, 3), i, dtype=torch.uint8) for i in range(40)])
    centred = torch.nn.functional.normalize(shapes - shapes.mean(0), dim=-1)
    share = []
    for i in range(40):
        others = [j for j in range(40) if j != i]
        nearest = sorted(others, key=lambda j: -float(centred[i] @ centred[j]))[:5]
        similar = {j: float(hues[i] @ hues[j]) for j in others}
        wins = [sum((similar[j] > similar[k]) + (similar[j] == similar[k]) / 2 for k in others) / 39 for j in nearest]
        share.append(sum(wins) / 5)
    agreement = colour_agreement(images)
    assert agreement.mean == pytest.approx(np.mean(share), abs=1e-6)
    assert agreement.error == pytest.approx(np.std(share, ddof=1) / 40**0.5, abs=1e-6)


def test_grey_images_and_bands_keep_what_they_have():
    """Brightness tells grey groceries apart: 4 points of k-NN, 3 of linear less without crops that keep it."""
    grey = torch.randint(256, (200, 16, 16, 1), dtype=torch.uint8)
    said = {1: "grey images", 3: "grey images", 13: "images of 13 channels"}
    for channels, why in said.items():
        images = Images.of(grey.expand(-1, -1, -1, channels).contiguous())
        expected = dataclasses.replace(SMALL_DATA, colour=1.0)
        assert choose_colours(SMALL_DATA, images) == (
            expected,
            f"--colour auto: {why}; crops that keep their colours: 4 of 8",
        )
    with pytest.raises(ValueError, match="images of 3 channels, not 1"):
        colour_agreement(Images.of(grey))


def test_views_cannot_be_drawn_before_it_is_decided():
    with pytest.raises(ValueError, match=r"decide it by scott_sparse.data.colour"):
        draw_views(torch.full((2, 2), 32), SMALL_DATA, generator=torch.Generator())


def test_independence_needs_a_small_error():
    assert ColourAgreement(0.52, 0.004, 1000).independent and not ColourAgreement(0.52, 0.006, 1000).independent
    assert not ColourAgreement(0.5, 0.01, 99).independent and not ColourAgreement(0.5, 0.0, 1000).independent
