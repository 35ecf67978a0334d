"""Frozen features and what their neighbours say: the first question to ask of an encoder."""

import torch
import torch.nn.functional as F

from scott_sparse.data import Images
from scott_sparse.shapes import Float, Int, Tensor
from scott_sparse.views import whole
from scott_sparse.vit import Encoder

NEIGHBOURS = 20
TEMPERATURE = 0.07


@torch.inference_mode()
def mean_token_features(
    encoder: Encoder, images: Images, *, size: tuple[int, int], device: torch.device, batch: int = 256
) -> Float[Tensor, "n D"]:
    """Mean over the tokens of each whole image (its centre square, for a square `size`), on the CPU."""
    rows = []
    for indices in torch.arange(len(images)).split(batch):
        pixels, sizes = images.batch(indices)
        rows.append(encoder(whole(pixels.to(device), sizes, size=size)).float().mean(1).cpu())
    return torch.cat(rows)


@torch.inference_mode()
def pixel_features(images: Images, *, size: tuple[int, int], batch: int = 256) -> Float[Tensor, "n C"]:
    """The baseline below which nothing was learnt: the resized image itself, flattened."""
    views = [whole(*images.batch(i), size=size) for i in torch.arange(len(images)).split(batch)]
    return torch.cat(views).flatten(1)


def knn_accuracy(
    bank: Float[Tensor, "n C"],
    bank_labels: Int[Tensor, " n"],
    queries: Float[Tensor, "m C"],
    query_labels: Int[Tensor, " m"],
    *,
    neighbours: int = NEIGHBOURS,
) -> float:
    """Per cent of queries classified right by their nearest neighbours (cosine, weights exp(similarity / 0.07)).

    The weighted vote of arXiv 1805.01978, section 3.4, with k = 20 as in DINO (arXiv 2104.14294).
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    classes = int(max(bank_labels.max(), query_labels.max())) + 1
    right = 0
    for chunk, labels in zip(queries.split(1024), query_labels.split(1024)):
        similarity, nearest = (chunk @ bank.T).topk(min(neighbours, len(bank)), dim=1)
        votes = torch.zeros(len(chunk), classes).scatter_add_(1, bank_labels[nearest], (similarity / TEMPERATURE).exp())
        right += int((votes.argmax(1) == labels).sum())
    return 100 * right / len(query_labels)
