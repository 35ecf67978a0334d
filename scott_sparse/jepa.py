"""MIM-JEPA: predict, in latent space, what an EMA target encoder says about the hidden patches.

The published objective (arXiv 2502.18056, section 3.2) is `masked_smooth_l1`. Beside it stands one named option, off in
the paper's recipes: cross-crop `invariance` of the pooled visible tokens, kept from collapsing by `sigreg` (LeJEPA,
arXiv 2511.08544). Masked crops whose hidden patches cost nothing are what a sparse stem makes possible: with
`context="visible"` neither tokenizer nor Transformer spends anything on hidden patches, and only the predictor is
shown mask tokens.
"""

import copy
import dataclasses

import torch
import torch.distributed
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.shapes import Bool, Float, Tensor
from scott_sparse.vit import Encoder, EncoderConfig, Predictor, layer_norm


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which terms the loss has, and how the context encoder sees its images."""

    predictor_depth: int = 3
    context: str = "all"
    """'all': mask tokens in the context encoder, as published. 'visible': packed visible tokens only."""
    invariance: float = 0.0
    """Weight of the cross-crop term beside MIM-JEPA; 0 is the published objective."""
    sigreg: float = 0.05
    """Share of SIGReg within the cross-crop term."""
    projector: tuple[int, int] = (512, 64)
    directions: int = 256

    def __post_init__(self):
        if self.context not in ("all", "visible"):
            raise ValueError(f"unknown context {self.context!r}; expected 'all' or 'visible'.")
        if not 0 <= self.sigreg <= 1 or self.invariance < 0:
            raise ValueError(
                f"sigreg {self.sigreg} must lie in [0, 1] and invariance {self.invariance} must not be negative."
            )

    @property
    def terms(self) -> tuple[str, ...]:
        return ("MIM-JEPA", "invariance", "SIGReg") if self.invariance else ("MIM-JEPA",)


class MIMJEPA(nn.Module):
    """Everything that is trained: context encoder, predictor and, for the cross-crop term, projector.

    One module, so that it is wrapped for distributed training once. The target encoder stays outside (`make_target`).
    """

    def __init__(self, encoder: EncoderConfig, objective: ObjectiveConfig, *, engine: str = "auto"):
        super().__init__()
        self.objective = objective
        self.encoder = Encoder(encoder, engine=engine)
        self.predictor = Predictor(encoder, objective.predictor_depth)
        self.projector = None
        if objective.invariance:
            self.projector = Projector(encoder.dim, *objective.projector)

    def forward(
        self,
        images: Float[Tensor, "B V 3 H W"],
        visible: Bool[Tensor, "B V N"],
        targets: Float[Tensor, "B N D"],
        directions: Float[Tensor, "E M"] | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of V crops per image, each with its own mask; `loss` is their weighted sum.

        `targets` belong to each image's first crop, the one that MIM-JEPA predicts; the others cost no target pass.
        `directions`: columns of unit length for SIGReg (see `draw_directions`), needed with the cross-crop term.
        """
        crops, seen = images.flatten(0, 1), visible.flatten(0, 1)
        features = self.context_features(crops, seen)
        first = rearrange(features, "(b v) n d -> v b n d", b=len(images))[0]
        predictions = self.predictor(first, self.encoder.tokenizer.grid(crops))
        losses = {"mim": masked_smooth_l1(predictions, targets, hidden=~visible[:, 0])}
        losses["loss"] = losses["mim"]
        if self.projector is not None:
            weight = seen[..., None].to(features.dtype)
            pooled = (features * weight).sum(1) / weight.sum(1)
            embeddings = rearrange(self.projector(pooled), "(b v) e -> v b e", b=len(images)).float()
            losses["invariance"] = invariance(embeddings)
            losses["sigreg"] = torch.stack([sigreg(view, directions) for view in embeddings]).mean()
            share = self.objective.sigreg
            term = (1 - share) * losses["invariance"] + share * losses["sigreg"]
            losses["loss"] = losses["loss"] + self.objective.invariance * term
        return losses

    def context_features(self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]) -> Tensor:
        """What the predictor gets, (B, N, D): context features, with mask tokens before or after the encoder."""
        if self.objective.context == "all":
            return self.encoder(images, visible)
        packed = self.encoder.forward_visible(images, visible)
        features = self.encoder.mask_token.to(packed.dtype).repeat(*visible.shape, 1)
        return features.masked_scatter(visible[..., None], packed)


class Projector(nn.Module):
    """Linear, standardisation over the global batch, ReLU, Linear: from pooled features to the space of SIGReg.

    Without the standardisation the first few hundred steps go into telling images apart at all: pooled features of an
    untrained encoder share one large mean. No running statistics: the projector is dropped after pretraining.
    """

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.hidden = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, out)

    def forward(self, pooled: Float[Tensor, "n D"]) -> Float[Tensor, "n E"]:
        rows = self.hidden(pooled).float()
        rows = rows - mean_over_processes(rows.mean(0))
        variance = mean_over_processes(rows.square().mean(0))
        return self.out(F.relu(rows / (variance + 1e-5).sqrt()))


def mean_over_processes(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Mean of a tensor over all processes, with its gradient: averages over the global batch, of equal shares."""
    if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return _AllReduce.apply(values) / torch.distributed.get_world_size()
    return values


class _AllReduce(torch.autograd.Function):
    """Sum over processes; every process's loss depends on the sum, so its gradient is summed as well."""

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


def masked_smooth_l1(
    predictions: Float[Tensor, "B N D"], targets: Float[Tensor, "B N D"], *, hidden: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Smooth-L1 (beta 1), mean over D and over each image's hidden patches, then over images."""
    per_patch = F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(-1)
    return ((per_patch * hidden).sum(1) / hidden.sum(1)).mean()


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
    count = len(embeddings) * (torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1)
    gauss = torch.exp(-knots.square() / 2)
    error = (phi[0] - gauss).square() + phi[1].square()
    return 2 * count * torch.trapezoid(error * gauss, knots, dim=-1).mean()


def draw_directions(width: int, count: int, *, generator: torch.Generator) -> Float[Tensor, "E M"]:
    """Random unit columns for `sigreg`, on the CPU."""
    return F.normalize(torch.randn(width, count, generator=generator), dim=0)


def make_target(encoder: Encoder) -> Encoder:
    """The target encoder: a copy in eval mode that no optimizer touches."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


@torch.no_grad()
def target_features(target: Encoder, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
    """What is predicted: the target's features of the whole image through a LayerNorm without affine."""
    return layer_norm(target(images).float())


@torch.no_grad()
def update_target(target: Encoder, encoder: Encoder, momentum: float) -> None:
    """target = momentum * target + (1 - momentum) * encoder, parameters only, after every optimizer step."""
    torch._foreach_lerp_(list(target.parameters()), list(encoder.parameters()), 1 - momentum)
