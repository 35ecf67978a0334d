"""The stem on a `SparseConvTensor` of the spconv library. This file alone imports it, and only when it is first used.

spconv has submanifold convolutions of stride 1 only. The exact form with stride 2: fold each 2x2 block of input sites
into channels (pixel-unshuffle), which turns a 7x7 kernel with stride 2 into a 4x4 kernel with stride 1 on blocks -2 to
+1, and give spconv that kernel with a rulebook computed here. The rulebook is affine in the patch: one per resolution
serves all images of a batch.
"""

import functools
import itertools
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.model.engines.dense import Dense
from scott_sparse.model.engines.halo import Halo
from scott_sparse.model.sites import KERNEL, REACH, ActiveSites
from scott_sparse.shapes import Float, Int, Tensor

BLOCKS = (-2, -1, 0, 1)  # the window 2o-3 .. 2o+3 of output o touches the 2-wide blocks o-2 .. o+1


class SpConv:
    """Works on a SparseConvTensor `x` with `x.features` (n, C), one row per active site.

    Computes in fp32 (TF32 on a GPU) also under autocast: spconv has no bf16. Has the interface of `engines.Engine`.
    """

    def __init__(self, active: ActiveSites):
        self.active, self.halo = active, Halo(active)

    @staticmethod
    def failure(device: torch.device) -> str | None:
        return spconv_failure(str(device))

    def enter(self, images: Float[Tensor, "B 3 H W"]):
        return self.tensor(self.active.gather(images.float()))

    def conv(self, x, kernel: Float[Tensor, "K C 7 7"]):
        folded = rearrange(self.patches(x), "s (y dy) (x dx) c -> s y x (dy dx c)", dy=2, dx=2)
        with torch.autocast(folded.device.type, enabled=False):
            features = self.conv_blocks(folded.flatten(0, 2), fold_kernel(kernel).contiguous(), folded.shape[1])
        return self.tensor(features.unflatten(0, folded.shape[:3]))

    def conv_blocks(self, blocks: Float[Tensor, "n f"], kernel: Float[Tensor, "K 4 4 f"], side: int):
        """spconv's own convolution of the folded blocks, `side` per patch and axis: (n, f) to (n, K)."""
        if len(blocks) == 0:  # spconv raises on empty input; the weight still gets its gradient, zero
            return blocks @ kernel[:, 0, 0].T
        library = import_spconv()
        pairs, counts = rulebook(self.halo.neighbours, side)
        return library.functional.indice_conv(blocks, kernel, pairs, counts, len(blocks), library.ConvAlgo.Native)

    def relu(self, x):
        return x.replace_feature(F.relu(x.features))

    def pool(self, x):
        with torch.autocast(x.features.device.type, enabled=False):
            return self.tensor(self.halo.pool(self.patches(x)))

    def leave(self, x) -> Float[Tensor, "S D"]:
        return x.features

    def patches(self, x) -> Float[Tensor, "S s s C"]:
        """The features of a SparseConvTensor, patch by patch."""
        side = x.spatial_shape[0] // self.active.grid[0]
        return x.features.unflatten(0, (len(self.active), side, side))

    def tensor(self, patches: Float[Tensor, "S s s C"]):
        """The SparseConvTensor of packed patches."""
        (h, w), side = self.active.grid, patches.shape[1]
        shape, indices = [h * side, w * side], site_indices(self.active, side)
        return import_spconv().SparseConvTensor(patches.flatten(0, 2), indices, shape, len(self.active.visible))


def fold_kernel(kernel: Float[Tensor, "K C 7 7"]) -> Float[Tensor, "K 4 4 f"]:
    """Offsets -3 .. 3 become blocks -2 .. 1 of two sites each, with a zero for the unused offset -4; f = 4 C."""
    return rearrange(F.pad(kernel, (1, 0, 1, 0)), "k c (y dy) (x dx) -> k y x (dy dx c)", dy=2, dx=2)


