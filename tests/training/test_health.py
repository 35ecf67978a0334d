"""Ranks of features whose rank is known, and the verdict on histories."""

import dataclasses

import pytest
import torch

from scott_sparse.training.health import Health, ema_distance, feature_std, lidar, rankme, token_similarity, verdict


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_rankme_counts_directions(rank):
    basis = torch.linalg.qr(noise(64, 64, seed=1)).Q[:rank]
    assert rankme(noise(4000, rank) @ basis) == pytest.approx(rank, rel=0.02)


@pytest.mark.parametrize("rank", [1, 5, 12])
def test_lidar_counts_directions_in_which_images_differ(rank):
    """Views differ in all 32 directions, images in a few."""
    images = 100 * noise(2000, 1, rank) @ torch.linalg.qr(noise(32, 32, seed=1)).Q[:rank]
    assert lidar(images + noise(2000, 4, 32, seed=2)) == pytest.approx(rank, rel=0.1)
    assert rankme(noise(2000, 32, seed=2)) > 31


def test_collapsed_features_have_no_rank_at_all():
    same = noise(1, 1, 32).expand(100, 4, 32)
    assert rankme(same[:, 0]) == pytest.approx(1, abs=0.01)
    assert torch.isfinite(torch.tensor(lidar(same)))
    assert feature_std(same[:, 0]) < 1e-5
    assert token_similarity(same) == pytest.approx(1, abs=1e-5)


def test_spread_out_features():
    assert feature_std(noise(2000, 64)) == pytest.approx(1, abs=0.02)
    assert token_similarity(noise(200, 9, 64)) == pytest.approx(0, abs=0.02)
    one_of_each = torch.eye(4)[None]
    assert token_similarity(one_of_each) == pytest.approx(0, abs=1e-6)


def test_ema_distance():
    a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    b.load_state_dict({name: 1.1 * tensor for name, tensor in a.state_dict().items()})
    assert ema_distance(a, a) == 0 and ema_distance(b, a) == pytest.approx(0.1, abs=1e-5)


def history(**numbers):
    """Reports at epochs 0, 1, ..., with the series given and constants for the rest."""
    length = len(next(iter(numbers.values())))
    constant = Health(0.0, 1.0, 50.0, 20.0, 0.5, 0.5, 0.1, None, None)
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
