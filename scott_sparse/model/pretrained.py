"""Start from weights that exist: of another run, or of a ViT of timm (`--init` of train/pretrain.py).

A ViT of timm becomes an encoder with `block="pre-norm"` that gives the same features. Three things are folded into the
linear layers beside them, which changes no value: the affine part of each LayerNorm, LayerScale, and the images'
normalisation. The class token and timm's register tokens become registers, with their positions added.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from scott_sparse.model.preprocess import IMAGENET_MEAN, IMAGENET_STD
from scott_sparse.model.vit import SIZES, Encoder, EncoderConfig
from scott_sparse.model.weights import CONFIG, WEIGHTS, load_encoder
from scott_sparse.shapes import Float, Tensor

HEAD_WIDTH = 64  # of timm's ViTs up to large; a file of weights does not tell
MAX_DIFFERENCE = 1e-3  # of features to timm's, relative; rounding leaves 1e-6
AFTER_FEATURES = re.compile(r"(head|fc_norm|attn_pool)\..*")
BLOCK_PARTS = {  # ours: timm's, the LayerNorm before it, the LayerScale after it
    "attention.qkv": ("attn.qkv", "norm1", None),
    "attention.proj": ("attn.proj", None, "ls1"),
    "ffn.fused": ("mlp.fc1", "norm2", None),
    "ffn.out": ("mlp.fc2", None, "ls2"),
}


@dataclasses.dataclass(frozen=True)
class Start:
    """The encoder that a run starts from, and the value of --init that names it."""

    name: str
    encoder: Encoder

    def config(self, recipe: EncoderConfig) -> EncoderConfig:
        """The architecture of the run: blocks, registers and positions of the start, tokenizer and rates of the recipe.

        Raises ValueError where width, depth or heads differ, naming the size that fits.
        """
        own = self.encoder.config
        theirs, ours = ((config.dim, config.depth, config.heads) for config in (own, recipe))
        if theirs != ours:
            fitting = [f"use --size {size}" for size, numbers in SIZES.items() if numbers == theirs]
            raise ValueError(
                f"--init {self.name} has width, depth, heads {theirs}, expected {ours} as --size says: "
                f"{fitting[0] if fitting else 'no --size has those'}."
            )
        taken = ("ffn", "mlp_ratio", "registers", "block", "position_grid")
        return dataclasses.replace(recipe, **{name: getattr(own, name) for name in taken})

    def load_into(self, encoder: Encoder) -> str:
        """Copy the weights into an encoder of `config`; says in one line what was loaded and what is new.

        A tokenizer of another kind, patch size or number of channels stays new, and so does the mask token, which no
        ViT of timm has.
        """
        theirs, ours = self.encoder.state_dict(), encoder.state_dict()
        shapes = [{n: x.shape for n, x in part.items() if n.startswith("tokenizer.")} for part in (theirs, ours)]
        new = ["tokenizer"] * (shapes[0] != shapes[1]) + ["mask_token"] * self.name.startswith("timm")
        encoder.load_state_dict(ours | {name: x for name, x in theirs.items() if not name.startswith(tuple(new))})
        config = encoder.config
        words = {
            "tokenizer": f"tokenizer ({config.tokenizer}, patch size {config.patch_size})",
            "transformer.blocks": f"{config.depth} blocks",
            "transformer.norm": "last LayerNorm",
            "transformer.registers": f"{config.registers} registers",
            "position_embedding": f"positions of a {config.position_grid} x {config.position_grid} grid",
            "mask_token": "mask token",
        }
        loaded = [text for name, text in words.items() if name not in new and any(n.startswith(name) for n in ours)]
        made = [*(words[name] for name in new), "predictor", "projectors"]
        return f"starts from {self.name}: loaded {', '.join(loaded)}; new: {', '.join(made)}"


def open_start(name: str) -> Start:
    """What --init names: timm:NAME, a safetensors file of a ViT of timm, or a run's folder, file or Hub repository.

    Raises ValueError for weights that cannot be fetched, read or mapped.
    """
    if name.startswith("timm:"):
        return Start(name, from_timm(published_timm_model(name.removeprefix("timm:"), f"--init {name}")))
    path = Path(name)
    kinds = {file: kind for kind, file in WEIGHTS.items()}
    if not path.is_file() or (path.name in kinds and (path.parent / CONFIG).is_file()):
        weights = kinds.get(path.name, "target")
        return Start(name, load_encoder(path.parent if path.name in kinds else name, weights=weights))
    try:
        state = load_file(path)
    except SafetensorError as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"--init {name} is no safetensors file ({reason}); timm writes them by save_file.") from None
    return Start(f"timm weights {name}", encoder_from(state, name=f"--init {name}"))


def first_encoder(config: EncoderConfig, *, seed: int, init: str | None) -> Encoder:
    """The encoder of a run before its first step, as train/pretrain.py makes it from seed and --init.

    Raises ValueError as `open_start` and `Start.config`.
    """
    start = open_start(init) if init else None
    torch.manual_seed(seed)
    encoder = Encoder(start.config(config) if start else config)
    if start:
        start.load_into(encoder)
    return encoder


def published_timm_model(name: str, flag: str) -> Any:
    """A model of timm with its published weights, in eval mode, without a classifier. `flag` is named by errors.

    Raises ValueError if timm is not installed or does not know the name, or if the weights cannot be fetched.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f"{flag} needs the package timm: pip install timm.") from None
    if not timm.is_model(name):
        raise ValueError(f"{flag}: unknown to timm; timm.list_models(pretrained=True) lists its models.")
    try:
        return timm.create_model(name, pretrained=True, num_classes=0).eval()
    except Exception as error:  # fetching weights fails in many ways; untrained weights must not be evaluated
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{flag}: the weights cannot be fetched ({reason}).") from error


