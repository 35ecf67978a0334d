"""Greedy k-centre: few points that cover many, each the farthest from all that were chosen before it.

The largest distance of a point to its nearest centre is then at most twice the smallest possible (Gonzalez, Theoretical
Computer Science 38:293, 1985). PatchCore (arXiv 2106.08265, section 3.2) thins out patch features so; to choose what to
label so is arXiv 1708.00489.
"""

import torch
from rich.progress import track

from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Int, Tensor

PROJECTED = 128  # dimensions


def k_centre(
    points: Float[Tensor, "n C"], count: int, *, starts: Float[Tensor, "m C"] | None = None, what: str = "centres"
) -> tuple[Int[Tensor, " k"], Float[Tensor, " k"]]:
    """Indices of `count` <= n points, and the distance of each to the nearest one before it.

    `starts` are centres from the beginning. Without them the first is the point nearest to the mean, at distance inf.
    """
    assert 0 < count <= len(points)
    squares = points.square().sum(1)
    # Written in place: new tensors at every step, between others that are kept, would scatter the heap over gigabytes.
    nearest, distance = torch.full_like(squares, torch.inf), torch.empty_like(squares)

    def squared_distance(centre: Tensor) -> Tensor:
        torch.mv(points, centre, out=distance)
        return distance.mul_(-2).add_(squares).add_(centre.square().sum()).clamp_(min=0)

    for start in () if starts is None else starts:
        torch.minimum(nearest, squared_distance(start), out=nearest)
    chosen: list[int] = []
    distances: list[float] = []
    for _ in track(range(count), description=what, transient=True):
        is_first = not chosen and starts is None
        farthest = int(squared_distance(points.mean(0)).argmin() if is_first else nearest.argmax())
        chosen.append(farthest)
        distances.append(float(nearest[farthest].sqrt()))
        torch.minimum(nearest, squared_distance(points[farthest]), out=nearest)
        nearest[farthest] = -1  # not again, even if all others are copies of it
    return torch.tensor(chosen), torch.tensor(distances)


def random_projection(points: Float[Tensor, "n C"]) -> Float[Tensor, "n c"]:
    """To `PROJECTED` dimensions, if there are more, in which distances are nearly the same (Johnson, Lindenstrauss)."""
    if points.shape[1] <= PROJECTED:
        return points
    matrix = torch.randn(points.shape[1], PROJECTED, generator=generator_at("projection of a coreset"))
    return points @ (matrix / PROJECTED**0.5).to(points)
