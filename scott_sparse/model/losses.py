"""The cross-crop term: views of one image should say the same, and embeddings of all images must not.

Not in the paper; the named option of `ObjectiveConfig.invariance`. What keeps the embeddings from collapsing is
contrast with the other images of the batch (SimCLR, arXiv 2002.05709), SIGReg (LeJEPA, arXiv 2511.08544), or variance
and covariance (VICReg, arXiv 2105.04906). Every average is one over the global batch, so that any number of processes
has the same loss.
"""

import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.shapes import Float, Tensor


class Projector(nn.Module):
    """Linear, standardisation over the global batch, ReLU, Linear: from pooled features to where crops are compared.

    Without the standardisation the first few hundred steps go into telling images apart at all: pooled features of an
    untrained encoder share one large mean. No running statistics: the projector is dropped after pretraining.
    """

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.hidden = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, out)

    def forward(self, pooled: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        rows = self.hidden(pooled).float()
        centre = rows.mean(0)
        # Mean and variance of all processes in one message: those of each, and how far the means lie apart.
        moments = of_all_processes(torch.stack([centre, (rows - centre).square().mean(0)]))
        mean = moments[:, 0].mean(0)
        variance = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        return self.out(F.relu((rows - mean) / (variance + 1e-5).sqrt()))


def of_all_processes(values: Float[Tensor, "*n"]) -> Float[Tensor, "P ..."]:
    """A tensor as each process has it, with its gradient: every process's loss depends on those of all."""
    if _processes() == 1:
        return values[None]
    own = torch.arange(_processes(), device=values.device) == _rank()
    return _AllReduce.apply(torch.where(own[(..., *[None] * values.ndim)], values, 0))


def mean_over_processes(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """From averages over equal shares to that over the global batch, with its gradient, in a message of their size."""
    return _AllReduce.apply(values) / _processes() if _processes() > 1 else values


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


class _AllReduce(torch.autograd.Function):
    """Sum over processes, and so is its gradient."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def invariance(embeddings: Float[Tensor, "V B E"]) -> Float[Tensor, ""]:
    """Mean squared distance of each view's embedding to the mean over views (arXiv 2511.08544, section 5)."""
    return (embeddings - embeddings.mean(0)).square().mean()


def sigreg(embeddings: Float[Tensor, "B E"], directions: Float[Tensor, "E M"]) -> Float[Tensor, ""]:
    """How far the embeddings are from a standard normal, by the Epps-Pulley test on random projections.

    n * integral of |phi_n(t) - exp(-t**2 / 2)|**2 exp(-t**2 / 2) dt over [-4, 4], averaged over the M directions, where
    phi_n is the empirical characteristic function of the n embeddings *of all processes* (arXiv 2511.08544, section
    4). The integrand is even: 17 knots on [0, 4], trapezoid rule, doubled.
    """
    knots = torch.linspace(0, 4, 17, device=embeddings.device)
    angles = (embeddings @ directions)[..., None] * knots
    phi = mean_over_processes(torch.stack([angles.cos().mean(0), angles.sin().mean(0)]))
    count = len(embeddings) * _processes()
    gauss = torch.exp(-knots.square() / 2)
    error = (phi[0] - gauss).square() + phi[1].square()
    return 2 * count * torch.trapezoid(error * gauss, knots, dim=-1).mean()


def draw_directions(width: int, count: int, *, generator: torch.Generator) -> Float[Tensor, "E M"]:
    """Random unit columns for `sigreg`, on the CPU."""
    return F.normalize(torch.randn(width, count, generator=generator), dim=0)


def variance_covariance(embeddings: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """VICReg's two terms in its proportion of 25 to 1: a hinge that holds each dimension's deviation above 1, and the
    squared covariances between dimensions (arXiv 2105.04906, section 4.1)."""
    centred = embeddings - mean_over_processes(embeddings.mean(0))
    covariance = mean_over_processes(centred.T @ centred / len(embeddings))
    deviation = (covariance.diagonal() + 1e-4).sqrt()
    off_diagonal = covariance.square().sum() - covariance.diagonal().square().sum()
    return F.relu(1 - deviation).mean() + off_diagonal / len(covariance) / 25


def contrast(embeddings: Float[Tensor, "V B E"], *, temperature: float) -> Float[Tensor, ""]:
    """Each view must pick every other view of its image from among all views of all other images, by cosine.

    SimCLR's NT-Xent (arXiv 2002.05709, eq. 1) for each of the V - 1 positives of a view in turn, averaged: minus the
    log of the softmax of cosine / temperature over that positive and all negatives.
    """
    views, images, _ = embeddings.shape
    with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would round the cosines to three digits
        own = F.normalize(embeddings.float(), dim=-1)
        everyone = rearrange(of_all_processes(own), "p v b e -> v (p b) e")
        scores = torch.einsum("vbe,wce->vbwc", own, everyone) / temperature
    first = _rank() * images  # of this process, among everyone's
    # No index by a mask: a GPU would have to be waited for.
    same_image = torch.ones(scores.shape[1::2], dtype=torch.bool, device=scores.device).tril(first).triu(first)
    negatives = scores.masked_fill(same_image[:, None], -torch.inf).logsumexp((2, 3))  # (V, b)
    positives = scores.diagonal(first, dim1=1, dim2=3)  # (V, V, b)
    itself = torch.eye(views, dtype=torch.bool, device=scores.device)[..., None]
    cost = torch.logaddexp(positives, negatives[:, None]) - positives
    return cost.masked_fill(itself, 0).sum() / (views * (views - 1) * images)
