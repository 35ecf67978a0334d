"""Which sites are active after a stride-2 layer? Those of the visible patches, and no others.

A plain strided sparse convolution would also activate every output whose window touches an active input, so visible
regions would bleed into hidden ones layer by layer. *Submanifold* means the active set never grows: with patches of P
pixels a stride-2 layer maps the P x P active sites of each visible patch to its (P/2) x (P/2), then (P/4) x (P/4) ...,
down to one site: the token. So the active set of every layer follows from the list of visible patches alone
(`ActivePatches`), and one rulebook per resolution, affine in the patch, serves all layers and the whole batch.

spconv has submanifold convolutions of stride 1 only. The exact stride-2 form used here: fold each 2x2 block of input
sites into channels (pixel-unshuffle), after which a 7x7 stride-2 kernel is a 4x4 stride-1 kernel on blocks -2..+1, and
hand spconv that kernel with a rulebook of our own. Both engines (`spconv`, and `dense`: convolve the zero-filled map,
then multiply by the active map) share one weight layout, dense OIHW, and one result.

This is the only file that imports spconv, and only when it is first needed.
"""

import functools
import itertools
import warnings

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from scott_sparse.shapes import Bool, Float, Int, Tensor

KERNEL = 7
PADDING = 3
BLOCKS = (-2, -1, 0, 1)  # a 7-wide window at 2o-3 .. 2o+3 touches the 2-wide blocks o-2 .. o+1
ENGINES = ("auto", "spconv", "dense")


