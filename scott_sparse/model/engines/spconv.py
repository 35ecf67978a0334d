"""The stem on a `SparseConvTensor` of the spconv library. This file alone imports it, and only when it is first used.

Two packages have its API: spconv, for NVIDIA and CPUs, and spconv-triton, for any GPU and Python. The first of them
that passes a self-test on the device is used.

spconv has submanifold convolutions of stride 1 only. The exact form with stride s: fold each s x s block of input sites
into channels (pixel-unshuffle), which turns a 7x7 kernel with stride 2 into a 4x4 kernel with stride 1 on blocks -2 to
+1, and give spconv that kernel with a rulebook computed here. The rulebook is affine in the patch: one per resolution
serves all images of a batch.
"""

import functools
import importlib
import itertools
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange

from scott_sparse.model.engines.dense import Dense
from scott_sparse.model.engines.halo import Halo
from scott_sparse.model.sites import ActiveSites
from scott_sparse.shapes import Float, Int, Tensor

PACKAGES = {  # name to import: how to install it
    "spconv": "pip install spconv-cu120 (Python < 3.12) or spconv-cu126 (3.12, 3.13)",
    "spconv_triton": "pip install spconv-triton, and use a GPU",
}


class SpConv:
    """Works on a SparseConvTensor `x` with `x.features` (n, C), one row per active site.

    Computes in fp32 also under autocast and with weights of another precision: spconv has no bf16. `library` is a
    package as `import_package` gives it, by default the one that works on the device; ValueError if none does. Has the
    interface of `engines.Engine`.
    """

    def __init__(self, active: ActiveSites, library: ModuleType | None = None):
        self.active, self.halo = active, Halo(active)
        if library is None:
            package, failure = choose_package(str(active.patch.device))
            if package is None:
                raise ValueError(f"engine spconv cannot work here: {failure}.")
            library = import_package(package)
        self.library: Any = library

    @staticmethod
    def failure(device: torch.device) -> str | None:
        return spconv_failure(str(device))

    def enter(self, images: Float[Tensor, "B C H W"]):
        return self.tensor(self.active.gather(images.float()))

    def conv(
        self,
        x,
        kernel: Float[Tensor, "K C k k"],
        bias: Float[Tensor, " K"] | None = None,
        *,
        stride: int,
        padding: int,
    ):
        folded = rearrange(self.patches(x), "s (y dy) (x dx) c -> s y x (dy dx c)", dy=stride, dx=stride)
        # The window of output o touches the blocks o + first .. o + last: for kernel 7 and stride 2 o-2 .. o+1.
        first = -padding // stride
        with torch.autocast(folded.device.type, enabled=False):
            blocks = fold_kernel(kernel.float(), stride, padding).contiguous()
            features = self.conv_blocks(folded.flatten(0, 2), blocks, folded.shape[1], first)
            features = features if bias is None else features + bias.float()
        return self.tensor(features.unflatten(0, folded.shape[:3]))

    def conv_blocks(self, blocks: Float[Tensor, "n f"], kernel: Float[Tensor, "K m m f"], side: int, first: int):
        """spconv's own convolution of the folded blocks, `side` per patch and axis: (n, f) to (n, K)."""
        if len(blocks) == 0:  # spconv raises on empty input; the weight still gets its gradient, zero
            return blocks @ kernel[:, 0, 0].T
        pairs, counts = rulebook(self.active, side, range(first, first + kernel.shape[1]))
        native = self.library.ConvAlgo.Native
        return self.library.functional.indice_conv(blocks, kernel, pairs, counts, len(blocks), native)

    def elementwise(self, x, function: Callable[[Tensor], Tensor]):
        return x.replace_feature(function(x.features))

    def rows(self, x, function: Callable[[Tensor], Tensor]):
        return x.replace_feature(function(x.features).float())

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
        return self.library.SparseConvTensor(patches.flatten(0, 2), indices, shape, len(self.active.visible))


def fold_kernel(kernel: Float[Tensor, "K C k k"], stride: int, padding: int) -> Float[Tensor, "K m m f"]:
    """A kernel on blocks of stride x stride sites, f = stride**2 C; unused offsets of its m x m blocks get zeros.

    For kernel 7 and stride 2: offsets -3 .. 3 become blocks -2 .. 1 of two sites each, with a zero at the offset -4.
    """
    lead = -padding % stride
    trail = -(lead + kernel.shape[-1]) % stride
    padded = F.pad(kernel, (lead, trail, lead, trail))
    return rearrange(padded, "k c (y dy) (x dx) -> k y x (dy dx c)", dy=stride, dx=stride)


