"""The Vision Transformer behind the tokenizer; context encoder and predictor have the same blocks.

Two things differ from the usual ViT, as in the paper's code (arXiv 2502.18056), so that its weights can be loaded:
* the block is not pre-norm: the second LayerNorm *overwrites* the residual stream (see `Block`);
* there is no LayerNorm after the last block, and no LayerNorm has affine parameters.
With `block="pre-norm"` an encoder is the usual ViT, so that it can go on from published weights (`pretrained.py`).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from scott_sparse.model.crops import cut_crops
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.model.tokenizer import TOKENIZERS
from scott_sparse.shapes import Bool, Float, Tensor

SIZES = {  # name: (width D, layers, heads)
    "demo": (96, 3, 3),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "paper": (384, 12, 4),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
}
PRE_NORM_EPS = 1e-6  # of LayerNorm in timm's ViTs


MAXIMA = {"dim": 16384, "depth": 256, "heads": 256, "patch_size": 1024, "in_channels": 1024, "stem_width": 16384}


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """The architecture of an encoder; saved as JSON beside its weights. Raises ValueError for values out of range.

    `tokenizer` is a name of `tokenizer.TOKENIZERS`, `ffn` is "swiglu" or "mlp"; `stem_width` is read by SCOTT's
    tokenizer only, `mlp_ratio` by "mlp" only. `registers` is a number of register tokens (arXiv 2309.16588).
    `block` is "paper" or "pre-norm" (see `Block`). `position_grid` is the side of a square grid of learned positions,
    which are interpolated to that of an image; 0 means fixed sine-cosine positions.
    """

    dim: int
    depth: int
    heads: int
    patch_size: int = 16
    tokenizer: str = "scott"
    stem_width: int = 64
    ffn: str = "swiglu"
    mlp_ratio: float = 4.0
    registers: int = 0
    block: str = "paper"
    position_grid: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0
    in_channels: int = 3

    def __post_init__(self):
        for name, most in MAXIMA.items():
            if not 1 <= getattr(self, name) <= most:
                raise ValueError(f"{name} {getattr(self, name)} is outside 1 to {most}.")
        for name in ("registers", "position_grid"):
            if not 0 <= getattr(self, name) <= 1024:
                raise ValueError(f"{name} {getattr(self, name)} is outside 0 to 1024.")
        if self.ffn == "mlp" and not 1 / self.dim <= self.mlp_ratio <= 64:
            raise ValueError(f"mlp_ratio {self.mlp_ratio} is outside 1 / dim to 64.")
        if self.dim % 4 or self.dim % self.heads:
            raise ValueError(f"dim {self.dim} must be a multiple of 4 and of heads {self.heads}.")
        if self.tokenizer not in TOKENIZERS:
            raise ValueError(f"unknown tokenizer {self.tokenizer!r}; expected one of {', '.join(TOKENIZERS)}.")
        TOKENIZERS[self.tokenizer].check_patch_size(self.patch_size)
        if self.ffn not in ("swiglu", "mlp"):
            raise ValueError(f"unknown ffn {self.ffn!r}; expected 'swiglu' or 'mlp'.")
        if self.block not in ("paper", "pre-norm") or (self.block == "pre-norm" and self.ffn != "mlp"):
            raise ValueError(f"block {self.block!r} with ffn {self.ffn!r}; expected 'paper', or 'pre-norm' with 'mlp'.")
        if self.ffn == "swiglu":
            check_swiglu(self.dim, self.heads)
        for name in ("dropout", "attention_dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside [0, 1).")

    @classmethod
    def named(cls, size: str, **fields) -> "EncoderConfig":
        """The config of a size in `SIZES`, with other fields as given. Raises ValueError for an unknown name."""
        if size not in SIZES:
            raise ValueError(f"unknown size {size!r}; expected one of {', '.join(SIZES)}.")
        dim, depth, heads = SIZES[size]
        return cls(**{"dim": dim, "depth": depth, "heads": heads, **fields})


class Encoder(nn.Module):
    """Tokenizer and Transformer: images (B, C, H, W) to features (B, N, D), for any grid.

    C is `config.in_channels`. Images are normalised as in training: `preprocess` does that. Pixels from 0 to 1 give
    features without an error, but far worse ones. After `.half()` or `.bfloat16()` images of any precision are taken,
    and features have that of the weights.
    """

    preprocess: Preprocess | None = None
    """From a picture to the images of training; None if its encoder.json does not say how."""

    run: Path | None = None
    """The folder that it was loaded from, whose results its model card lists."""

    def __init__(self, config: EncoderConfig, *, engine: str = "auto"):
        super().__init__()
        self.config = config
        self.tokenizer = TOKENIZERS[config.tokenizer](
            config.dim,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            stem_width=config.stem_width,
            engine=engine,
        )
        self.transformer = Transformer(config)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.position_embedding = None
        if side := config.position_grid:
            self.position_embedding = nn.Parameter(torch.zeros(1, config.dim, side, side))
            nn.init.trunc_normal_(self.position_embedding, std=0.02)

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        visible: Bool[Tensor, "B N"] | None = None,
        *,
        count: int | None = None,
        span: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Features of all N patches; where hidden, the Transformer sees the learned mask token.

        `count`, here and below: the number of visible patches of every image, where it is known (see `Tokenizer`).
        `span`: for images of another size than those of training, the patch grid (h, w) of training, over which the
        positions are then spread (see `positions`).
        """
        tokens = self.tokenizer(images, visible, count=count)
        if visible is not None:
            tokens = torch.where(visible[..., None], tokens, self.mask_token.to(tokens.dtype))
        return self.transformer(tokens, self.positions(images, tokens, span))

    def positions(
        self, images: Float[Tensor, "B C H W"], like: Float[Tensor, "*B D"], span: tuple[int, int] | None = None
    ) -> Float[Tensor, "N D"]:
        """What is added to the tokens of an image: see the function `positions`. Learned ones always span the image."""
        grid = self.tokenizer.grid(images)
        if self.position_embedding is None:
            return positions(grid, like, span)
        learned: Tensor = self.position_embedding
        traced = torch.compiler.is_compiling() or type(like) is not Tensor  # a graph must not be for this grid alone
        if traced or grid != learned.shape[2:]:
            learned = F.interpolate(learned.float(), grid, mode="bicubic", antialias=True)
        return rearrange(learned, "1 d h w -> (h w) d").to(like.dtype)

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "Encoder":
        """The encoder of a run folder or of a Hub repository `owner/name`: `weights.load_encoder`, with its options."""
        from scott_sparse.model.weights import load_encoder

        return load_encoder(source, **options)

    def save_pretrained(self, folder: str | Path, **options: Any) -> None:
        """Write weights, config and a model card, unless there is a README.md, for a Hub repository.

        Options are those of `huggingface_hub.ModelHubMixin.save_pretrained`, such as `model_card_kwargs={"license":
        "cc-by-4.0"}` (`hub.model_card`).
        """
        from scott_sparse.model.hub import HubEncoder

        HubEncoder(self, Path(folder).name).save_pretrained(folder, **options)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a repository `owner/name`, which is made if there is none.

        Options are those of `huggingface_hub.ModelHubMixin.push_to_hub`. Returns the address of the commit.
        """
        from scott_sparse.model.hub import HubEncoder

        return HubEncoder(self, repo_id).push_to_hub(repo_id, **options)

    @property
    def num_features(self) -> int:
        """Width D of the features, under the name that it has in timm."""
        return self.config.dim

    def forward_features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N D"]:
        """Features of whole images, under timm's name. There is no head: it is what `forward` returns."""
        return self(images)

    def forward_intermediates(
        self,
        images: Float[Tensor, "B C H W"],
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Float[Tensor, "B N D"], list[Tensor]]:
        """Features after some blocks as maps (B, D, h, w), or (B, N, D) with output_fmt "NLC"; arguments as in timm.

        `indices`: the last so many blocks, all if None, or those of a sequence, where -1 is the last; maps are in the
        order of the blocks. `norm`: apply to each the LayerNorm without affine parameters that targets and probes see.
        Returns (features of the last block, maps), or the maps alone. Raises ValueError for blocks that do not exist.
        """
        depth = self.config.depth
        asked = range(-depth, 0) if indices is None else range(-indices, 0) if isinstance(indices, int) else indices
        if not asked or not all(-depth <= i < depth for i in asked):
            raise ValueError(f"indices is {indices}; expected 1 to {depth}, or some of -{depth} to {depth - 1}.")
        chosen = sorted({range(depth)[i] for i in asked})
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NLC'.")
        h, w = self.tokenizer.grid(images)
        blocks = self.last_blocks(images, depth - chosen[0])
        maps = [layer_norm(blocks[i - depth]) if norm else blocks[i - depth] for i in chosen]
        if output_fmt == "NCHW":
            maps = [rearrange(x, "b (h w) d -> b d h w", h=h, w=w) for x in maps]
        return maps if intermediates_only else (blocks[-1], maps)

    def pooled(
        self, images: Float[Tensor, "B C H W"], *, size: tuple[int, int] | None = None, crops: int = 1
    ) -> Float[Tensor, "B D"]:
        """One vector for each image, as the probes see it: the mean token of the last block after a LayerNorm.

        With crops=8 it is averaged over fixed crops of the images, for eight times the work (`crops.fixed_crops`).
        `size`: (height, width) of the views in pixels, if not that of the images; give images as large as they are.
        """
        views = cut_crops(images, size=size or (images.shape[2], images.shape[3]), crops=crops)
        return torch.stack([layer_norm(self(view).float()).mean(1) for view in views]).mean(0)

    def last_blocks(
        self, images: Float[Tensor, "B C H W"], count: int, span: tuple[int, int] | None = None
    ) -> list[Float[Tensor, "B N D"]]:
        """Features of whole images after each of the last `count` blocks, in the order of the blocks."""
        tokens = self.tokenizer(images)
        return self.transformer.last_blocks(tokens, self.positions(images, tokens, span), count)

    def last_attention(
        self, images: Float[Tensor, "B C H W"], span: tuple[int, int] | None = None
    ) -> Float[Tensor, "B heads N N"]:
        """Attention weights of the last block from each patch to each patch; registers are left out."""
        last, inputs = self.transformer.blocks[-1], []
        assert isinstance(last, Block)
        with last.attention.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0])):
            self(images, span=span)
        registers = self.config.registers
        return last.attention.weights(inputs[0])[..., registers:, registers:]

    def forward_visible(
        self,
        images: Float[Tensor, "B C H W"],
        visible: Bool[Tensor, "B N"],
        *,
        count: int | None = None,
        span: tuple[int, int] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """Features of the visible patches only, in raster order; hidden patches are not computed at all.

        Every image must have the same number n of visible patches, as `draw_visible` gives; ValueError otherwise.
        """
        tokens, where = self.tokenizer.packed_by_image(images, visible, count=count)
        return self.transformer(tokens, self.positions(images, tokens, span)[where])


class Predictor(nn.Module):
    """A Transformer of `depth` blocks on the context features of all N patches, then SiLU, LayerNorm, Linear.

    Its blocks and positions are those of the paper whatever the encoder's are. It predicts F = D * outputs values for
    each patch.
    """

    def __init__(self, config: EncoderConfig, depth: int, *, outputs: int = 1):
        super().__init__()
        self.width = config.dim * outputs
        own = dataclasses.replace(config, depth=depth, block="paper", position_grid=0)
        self.transformer = Transformer(own, first_layer=config.depth + 1)
        self.head = nn.Sequential(nn.SiLU(), nn.LayerNorm(config.dim), init_linear(nn.Linear(config.dim, self.width)))

    def forward(
        self, features: Float[Tensor, "B N D"], grid: tuple[int, int], span: tuple[int, int] | None = None
    ) -> Float[Tensor, "B N F"]:
        """Predicted target features of all N = h * w patches of a `grid` (h, w); hidden ones come as mask tokens."""
        return self.head(self.transformer(features, positions(grid, features, span)))


class Transformer(nn.Module):
    """Add positions, put the registers in front, apply the blocks, drop the registers.

    The last weights of each branch are scaled down with the index of their layer. `first_layer` > 1 marks a predictor,
    whose layers are scaled once more, counted on from those of the encoder, as in the paper's code.
    """

    def __init__(self, config: EncoderConfig, *, first_layer: int = 1):
        super().__init__()
        self.registers = nn.Parameter(torch.zeros(1, config.registers, config.dim)) if config.registers else None
        if self.registers is not None:
            nn.init.trunc_normal_(self.registers, std=0.02)
        self.dropout = Dropout(config.dropout)
        # Stochastic depth grows linearly with the layer (arXiv 1603.09382).
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        blocks = [Block(config, rate) for rate in rates]
        for layer, block in enumerate(blocks):
            for last in (block.attention.proj, block.ffn.out):
                last.weight.data /= math.sqrt(2 * (layer + 1))
                if first_layer > 1:
                    last.weight.data /= math.sqrt(2 * (layer + first_layer))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.dim, eps=PRE_NORM_EPS) if config.block == "pre-norm" else None

    def forward(self, tokens: Float[Tensor, "B n D"], pos: Float[Tensor, "*B n D"]) -> Float[Tensor, "B n D"]:
        return self.last_blocks(tokens, pos, 1)[0]

    def last_blocks(
        self, tokens: Float[Tensor, "B n D"], pos: Float[Tensor, "*B n D"], count: int
    ) -> list[Float[Tensor, "B n D"]]:
        """The patch features after each of the last `count` blocks."""
        x = tokens + pos
        registers = 0
        if self.registers is not None:
            registers = self.registers.shape[1]
            x = torch.cat([self.registers.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)
        x = self.dropout(x)
        outputs = []
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if self.norm is not None and layer == len(self.blocks) - 1:
                x = self.norm(x)
            if layer >= len(self.blocks) - count:
                outputs.append(x[:, registers:])
        return outputs


class Block(nn.Module):
    """x = x + attention(LN(x)); x = LN(x); x = x + ffn(x): as in the paper's code, not the usual pre-norm.

    With `block="pre-norm"`: x = x + attention(LN(x)); x = x + ffn(LN(x)), with biases, as in timm's VisionTransformer.
    No LayerNorm is affine: weights of one are a part of the linear layer that follows.
    """

    def __init__(self, config: EncoderConfig, drop_path: float):
        super().__init__()
        self.pre_norm = config.block == "pre-norm"
        self.attention = Attention(config)
        self.ffn = SwiGLU(config.dim) if config.ffn == "swiglu" else MLP(config.dim, config.mlp_ratio, self.pre_norm)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        if self.pre_norm:
            x = x + self._drop(self.attention(layer_norm(x, PRE_NORM_EPS)))
            return x + self._drop(self.ffn(layer_norm(x, PRE_NORM_EPS)))
        x = x + self._drop(self.attention(layer_norm(x)))
        x = layer_norm(x)
        return x + self._drop(self.ffn(x))

    def _drop(self, branch: Tensor) -> Tensor:
        if not self.training or self.drop_path == 0:
            return branch
        keep = 1 - self.drop_path
        return branch * branch.new_empty(len(branch), 1, 1).bernoulli_(keep) / keep


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 1706.03762); with biases in blocks of the kind "pre-norm" only."""

    def __init__(self, config: EncoderConfig):
        super().__init__()
        self.heads, self.attention_dropout = config.heads, config.attention_dropout
        bias = config.block == "pre-norm"
        self.qkv = init_linear(nn.Linear(config.dim, 3 * config.dim, bias=bias))
        self.proj = init_linear(nn.Linear(config.dim, config.dim, bias=bias))
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B n D"]:
        q, k, v = self._by_head(x)
        rate = self.attention_dropout if self.training else 0.0
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
        attend = _attend_by_products if slow else F.scaled_dot_product_attention
        x = attend(q, k, v, dropout_p=rate)
        return self.dropout(self.proj(rearrange(x, "b h n d -> b n (h d)")))

    def weights(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "B h n n"]:
        """How much each token (row) attends to each token (column); rows sum to 1."""
        q, k, _ = self._by_head(x)
        return _weights(q, k)

    def _by_head(self, x: Float[Tensor, "B n D"]) -> Float[Tensor, "3 B h n d"]:
        """Queries, keys and values."""
        return rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)


def _weights(q: Float[Tensor, "B h n d"], k: Float[Tensor, "B h n d"]) -> Float[Tensor, "B h n n"]:
    return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(-1)


def _attend_by_products(
    q: Float[Tensor, "B h n d"], k: Float[Tensor, "B h n d"], v: Float[Tensor, "B h n d"], *, dropout_p: float
) -> Float[Tensor, "B h n d"]:
    """Attention as two matrix products: in bf16 on a CPU PyTorch's own kernels take 2 to 12 times as long."""
    return dropout(_weights(q, k), dropout_p) @ v


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, rate: float) -> Tensor:
    """Zeros with probability `rate`, else x / (1 - rate): on a CPU in less than half the time of PyTorch's own.

    There random numbers are drawn one after the other, so four elements share one of 64 bits; `rate` is rounded to
    1/65536.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    limit = round(rate * 2**16)
    if limit == 0:
        return x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    kept = bits[: x.numel()].view(x.shape) >= limit - 2**15
    return x * kept.to(x.dtype).div_(1 - limit / 2**16)


class SwiGLU(nn.Module):
    """silu(x W) * (x V), with W and V in one matrix, then a linear layer back to D (arXiv 2002.05202)."""

    def __init__(self, dim: int):
        super().__init__()
        hidden = swiglu_width(dim)
        self.fused = init_linear(nn.Linear(dim, 2 * hidden, bias=False))
        self.out = init_linear(nn.Linear(hidden, dim, bias=False))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        gate, value = self.fused(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


def swiglu_width(dim: int) -> int:
    """Hidden width of SwiGLU: 8/3 D, rounded to a multiple of 128 as in the paper's code; 0 for D up to 24."""
    return 128 * round(8 / 3 * dim / 128)