@torch.no_grad()
def from_timm(model: Any) -> Encoder:
    """An encoder that gives the features of a VisionTransformer of timm, of images normalised as in this package.

    Its patch features are compared with the model's. Raises ValueError for a model that is no plain ViT.
    """
    name, published = type(model).__name__, getattr(model, "pretrained_cfg", {})
    rows, columns = getattr(getattr(model, "patch_embed", None), "grid_size", None) or (0, 0)
    if rows != columns:
        raise ValueError(f"{name} has positions of a {rows} x {columns} grid, expected a square one.")
    heads = getattr(getattr(getattr(model, "blocks", [None])[0], "attn", None), "num_heads", None)
    normalisation = published.get("mean", IMAGENET_MEAN), published.get("std", IMAGENET_STD)
    encoder = encoder_from(model.state_dict(), name=name, heads=heads, normalisation=normalisation).eval()
    side = encoder.config.position_grid * encoder.config.patch_size
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    scale, shift = renormalise(*normalisation)
    expected = model.eval().forward_features(images * scale + shift)[:, encoder.config.registers :]
    error = ((encoder(images) - expected).norm() / expected.norm()).item()
    if not error < MAX_DIFFERENCE:
        raise ValueError(f"{name} computes something else than a plain ViT: its features differ by {error:.1e}.")
    return encoder


def encoder_from(
    state: Mapping[str, Tensor],
    *,
    name: str,
    heads: int | None = None,
    normalisation: tuple[Sequence[float], Sequence[float]] = (IMAGENET_MEAN, IMAGENET_STD),
) -> Encoder:
    """An encoder from the state dict of a ViT of timm; `heads` None: one for each 64 channels.

    `normalisation`: mean and standard deviation of the images that the weights are for; ImageNet's are ours. The mask
    token is new. Raises ValueError, with `name`, for tensors that a plain ViT with learned positions does not have.
    """
    left = {key: x for key, x in state.items() if not AFTER_FEATURES.fullmatch(key)}

    def take(key: str, default: Tensor | None = None) -> Tensor:
        if key not in left and default is None:
            raise ValueError(f"{name} is no ViT of timm with learned positions: it has no {key}.")
        return (left.pop(key) if default is None else left.pop(key, default)).double()

    kernel, positions = take("patch_embed.proj.weight"), take("pos_embed")
    dim, channels, patch_size = kernel.shape[:3]
    prefix = torch.cat([take(key, kernel.new_empty(1, 0, dim)) for key in ("cls_token", "reg_token")], 1)
    registers, count = prefix.shape[1], positions.shape[1]
    if math.isqrt(count - registers) ** 2 == count - registers:  # the tokens in front have positions too
        prefix, positions = prefix + positions[:, :registers], positions[:, registers:]
    side = math.isqrt(positions.shape[1])
    depth = 1 + max((int(key.split(".")[1]) for key in left if re.match(r"blocks\.\d+\.", key)), default=-1)
    if side**2 != positions.shape[1] or channels != 3 or kernel.shape[3] != patch_size or not depth:
        raise ValueError(f"{name}: expected RGB, square patches, a square grid of positions, and blocks.")

    scale, shift = (x.double() for x in renormalise(*normalisation))
    ones, zeros = kernel.new_ones(dim), kernel.new_zeros(dim)
    ours = {
        "tokenizer.proj.weight": kernel * scale,
        "tokenizer.proj.bias": take("patch_embed.proj.bias", zeros) + (kernel * shift).sum((1, 2, 3)),
        "position_embedding": positions.mT.unflatten(2, (side, side)),
        "transformer.norm.weight": take("norm.weight", ones),
        "transformer.norm.bias": take("norm.bias", zeros),
    }
    if registers:
        ours["transformer.registers"] = prefix
    for block in range(depth):
        for part, (theirs, norm, layer_scale) in BLOCK_PARTS.items():
            key = f"blocks.{block}."
            weight = take(f"{key}{theirs}.weight")
            bias = take(f"{key}{theirs}.bias", weight.new_zeros(len(weight)))
            if norm:
                gain, offset = take(f"{key}{norm}.weight", ones), take(f"{key}{norm}.bias", zeros)
                weight, bias = weight * gain, bias + weight @ offset
            if layer_scale:
                gain = take(f"{key}{layer_scale}.gamma", ones)
                weight, bias = gain[:, None] * weight, gain * bias
            for kind, tensor in (("weight", weight), ("bias", bias)):
                ours[f"transformer.{key}{part}.{kind}"] = tensor.float()
    if left:
        raise ValueError(f"{name} is no plain ViT of timm: {sorted(left)[0]} has no counterpart here.")
    hidden = len(ours["transformer.blocks.0.ffn.fused.weight"])
    ratio = hidden / dim
    config = EncoderConfig(
        dim=dim,
        depth=depth,
        heads=heads or max(dim // HEAD_WIDTH, 1),
        patch_size=patch_size,
        tokenizer="patch",
        ffn="mlp",
        mlp_ratio=ratio if int(ratio * dim) == hidden else math.nextafter(ratio, math.inf),
        registers=registers,
        block="pre-norm",
        position_grid=side,
    )
    encoder = Encoder(config)
    encoder.load_state_dict(encoder.state_dict() | {key: x.float().contiguous() for key, x in ours.items()})
    return encoder


def renormalise(mean: Sequence[float], std: Sequence[float]) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """(scale, shift) from our normalisation to another one."""
    ours, theirs = torch.tensor([IMAGENET_MEAN, IMAGENET_STD]), torch.tensor([list(mean), list(std)])
    return (ours[1] / theirs[1])[:, None, None], ((ours[0] - theirs[0]) / theirs[1])[:, None, None]
