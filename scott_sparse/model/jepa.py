"""MIM-JEPA: predict, in latent space, what an EMA target encoder says about the hidden patches.

The published objective (arXiv 2502.18056, section 3.2) is `masked_smooth_l1`. Beside it stands a named option, off in
the paper's recipes: the cross-crop term of `losses.py`, on the pooled visible tokens. Masked crops whose
hidden patches cost nothing are what a sparse stem makes possible: with `context="visible"` neither tokenizer nor
Transformer spends anything on hidden patches, and only the predictor is shown mask tokens.
"""

import copy
import dataclasses
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.distributed import full_tensor
from scott_sparse.model.losses import Projector, contrast, invariance, sigreg, variance_covariance
from scott_sparse.model.vit import Encoder, EncoderConfig, Predictor, layer_norm
from scott_sparse.shapes import Bool, Float, Tensor


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which terms the loss has, and how the context encoder sees its images."""

    mim: float = 1.0
    """Weight of MIM-JEPA; 0 leaves out the target's pass and the predictor as well."""
    predictor_depth: int = 3
    context: str = "all"
    """'all': mask tokens in the context encoder, as published. 'visible': packed visible tokens only."""
    invariance: float = 0.0
    """Weight of the cross-crop term beside MIM-JEPA; 0 is the published objective."""
    spread: Literal["contrast", "sigreg", "vicreg"] = "contrast"
    """What keeps the cross-crop term from collapsing; 'contrast' is agreement and spread in one."""
    temperature: float = 0.2
    """Of contrast."""
    spread_share: float = 0.05
    """Of SIGReg or VICReg, within the cross-crop term."""
    projector: tuple[int, int] = (512, 64)
    directions: int = 256
    """Of SIGReg, at each step."""
    target_blocks: int = 1
    """Predict the mean of the target's last n blocks (data2vec, arXiv 2202.03555); 1 is the published target."""

    def __post_init__(self):
        if self.context not in ("all", "visible"):
            raise ValueError(f"unknown context {self.context!r}; expected 'all' or 'visible'.")
        if not 0 <= self.spread_share <= 1:
            raise ValueError(f"spread_share {self.spread_share} must lie in [0, 1].")
        if min(self.mim, self.invariance) < 0 or self.mim + self.invariance == 0:
            raise ValueError(
                f"mim {self.mim:g} and invariance {self.invariance:g} must not be negative, nor both be 0: "
                "they are the weights of the loss."
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature {self.temperature} must be positive.")
        if self.target_blocks < 1:
            raise ValueError(f"target_blocks is {self.target_blocks}; expected 1 or more.")

    @property
    def weights(self) -> dict[str, float]:
        """Of each term in the loss, by name.

        mim * MIM-JEPA + invariance * contrast, or
        mim * MIM-JEPA + invariance * ((1 - spread_share) * cross-crop invariance + spread_share * SIGReg or VICReg).
        """
        weights = {"mim": self.mim} if self.mim else {}
        if self.invariance and self.spread == "contrast":
            weights["contrast"] = self.invariance
        elif self.invariance:
            weights["invariance"] = self.invariance * (1 - self.spread_share)
            weights[self.spread] = self.invariance * self.spread_share
        return weights

    @property
    def terms(self) -> tuple[str, ...]:
        written = {"mim": "MIM-JEPA", "sigreg": "SIGReg", "vicreg": "VICReg"}
        return tuple(written.get(name, name) for name in self.weights)


class MIMJEPA(nn.Module):
    """Everything that is trained: context encoder, predictor and, for the cross-crop term, projector.

    One module, so that it is wrapped for distributed training once. The target encoder stays outside (`make_target`).
    """

    _no_split_modules = ("Block",)  # what Accelerate shards together (FSDP2)

    def __init__(self, encoder: EncoderConfig, objective: ObjectiveConfig, *, engine: str = "auto"):
        super().__init__()
        self.objective = objective
        self.encoder = Encoder(encoder, engine=engine)
        self.predictor = Predictor(encoder, objective.predictor_depth) if objective.mim else None
        self.projector = Projector(encoder.dim, *objective.projector) if objective.invariance else None
        if not objective.mim and objective.context == "visible":  # nothing sees it, and DDP would wait for its gradient
            self.encoder.mask_token.requires_grad_(False)

    def forward(
        self,
        images: Float[Tensor, "B V 3 H W"],
        visible: Bool[Tensor, "B VM N"],
        targets: Float[Tensor, "B N D"] | None,
        directions: Float[Tensor, "E M"] | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of V crops per image, each seen under M masks; `loss` is their weighted sum.

        `targets` (with MIM-JEPA) belong to each image's first crop, the one that is predicted, under each of its masks;
        the other crops cost no target pass. `directions`: columns of unit length for SIGReg (see `draw_directions`), if
        it is on.
        """
        masks, losses = visible.shape[1] // images.shape[1], {}
        crops, seen = images.repeat_interleave(masks, 1).flatten(0, 1), visible.flatten(0, 1)
        features = self.context_features(crops, seen)
        if self.predictor is not None:
            of_first = rearrange(features, "(b w) n d -> b w n d", b=len(images))[:, :masks].flatten(0, 1)
            seen_first = visible[:, :masks].flatten(0, 1)
            predictions = self.predictor(
                self.insert_mask_tokens(of_first, seen_first), self.encoder.tokenizer.grid(crops)
            )
            losses["mim"] = masked_smooth_l1(predictions, targets.repeat_interleave(masks, 0), hidden=~seen_first)
        if self.projector is not None:
            embeddings = self.projector(self.pooled(features, seen)).float()
            losses |= self.cross_crop(rearrange(embeddings, "(b w) e -> w b e", b=len(images)), directions)
        return {**losses, "loss": sum(weight * losses[name] for name, weight in self.objective.weights.items())}

    def cross_crop(
        self, embeddings: Float[Tensor, "V B E"], directions: Float[Tensor, "E M"] | None
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms that compare the views of an image, by name."""
        if self.objective.spread == "contrast":
            return {"contrast": contrast(embeddings, temperature=self.objective.temperature)}
        if self.objective.spread == "sigreg":
            spread = [sigreg(view, directions) for view in embeddings]
        else:
            spread = [variance_covariance(view) for view in embeddings]
        return {"invariance": invariance(embeddings), self.objective.spread: torch.stack(spread).mean()}

    def context_features(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B n D"]:
        """Of all N patches, hidden ones as mask tokens (context 'all'), or of the n visible ones alone."""
        if self.objective.context == "all":
            return self.encoder(images, visible)
        return self.encoder.forward_visible(images, visible)

    def insert_mask_tokens(
        self, features: Float[Tensor, "B n D"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"]:
        """What the predictor gets: context features, with mask tokens where the encoder had none."""
        if self.objective.context == "all":
            return features
        mask_tokens = self.encoder.mask_token.to(features.dtype).repeat(*visible.shape, 1)
        return mask_tokens.masked_scatter(visible[..., None], features)

    def pooled(self, features: Float[Tensor, "B n D"], visible: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        """Mean of the context features of the visible patches."""
        if self.objective.context == "visible":
            return features.mean(1)
        weight = visible[..., None].to(features.dtype)
        return (features * weight).sum(1) / weight.sum(1)


def masked_smooth_l1(
    predictions: Float[Tensor, "B N D"], targets: Float[Tensor, "B N D"], *, hidden: Bool[Tensor, "B N"]
) -> Float[Tensor, ""]:
    """Smooth-L1 (beta 1), mean over D and over each image's hidden patches, then over images."""
    per_patch = F.smooth_l1_loss(predictions.float(), targets.float(), reduction="none").mean(-1)
    return ((per_patch * hidden).sum(1) / hidden.sum(1)).mean()


def make_target(encoder: Encoder) -> Encoder:
    """The target encoder: a copy in eval mode that no optimizer touches."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


@torch.no_grad()
def target_features(target: Encoder, images: Float[Tensor, "B 3 H W"], *, blocks: int = 1) -> Float[Tensor, "B N D"]:
    """What is predicted: the target's features of the whole image through a LayerNorm without affine.

    Of more than one block: the mean of their normalised features, normalised again.
    """
    features = [layer_norm(tokens.float()) for tokens in target.last_blocks(images, blocks)]
    return features[0] if len(features) == 1 else layer_norm(torch.stack(features).mean(0))


@torch.no_grad()
def update_target(target: Encoder, encoder: Encoder, momentum: float, *, skip: Float[Tensor, ""] | None = None) -> None:
    """target = momentum * target + (1 - momentum) * encoder, parameters only, after every optimizer step.

    Where `skip` is 1 instead of 0 the target stays as it is; the device is not waited for.
    """
    own, new = list(target.parameters()), [full_tensor(p) for p in encoder.parameters()]
    weight = 1 - momentum if skip is None else [(1 - momentum) * (1 - skip)] * len(own)
    torch._foreach_lerp_(own, new, weight)
