"""From pixels to tokens: SCOTT, the sparse convolutional tokenizer, and plain patch embedding as its baseline.

Both take images (B, 3, H, W) and `visible` (B, N) and never let a hidden pixel reach a visible token. Both have two
forms of output: dense tokens (B, N, D) with zeros where hidden, and `packed` tokens (S, D), one row per visible patch.
"""

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from scott_sparse.model.engines import spconv as sparse
from scott_sparse.model.engines.dense import dense_strided_conv, hide, max_blur_pool, restrict
from scott_sparse.model.engines.halo import max_blur_pool_tiles, strided_conv_tiles
from scott_sparse.model.sites import KERNEL, ActivePatches
from scott_sparse.shapes import Bool, Float, Int, Tensor

# Whether each stride-2 convolution is followed by a stride-2 max-blur-pool: P = 2 ** (convolutions + pools).
STAGES = {16: (True, True), 8: (True, False), 4: (True,)}


class Tokenizer(nn.Module):
    """What both tokenizers share: the patch grid, and the dense form as the scattered packed form."""

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        self.dim, self.patch_size = dim, patch_size

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Patch rows and columns. Raises ValueError unless H and W are multiples of the patch size."""
        return tuple(patches_along(side, self.patch_size) for side in images.shape[-2:])

    def forward(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"] | None = None
    ) -> Float[Tensor, "B N D"]:
        """Tokens in raster order; zeros where hidden. `visible` None means that everything is."""
        h, w = self.grid(images)
        if visible is None:  # len(images) would be a constant of an exported graph
            return self._packed(images, None).reshape(images.shape[0], h * w, self.dim)
        tokens, indices = self.packed(images, visible)
        dense = tokens.new_zeros(len(images) * h * w, self.dim)
        dense = dense.index_copy(0, indices[:, 0] * (h * w) + indices[:, 1], tokens)
        return dense.view(len(images), h * w, self.dim)

    @torch._dynamo.disable  # how many patches are visible is known to no compiler
    def packed(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "S D"], Int[Tensor, "S 2"]]:
        """Tokens of the visible patches only, image by image in raster order, and their (image, patch) indices."""
        active = self.active(images, visible)
        return self._packed(images, active), torch.stack([active.image, active.patch], dim=1)

    @torch._dynamo.disable
    def packed_by_image(
        self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "B n D"], Int[Tensor, "B n"]]:
        """The same where every image has n visible patches: tokens, and the patch of each. ValueError otherwise."""
        counts = visible.sum(1)
        if (counts != counts[0]).any():
            raise ValueError(f"every image must have as many visible patches, got {counts.tolist()}.")
        tokens, indices = self.packed(images, visible)
        return tokens.unflatten(0, (len(images), -1)), indices[:, 1].unflatten(0, (len(images), -1))

    def active(self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]) -> ActivePatches:
        """The visible patches as the sparse layers use them. Raises ValueError where the shapes disagree."""
        grid = self.grid(images)
        expected = (len(images), grid[0] * grid[1])
        if tuple(visible.shape) != expected:
            raise ValueError(
                f"visible has shape {tuple(visible.shape)}; expected {expected}: one row per image, "
                f"one entry per patch of the {grid[0]} x {grid[1]} grid."
            )
        return ActivePatches(visible, grid)

    def _packed(self, images: Tensor, active: ActivePatches | None) -> Tensor:
        raise NotImplementedError


class SparseTokenizer(Tokenizer):
    """SCOTT (arXiv 2502.18056, section 3.1): strided submanifold convolutions and max-blur-pools.

    P = 16: conv 7x7/2, 3 -> stem_width, ReLU, max-blur-pool, conv 7x7/2, stem_width -> D, ReLU, max-blur-pool. P = 8
    drops the second pool, P = 4 is a single stage. Active sites after every layer: those of the visible patches.

    `engine`: `spconv` (a SparseConvTensor of the visible pixels runs through spconv), `tiles` (visible patches with
    their halo, one matrix product per convolution), `dense` (the oracle: convolve, then zero), or `auto`: what is
    fastest (`choose_engine`). Where everything is visible all are the same and dense runs.
    Raises ValueError for an unknown patch size or engine, and for `spconv` where it cannot work.
    """

    def __init__(self, dim: int, *, patch_size: int = 16, stem_width: int = 64, engine: str = "auto"):
        super().__init__(dim, patch_size)
        if patch_size not in STAGES:
            raise ValueError(f"patch_size {patch_size} has no SCOTT stem; expected one of {sorted(STAGES)}.")
        if engine not in sparse.ENGINES:
            raise ValueError(f"unknown engine {engine!r}; expected one of {', '.join(sparse.ENGINES)}.")
        self.engine = engine
        self.pools = STAGES[patch_size]
        widths = [3, *[stem_width] * (len(self.pools) - 1), dim]
        self.kernels = nn.ParameterList(
            nn.Parameter(torch.empty(k, c, KERNEL, KERNEL)) for c, k in itertools.pairwise(widths)
        )
        for kernel in self.kernels:
            nn.init.kaiming_normal_(kernel)

    def sparse_input(self, images: Float[Tensor, "B 3 H W"], visible: Bool[Tensor, "B N"]):
        """The masked images on their way in: a `spconv.pytorch.SparseConvTensor`, one voxel per visible pixel."""
        return sparse.to_sparse(images, self.active(images, visible))

    def _packed(self, images, active):
        if active is None:
            return self._dense(images, None)
        share = len(active) / max(active.visible.numel(), 1)
        engine = sparse.choose_engine(self.engine, images.device, visible_share=share, dim=self.dim)
        return {"spconv": self._spconv, "tiles": self._tiles, "dense": self._dense}[engine](images, active)

    def _spconv(self, images: Tensor, active: ActivePatches) -> Tensor:
        # spconv has no bf16, and under autocast its functions would fall to fp16: an fp32 (TF32) island.
        with torch.autocast(images.device.type, enabled=False):
            x = sparse.to_sparse(images.float(), active)
            for kernel, pool in zip(self.kernels, self.pools):
                x = sparse.sparse_relu(sparse.strided_submanifold_conv(x, kernel, active))
                if pool:
                    x = sparse.sparse_max_blur_pool(x, active)
            return x.features

    def _tiles(self, images: Tensor, active: ActivePatches) -> Tensor:
        p = self.patch_size
        x = active.gather(images).unflatten(0, (len(active), p, p))
        for kernel, pool in zip(self.kernels, self.pools):
            x = F.relu(strided_conv_tiles(x, kernel, active))
            if pool:
                x = max_blur_pool_tiles(x, active)
        return x.flatten(0, 2)

    def _dense(self, images: Tensor, active: ActivePatches | None) -> Tensor:
        x = hide(images, active).contiguous(memory_format=torch.channels_last)
        for kernel, pool in zip(self.kernels, self.pools):
            x = F.relu(dense_strided_conv(x, kernel, active))
            if pool:
                x = restrict(max_blur_pool(x), active)
        return rearrange(x, "b d h w -> (b h w) d") if active is None else active.gather(x)


class PatchEmbed(Tokenizer):
    """The baseline: one biased convolution with kernel = stride = P, applied to the visible patches only."""

    def __init__(self, dim: int, *, patch_size: int = 16):
        super().__init__(dim, patch_size)
        self.proj = nn.Conv2d(3, dim, patch_size, stride=patch_size)

    def _packed(self, images, active):
        p = self.patch_size
        patches = rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)
        chosen = patches.flatten(0, 1) if active is None else patches[active.image, active.patch]
        return F.linear(chosen, self.proj.weight.flatten(1), self.proj.bias)


def patches_along(side: int, patch_size: int) -> int:
    """Patches along an image side. Raises ValueError unless the side is a positive multiple of the patch size."""
    if side < patch_size or side % patch_size:
        lower = max(side // patch_size, 1) * patch_size
        nearest = f"{lower}" if side < patch_size else f"{lower} or {lower + patch_size}"
        raise ValueError(f"image side {side} is not a multiple of patch_size {patch_size}; nearest: {nearest}.")
    return side // patch_size