def site_indices(active: ActiveSites, side: int) -> Int[Tensor, "n 3"]:
    """(image, row, column) of each active site as int32, contiguous: spconv reads garbage from anything else."""
    local = torch.arange(side, device=active.patch.device)
    row = (active.patch // active.grid[1] * side)[:, None, None] + local[:, None]
    column = (active.patch % active.grid[1] * side)[:, None, None] + local
    sites = torch.stack(torch.broadcast_tensors(active.image[:, None, None], row, column), dim=-1)
    return sites.reshape(-1, 3).int().contiguous()


def rulebook(neighbours: Int[Tensor, "5 5 S"], side: int) -> tuple[Int[Tensor, "2 k n"], Int[Tensor, " k"]]:
    """Pairs (input block, output site) for each of the k = 16 kernel positions, at `side` output sites per patch.

    `pairs[0, k, :counts[k]]` are rows of the block features, `pairs[1, k, :counts[k]]` rows of the output. Within a
    patch the sites of one kernel position read from at most four patches.
    """
    device, patches = neighbours.device, neighbours.shape[-1]

    @functools.cache
    def first_sites(down: int, right: int) -> tuple[Tensor, Tensor]:
        """First site of each visible patch that has a visible neighbour there, and first site of that neighbour."""
        there = neighbours[REACH + down, REACH + right].int()
        here = (there < patches).nonzero()[:, 0]
        return here.int() * side**2, there[here] * side**2

    pairs = torch.full((2, len(BLOCKS) ** 2, patches * side**2), -1, dtype=torch.int32, device=device)
    counts = []
    for position, sources in enumerate(_sources(side, device)):
        count = 0
        for down, right, local_there, local_here in sources:
            here, there = first_sites(down, right)
            until = count + len(here) * len(local_here)
            pairs[0, position, count:until] = (there[:, None] + local_there).flatten()
            pairs[1, position, count:until] = (here[:, None] + local_here).flatten()
            count = until
        counts.append(count)
    return pairs, torch.tensor(counts, dtype=torch.int32)


@functools.cache
def _sources(side: int, device: torch.device) -> list[list[tuple[int, int, Tensor, Tensor]]]:
    """For each kernel position the patches it reads: (patches down, patches right, sites there, sites here)."""

    def runs(shift: int) -> list[tuple[int, list[int], list[int]]]:
        """Along one axis site i reads block i + shift: (distance in patches, sites there, sites here) per distance."""
        by_patch: dict[int, tuple[list[int], list[int]]] = {}
        for site in range(side):
            distance, there = divmod(site + shift, side)
            run = by_patch.setdefault(distance, ([], []))
            run[0].append(there)
            run[1].append(site)
        return [(distance, *run) for distance, run in by_patch.items()]

    def local(ys: list[int], xs: list[int]) -> Tensor:
        return torch.tensor([y * side + x for y in ys for x in xs], dtype=torch.int32, device=device)

    return [
        [
            (down, right, local(there_y, there_x), local(here_y, here_x))
            for (down, there_y, here_y), (right, there_x, here_x) in itertools.product(runs(dy), runs(dx))
        ]
        for dy, dx in itertools.product(BLOCKS, BLOCKS)
    ]


@functools.cache
def spconv_failure(device: str) -> str | None:
    """Why spconv cannot be used on a device; None if it imports and agrees with F.conv2d on a small case."""
    try:
        import_spconv()
    except ImportError as error:
        return f"spconv does not import ({error}); pip install spconv-cu120 (Python < 3.12) or spconv-cu126"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, 32, 48, generator=generator).to(device)
    kernel = torch.randn(8, 3, KERNEL, KERNEL, generator=generator).to(device)
    active = ActiveSites(torch.arange(48, device=device).view(2, 24) % 3 > 0, (4, 6))
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        dense, sparse = Dense(active), SpConv(active)
        expected = dense.leave(dense.conv(dense.enter(images), kernel))
        tokens = sparse.leave(sparse.conv(sparse.enter(images), kernel))
        difference = (tokens - expected).abs().max() / expected.abs().max()
    # TF32 convolutions, the default on CUDA, are good to three digits only.
    if not difference < (5e-3 if images.is_cuda else 1e-5):
        return f"its self-test differs from F.conv2d by {difference:.1e}"
    return None


@functools.cache
def import_spconv():
    """spconv.pytorch with `functional` and `ConvAlgo`; its deprecation warnings on import are kept from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spconv.pytorch
        import spconv.pytorch.functional
        from spconv.core import ConvAlgo
    spconv.pytorch.ConvAlgo = ConvAlgo
    return spconv.pytorch
