"""Greedy k-centre against its definition, slowly; distances survive the projection."""

import pytest
import torch

from scott_sparse.evaluation.coreset import PROJECTED, k_centre, random_projection


def slow(points, count, starts):
    chosen, centres = [], list(starts)
    for _ in range(count):
        if not centres:
            far = (points - points.mean(0)).norm(dim=1).argmin()
        else:
            far = torch.stack([(points - centre).norm(dim=1) for centre in centres]).amin(0).argmax()
        chosen.append(int(far))
        centres.append(points[far])
    return chosen


@pytest.mark.parametrize("starts", [0, 1, 5])
def test_k_centre(starts):
    points, given = torch.randn(60, 7), torch.randn(starts, 7)
    chosen, distances = k_centre(points, 20, starts=given if starts else None)
    assert chosen.tolist() == slow(points, 20, given)
    assert (distances[1:].diff() <= 0).all() and distances[0].isinf() == (starts == 0)


def test_copies_are_chosen_once():
    chosen, distances = k_centre(torch.ones(5, 3), 5)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3, 4] and distances[1:].max() == 0


def test_distances_after_projection():
    points = torch.randn(40, 1000)
    assert random_projection(points).shape == (40, PROJECTED) and random_projection(points[:, :9]).shape == (40, 9)
    ratio = torch.pdist(random_projection(points)) / torch.pdist(points)
    assert 0.9 < ratio.mean() < 1.1 and ratio.std() < 0.1
