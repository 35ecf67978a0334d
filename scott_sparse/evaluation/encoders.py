"""What is evaluated: anything that turns images into frozen features.

Each model here maps normalised images (B, 3, h, w) to `pooled` (B, L, C), one vector for each of its last L blocks,
the last one last, and to its `tokens` (B, N, D). A user's encoder is so held against raw pixels, its own
initialisation, and other people's models by the same probes.
"""

import hashlib
import json

import torch
from einops import rearrange
from torch import nn

from scott_sparse.data.views import IMAGENET_MEAN, IMAGENET_STD
from scott_sparse.model.vit import Encoder, layer_norm
from scott_sparse.shapes import Float, Tensor

BLOCKS = 4


class FrozenEncoder(nn.Module):
    """Our encoder: tokens through the LayerNorm without affine of the paper's target and probe, pooled by the mean."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder.eval()

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> tuple[Float[Tensor, "B L D"], Float[Tensor, "B N D"]]:
        blocks = [layer_norm(tokens.float()) for tokens in self.encoder.last_blocks(images, BLOCKS)]
        return torch.stack([tokens.mean(1) for tokens in blocks], dim=1), blocks[-1]


class Pixels(nn.Module):
    """The baseline below which nothing was learnt: the image itself, and its patches."""

    def __init__(self, patch_size: int):
        super().__init__()
        self.patch_size = patch_size

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N D"]]:
        p = self.patch_size
        return images.flatten(1)[:, None], rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)


class TimmModel(nn.Module):
    """A model of timm with its published weights, pooled as its authors do.

    Raises ValueError where timm is missing, does not know the name, or cannot get its weights.
    """

    def __init__(self, name: str):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise ValueError(f"--timm {name} needs the package timm: pip install timm.") from None
        if not timm.is_model(name):
            raise ValueError(f"--timm {name}: timm knows no such model; timm.list_models(pretrained=True) lists all.")
        try:
            self.model = timm.create_model(name, pretrained=True, num_classes=0).eval()
        except Exception as error:  # whatever its many ways to fetch weights raise; nothing untrained is evaluated
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--timm {name}: its weights could not be had ({reason}).") from error
        config = self.model.pretrained_cfg
        self.size = tuple(config["input_size"][1:])
        ours = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])
        theirs = torch.tensor([config["mean"], config["std"]])
        scale = ours[1] / theirs[1]
        self.register_buffer("scale", scale[:, None, None], persistent=False)
        self.register_buffer("shift", ((ours[0] - theirs[0]) / theirs[1])[:, None, None], persistent=False)

    def forward(self, images: Float[Tensor, "B 3 h w"]) -> tuple[Float[Tensor, "B 1 C"], Float[Tensor, "B N D"]]:
        features = self.model.forward_features(images * self.scale + self.shift)
        pooled = self.model.forward_head(features, pre_logits=True)[:, None]
        if features.ndim == 3:
            return pooled, features[:, getattr(self.model, "num_prefix_tokens", 0) :]
        channels_last = features.shape[-1] == self.model.num_features  # as of timm's Swin
        return pooled, rearrange(features, "b h w c -> b (h w) c" if channels_last else "b c h w -> b (h w) c")


def fingerprint(model: nn.Module) -> str:
    """A hash of a model's form and of every number in it."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(model).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), *tensor.shape]).encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
