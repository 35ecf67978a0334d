"""MIM-JEPA: predict the features that an EMA target encoder gives to the hidden patches, in latent space.

The published objective (arXiv 2502.18056, section 3.2) is `losses.masked_smooth_l1` alone, with mask tokens in the
context encoder. Three options are not in the paper and off by default. The cross-crop term (`losses.nt_xent`, or
`losses.invariance` with `losses.sigreg`) compares crops of one image by their pooled visible tokens. With
`context="visible"` tokenizer and Transformer process the visible patches only, and mask tokens enter the predictor
alone. With `mim_target="all"` the features of tokenizer and all blocks are predicted, not the last block's alone.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Annotated, Any

import torch
from einops import rearrange
from torch import nn

from scott_sparse.cli import ADVANCED
from scott_sparse.distributed import full_tensor
from scott_sparse.model.losses import Projector, invariance, masked_smooth_l1, nt_xent, sigreg
from scott_sparse.model.sites import visible_indices
from scott_sparse.model.vit import Encoder, EncoderConfig, Predictor, layer_norm
from scott_sparse.shapes import Bool, Float, Tensor

TERMS = {"mim": "MIM-JEPA", "ntxent": "NT-Xent", "invariance": "crop invariance", "sigreg": "SIGReg"}
READ_BY = {  # fields of ObjectiveConfig that not all losses read: the terms that do
    "predictor_depth": ("mim",),
    "mim_target": ("mim",),
    "cross_crop_loss": ("ntxent", "sigreg"),
    "projector": ("ntxent", "sigreg"),
    "temperature": ("ntxent",),
    "sigreg_weight": ("sigreg",),
    "sigreg_projections": ("sigreg",),
}


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """Which terms the loss has, and what the context encoder sees."""

    mim_weight: float = 1.0
    """Weight of MIM-JEPA's loss; 0 leaves out target encoder pass and predictor."""
    predictor_depth: Annotated[int, ADVANCED] = 3
    """Blocks of the predictor."""
    mim_target: Annotated[str, ADVANCED] = dataclasses.field(default="last", kw_only=True)
    """Which features of the target encoder are predicted: those of the "last" block, as published, or those of "all"
    blocks and of the tokenizer, side by side (several layers, as in Bootleg, arXiv 2603.15553)."""
    context: str = "all"
    """What the context encoder processes: "all" patches, with mask tokens where hidden, as published, or "visible"."""
    cross_crop_weight: float = 0.0
    """Weight of the cross-crop term, which compares the crops of an image; 0 is the published objective."""
    cross_crop_loss: str = "ntxent"
    """The cross-crop term: "ntxent" (SimCLR's NT-Xent), or "sigreg" (LeJEPA's crop invariance and SIGReg)."""
    temperature: Annotated[float, ADVANCED] = 0.2
    """Temperature of NT-Xent."""
    sigreg_weight: Annotated[float, ADVANCED] = 0.05
    """Share of SIGReg in the cross-crop term, in [0, 1]; the rest is crop invariance."""
    projector: Annotated[tuple[int, int], ADVANCED] = (512, 64)
    """Hidden and output width of the projector of the cross-crop term."""
    sigreg_projections: Annotated[int, ADVANCED] = 256
    """Random projections of SIGReg, drawn anew at each step."""

    def __post_init__(self):
        """Raises ValueError for a value that is wrong, and for one that was changed although the loss ignores it."""
        if self.context not in ("all", "visible"):
            raise ValueError(f"unknown context {self.context!r}; expected 'all' or 'visible'.")
        if self.cross_crop_loss not in ("ntxent", "sigreg"):
            raise ValueError(f"unknown cross_crop_loss {self.cross_crop_loss!r}; expected 'ntxent' or 'sigreg'.")
        if self.mim_target not in ("last", "all"):
            raise ValueError(f"unknown mim_target {self.mim_target!r}; expected 'last' or 'all'.")
        mim, cross = self.mim_weight, self.cross_crop_weight
        if not (min(mim, cross) >= 0 and 0 < mim + cross < math.inf):
            raise ValueError(
                f"mim_weight {mim:g} and cross_crop_weight {cross:g} must be finite, 0 or more, not both 0."
            )
        # Built-in recipes set these two, and may be run with mim_weight 0.
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        self.refuse_ignored({**defaults, "predictor_depth": self.predictor_depth, "mim_target": self.mim_target})
        for name in ("predictor_depth", "temperature", "projector", "sigreg_projections"):
            value = getattr(self, name)
            if self.reads(name) and not (min(value) if isinstance(value, tuple) else value) > 0:
                raise ValueError(f"{name} {value} must be positive.")
        if self.reads("sigreg_weight") and not 0 <= self.sigreg_weight <= 1:
            raise ValueError(f"sigreg_weight {self.sigreg_weight} must lie in [0, 1].")

    def reads(self, name: str) -> bool:
        """Whether a field of `READ_BY` has an effect on the chosen loss."""
        return any(term in self.weights for term in READ_BY[name])

    def refuse_ignored(self, defaults: Mapping[str, Any]) -> None:
        """Raises ValueError for a field that differs from its value in `defaults` although the loss ignores it."""
        for name, readers in READ_BY.items():
            value, default = getattr(self, name), defaults[name]
            if value != default and not self.reads(name):
                missing, terms = " or ".join(TERMS[term] for term in readers), " and ".join(self.terms)
                raise ValueError(
                    f"{name} {value} has no effect: it is for {missing}, the loss is {terms}; leave it at {default}."
                )

    @property
    def weights(self) -> dict[str, float]:
        """Weight of each term in the loss, by the name that the term has in `MIMJEPA.forward`.

        With NT-Xent: mim_weight * mim + cross_crop_weight * ntxent. With SIGReg: mim_weight * mim +
        cross_crop_weight * ((1 - sigreg_weight) * invariance + sigreg_weight * sigreg), as in arXiv 2511.08544.
        """
        weights = {"mim": self.mim_weight} if self.mim_weight else {}
        if self.cross_crop_weight and self.cross_crop_loss == "ntxent":
            weights["ntxent"] = self.cross_crop_weight
        elif self.cross_crop_weight:
            weights["invariance"] = self.cross_crop_weight * (1 - self.sigreg_weight)
            weights["sigreg"] = self.cross_crop_weight * self.sigreg_weight
        return weights

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms as they are printed."""
        return tuple(TERMS[name] for name in self.weights)


class MIMJEPA(nn.Module):
    """All that is trained: context encoder, predictor and, for the cross-crop term, projector.

    They are one module, so that they are wrapped for distributed training once. The target encoder is not part of it,
    see `make_target`. `count`: the number of visible patches of every crop, where it is known (see `Tokenizer`).
    `plain_crops`: the last so many crops of each image kept their colours. The cross-crop term compares them with each
    other, and the crops before them with each other, each group through a projector of its own, so that the features
    are told to keep what colours say and what they do not (LooC, arXiv 2008.05659).
    """

    _no_split_modules = ("Block",)  # what Accelerate shards together (FSDP2)

    def __init__(
        self,
        encoder: EncoderConfig,
        objective: ObjectiveConfig,
        *,
        plain_crops: int = 0,
        engine: str = "auto",
        count: int | None = None,
    ):
        super().__init__()
        self.objective, self.plain_crops, self.count = objective, plain_crops, count
        self.encoder = Encoder(encoder, engine=engine)
        self.predictor = None
        if objective.mim_weight:
            outputs = encoder.depth + 1 if objective.mim_target == "all" else 1
            self.predictor = Predictor(encoder, objective.predictor_depth, outputs=outputs)
        groups = (2 if plain_crops else 1) if objective.cross_crop_weight else 0
        self.projectors = nn.ModuleList(Projector(encoder.dim, *objective.projector) for _ in range(groups))
        if not objective.mim_weight and objective.context == "visible":
            self.encoder.mask_token.requires_grad_(False)  # it is not used, and DDP would wait for its gradient

    def forward(
        self,
        images: Float[Tensor, "B V C H W"],
        visible: Bool[Tensor, "B V N"],
        targets: Float[Tensor, "B N F"] | None = None,
        projections: Float[Tensor, "E M"] | None = None,
        *,
        cached: Float[Tensor, "A R D"] | None = None,
        number: int = 0,
        pooled_only: bool = False,
    ) -> dict[str, Tensor]:
        """Loss terms of a batch of V masked crops per image, by name; `loss` is their weighted sum.

        `targets`, needed with MIM-JEPA, are the target features of each image's first crop, the only one that is
        predicted; F is D, or D * (depth + 1) with the mim_target "all". `projections`, needed with SIGReg, are unit
        columns (see `draw_projections`).

        Gradient accumulation: `pooled_only` gives {"pooled": (R, D)} alone, the pooled features of the R = B * V crops
        of a micro-batch. `cached` are those of all A micro-batches of a step, without gradient. With them this call is
        for micro-batch `number`, its cross-crop term is that of the whole batch, and the mean over the A calls has the
        gradient of the whole batch (see `insert_live`).
        """
        if images.ndim != 5 or visible.shape[:2] != images.shape[:2]:
            raise ValueError(
                f"images have shape {tuple(images.shape)}, visible {tuple(visible.shape)}; expected (B, V, C, H, W) "
                "and (B, V, N): with one crop of each image, give images[:, None] and visible[:, None]."
            )
        crops, seen = images.flatten(0, 1), visible.flatten(0, 1)
        features = self.context_features(crops, seen)
        if pooled_only:
            return {"pooled": self.pooled(features, seen)}
        losses = {}
        if self.predictor is not None:
            if targets is None:
                raise ValueError("targets are missing; MIM-JEPA predicts target_features(target, images).")
            if targets.shape[-1] != self.predictor.width:
                raise ValueError(
                    f"targets have width {targets.shape[-1]}, expected {self.predictor.width}: give target_features "
                    f"of {self.objective.mim_target!r}."
                )
            first = features.unflatten(0, visible.shape[:2])[:, 0]
            context = self.insert_mask_tokens(first, visible[:, 0])
            predictions = self.predictor(context, self.encoder.tokenizer.grid(crops))
            losses["mim"] = masked_smooth_l1(predictions, targets, hidden=~visible[:, 0])
        if self.projectors:
            pooled = self.pooled(features, seen)
            if cached is not None:
                pooled = insert_live(cached, number, pooled)
            losses |= self.cross_crop(pooled.unflatten(0, (-1, images.shape[1])), projections)
        weighted = [weight * losses[name] for name, weight in self.objective.weights.items()]
        return {**losses, "loss": sum(weighted[1:], start=weighted[0])}

    def cross_crop(
        self, pooled: Float[Tensor, "B V D"], projections: Float[Tensor, "E M"] | None
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms that compare the crops of an image, by name; with plain crops the mean over both groups."""
        crops = pooled.shape[1]
        groups = pooled.split([crops - self.plain_crops, self.plain_crops] if self.plain_crops else [crops], dim=1)
        of_groups = []
        for projector, group in zip(self.projectors, groups, strict=True):
            embeddings = projector(group.flatten(0, 1)).float()
            of_groups.append(self.compare(rearrange(embeddings, "(b v) e -> v b e", v=group.shape[1]), projections))
        return {name: torch.stack([terms[name] for terms in of_groups]).mean() for name in of_groups[0]}

    def compare(
        self, embeddings: Float[Tensor, "V B E"], projections: Float[Tensor, "E M"] | None
    ) -> dict[str, Float[Tensor, ""]]:
        """The terms of one group of crops."""
        if self.objective.cross_crop_loss == "ntxent":
            return {"ntxent": nt_xent(embeddings, temperature=self.objective.temperature)}
        if projections is None:
            raise ValueError("projections are missing; SIGReg needs those of draw_projections.")
        normality = torch.stack([sigreg(view, projections) for view in embeddings]).mean()
        return {"invariance": invariance(embeddings), "sigreg": normality}

    def context_features(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], span: tuple[int, int] | None = None
    ) -> Float[Tensor, "B n D"]:
        """Features of all N patches, with mask tokens where hidden (context "all"), or of the n visible ones only.

        `span`: see `Encoder.forward`.
        """
        encode = self.encoder if self.objective.context == "all" else self.encoder.forward_visible
        return encode(images, visible, count=self.count, span=span)

    def predict_hidden(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], span: tuple[int, int] | None = None
    ) -> Float[Tensor, "B N F"]:
        """The predictor's features of all patches, from the visible ones; it was trained on the hidden ones alone."""
        assert self.predictor is not None
        context = self.insert_mask_tokens(self.context_features(images, visible, span), visible)
        return self.predictor(context, self.encoder.tokenizer.grid(images), span)

    def insert_mask_tokens(
        self, features: Float[Tensor, "B n D"], visible: Bool[Tensor, "B N"]
    ) -> Float[Tensor, "B N D"]:
        """The predictor's input: context features, and mask tokens for the patches that have none."""
        if self.objective.context == "all":
            return features
        mask_tokens = self.encoder.mask_token.to(features.dtype).repeat(*visible.shape, 1)
        where = visible_indices(visible, features.shape[1])  # the backward pass of masked_scatter would wait for a GPU
        return mask_tokens.scatter(1, where[..., None].expand_as(features), features)

    def pooled(self, features: Float[Tensor, "B n D"], visible: Bool[Tensor, "B N"]) -> Float[Tensor, "B D"]:
        """Mean of the context features over the visible patches."""
        if self.objective.context == "visible":
            return features.mean(1)
        weight = visible[..., None].to(features.dtype)
        return (features * weight).sum(1) / weight.sum(1)