def site_indices(active: ActiveSites, side: int) -> Int[Tensor, "n 3"]:
    """(image, row, column) of each active site as int32, contiguous: spconv reads garbage from anything else."""
    local = torch.arange(side, device=active.patch.device)
    row = (active.patch // active.grid[1] * side)[:, None, None] + local[:, None]
    column = (active.patch % active.grid[1] * side)[:, None, None] + local
    sites = torch.stack(torch.broadcast_tensors(active.image[:, None, None], row, column), dim=-1)
    return sites.reshape(-1, 3).int().contiguous()


def rulebook(active: ActiveSites, side: int, blocks: range) -> tuple[Int[Tensor, "2 k n"], Int[Tensor, " k"]]:
    """Pairs (input block, output site) for each kernel position, at `side` output sites per patch.

    `blocks` are the k**.5 blocks, relative to the output, that the kernel reads along one axis. `pairs[0, k,
    :counts[k]]` are rows of the block features, `pairs[1, k, :counts[k]]` rows of the output.
    """
    reach = -(-max(-blocks[0], blocks[-1]) // side)
    neighbours = active.neighbours(reach)
    device, patches = neighbours.device, neighbours.shape[-1]

    @functools.cache
    def first_sites(down: int, right: int) -> tuple[Tensor, Tensor]:
        """First site of each visible patch that has a visible neighbour there, and first site of that neighbour."""
        there = neighbours[reach + down, reach + right].int()
        here = (there < patches).nonzero()[:, 0]
        return here.int() * side**2, there[here] * side**2

    pairs = torch.full((2, len(blocks) ** 2, patches * side**2), -1, dtype=torch.int32, device=device)
    counts = []
    for position, sources in enumerate(_sources(side, blocks, device)):
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
def _sources(side: int, blocks: range, device: torch.device) -> list[list[tuple[int, int, Tensor, Tensor]]]:
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
        for dy, dx in itertools.product(blocks, blocks)
    ]


@functools.cache
def choose_package(device: str) -> tuple[str | None, str | None]:
    """The first of PACKAGES that works on a device and None, or else None and why none does."""
    failures = []
    for package, remedy in PACKAGES.items():
        failure = package_failure(package, device)
        if failure is None:
            return package, None
        failures.append(f"{package} {failure}, remedy: {remedy}")
    return None, f"expected a package that agrees with F.conv2d, got: {'; '.join(failures)}"


def spconv_failure(device: str) -> str | None:
    """Why none of PACKAGES can be used on a device; None if one works."""
    return choose_package(device)[1]


def package_failure(package: str, device: str) -> str | None:
    """Why a package cannot be used on a device; None if its forward and backward agree with F.conv2d on a small case.

    A package that was built for another driver, PyTorch or numpy can fail in any way: each is a reason not to use it.
    """
    try:
        library = import_package(package)
    except Exception as error:
        return f"does not import ({describe(error)})"
    results = []
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(torch.device(device).type, enabled=False):
            generator = torch.Generator().manual_seed(0)
            images = torch.randn(2, 3, 32, 48, generator=generator).to(device)
            kernel = torch.randn(64, 3, 7, 7, generator=generator).to(device).requires_grad_()
            active = ActiveSites(torch.arange(48, device=device).view(2, 24) % 3 > 0, (4, 6))
            for engine in (Dense(active), SpConv(active, library)):
                tokens = engine.leave(engine.conv(engine.enter(images), kernel, stride=2, padding=3))
                results.append((tokens.detach(), *torch.autograd.grad(tokens.square().sum(), kernel)))
            errors = [((found - true).abs().max() / true.abs().max()).item() for true, found in zip(*results)]
    except Exception as error:
        return f"fails in its self-test ({describe(error)})"
    # TF32 convolutions, the default on CUDA, are good to three digits only.
    if not max(errors) < (5e-3 if device.startswith("cuda") else 1e-5):
        return f"differs from F.conv2d by {max(errors):.1e} in its self-test"
    return None


def describe(error: Exception) -> str:
    """In one line."""
    return " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")


@functools.cache
def import_package(package: str) -> ModuleType:
    """`pytorch` of a package, with `functional` and `ConvAlgo`; warnings on import are kept from the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library: Any = importlib.import_module(f"{package}.pytorch")
        importlib.import_module(f"{package}.pytorch.functional")
        library.ConvAlgo = importlib.import_module(f"{package}.core").ConvAlgo
    return library
