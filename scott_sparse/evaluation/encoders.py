"""Image encoders that are evaluated: ours, raw pixels, and models of timm.

Each maps images (B, C, h, w) that are normalised by its `statistics` to `pooled` features (B, L, C), one vector for
each of the last L blocks with the last block last, and to the `tokens` (B, N, D) of the last block. `maps` gives
feature maps, for what is asked of each place in an image. Every probe runs on every encoder, so that an encoder is
compared with raw pixels, with its own initialisation and with models pretrained elsewhere.
"""

import dataclasses
import hashlib
import json
from importlib.metadata import version

import torch
from einops import rearrange
from torch import nn

from scott_sparse.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from scott_sparse.model.pretrained import published_timm_model, renormalise
from scott_sparse.model.vit import Encoder, layer_norm
from scott_sparse.shapes import Float, Tensor

BLOCKS = 4


class ImageEncoder(nn.Module):
    """Base class; a subclass defines `forward` as above."""

    description: dict
    """Everything but the weights that determines the output, in values that JSON can hold."""
    statistics: dict[str, tuple[float, ...]] = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}  # noqa: RUF012 - constant
    """Of each channel, by which images are to be normalised."""

    def normalised_as(self, preprocess: Preprocess | None, channels: int = 3) -> None:
        """Take the statistics of an encoder's training; None: ImageNet's. Raises ValueError if there are none."""
        if preprocess is not None:
            self.statistics = preprocess.statistics
        elif channels != 3:
            raise ValueError(f"an encoder of {channels} channels without preprocess: its encoder.json needs mean, std.")

    def maps(self, images: Float[Tensor, "B c H W"]) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """Feature maps (B, C, h, w) by name: `last`, the tokens of the last block on their grid, and others."""
        return {"last": on_grid(self(images)[1], images)}


class FrozenEncoder(ImageEncoder):
    """Our encoder; the tokens of each block pass a LayerNorm without affine parameters (as the targets of pretraining
    do, arXiv 2502.18056), and `pooled` is their mean. `span`: the patch grid of training, over which positions are
    spread where images are of another size."""

    def __init__(self, encoder: Encoder, span: tuple[int, int] | None = None):
        super().__init__()
        self.encoder, self.span = encoder.eval(), span
        self.description = {"blocks": BLOCKS, **dataclasses.asdict(encoder.config)}  # engines compute the same
        self.description |= {"span": span} if span else {}
        self.normalised_as(encoder.preprocess, encoder.config.in_channels)

    def forward(self, images: Float[Tensor, "B C h w"]) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B N D"]]:
        blocks = self.blocks(images)
        return torch.stack([tokens.mean(1) for tokens in blocks], dim=1), blocks[-1]

    def blocks(self, images: Float[Tensor, "B C h w"]) -> list[Float[Tensor, "B N D"]]:
        return [layer_norm(tokens.float()) for tokens in self.encoder.last_blocks(images, BLOCKS, self.span)]

    def maps(self, images: Float[Tensor, "B c H W"]) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """`last`, and `last-4`: the last four blocks (or all of fewer) side by side."""
        blocks = self.blocks(images)
        return {"last": on_grid(blocks[-1], images), "last-4": on_grid(torch.cat(blocks, dim=2), images)}


class Pixels(ImageEncoder):
    """The baseline without an encoder: `pooled` is the whole image, `tokens` are its patches; normalised as for an
    encoder with `preprocess`."""

    def __init__(self, patch_size: int, preprocess: Preprocess | None = None):
        super().__init__()
        self.patch_size, self.description = patch_size, {"patch_size": patch_size}
        self.normalised_as(preprocess)

    def forward(self, images: Float[Tensor, "B c h w"]) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N D"]]:
        p = self.patch_size
        return images.flatten(1)[:, None], rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def maps(self, images: Float[Tensor, "B c H W"]) -> dict[str, Float[Tensor, "B _ _ _"]]:
        """`patch`: all pixels of a patch. `pixel`: the colours of each pixel."""
        return {"patch": on_grid(self(images)[1], images), "pixel": images}


class TimmModel(ImageEncoder):
    """A model of timm with its published weights, its normalisation and its own pooling. `size`: (height, width).

    Raises ValueError if timm is not installed or does not know the name, or if the weights cannot be fetched.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, name: str):
        super().__init__()
        model = published_timm_model(name, f"--timm {name}")
        self.model, config = model, model.pretrained_cfg
        self.description = {"timm": version("timm"), "name": name, "pretrained_cfg": dict(config)}
        self.size = (int(config["input_size"][1]), int(config["input_size"][2]))
        scale, shift = renormalise(config["mean"], config["std"])
        self.register_buffer("scale", scale, persistent=False)
        self.register_buffer("shift", shift, persistent=False)

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N D"]]:
        features = self.model.forward_features(images * self.scale + self.shift)
        pooled = self.model.forward_head(features, pre_logits=True)[:, None]
        if features.ndim == 3:
            return pooled, features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        channels_last = features.shape[-1] == self.model.num_features  # as in timm's Swin
        return pooled, rearrange(features, "b h w c -> b (h w) c" if channels_last else "b c h w -> b (h w) c")


def on_grid(tokens: Float[Tensor, "B N D"], images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B D h w"]:
    """Tokens as a map; their grid has the aspect ratio of the images."""
    height, width = images.shape[2:]
    rows = round((tokens.shape[1] * height / width) ** 0.5)
    return rearrange(tokens, "b (h w) d -> b d h w", h=rows)


def fingerprint(encoder: ImageEncoder) -> str:
    """A hash of all that determines the features of given images: class, description, normalisation and weights."""
    digest = hashlib.blake2b(digest_size=16)
    form = [type(encoder).__name__, encoder.description, *encoder.statistics.values()]
    digest.update(json.dumps(form, sort_keys=True, default=str).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
