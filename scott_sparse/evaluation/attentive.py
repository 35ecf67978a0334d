"""Attentive probe: three kinds of attention pooling on frozen tokens, trained side by side in one pass over the data.

The heads of the released code of arXiv 2502.18056. They weigh the tokens of an image by one score per token (`simple`),
by one per token and attention head (`multihead`), or by cross-attention from a learned query (`cross`). Each is trained
at each learning rate and stored at ten epochs; head, rate and epoch are settings to choose among.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.progress import track
from torch import nn

from scott_sparse.evaluation.features import Features
from scott_sparse.model.vit import Dropout, SwiGLU, init_linear, layer_norm
from scott_sparse.randomness import generator_at, seed_at
from scott_sparse.shapes import Float, Int, Tensor

RATES = (3e-4, 1e-3, 3e-3)
DROPOUT = 0.2
HEADS = 4
SNAPSHOTS = 10


class SimpleHead(nn.Module):
    """Mean of the tokens weighted by the softmax of one linear score; a linear classifier."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.score = nn.Sequential(Dropout(DROPOUT), nn.Linear(dim, 1))
        self.dropout = Dropout(DROPOUT)
        self.classify = nn.Linear(dim, classes)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        weight = self.dropout(self.score(tokens).softmax(dim=1))  # (B, N, 1)
        return self.classify((weight * tokens).sum(1))


class MultiHead(nn.Module):
    """The same with one score per attention head, each for its share of the projected width; a small MLP."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.score = nn.Sequential(Dropout(DROPOUT), nn.Linear(dim, HEADS))
        self.dropout = Dropout(DROPOUT)
        self.project = nn.Sequential(Dropout(DROPOUT), nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.classify = nn.Sequential(
            nn.SiLU(), nn.Linear(dim, dim), nn.LayerNorm(dim), nn.SiLU(), nn.Linear(dim, classes)
        )

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        weight = self.dropout(self.score(tokens).softmax(dim=1))
        shares = rearrange(self.project(tokens), "b n (h d) -> b n h d", h=HEADS)
        return self.classify(rearrange((weight[..., None] * shares).sum(1), "b h d -> b (h d)"))


class CrossHead(nn.Module):
    """Cross-attention of one learned query to the tokens; SwiGLU, LayerNorm, a linear classifier.

    With one query, keys and values need not be computed for each token: q (W x) = (q W) x, and the weighted sum of W x
    is W of the weighted sum. The affine part of the LayerNorm of the tokens is moved in the same way; its bias adds the
    same to all scores of a softmax. The result is that of the released code, in a quarter of the time.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        nn.init.trunc_normal_(self.query, std=0.02)
        self.tokens_norm, self.norm, self.last_norm = (nn.LayerNorm(dim) for _ in range(3))
        self.query_proj, self.proj = (init_linear(nn.Linear(dim, dim, bias=False)) for _ in range(2))
        self.key_value = init_linear(nn.Linear(dim, 2 * dim, bias=False))
        self.dropout = Dropout(DROPOUT)
        self.ffn = SwiGLU(dim)
        self.classify = init_linear(nn.Linear(dim, classes))

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B K"]:
        tokens = layer_norm(tokens)
        key, value = rearrange(self.key_value.weight, "(two h d) i -> two h d i", two=2, h=HEADS)
        query = rearrange(self.query_proj(self.query), "(h d) -> h d", h=HEADS)
        scale, shift = self.tokens_norm.weight, self.tokens_norm.bias
        scores = tokens @ (torch.einsum("hd,hdi->ih", query, key) * scale[:, None] * query.shape[1] ** -0.5)
        weight = self.dropout(scores.softmax(dim=1))  # (B, N, h)
        attended = rearrange(weight, "b n h -> b h n") @ tokens * scale + weight.sum(1)[..., None] * shift
        attended = torch.einsum("bhi,hdi->bhd", attended, value).flatten(1)
        x = self.norm(self.query + self.dropout(self.proj(attended)))
        return self.classify(self.last_norm(x + self.ffn(x)))


HEAD_TYPES = {"simple": SimpleHead, "multihead": MultiHead, "cross": CrossHead}


@dataclass(frozen=True)
class AttentiveProbe:
    """One trained head for each setting."""

    settings: list[dict]
    heads: list[nn.Module]
    device: torch.device

    @torch.inference_mode()
    def logits(self, features: Features, settings: Sequence[int]) -> Iterator[Float[Tensor, "m K"]]:
        assert features.tokens is not None
        for i in settings:
            head = self.heads[i].to(self.device)
            of_crops = torch.cat([head(part.to(self.device).float()).cpu() for part in features.tokens.split(256)])
            yield of_crops.unflatten(0, (len(features.pooled), -1)).mean(1)
            head.cpu()


def fit_attentive(
    features: Features,
    labels: Int[Tensor, " n"],
    *,
    classes: int,
    device: torch.device,
    epochs: int = 100,
    batch: int = 64,
) -> AttentiveProbe:
    """Train each head at each of `RATES` by AdamW with cosine decay.

    Features of several crops are averaged for the other probes; tokens cannot be, as each crop has others in the same
    place. Here an epoch takes one crop of each image, the next epoch the next one, and logits are averaged.

    Raises ValueError if the width of the tokens does not divide into the attention heads.
    """
    assert features.tokens is not None
    dim, crops = features.tokens.shape[-1], len(features.tokens) // len(labels)
    if dim % HEADS:
        raise ValueError(f"tokens of width {dim} do not divide into the {HEADS} heads of the attentive probe.")
    kinds = [(name, rate) for name in HEAD_TYPES for rate in RATES]
    with torch.random.fork_rng():
        torch.manual_seed(seed_at("attentive heads"))
        heads = nn.ModuleList(HEAD_TYPES[name](dim, classes) for name, _ in kinds).to(device)
        groups = [{"params": head.parameters(), "lr": rate} for head, (_, rate) in zip(heads, kinds)]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.04)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // batch))
        stored_at = {-(-epochs * part // SNAPSHOTS) for part in range(1, SNAPSHOTS + 1)}
        settings, snapshots = [], []
        for epoch in track(range(1, epochs + 1), description="attentive heads", transient=True):
            heads.train()
            order = torch.randperm(len(labels), generator=generator_at("order of a probe", epoch))
            for rows in order.split(batch):
                of_crop = rows * crops + (rows + epoch) % crops
                tokens, expected = features.tokens[of_crop].to(device).float(), labels[rows].to(device)
                # Each head has parameters of its own: its gradient of the sum is that of its own loss.
                losses = torch.stack([F.cross_entropy(head(tokens), expected) for head in heads])
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
                schedule.step()
            if epoch in stored_at:
                settings += [{"head": name, "lr": rate, "epoch": epoch} for name, rate in kinds]
                snapshots += [copy.deepcopy(head).eval().cpu() for head in heads]
    return AttentiveProbe(settings, snapshots, device)
