"""The loss terms: MIM-JEPA's regression of hidden patches, and the cross-crop term with its projector.

`masked_smooth_l1` is the published loss. The cross-crop term is not in the paper: crops of one image should have
similar embeddings, and the embeddings of all images must not collapse to one point. `nt_xent` (SimCLR) asks for both;
`invariance` asks for the first and `sigreg` (LeJEPA) for the second. Every average is one over the global batch, so
that the loss does not depend on the number of processes.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.distributed import all_gather_with_grad, all_mean_with_grad, rank, world_size
from scott_sparse.shapes import Bool, Float, Tensor


def masked_smooth_l1(
    predictions: Float[Tensor, "B N F"], targets: Float[Tensor, "B N F"], *, hidden: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Smooth L1 (beta 1): mean over F and over the hidden patches of each image, then over images.

    The loss of MIM-JEPA (arXiv 2502.18056, section 3.2).
    """
    per_patch = F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(-1)
    return ((per_patch * hidden).sum(1) / hidden.sum(1)).mean()


class Projector(nn.Module):
    """Linear, standardisation over the global batch, ReLU, Linear: pooled features to the embeddings to compare.

    Pooled features of an untrained encoder share one large mean; without the standardisation, training spends its first
    few hundred steps on that mean. There are no running statistics: the projector is dropped after pretraining.
    """

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.hidden = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, out)

    def forward(self, pooled: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        rows = self.hidden(pooled).float()
        mean = rows.mean(0)
        # Each process's mean and variance in one message. The variance over all processes is the mean of the variances
        # plus the variance of the means.
        moments = all_gather_with_grad(torch.stack([mean, (rows - mean).square().mean(0)]))
        mean = moments[:, 0].mean(0)
        variance = (moments[:, 1] + (moments[:, 0] - mean).square()).mean(0)
        return self.out(F.relu((rows - mean) / (variance + 1e-5).sqrt()))


def nt_xent(embeddings: Float[Tensor, "V B E"], *, temperature: float) -> Float[Tensor, ""]:
    """NT-Xent (SimCLR, arXiv 2002.05709, eq. 1), averaged over the V - 1 positives of each of the V views of an image.

    -log softmax of cosine / temperature, over one positive and all negatives: the views of all other images, of all
    processes.
    """
    views, images, _ = embeddings.shape
    with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would round the cosines to three digits
        own = F.normalize(embeddings.float(), dim=-1)
        everyone = rearrange(all_gather_with_grad(own), "p v b e -> v (p b) e")
        scores = torch.einsum("vbe,wce->vbwc", own, everyone) / temperature
    first = rank() * images  # index of this process's first image among all
    # The masks below are not indices: indexing by a boolean would make the host wait for a GPU.
    same_image = torch.ones(scores.shape[1::2], dtype=torch.bool, device=scores.device).tril(first).triu(first)
    negatives = scores.masked_fill(same_image[:, None], -torch.inf).logsumexp((2, 3))  # (V, B)
    positives = scores.diagonal(first, dim1=1, dim2=3)  # (V, V, B)
    itself = torch.eye(views, dtype=torch.bool, device=scores.device)[..., None]
    cost = torch.logaddexp(positives, negatives[:, None]) - positives
    return cost.masked_fill(itself, 0).sum() / (views * (views - 1) * images)


def invariance(embeddings: Float[Tensor, "V B E"]) -> Float[Tensor, ""]:
    """Mean squared distance of each view's embedding to the mean over views (LeJEPA, arXiv 2511.08544, section 5)."""
    return (embeddings - embeddings.mean(0)).square().mean()


def sigreg(embeddings: Float[Tensor, "B E"], projections: Float[Tensor, "E M"]) -> Float[Tensor, ""]:
    """SIGReg: distance of the embeddings from a standard normal (LeJEPA, arXiv 2511.08544, section 4).

    The Epps-Pulley statistic, averaged over M random projections: n * integral over [-4, 4] of
    |phi(t) - exp(-t**2 / 2)|**2 exp(-t**2 / 2) dt, with phi the empirical characteristic function of the n embeddings
    of all processes. The integrand is even: 17 knots on [0, 4], trapezoid rule, doubled.
    """
    knots = torch.linspace(0, 4, 17, device=embeddings.device)
    angles = (embeddings @ projections)[..., None] * knots
    phi = all_mean_with_grad(torch.stack([angles.cos().mean(0), angles.sin().mean(0)]))
    count = len(embeddings) * world_size()
    normal = torch.exp(-knots.square() / 2)
    error = (phi[0] - normal).square() + phi[1].square()
    return 2 * count * torch.trapezoid(error * normal, knots, dim=-1).mean()


def draw_projections(width: int, count: int, *, generator: torch.Generator) -> Float[Tensor, "E M"]:
    """Random unit columns for `sigreg`, on the CPU."""
    return F.normalize(torch.randn(width, count, generator=generator), dim=0)
