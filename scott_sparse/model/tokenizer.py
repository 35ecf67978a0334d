"""From pixels to tokens: SCOTT, the sparse convolutional tokenizer, and the plain patch tokenizer as its baseline.

Both take images (B, 3, H, W) and `visible` (B, N), and no hidden pixel ever reaches a visible token. Both have two
forms of output: dense tokens (B, N, D) with zeros where hidden, and packed tokens (S, D), one row per visible patch.
"""

import itertools
from collections.abc import Callable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.model.engines import ENGINES, Engine, check_engine, choose_engine
from scott_sparse.model.engines.dense import Dense
from scott_sparse.model.engines.spconv import choose_package
from scott_sparse.model.sites import KERNEL, ActiveSites
from scott_sparse.shapes import Bool, Float, Int, Tensor

# The stem by patch size P. Each stage is a 7x7 convolution of stride 2, a ReLU and, where True, a max-blur-pool of
# stride 2, so that P = 2 ** (convolutions + pools).
STAGES = {16: (True, True), 8: (True, False), 4: (True,)}

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

    def __init__(self, dim: int, *, patch_size: int = 16, stem_width: int = 64, engine: str = "auto"):
        super().__init__()
        self.check_patch_size(patch_size)
        check_engine(engine)
        self.dim, self.patch_size, self.engine = dim, patch_size, engine

    @classmethod
    def check_patch_size(cls, patch_size: int) -> None:
        """Raises ValueError for a patch size that the tokenizer does not have."""

    @classmethod
    def engine_name(cls, engine: str, device: torch.device, *, visible_share: float, dim: int) -> str:
        """The engine that runs. Raises ValueError where it cannot work. A tokenizer without engines is dense."""
        return "dense"

    def _packed(self, images: Float[Tensor, "B 3 H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        """Tokens of the active patches, of all patches where `active` is None."""
        raise NotImplementedError

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns (h, w). Raises ValueError unless H and W are multiples of the patch size."""
        height, width = images.shape[-2:]
        return patches_along(height, self.patch_size), patches_along(width, self.patch_size)

    @property
    def in_graphs(self) -> bool:
        """Whether it becomes a part of compiled graphs."""
        return True

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        visible: Bool[Tensor, "B N"] | None = None,
        *,
        count: int | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens in raster order; zeros where hidden. `visible` None means that all patches are visible.

        `count`, here and below: the number of visible patches of every image, where it is known. Then the host does not
        wait for a GPU, and the engines "dense" and "halo", by name, compile to one graph. ValueError on a CPU if it is
        wrong; on a GPU it is not checked.
        """
        h, w = self.grid(images)
        if visible is None:  # len(images) would be a constant of an exported graph
            return self._packed(images, None).reshape(images.shape[0], h * w, self.dim)
        tokens, indices = self.packed(images, visible, count=count)
        dense = tokens.new_zeros(len(images) * h * w, self.dim)
        dense = dense.index_copy(0, indices[:, 0] * (h * w) + indices[:, 1], tokens)
        return dense.view(len(images), h * w, self.dim)

    def packed(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"], *, count: int | None = None
    ) -> tuple[Float[Tensor, "S D"], Int[Tensor, "S 2"]]:
        """Tokens of the visible patches only, image by image in raster order, and their (image, patch) indices."""
        in_graph = count is not None and self.in_graphs
        return (self._pack if in_graph else self._pack_outside_graphs)(images, visible, count)

    def packed_by_image(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"], *, count: int | None = None
    ) -> tuple[Float[Tensor, "B n D"], Int[Tensor, "B n"]]:
        """`packed` where every image has n visible patches: tokens, and their patch indices. ValueError otherwise."""
        if count is None:
            count = common_count(visible)
        tokens, indices = self.packed(images, visible, count=count)
        return tokens.unflatten(0, (len(images), count)), indices[:, 1].unflatten(0, (len(images), count))

    def _pack(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"], count: int | None
    ) -> tuple[Float[Tensor, "S D"], Int[Tensor, "S 2"]]:
        active = self.active_sites(images, visible, count)
        return self._packed(images, active), torch.stack([active.image, active.patch], dim=1)

    _pack_outside_graphs = not_compiled(_pack)

    def active_sites(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"], count: int | None = None
    ) -> ActiveSites:
        """The visible patches on the patch grid. Raises ValueError where `visible` lacks one entry per patch."""
        grid = self.grid(images)
        expected = (len(images), grid[0] * grid[1])
        if tuple(visible.shape) != expected:
            raise ValueError(
                f"visible has shape {tuple(visible.shape)}; expected {expected}: one row per image, "
                f"one entry per patch of the {grid[0]} x {grid[1]} grid."
            )
        known = visible.device.type == "cpu" and not torch.compiler.is_compiling()
        if count is not None and known and (visible.sum(1) != count).any():
            raise ValueError(f"every image must have {count} visible patches, got {visible.sum(1).tolist()}.")
        return ActiveSites(visible, grid, count)


class SparseTokenizer(Tokenizer):
    """SCOTT (arXiv 2502.18056, section 3.1): strided submanifold convolutions and max-blur-pools, see `STAGES`.

    Widths: 3, `stem_width` after the first of two stages, `dim` after the last. After every layer the active sites are
    those of the visible patches. `engine`: "auto" (the fastest, see `choose_engine`), or a name of `ENGINES`; all give
    the same result. Where all patches are visible the dense engine runs.
    Raises ValueError for an unknown patch size or engine and, when called, for an engine that cannot work.
    """

    def __init__(self, dim: int, *, patch_size: int = 16, stem_width: int = 64, engine: str = "auto"):
        super().__init__(dim, patch_size=patch_size, engine=engine)
        self.pools = STAGES[patch_size]
        widths = [3, *[stem_width] * (len(self.pools) - 1), dim]
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(k, c, KERNEL, KERNEL)) for c, k in itertools.pairwise(widths)
        )
        for kernel in self.kernels:
            nn.init.kaiming_normal_(kernel)

    def sparse_input(self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]):
        """The visible pixels as a `spconv.pytorch.SparseConvTensor`, one voxel per pixel."""
        return ENGINES["spconv"](self.active_sites(images, visible)).enter(images)

    @classmethod
    def check_patch_size(cls, patch_size: int) -> None:
        if patch_size not in STAGES:
            raise ValueError(f"patch_size {patch_size} has no SCOTT stem; expected one of {sorted(STAGES)}.")

    @classmethod
    def engine_name(cls, engine: str, device: torch.device, *, visible_share: float, dim: int) -> str:
        name = choose_engine(engine, device, visible_share=visible_share, dim=dim)
        return f"spconv (package {choose_package(str(device))[0]})" if name == "spconv" else name

    @property
    def in_graphs(self) -> bool:
        return self.engine in ("dense", "halo")  # "auto" may be spconv

    def _packed(self, images: Float[Tensor, "B 3 H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        engine: Engine
        if active is None:
            engine = Dense(None)
        else:
            share = len(active) / max(active.visible.numel(), 1)
            name = choose_engine(self.engine, images.device, visible_share=share, dim=self.dim)
            engine = ENGINES[name](active)
        x = engine.enter(images.to(self.kernels[0].dtype))
        for kernel, pool in zip(self.kernels, self.pools):
            x = engine.relu(engine.conv(x, kernel))
            if pool:
                x = engine.pool(x)
        tokens = engine.leave(x)  # a pool on a CPU, and all of spconv, compute in fp32
        return tokens if torch.is_autocast_enabled(images.device.type) else tokens.to(self.kernels[0].dtype)


class PatchTokenizer(Tokenizer):
    """The baseline: one biased convolution with kernel = stride = P, computed for the visible patches only.

    `stem_width` and `engine` have no meaning for it.
    """

    def __init__(self, dim: int, *, patch_size: int = 16, stem_width: int = 64, engine: str = "auto"):
        super().__init__(dim, patch_size=patch_size, engine=engine)
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def _packed(self, images: Float[Tensor, "B 3 H W"], active: ActiveSites | None) -> Float[Tensor, "S D"]:
        p = self.patch_size
        patches = rearrange(images.to(self.proj.weight.dtype), "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        chosen = patches.flatten(0, 1) if active is None else patches[active.image, active.patch]
        return F.linear(chosen, self.proj.weight.flatten(1), self.proj.bias)


TOKENIZERS: dict[str, type[Tokenizer]] = {"scott": SparseTokenizer, "patch": PatchTokenizer}


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
