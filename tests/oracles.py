"""Slow reference forms of the model's parts, written from their definitions and not from the code under test.

Tests compare against them; benchmarks/step.py times some of them as the plain way to write the same thing.
"""

import itertools
import math
import random

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.model.masks import ASPECT_RANGE, MIN_BLOCK_AREA
from scott_sparse.model.vit import Attention


def pixel_mask(visible: torch.Tensor, grid: tuple[int, int], side: int) -> torch.Tensor:
    """`visible` (B, N) for each of the `side` x `side` sites of a patch: (B, 1, h * side, w * side)."""
    return visible.view(-1, 1, *grid).repeat_interleave(side, 2).repeat_interleave(side, 3)


def visible_by_loop(h: int, w: int, count: int) -> torch.Tensor:
    """A block mask for one image (arXiv 2106.08254, algorithm 1), rectangle by rectangle."""
    visible = torch.zeros(h, w, dtype=torch.bool)
    low, high = (math.log(ratio) for ratio in ASPECT_RANGE)
    while (missing := count - int(visible.sum())) > 0:
        for _ in range(64):
            smallest = min(missing, MIN_BLOCK_AREA)
            area, aspect = random.uniform(smallest, missing), math.exp(random.uniform(low, high))
            height = min(max(round(math.sqrt(area * aspect)), 1), h)
            width = min(max(round(math.sqrt(area / aspect)), 1), w)
            top, left = random.randint(0, h - height), random.randint(0, w - width)
            added = height * width - int(visible[top : top + height, left : left + width].sum())
            if 0 < added <= missing:
                visible[top : top + height, left : left + width] = True
                break
        else:
            hidden = (~visible).flatten().nonzero()[:, 0]
            visible.view(-1)[hidden[torch.randperm(len(hidden))[:missing]]] = True
    return visible.flatten()


def max_blur_pool_by_loop(x: torch.Tensor) -> torch.Tensor:
    """Of one channel (H, W): maxima over 2x2, one zero all round, [1 2 1] x [1 2 1] / 16 with stride 2."""
    h, w = x.shape
    padded = torch.zeros(h + 1, w + 1, dtype=x.dtype)
    for i, j in itertools.product(range(h - 1), range(w - 1)):
        padded[1 + i, 1 + j] = x[i : i + 2, j : j + 2].max()
    tap = torch.tensor([1, 2, 1], dtype=x.dtype)
    kernel = tap[:, None] * tap / 16
    rows = [[(padded[i : i + 3, j : j + 3] * kernel).sum() for j in range(0, w - 1, 2)] for i in range(0, h - 1, 2)]
    return torch.tensor(rows, dtype=x.dtype)


def stem_by_loop(stem, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """A SparseStem in training mode by its definition: each layer on the dense map, then hidden sites set to zero."""
    side = stem.patch_size
    grid = (images.shape[2] // side, images.shape[3] // side)
    kernels, biases, norms = iter(stem.kernels), iter(stem.biases), iter(stem.norms)
    mask = pixel_mask(visible, grid, side).to(images.dtype)
    x = images * mask
    for stage in stem.stages:
        kind = type(stage).__name__
        if kind == "Conv":
            usual = 0 if stage.kernel == stage.stride else (stage.kernel - 1) // 2  # for odd kernels
            padding = usual if stage.padding is None else stage.padding
            x = F.conv2d(x, next(kernels), next(biases) if stage.bias else None, stage.stride, padding)
        elif kind == "MaxBlurPool":
            tap = torch.tensor([1, 2, 1], dtype=x.dtype)
            blur = (tap[:, None] * tap / 16).expand(x.shape[1], 1, 3, 3)
            x = F.conv2d(F.max_pool2d(x, 2, stride=1), blur, stride=2, padding=1, groups=x.shape[1])
        elif kind in ("ReLU", "GELU"):
            x = x.clamp(min=0) if kind == "ReLU" else x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        else:
            norm = next(norms)
            dims, weight = ((1,), torch.ones_like(x)) if kind == "LayerNorm" else ((0, 2, 3), mask.expand_as(x))
            count = weight.sum(dims, keepdim=True)
            mean = (x * weight).sum(dims, keepdim=True) / count
            variance = ((x - mean).square() * weight).sum(dims, keepdim=True) / count
            x = (x - mean) / (variance + stage.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]
        side //= getattr(stage, "stride", 1)
        mask = pixel_mask(visible, grid, side).to(x.dtype)
        x = x * mask
    return x.flatten(2).mT


def attention_by_einsum(self: Attention, x: torch.Tensor) -> torch.Tensor:
    """`Attention.forward` with its weights materialised (arXiv 1706.03762, eq. 1)."""
    q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
    weights = (torch.einsum("bhnd,bhmd->bhnm", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    weights = F.dropout(weights, self.attention_dropout, self.training)
    return self.dropout(self.proj(rearrange(torch.einsum("bhnm,bhmd->bhnd", weights, v), "b h n d -> b n (h d)")))


def nt_xent_by_loop(embeddings: torch.Tensor, temperature: float) -> float:
    """NT-Xent of (V, B, E): over anchors and positives, -log of one pair's share among that pair and all negatives."""
    views, images, _ = embeddings.shape
    z, costs = F.normalize(embeddings.double(), dim=-1), []
    for v, b, w in itertools.product(range(views), range(images), range(views)):
        if v != w:
            pairs = ((u, c) for u, c in itertools.product(range(views), range(images)) if c != b)
            negatives = sum((z[v, b] @ z[u, c] / temperature).exp() for u, c in pairs)
            positive = (z[v, b] @ z[w, b] / temperature).exp()
            costs.append(-(positive / (positive + negatives)).log())
    return torch.stack(costs).mean().item()


def sigreg_by_integral(z: torch.Tensor, projections: torch.Tensor) -> float:
    """SIGReg of (B, E) by a fine grid on all of [-4, 4] and the complex characteristic function."""
    t = torch.linspace(-4, 4, 4001, dtype=torch.double)
    phi = torch.exp(1j * (z.double() @ projections.double()).T[:, None, :] * t[:, None]).mean(-1)
    normal = torch.exp(-t.square() / 2)
    return len(z) * torch.trapezoid((phi - normal).abs().square() * normal, t, dim=-1).mean().item()
