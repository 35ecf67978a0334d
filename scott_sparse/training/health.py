"""Is a run learning, or collapsing? Measures of features that need no labels; `verdict` says what they mean.

A collapsed encoder says nearly the same of every image: its features span few dimensions. RankMe and LiDAR are soft
counts of them; the standard deviation of the features goes to 0, the similarity of an image's tokens to 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from scott_sparse.distributed import full_tensor
from scott_sparse.shapes import Float, Tensor


@dataclass(frozen=True)
class Health:
    """One report."""

    epoch: float
    loss: float | None
    """Mean over the steps since the last report; None before the first step."""
    rankme: float
    lidar: float
    std: float
    token_similarity: float
    ema_distance: float
    knn: float | None
    """k-NN accuracy on val in per cent; None without labels."""
    knn_error: float | None
    """Its standard error, in per cent."""
    knn_pixels: float | None = None
    """k-NN accuracy of raw pixels on the same images, in per cent; the same in all reports of a run."""
    knn_untrained: float | None = None
    """That of the encoder at step 0, which is untrained but with --init; None if there was no report then."""


def rankme(features: Float[Tensor, "n C"]) -> float:
    """Effective rank: exp of the entropy of the normalised singular values (arXiv 2210.02885), 1 to min(n, C)."""
    return _effective_number(torch.linalg.svdvals(features.double()))


def lidar(features: Float[Tensor, "n q C"], *, ridge: float = 1e-4) -> float:
    """Rank of the differences between n images, relative to those between q views of an image (arXiv 2312.04000).

    exp of the entropy of the eigenvalues of the linear discriminant of images: 1 to min(n - 1, C). The published one
    takes 1,000 images and 50 views of each; with fewer the number is lower, and comparable for the same n and q only.
    """
    centres = features.double().mean(1)
    between = torch.cov(centres.T)
    within = (features.double() - centres[:, None]).flatten(0, 1)
    within = within.T @ within / (features.shape[0] * (features.shape[1] - 1))
    within += ridge * within.diagonal().mean().clamp(min=1e-12) * torch.eye(len(within), dtype=within.dtype)
    whiten = torch.linalg.inv(torch.linalg.cholesky(within))
    return _effective_number(torch.linalg.eigvalsh(whiten @ between @ whiten.T).clamp(min=0))


def _effective_number(values: Float[Tensor, " r"]) -> float:
    shares = values / values.sum().clamp(min=1e-30) + 1e-12
    return torch.exp(-(shares * shares.log()).sum()).item()


def feature_std(features: Float[Tensor, "n C"]) -> float:
    """Mean standard deviation of unit-length features, times √C: 0 when collapsed, at most 1 (arXiv 2011.10566)."""
    return F.normalize(features, dim=1).std(0).mean().item() * features.shape[1] ** 0.5


def token_similarity(tokens: Float[Tensor, "n N D"]) -> float:
    """Mean cosine between different tokens of the same image."""
    n, count, _ = tokens.shape
    total = F.normalize(tokens.float(), dim=2).sum(1).square().sum() / n
    return ((total - count) / (count * max(count - 1, 1))).item()


def ema_distance(target: nn.Module, encoder: nn.Module) -> float:
    """|target - encoder| / |encoder| over all parameters; all processes take part."""
    ours, theirs = (torch.cat([full_tensor(p.detach()).flatten() for p in m.parameters()]) for m in (target, encoder))
    return ((ours - theirs).norm() / theirs.norm()).item()
