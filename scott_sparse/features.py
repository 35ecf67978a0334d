"""Frozen features: what an encoder says of whole images, before any probe."""

import torch

from scott_sparse.data import Images
from scott_sparse.shapes import Float, Int, Tensor
from scott_sparse.views import whole, whole_boxes
from scott_sparse.vit import Encoder


def whole_images(images: Images, indices: Int[Tensor, " B"], *, size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """The evaluation view: the largest centred box of the aspect ratio of `size`, resized and normalised."""
    boxes = whole_boxes(images.sizes[indices], size=size)
    return whole(images.cut(indices, boxes[:, None])[:, 0], boxes[:, 2:], size=size)


@torch.inference_mode()
def mean_token_features(
    encoder: Encoder, images: Images, *, size: tuple[int, int], device: torch.device, batch: int = 256
) -> Float[Tensor, "n D"]:
    """Mean over the tokens of each whole image, on the CPU."""
    rows = []
    for indices in torch.arange(len(images)).split(batch):
        rows.append(encoder(whole_images(images, indices, size=size).to(device)).float().mean(1).cpu())
    return torch.cat(rows)


@torch.inference_mode()
def pixel_features(images: Images, *, size: tuple[int, int], batch: int = 256) -> Float[Tensor, "n C"]:
    """The baseline below which nothing was learnt: the resized image itself, flattened."""
    views = [whole_images(images, i, size=size) for i in torch.arange(len(images)).split(batch)]
    return torch.cat(views).flatten(1)
