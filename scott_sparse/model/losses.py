"""The cross-crop term: views of one image should say the same, and embeddings of all images must not.

Not in the paper; the named option of `ObjectiveConfig.invariance`. What keeps the embeddings from collapsing is
contrast with the other images of the batch (SimCLR, arXiv 2002.05709), SIGReg (LeJEPA, arXiv 2511.08544), or variance
and covariance (VICReg, arXiv 2105.04906). Every average is one over the global batch, so that any number of processes
has the same loss.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.distributed import all_gather_with_grad, all_mean_with_grad, rank, world_size
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
        moments = all_gather_with_grad(torch.stack([centre, (rows - centre).square().mean(0)]))
        mean = moments[:, 0].mean(0)
        variance = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        return self.out(F.relu((rows - mean) / (variance + 1e-5).sqrt()))


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
    phi = all_mean_with_grad(torch.stack([angles.cos().mean(0), angles.sin().mean(0)]))
    count = len(embeddings) * world_size()
    gauss = torch.exp(-knots.square() / 2)
    error = (phi[0] - gauss).square() + phi[1].square()
    return 2 * count * torch.trapezoid(error * gauss, knots, dim=-1).mean()


def draw_directions(width: int, count: int, *, generator: torch.Generator) -> Float[Tensor, "E M"]:
    """Random unit columns for `sigreg`, on the CPU."""
    return F.normalize(torch.randn(width, count, generator=generator), dim=0)


def variance_covariance(embeddings: Float[Tensor, "B E"]) -> Float[Tensor, ""]:
    """VICReg's two terms in its proportion of 25 to 1: a hinge that holds each dimension's deviation above 1, and the
    squared covariances between dimensions (arXiv 2105.04906, section 4.1)."""
    centred = embeddings - all_mean_with_grad(embeddings.mean(0))
    covariance = all_mean_with_grad(centred.T @ centred / len(embeddings))
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
        everyone = rearrange(all_gather_with_grad(own), "p v b e -> v (p b) e")
        scores = torch.einsum("vbe,wce->vbwc", own, everyone) / temperature
    first = rank() * images  # of this process, among everyone's
    # No index by a mask: a GPU would have to be waited for.
    same_image = torch.ones(scores.shape[1::2], dtype=torch.bool, device=scores.device).tril(first).triu(first)
    negatives = scores.masked_fill(same_image[:, None], -torch.inf).logsumexp((2, 3))  # (V, b)
    positives = scores.diagonal(first, dim1=1, dim2=3)  # (V, V, b)
    itself = torch.eye(views, dtype=torch.bool, device=scores.device)[..., None]
    cost = torch.logaddexp(positives, negatives[:, None]) - positives
    return cost.masked_fill(itself, 0).sum() / (views * (views - 1) * images)
