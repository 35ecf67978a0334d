"""From pixels to tokens: SCOTT, the sparse convolutional tokenizer, and the plain patch tokenizer as its baseline.

Both take images (B, C, H, W) and `visible` (B, N), and no hidden pixel ever reaches a visible token. Both have two
forms of output: dense tokens (B, N, D) with zeros where hidden, and packed tokens (S, D), one row per visible patch.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.model.engines import ENGINES, Engine, check_engine, choose_engine
from scott_sparse.model.engines.dense import Dense
from scott_sparse.model.engines.spconv import SpConv, choose_package
from scott_sparse.model.sites import ActiveSites, complete_patches
from scott_sparse.model.stages import (
    GELU,
    BatchNorm,
    Conv,
    LayerNorm,
    MaxBlurPool,
    ReLU,
    Stage,
    check_stages,
    scott_stem,
)
from scott_sparse.shapes import Bool, Float, Int, Tensor

if TYPE_CHECKING:
    from spconv.pytorch import SparseConvTensor

Method = TypeVar("Method", bound=Callable)


def not_compiled(method: Method) -> Method:
    """Leave a method out of compiled graphs, where the number of visible patches is not known or the engine opaque."""
    # torch's own form of torch.compiler.disable, which imports torch._dynamo at the first call: that takes a second.
    disable = getattr(torch, "_disable_dynamo", torch.compiler.disable)
    return cast(Method, disable(method))


class Tokenizer(nn.Module):
    """What all tokenizers share: the patch grid, and the dense form as the scattered packed form.

    A new tokenizer implements `_packed` and is registered in `TOKENIZERS`; all take the same arguments. Raises
    ValueError for a patch size that the tokenizer does not have, and for an unknown engine.
    """

    def __init__(
        self, dim: int, *, patch_size: int = 16, in_channels: int = 3, stem_width: int = 64, engine: str = "auto"
    ):
        super().__init__()
        self.check_patch_size(patch_size)
        check_engine(engine)
        sizes = {"dim": dim, "patch_size": patch_size, "in_channels": in_channels, "stem_width": stem_width}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}; expected 1 or more.")
        self.dim, self.patch_size, self.in_channels, self.engine = dim, patch_size, in_channels, engine

    @classmethod
    def check_patch_size(cls, patch_size: int) -> None:
        """Raises ValueError for a patch size that the tokenizer does not have."""

    @classmethod
    def engine_name(cls, engine: str, device: torch.device, *, visible_share: float, dim: int) -> str:
        """The engine that runs. Raises ValueError where it cannot work. A tokenizer without engines is dense."""
        return "dense"

    def _packed(self, images: Float[Tensor, "B C H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        """Tokens of the active patches, of all patches where `active` is None."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns (h, w). Raises ValueError unless `images` is (B, C, H, W) of floating point with
        C = in_channels, and H and W are multiples of the patch size."""
        if images.ndim != 4 or images.shape[1] != self.in_channels or not images.is_floating_point():
            remedy = "give a batch" if images.ndim == 3 else "give in_channels to the model, or other images"
            if images.ndim == 4 and images.shape[1] == self.in_channels:
                remedy = "normalise: (images / 255 - mean) / std, as encoder.preprocess does"
            raise ValueError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; expected floating point of shape "
                f"(B, {self.in_channels}, H, W): {remedy}."
            )
        height, width = images.shape[-2:]
        return patches_along(height, self.patch_size), patches_along(width, self.patch_size)

    @property
    def in_graphs(self) -> bool:
        """Whether it becomes a part of compiled graphs."""
        return True

    def forward(
        self,
        images: Float[Tensor, "B C H W"],
        visible: Bool[Tensor, "B N"] | None = None,
        *,
        count: int | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens in raster order; zeros where hidden. `visible` None means that all patches are visible.

        `count`, here and below: the number of visible patches of every image, where it is known. Then the host does not
        wait for a GPU, and the engines "dense" and "halo", by name, compile to one graph. ValueError on a CPU if it is
        wrong; on a GPU it is not checked.

        Raises ValueError as `grid` and `active_sites`: for images and masks of another shape, dtype or device.
        """
        h, w = self.grid(images)
        if visible is None:  # len(images) would be a constant of an exported graph
            return self._packed(images, None).reshape(images.shape[0], h * w, self.dim)
        tokens, indices = self.packed(images, visible, count=count)
        dense = tokens.new_zeros(len(images) * h * w, self.dim)
        dense = dense.index_copy(0, indices[:, 0] * (h * w) + indices[:, 1], tokens)
        return dense.view(len(images), h * w, self.dim)

    def packed(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], *, count: int | None = None
    ) -> tuple[Float[Tensor, "S D"], Int[Tensor, "S 2"]]:
        """Tokens of the visible patches only, image by image in raster order, and their (image, patch) indices."""
        in_graph = count is not None and self.in_graphs
        return (self._pack if in_graph else self._pack_outside_graphs)(images, visible, count)

    def packed_by_image(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], *, count: int | None = None
    ) -> tuple[Float[Tensor, "B n D"], Int[Tensor, "B n"]]:
        """`packed` where every image has n visible patches: tokens, and their patch indices. ValueError otherwise."""
        if count is None:
            count = common_count(visible)
        tokens, indices = self.packed(images, visible, count=count)
        return tokens.unflatten(0, (len(images), count)), indices[:, 1].unflatten(0, (len(images), count))

    def _pack(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], count: int | None
    ) -> tuple[Float[Tensor, "S D"], Int[Tensor, "S 2"]]:
        active = self.active_sites(images, visible, count)
        return self._packed(images, active), torch.stack([active.image, active.patch], dim=1)

    _pack_outside_graphs = not_compiled(_pack)

    def active_sites(
        self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"], count: int | None = None
    ) -> ActiveSites:
        """The visible patches on the patch grid. Raises ValueError unless `visible` has one bool per patch, on the
        device of the images."""
        grid = self.grid(images)
        expected = (len(images), grid[0] * grid[1])
        if tuple(visible.shape) != expected:
            raise ValueError(
                f"visible has shape {tuple(visible.shape)}; expected {expected}: one row per image, "
                f"one entry per patch of the {grid[0]} x {grid[1]} grid."
            )
        if visible.dtype != torch.bool:
            raise ValueError(f"visible is {visible.dtype}; expected torch.bool, True where seen: give visible.bool().")
        if visible.device != images.device:
            raise ValueError(
                f"visible is on {visible.device}, images are on {images.device}; expected one device: give "
                "visible.to(images.device)."
            )
        known = visible.device.type == "cpu" and not torch.compiler.is_compiling()
        if count is not None and known and (visible.sum(1) != count).any():
            raise ValueError(f"every image must have {count} visible patches, got {visible.sum(1).tolist()}.")
        return ActiveSites(visible, grid, count)