def check_swiglu(dim: int, heads: int) -> None:
    """Raises ValueError where SwiGLU has no hidden unit, naming the smallest dim that works with so many heads."""
    if swiglu_width(dim) == 0:
        step = math.lcm(4, heads)
        least = next(wider for wider in itertools.count(step, step) if swiglu_width(wider))
        raise ValueError(f"dim {dim} gives SwiGLU a hidden width of 0; use dim {least} or more, or ffn 'mlp'.")


class MLP(nn.Module):
    """Linear, GELU, linear; hidden width ratio * D."""

    def __init__(self, dim: int, ratio: float, bias: bool):
        super().__init__()
        self.fused = init_linear(nn.Linear(dim, int(ratio * dim), bias=bias))
        self.out = init_linear(nn.Linear(int(ratio * dim), dim, bias=bias))

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        return self.out(F.gelu(self.fused(x)))


def layer_norm(x: Float[Tensor, "*B D"], eps: float = 1e-5) -> Float[Tensor, "*B D"]:
    """LayerNorm over D without affine parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def positions(
    grid: tuple[int, int], like: Float[Tensor, "*B D"], span: tuple[int, int] | None = None
) -> Float[Tensor, "N D"]:
    """Fixed 2-D sine-cosine positions: the first half of D encodes the row, the second half the column.

    Each half is [sin, cos] of index / 10000**(i / (D/4)), i = 0 .. D/4 - 1 (arXiv 1706.03762, 2111.06377). Device and
    dtype are those of `like`. With `span`, another grid, the indices are spread over its extent: an image at twice the
    size of training then has the positions of training and those half-way between them.
    """
    # A tensor that is computed while a graph is traced must not be kept beyond the trace.
    traced = torch.compiler.is_compiling() or type(like) is not Tensor
    axis = axis_positions if traced else cached_axis_positions
    extents = span or (None, None)
    rows, columns = (axis(n, extent, like.shape[-1] // 4, like.dtype, like.device) for n, extent in zip(grid, extents))
    rows = repeat(rows, "h d -> (h w) d", w=grid[1])
    return torch.cat([rows, repeat(columns, "w d -> (h w) d", h=grid[0])], dim=1)


def axis_positions(
    length: int, extent: int | None, frequencies: int, dtype: torch.dtype, device: torch.device
) -> Float[Tensor, "n d"]:
    """[sin, cos] of each index along one axis, d = 2 * frequencies; in float64 on the CPU, as MPS has no float64."""
    index = torch.arange(length, dtype=torch.float64, device="cpu")
    if extent is not None:
        index = (index + 0.5) * (extent / length) - 0.5  # centres of patches stay where they are in the image
    omega = 10000.0 ** (-torch.arange(frequencies, dtype=torch.float64, device="cpu") / frequencies)
    angle = index[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).to(dtype).to(device)


@functools.lru_cache(maxsize=64)
def cached_axis_positions(*arguments) -> Float[Tensor, "n d"]:
    with torch.inference_mode(False):  # else training could not use what an evaluation computed first
        return axis_positions(*arguments)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Initialise in place: weights from a normal truncated at two units, standard deviation 0.02; biases 0."""
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear
