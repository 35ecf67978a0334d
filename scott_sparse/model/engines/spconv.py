"""SCOTT's layers on a `SparseConvTensor` of spconv, their dense oracle, and which engine runs.

spconv has submanifold convolutions of stride 1 only. The exact stride-2 form used here: fold each 2x2 block of input
sites into channels (pixel-unshuffle), after which a 7x7 stride-2 kernel is a 4x4 stride-1 kernel on blocks -2..+1, and
hand spconv that kernel with a rulebook of our own: one per resolution, affine in the patch, for all layers and the
whole batch. All engines (`spconv`, `tiles` of tiles.py, `dense` of dense.py) share one weight layout, dense OIHW, and
one result.

This is the only file that imports spconv, and only when it is first needed.
"""

import functools
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.model.engines.dense import dense_strided_conv, restrict
from scott_sparse.model.engines.halo import max_blur_pool_tiles
from scott_sparse.model.sites import KERNEL, ActivePatches
from scott_sparse.shapes import Float, Tensor

ENGINES = ("auto", "spconv", "tiles", "dense")
# Of the patches visible: above it `tiles` is slower than `dense`. Narrow products do not pay for the copies as soon.
TILES_UNTIL, TILES_UNTIL_NARROW, NARROW = 0.5, 0.3, 192


def to_sparse(images: Float[Tensor, "B C H W"], active: ActivePatches):
    """The masked images as a `spconv.pytorch.SparseConvTensor`: one voxel per visible pixel, features (n, C)."""
    return _sparse_tensor(active.gather(images), active, images.shape[-2] // active.grid[0])


def strided_submanifold_conv(sparse, weight: Float[Tensor, "K C 7 7"], active: ActivePatches):
    """7x7 stride-2 padding-3 convolution without bias of a SparseConvTensor; the active set is only restricted.

    Equals `F.conv2d(dense, weight, stride=2, padding=3)` at the active output sites.
    """
    blocks, side = fold_blocks(sparse, active)
    return _sparse_tensor(_indice_conv(blocks, fold_kernel(weight).contiguous(), active, side), active, side)


def fold_blocks(sparse, active: ActivePatches) -> tuple[Float[Tensor, "n f"], int]:
    """Features of the 2x2 blocks of a SparseConvTensor's sites, f = 4 C, and blocks per side of a patch."""
    side = sparse.spatial_shape[0] // active.grid[0] // 2
    pattern = "(s y dy x dx) c -> (s y x) (dy dx c)"
    return rearrange(sparse.features, pattern, s=len(active), x=side, y=side, dx=2, dy=2), side


def fold_kernel(weight: Float[Tensor, "K C 7 7"]) -> Float[Tensor, "K 4 4 f"]:
    """Offsets -3..3 become blocks -2..1 of two sites each, with a zero for the unused offset -4."""
    return rearrange(F.pad(weight, (1, 0, 1, 0)), "k c (y dy) (x dx) -> k y x (dy dx c)", dy=2, dx=2)


def _indice_conv(blocks: Tensor, kernel: Tensor, active: ActivePatches, side: int) -> Tensor:
    if len(active) == 0:  # spconv raises on empty input; keep the graph so that the weight still gets its zero gradient
        return blocks @ kernel[:, 0, 0].T
    spconv = _import_spconv()
    pairs, counts = active.rulebook(side)
    return spconv.functional.indice_conv(blocks, kernel, pairs, counts, len(active) * side**2, spconv.ConvAlgo.Native)


def sparse_relu(sparse):
    return sparse.replace_feature(torch.relu(sparse.features))


def sparse_max_blur_pool(sparse, active: ActivePatches):
    """`max_blur_pool` of a SparseConvTensor, restricted to the active sites."""
    side = sparse.spatial_shape[0] // active.grid[0]
    pooled = max_blur_pool_tiles(sparse.features.unflatten(0, (len(active), side, side)), active)
    return _sparse_tensor(pooled.flatten(0, 2), active, side // 2)


def choose_engine(engine: str, device: torch.device, *, visible_share: float, dim: int) -> str:
    """The engine that will run, `spconv`, `tiles` or `dense`, for tokens `dim` wide where so much is visible.

    `auto` follows the table of benchmarks/RESULTS.md: on a CPU `tiles` where some is hidden, `dense` where little is;
    elsewhere, where nothing is measured yet, `spconv` wherever it works. Raises ValueError for an unknown name, and
    for `spconv` where it cannot work, with the reason.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}.")
    if engine in ("tiles", "dense"):
        return engine
    if engine == "auto" and device.type == "cpu":
        return "tiles" if visible_share <= (TILES_UNTIL if dim >= NARROW else TILES_UNTIL_NARROW) else "dense"
    reason = spconv_failure(str(device))
    if reason is None:
        return "spconv"
    if engine == "spconv":
        raise ValueError(f"engine spconv cannot work here: {reason}; use --engine auto, tiles or dense.")
    return "dense"


@functools.lru_cache
def spconv_failure(device: str) -> str | None:
    """Why spconv cannot be used on this device; None if it imports and agrees with F.conv2d on a small case."""
    try:
        _import_spconv()
    except ImportError as error:
        return f"spconv does not import ({error}); pip install spconv-cu120 (Python < 3.12) or spconv-cu126"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 48, generator=generator).to(device)
    weight = torch.randn(8, 3, KERNEL, KERNEL, generator=generator).to(device)
    active = ActivePatches(torch.arange(48, device=device).view(2, 24) % 3 > 0, (4, 6))
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        expected = dense_strided_conv(restrict(images, active), weight, active)
        got = strided_submanifold_conv(to_sparse(images, active), weight, active)
        error = (got.features - active.gather(expected)).abs().max() / expected.abs().max()
    # TF32 convolutions, the default on CUDA, are good to three digits only.
    if not error < (5e-3 if images.is_cuda else 1e-5):
        return f"its self-test differs from F.conv2d by {error:.1e}"
    return None


@functools.cache
def _import_spconv():
    """spconv.pytorch with `functional` and `ConvAlgo`; its import-time deprecation warnings are not the user's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch
        import spconv.pytorch.functional
        from spconv.core import ConvAlgo
    spconv.pytorch.ConvAlgo = ConvAlgo
    return spconv.pytorch


def _sparse_tensor(features: Tensor, active: ActivePatches, side: int):
    h, w = active.grid
    return _import_spconv().SparseConvTensor(features, active.indices(side), [h * side, w * side], len(active.visible))