def insert_live(cached: Float[Tensor, "A R D"], number: int, live: Float[Tensor, "R D"]) -> Float[Tensor, "n D"]:
    """The features of all A micro-batches, n = A * R, of which those of micro-batch `number` have a gradient.

    The gradient of `live` is multiplied by A. A training loop takes the mean over the A losses of a step; as each of
    them is the loss of the whole batch, the encoder so gets the gradient of that loss through all micro-batches, and
    what follows (projector, loss) gets it A times over A. The idea is GradCache's (arXiv 2101.06983).
    """
    scaled = live.detach() + len(cached) * (live - live.detach())  # equal to `live`, exactly
    cached = cached.to(live.dtype)  # Accelerate returns outputs in fp32 also under autocast
    return torch.cat([*cached[:number], scaled, *cached[number + 1 :]])


def make_target(encoder: Encoder) -> Encoder:
    """The target encoder: a copy in eval mode that no optimizer updates."""
    return copy.deepcopy(encoder).eval().requires_grad_(False)


@torch.no_grad()
def target_features(
    target: Encoder, images: Float[Tensor, "B C H W"], span: tuple[int, int] | None = None, *, of: str = "last"
) -> Float[Tensor, "B N F"]:
    """What is predicted: the target's features of whole images, after a LayerNorm without affine parameters.

    `of`: `ObjectiveConfig.mim_target`, "last", where F = D, or "all": those of the tokenizer and of each block, side by
    side.
    """
    if of == "last":
        return layer_norm(target(images, span=span).float())
    tokens = target.tokenizer(images)
    blocks = target.transformer.last_blocks(tokens, target.positions(images, tokens, span), target.config.depth)
    return torch.cat([layer_norm(output.float()) for output in (tokens, *blocks)], dim=-1)


@torch.no_grad()
def update_target(
    target: nn.Module, encoder: nn.Module, momentum: float, *, skip: Float[Tensor, ""] | None = None
) -> None:
    """target = momentum * target + (1 - momentum) * encoder for all parameters, after every optimizer step.

    Where `skip` is 1 instead of 0 the target stays as it is; the device is not waited for.
    """
    own: list[Tensor] = list(target.parameters())
    new = [full_tensor(p) for p in encoder.parameters()]
    weight = 1 - momentum if skip is None else [(1 - momentum) * (1 - skip)] * len(own)
    torch._foreach_lerp_(own, new, weight)  # pyright: ignore[reportPrivateImportUsage]
