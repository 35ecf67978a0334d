"""Ranks of features whose rank is known."""

import pytest
import torch

from scott_sparse.training.health import ema_distance, feature_std, lidar, rankme, token_similarity


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
