"""The layers of a sparse stem, as descriptions: `tokenizer.SparseStem` has their weights, engines compute them.

What a stage gives is defined on the dense map that is zero at hidden sites: apply the layer, then set what is hidden to
zero. Statistics of a normalisation are those of the active sites alone. After every stage the active sites are those
of the visible patches (see `sites`), so that the product of the strides is the patch size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F

from scott_sparse.shapes import Float, Tensor

__all__ = ["GELU", "BatchNorm", "Conv", "LayerNorm", "MaxBlurPool", "ReLU", "Stage", "scott_stem"]


@dataclass(frozen=True)
class Conv:
    """A convolution with a square kernel, to `width` channels.

    `padding`: zeros on each side of the map. Default: those of the usual layer, none where kernel and stride are equal.
    Raises ValueError for values below 1 (`padding`: 0), and where the map would not shrink by exactly the stride.
    """

    width: int
    kernel: int = 7
    stride: int = 2
    padding: int | None = None
    bias: bool = False

    def __post_init__(self):
        for name in ("width", "kernel", "stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self}: {name} is {getattr(self, name)}; expected 1 or more.")
        if self.padding is not None and self.padding < 0:
            raise ValueError(f"{self}: padding is {self.padding}; expected 0 or more.")
        if not 1 <= self.kernel - 2 * self.before <= self.stride:
            low, high = max(-(-(self.kernel - self.stride) // 2), 0), (self.kernel - 1) // 2
            remedy = f"expected padding {low} to {high}" if low <= high else "expected an odd kernel"
            raise ValueError(f"{self}: the map would not shrink by exactly the stride {self.stride}; {remedy}.")

    @property
    def before(self) -> int:
        """The padding: the sites by which the first window begins before the map."""
        if self.padding is not None:
            return self.padding
        odd = self.kernel % 2 == 1 and self.kernel != self.stride
        return (self.kernel - 1) // 2 if odd else max(self.kernel - self.stride, 0) // 2


@dataclass(frozen=True)
class MaxBlurPool:
    """Maximum over 2x2 sites, then a 3x3 binomial blur with stride 2 (see `engines.dense.max_blur_pool`)."""

    stride = 2


@dataclass(frozen=True)
class ReLU:
    """max(x, 0)."""

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.relu(x)


@dataclass(frozen=True)
class GELU:
    """x times the normal distribution's probability of a value below x (arXiv 1606.08415)."""

    def __call__(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return F.gelu(x)


@dataclass(frozen=True)
class LayerNorm:
    """LayerNorm over the channels of each active site, with weight and bias."""

    eps: float = 1e-6


@dataclass(frozen=True)
class BatchNorm:
    """BatchNorm over the active sites alone, of the batch of one process; with weight and bias."""

    eps: float = 1e-5
    momentum: float = 0.1


Stage = Conv | MaxBlurPool | ReLU | GELU | LayerNorm | BatchNorm

# SCOTT's stem by patch size P: whether a max-blur-pool follows each of its convolutions.
POOLS = {16: (True, True), 8: (True, False), 4: (True,)}


def scott_stem(dim: int, *, patch_size: int = 16, stem_width: int = 64) -> list[Stage]:
    """SCOTT's published stem (arXiv 2502.18056, section 3.1), and the shorter ones for smaller patches.

    `stem_width` channels after the first of two convolutions, `dim` after the last. Raises ValueError for a patch size
    that it does not have.
    """
    if patch_size not in POOLS:
        raise ValueError(f"patch_size {patch_size} has no SCOTT stem; expected one of {sorted(POOLS)}.")
    pools = POOLS[patch_size]
    stages: list[Stage] = []
    for width, pool in zip([*[stem_width] * (len(pools) - 1), dim], pools):
        stages += [Conv(width), ReLU(), *([MaxBlurPool()] if pool else [])]
    return stages


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises ValueError unless there is a convolution, and for what is no stage."""
    unknown = [stage for stage in stages if not isinstance(stage, Stage)]
    if unknown:
        kinds = ", ".join(kind.__name__ for kind in Stage.__args__)
        raise ValueError(f"{type(unknown[0]).__name__} is no stage of a sparse stem; expected some of {kinds}.")
    if not any(isinstance(stage, Conv) for stage in stages):
        raise ValueError(f"{len(stages)} stages without a convolution; expected a Conv, which gives tokens a width.")