class SparseStem(Tokenizer):
    """A stack of sparse layers: strided submanifold convolutions (arXiv 1711.10275) and what may stand between them.

    SparseStem([Conv(64), BatchNorm(), ReLU(), Conv(384, kernel=3), LayerNorm(), GELU()])  # P = 4, D = 384

    Args:
        stages: In order, of `scott_sparse.model.stages`. The width of the last convolution is that of the tokens, the
            product of the strides is the patch size P.
        in_channels: C of the images.
        engine: "auto" (the fastest, see `choose_engine`), or a name of `ENGINES`; all give the same result. Where all
            patches are visible the dense engine runs.

    After every stage the active sites are those of the visible patches. Raises ValueError for what is no stage, for an
    unknown engine and, when called, for an engine that cannot work.
    """

    def __init__(self, stages: Sequence[Stage], *, in_channels: int = 3, engine: str = "auto"):
        check_stages(stages)
        convs = [stage for stage in stages if isinstance(stage, Conv)]
        patch_size = math.prod(stage.stride for stage in stages if isinstance(stage, Conv | MaxBlurPool))
        super().__init__(convs[-1].width, patch_size=patch_size, in_channels=in_channels, engine=engine)
        self.stages = tuple(stages)
        widths = itertools.pairwise([in_channels, *(conv.width for conv in convs)])
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(k, c, conv.kernel, conv.kernel)) for (c, k), conv in zip(widths, convs)
        )
        for kernel in self.kernels:
            nn.init.kaiming_normal_(kernel)
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(conv.width)) for conv in convs if conv.bias)
        self.norms, width = nn.ModuleList(), in_channels
        for stage in stages:
            if isinstance(stage, Conv):
                width = stage.width
            elif isinstance(stage, LayerNorm):
                self.norms.append(nn.LayerNorm(width, eps=stage.eps))
            elif isinstance(stage, BatchNorm):
                self.norms.append(nn.BatchNorm1d(width, eps=stage.eps, momentum=stage.momentum))

    def sparse_input(self, images: Float[Tensor, "B C H W"], visible: Bool[Tensor, "B N"]) -> "SparseConvTensor":
        """The visible pixels as a `spconv.pytorch.SparseConvTensor`, one voxel per pixel."""
        return SpConv(self.active_sites(images, visible)).enter(images)

    def forward_sparse(self, x: "SparseConvTensor") -> "SparseConvTensor":
        """From pixels as a SparseConvTensor, as `sparse_input` gives them, to tokens as one, by the engine spconv.

        x: features (n, C), indices (image, row, column) in any order, spatial_shape (H, W). Returned: features (S, D)
        in packed order, indices (image, patch row, patch column), spatial_shape (h, w). Raises ValueError unless each
        patch has all of its P x P sites or none.
        """
        if x.features.shape[1] != self.in_channels:
            raise ValueError(
                f"the SparseConvTensor has {x.features.shape[1]} channels; expected in_channels {self.in_channels}."
            )
        grid = [patches_along(side, self.patch_size) for side in x.spatial_shape]
        active, order = complete_patches(x.indices, x.batch_size, (grid[0], grid[1]), self.patch_size)
        engine = SpConv(active)
        patches = x.features.float()[order].unflatten(0, (len(active), self.patch_size, self.patch_size))
        return self._run(engine, engine.tensor(patches))

    @classmethod
    def engine_name(cls, engine: str, device: torch.device, *, visible_share: float, dim: int) -> str:
        name = choose_engine(engine, device, visible_share=visible_share, dim=dim)
        return f"spconv (package {choose_package(str(device))[0]})" if name == "spconv" else name

    @property
    def in_graphs(self) -> bool:
        return self.engine in ("dense", "halo")  # "auto" may be spconv

    def _packed(self, images: Float[Tensor, "B C H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        engine: Engine
        if active is None:
            engine = Dense(None)
        else:
            share = len(active) / max(active.visible.numel(), 1)
            name = choose_engine(self.engine, images.device, visible_share=share, dim=self.dim)
            engine = ENGINES[name](active)
        dtype = self.kernels[0].dtype
        tokens = engine.leave(self._run(engine, engine.enter(images.to(dtype))))
        # A pool on a CPU, and all of spconv, compute in fp32.
        return tokens if torch.is_autocast_enabled(images.device.type) else tokens.to(dtype)

    def _run(self, engine: Engine, x: Any) -> Any:
        """The stages on an engine's own representation."""
        kernels, biases, norms = iter(self.kernels), iter(self.biases), iter(self.norms)
        for stage in self.stages:
            if isinstance(stage, Conv):
                bias = next(biases) if stage.bias else None
                x = engine.conv(x, next(kernels), bias, stride=stage.stride, padding=stage.before)
            elif isinstance(stage, MaxBlurPool):
                x = engine.pool(x)
            elif isinstance(stage, ReLU | GELU):
                x = engine.elementwise(x, stage)
            else:
                x = engine.rows(x, functools.partial(normalise, next(norms)))
        return x


class SparseTokenizer(SparseStem):
    """SCOTT (arXiv 2502.18056, section 3.1): the stages of `scott_stem`, convolutions 7x7 and max-blur-pools.

    Args:
        dim: Width D of the tokens.
        patch_size: P in pixels, 16 (published), 8 or 4.
        in_channels: C of the images.
        stem_width: Channels after the first of two convolutions.
        engine: As in `SparseStem`.

    Raises ValueError for an unknown patch size or engine and, when called, for an engine that cannot work.
    """

    def __init__(
        self, dim: int, *, patch_size: int = 16, in_channels: int = 3, stem_width: int = 64, engine: str = "auto"
    ):
        stages = scott_stem(dim, patch_size=patch_size, stem_width=stem_width)
        super().__init__(stages, in_channels=in_channels, engine=engine)

    @classmethod
    def check_patch_size(cls, patch_size: int) -> None:
        scott_stem(1, patch_size=patch_size)


class PatchTokenizer(Tokenizer):
    """The baseline: one biased convolution with kernel = stride = P, computed for the visible patches only.

    `dim`, `patch_size` (any) and `in_channels` as in `SparseTokenizer`; `stem_width` and `engine` have no meaning here.
    """

    def __init__(
        self, dim: int, *, patch_size: int = 16, in_channels: int = 3, stem_width: int = 64, engine: str = "auto"
    ):
        super().__init__(dim, patch_size=patch_size, in_channels=in_channels, engine=engine)
        self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)

    def _packed(self, images: Float[Tensor, "B C H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        p = self.patch_size
        patches = rearrange(images.to(self.proj.weight.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        chosen = patches.flatten(0, 1) if active is None else patches[active.image, active.patch]
        return F.linear(chosen, self.proj.weight.flatten(1), self.proj.bias)


TOKENIZERS: dict[str, type[Tokenizer]] = {"scott": SparseTokenizer, "patch": PatchTokenizer}


def normalise(norm: nn.Module, rows: Float[Tensor, "n C"]) -> Float[Tensor, "n C"]:
    """A LayerNorm or BatchNorm of rows in any precision; of no row, which BatchNorm refuses, with zero gradients."""
    weight, bias = norm.weight, norm.bias
    assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
    if len(rows) == 0:
        return rows * weight + bias
    return norm(rows if torch.is_autocast_enabled(rows.device.type) else rows.to(weight.dtype))


@not_compiled
def common_count(visible: Bool[Tensor, "B N"]) -> int:
    """The number of visible patches of every image. Raises ValueError where they differ."""
    counts = visible.sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"every image must have as many visible patches, got {counts}.")
    return counts[0]


def patches_along(side: int, patch_size: int) -> int:
    """Patches along an image side. Raises ValueError unless the side is a positive multiple of the patch size."""
    if side < patch_size or side % patch_size:
        lower = max(side // patch_size, 1) * patch_size
        nearest = f"{lower}" if side < patch_size else f"{lower} or {lower + patch_size}"
        raise ValueError(f"image side {side} is not a multiple of patch_size {patch_size}; nearest: {nearest}.")
    return side // patch_size
