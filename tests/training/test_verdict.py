"""The verdict on histories of reports, and on finished runs."""

import dataclasses
import re
import shlex

import pytest

from scott_sparse.training import recipe as recipes
from scott_sparse.training.health import Health
from scott_sparse.training.verdict import final_verdict, standard_error, verdict, what_to_try


def history(**numbers):
    """Reports at epochs 0, 1, ..., with the series given and constants for the rest."""
    length = len(next(iter(numbers.values())))
    constant = Health(0.0, 1.0, 50.0, 20.0, 0.5, 0.5, 0.1, None, None, None, None)
    rows = [{name: series[i] for name, series in numbers.items()} for i in range(length)]
    return [dataclasses.replace(constant, epoch=float(i), **row) for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    "series, expected",
    [
        ({"rankme": [180.0]}, "starting"),
        ({"std": [0.0]}, "collapsing: the features of all images are equal (standard deviation 0)"),
        ({"rankme": [180.0, 100.0]}, "learning"),
        ({"rankme": [60.0, 180.0, 90.0, 12.0]}, "collapsing: RankMe fell from 180 to 12"),
        ({"loss": [1.0, 0.9, 0.8, 0.7, 0.6]}, "learning"),
        ({"loss": [1.0] * 5}, "stalled: neither LiDAR nor the loss has improved since epoch 1"),
        ({"loss": [1.0] * 5, "lidar": [10.0, 11.0, 12.0, 13.0, 14.0]}, "learning"),
        ({"loss": [None, 1.0, 1.2, 1.2, 1.2]}, "stalled: neither LiDAR nor the loss has improved since epoch 1"),
        ({"loss": [1.0, 0.8, 0.6, None, 0.4]}, "learning"),
        ({"loss": [1.0, 1.0, None, None, None]}, "stalled: neither LiDAR nor the loss has improved since epoch 1"),
        ({"knn": [10.0, 12.0, 20.0, 30.0, 40.0], "knn_error": [2.0] * 5}, "learning"),
        (
            {"knn": [10.0, 12.0, 13.0, 12.0, 11.0], "knn_error": [2.0] * 5},
            "stalled: neither k-NN, LiDAR nor the loss has improved since epoch 1",
        ),
    ],
)
def test_verdict(series, expected):
    assert verdict(history(**series)) == expected


@pytest.mark.parametrize(
    "knn, pixels, expected",
    [
        ([40.0, 35.0], 10.0, "starting"),  # too early to say
        ([40.0, 35.0, 36.0], 10.0, "starting"),  # the first report after warm-up
        ([40.0, 35.0, 36.0, 36.5], 10.0, "worse than untrained so far; try X"),
        ([40.0, 35.0, 39.0, 36.0], 10.0, "starting"),  # 39 is within the noise of 40
        ([40.0, 38.0, 38.0, 38.0], 10.0, "learning"),  # so is 38
        ([40.0, 37.0, 37.0, 37.0], 10.0, "worse than untrained so far; try X"),
        ([40.0, 35.0, 36.0, 44.0], 10.0, "learning"),
        ([40.0, 45.0, 46.0, 45.0], 53.0, "worse than raw pixels so far; try X"),
        ([40.0, 42.0, 45.0, 48.0], 53.0, "learning"),  # at a new height
        ([40.0, 35.0, 36.0, 35.0], 53.0, "worse than untrained and raw pixels so far; try X"),
        ([40.0, 35.0, 36.0, 35.0], None, "worse than untrained so far; try X"),
    ],
)
def test_verdict_against_baselines(knn, pixels, expected):
    """With a standard error of 1.5: a difference of 2.1 counts. Warm-up ends at epoch 1."""
    n = len(knn)
    loss = [1.0 - 0.1 * i for i in range(n)]  # learning by this alone
    series = {"loss": loss, "knn": knn, "knn_error": [1.5] * n, "knn_pixels": [pixels] * n, "knn_untrained": [40.0] * n}
    assert verdict(history(**series), warmup_epochs=1.0, remedy="; try X") == expected
    series["rankme"] = [50.0] * (n - 1) + [5.0]
    assert verdict(history(**series), warmup_epochs=1.0, remedy="; try X").startswith("collapsing")


@pytest.mark.parametrize(
    "so_far, pixels, init, pretrained, expected",
    [
        ("learning", 53.4, 40.2, 39.0, "worse than raw pixels, no better than untrained; try X"),
        ("learning", 10.0, 40.2, 36.0, "worse than untrained; try X"),
        ("stalled: ...", 53.4, 40.2, 30.0, "worse than untrained and raw pixels; try X"),
        ("learning", 10.0, 40.0, 40.0, "no better than untrained; try X"),
        ("learning", 40.5, 40.5, 40.0, "no better than untrained and raw pixels; try X"),
        ("learning", 10.0, 40.0, 40.1, "learning"),
        ("starting", 10.0, 40.0, 45.0, "learning"),
        ("worse than raw pixels so far; try X", 50.0, 40.0, 55.0, "learning"),
        ("", 10.0, 40.0, 45.0, "learning"),  # no reports
        ("stalled: ...", 10.0, 40.0, 45.0, "stalled: ..."),
        ("collapsing: ...", 10.0, 40.0, 5.0, "collapsing: ..."),
        ("learning", None, None, None, "learning"),  # no labels
    ],
)
def test_final_verdict(so_far, pixels, init, pretrained, expected):
    knn = {"pixels": pixels, "init": init, "pretrained": pretrained}
    assert final_verdict(so_far, knn, n=1000, remedy="; try X") == expected


def test_standard_error():
    assert standard_error(40.0, 1000) == pytest.approx(100 * (0.4 * 0.6 / 1000) ** 0.5, rel=1e-3)
    assert 0 < standard_error(0.0, 1000) < 0.2
    assert standard_error(0.0, 1000) == pytest.approx(standard_error(100.0, 1000))


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("small-data", "colour-invariant (the colours of all crops change), --plain-share 0 --colour 0 (of none), or"),
        ("small-data --plain-share 0", "--plain-share 0.5 --colour 1 --crops 8 "),
        ("colour-invariant", "--plain-share 0.5 --colour 1 --crops 8 "),
        ("demo", "--plain-share 0.5 --colour 1 --crops 8 "),
        (
            "flowers102 --epochs 10 --warmup-epochs 1",
            "about 100,000 image passes, this run has 29,360: try the recipe mim-jepa, or --epochs 103",
        ),
        ("flowers102", "eval/attentive.py"),
        ("mim-jepa --epochs 10", "eval/attentive.py"),
    ],
)
def test_what_to_try_names_flags_that_work(flags, expected):
    name, recipe = recipes.parse([*flags.split(), "--data", "PHOTOS"])
    advice = what_to_try(recipe, 2936)
    assert expected in advice
    assert set(re.findall(r"the recipe ([\w-]+)", advice)) <= set(recipes.RECIPES)
    for option in re.findall(r"((?:--[a-z-]+ [\d.]+ ?)+)", advice):
        _, changed = recipes.parse([*flags.split(), "--data", "PHOTOS", *shlex.split(option)])
        assert changed != recipe and name