class ActivePatches:
    """The visible patches of a batch, and where their sites lie at every resolution.

    `visible` is (B, N) with N = h * w patches in raster order. With `side` sites per patch and axis (P at the
    pixels, 1 at the tokens) the S visible patches have S * side**2 active sites, ordered (patch, row, column).
    """

    def __init__(self, visible: Bool[Tensor, "B N"], grid: tuple[int, int]):
        assert visible.shape[1] == grid[0] * grid[1], f"{visible.shape[1]} patches do not fill a {grid} grid"
        self.visible, self.grid = visible, grid
        self.image, self.patch = visible.nonzero(as_tuple=True)
        self._rulebooks: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.image)

    def active_map(self, side: int) -> Bool[Tensor, "B 1 H W"]:
        """True at the active sites, at `side` sites per patch."""
        h, w = self.grid
        return repeat(self.visible, "b (h w) -> b 1 (h p) (w q)", h=h, w=w, p=side, q=side)

    def indices(self, side: int) -> Int[Tensor, "n 3"]:
        """(image, row, column) of each active site as int32, contiguous: spconv reads garbage from any other."""
        local = torch.arange(side, device=self.patch.device)
        row = (self.patch // self.grid[1] * side)[:, None, None] + local[:, None]
        column = (self.patch % self.grid[1] * side)[:, None, None] + local
        image = self.image[:, None, None]
        sites = torch.stack(torch.broadcast_tensors(image, row, column), dim=-1)
        return sites.reshape(-1, 3).int().contiguous()

    def gather(self, dense: Float[Tensor, "B C H W"]) -> Float[Tensor, "n C"]:
        """The active sites of a dense map."""
        h, w = self.grid
        patches = rearrange(dense, "b c (h p) (w q) -> (b h w) p q c", h=h, w=w)
        return patches[self.image * (h * w) + self.patch].flatten(0, 2)

    def scatter(self, features: Float[Tensor, "n C"], side: int) -> Float[Tensor, "B C H W"]:
        """A dense map (channels last in memory) that is zero at every inactive site."""
        h, w = self.grid
        rows = features.reshape(len(self), side * side * features.shape[1])
        zeros = rows.new_zeros(self.visible.numel(), rows.shape[1])
        # Whole patches are copied, not sites: the backward pass is then a plain gather of long rows.
        filled = zeros.index_copy(0, self.image * (h * w) + self.patch, rows)
        channels_last = rearrange(filled, "(b h w) (p q c) -> b (h p) (w q) c", h=h, w=w, p=side, q=side)
        return channels_last.permute(0, 3, 1, 2)  # pooling is several times faster in this memory format

    def rulebook(self, side: int) -> tuple[Int[Tensor, "2 k n"], Int[Tensor, " k"]]:
        """Pairs (input block, output site) for each of the 4x4 kernel positions at `side` output sites per patch.

        `pairs[0, k, :counts[k]]` are rows of the block features, `pairs[1, k, :counts[k]]` rows of the output.
        """
        if side not in self._rulebooks:
            self._rulebooks[side] = self._build_rulebook(side)
        return self._rulebooks[side]

    def _build_rulebook(self, side: int):
        """Affine in the patch: within a patch the sites of one kernel position fall into at most four neighbours."""
        device, (h, w) = self.patch.device, self.grid
        reach = -(BLOCKS[0] // side)  # how many patches away the window's first block may lie
        # Packed row of every patch, -1 where it is hidden or beyond the border.
        lookup = torch.full((len(self.visible), h + 2 * reach, w + 2 * reach), -1, dtype=torch.int32, device=device)
        row, column = self.patch // w + reach, self.patch % w + reach
        lookup[self.image, row, column] = torch.arange(len(self), dtype=torch.int32, device=device)

        @functools.cache
        def neighbours(away_y: int, away_x: int) -> tuple[Tensor, Tensor]:
            """First site of each visible patch with a visible neighbour there, and first site of that neighbour."""
            there = lookup[self.image, row + away_y, column + away_x]
            here = (there >= 0).nonzero()[:, 0]
            return here.int() * side**2, there[here] * side**2

        sites = len(self) * side**2
        pairs = torch.full((2, len(BLOCKS) ** 2, sites), -1, dtype=torch.int32, device=device)
        counts = []
        for position, window in enumerate(_windows(side, device)):
            count = 0
            for away_y, away_x, local_there, local_here in window:
                here, there = neighbours(away_y, away_x)
                until = count + len(here) * len(local_here)
                pairs[0, position, count:until] = (there[:, None] + local_there).flatten()
                pairs[1, position, count:until] = (here[:, None] + local_here).flatten()
                count = until
            counts.append(count)
        return pairs, torch.tensor(counts, dtype=torch.int32)


@functools.cache
def _windows(side: int, device: torch.device) -> list[list[tuple[int, int, Tensor, Tensor]]]:
    """For each kernel position the neighbours it reads: (patches down, patches right, sites there, sites here)."""

    def runs(shift: int) -> list[tuple[int, list[int], list[int]]]:
        """Along one axis site i reads block i + shift: (patches away, sites there, sites here) per patch away."""
        by_patch: dict[int, tuple[list[int], list[int]]] = {}
        for site in range(side):
            away, there = divmod(site + shift, side)
            run = by_patch.setdefault(away, ([], []))
            run[0].append(there)
            run[1].append(site)
        return [(away, *run) for away, run in by_patch.items()]

    def local(ys: list[int], xs: list[int]) -> Tensor:
        return torch.tensor([y * side + x for y in ys for x in xs], dtype=torch.int32, device=device)

    return [
        [
            (away_y, away_x, local(there_y, there_x), local(here_y, here_x))
            for (away_y, there_y, here_y), (away_x, there_x, here_x) in itertools.product(runs(dy), runs(dx))
        ]
        for dy, dx in itertools.product(BLOCKS, BLOCKS)
    ]


def to_sparse(images: Float[Tensor, "B C H W"], active: ActivePatches):
    """The masked images as a `spconv.pytorch.SparseConvTensor`: one voxel per visible pixel, features (n, C)."""
    return _sparse_tensor(active.gather(images), active, images.shape[-2] // active.grid[0])


def strided_submanifold_conv(sparse, weight: Float[Tensor, "K C 7 7"], active: ActivePatches):
    """7x7 stride-2 padding-3 convolution without bias of a SparseConvTensor; the active set is only restricted.

    Equals `F.conv2d(dense, weight, stride=2, padding=3)` at the active output sites.
    """
    side = sparse.spatial_shape[0] // active.grid[0] // 2
    blocks = rearrange(
        sparse.features, "(s y dy x dx) c -> (s y x) (dy dx c)", s=len(active), x=side, y=side, dx=2, dy=2
    )
    # Offsets -3..3 become blocks -2..1 of two sites each, with a zero for the unused offset -4.
    kernel = rearrange(F.pad(weight, (1, 0, 1, 0)), "k c (y dy) (x dx) -> k y x (dy dx c)", dy=2, dx=2)
    return _sparse_tensor(_indice_conv(blocks, kernel.contiguous(), active, side), active, side)


def _indice_conv(blocks: Tensor, kernel: Tensor, active: ActivePatches, side: int) -> Tensor:
    if len(active) == 0:  # spconv raises on empty input; keep the graph so that the weight still gets its zero gradient
        return blocks @ kernel[:, 0, 0].T
    spconv = _import_spconv()
    pairs, counts = active.rulebook(side)
    return spconv.functional.indice_conv(blocks, kernel, pairs, counts, len(active) * side**2, spconv.ConvAlgo.Native)


def sparse_relu(sparse):
    return sparse.replace_feature(torch.relu(sparse.features))


def sparse_max_blur_pool(sparse, active: ActivePatches):
    """`max_blur_pool` of a SparseConvTensor, restricted to the active sites.

    The intermediate maximum is non-zero one site outside the visible region, so it lives on the zero-filled map. On the
    CPU that also measures faster, forward and backward, than gathering windows by index table.
    """
    side = sparse.spatial_shape[0] // active.grid[0]
    pooled = max_blur_pool(active.scatter(sparse.features, side))
    return _sparse_tensor(active.gather(pooled), active, side // 2)


def dense_strided_conv(
    images: Float[Tensor, "B C H W"], weight: Float[Tensor, "K C 7 7"], active: ActivePatches | None
) -> Float[Tensor, "B K h w"]:
    """The oracle: convolve the zero-filled map, then zero what is not active. `active` None: everything is."""
    return restrict(F.conv2d(images, weight, stride=2, padding=PADDING), active)


def restrict(dense: Float[Tensor, "B C H W"], active: ActivePatches | None) -> Float[Tensor, "B C H W"]:
    """Zero every inactive site of a dense map."""
    if active is None:
        return dense
    # `where`, not a product: a nan or inf under a hidden patch must not survive as nan * 0.
    return torch.where(active.active_map(dense.shape[-2] // active.grid[0]), dense, 0)


def max_blur_pool(dense: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H/2 W/2"]:
    """Maximum over 2x2, stride 1, then the 3x3 binomial blur with stride 2 (arXiv 1904.11486, section 3).

    The maximum map has H-1 x W-1 sites; the blur pads it with one zero on each side.
    """
    tap = torch.tensor([0.25, 0.5, 0.25], dtype=dense.dtype, device=dense.device)
    kernel = repeat(tap[:, None] * tap, "y x -> c 1 y x", c=dense.shape[1])
    return F.conv2d(F.max_pool2d(dense, 2, stride=1), kernel, stride=2, padding=1, groups=dense.shape[1])


def choose_engine(engine: str, device: torch.device) -> str:
    """The engine that will run: `spconv` or `dense`. `auto` takes spconv wherever it works.

    Raises ValueError for an unknown name, and for `spconv` where it cannot work, with the reason.
    """
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; expected one of {', '.join(ENGINES)}.")
    if engine == "dense":
        return "dense"
    reason = spconv_failure(str(device))
    if reason is None:
        return "spconv"
    if engine == "spconv":
        raise ValueError(f"engine spconv cannot work here: {reason}; use --engine auto or dense.")
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
        error = (active.scatter(got.features, 4) - expected).abs().max() / expected.abs().max()
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
