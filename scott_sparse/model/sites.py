"""Which sites are active after a stride-2 layer? Those of the visible patches, and no others.

A plain strided sparse convolution would also activate every output whose window touches an active input, so visible
regions would bleed into hidden ones layer by layer. *Submanifold* means the active set never grows: with patches of P
pixels a stride-2 layer maps the P x P active sites of each visible patch to its (P/2) x (P/2), then (P/4) x (P/4) ...,
down to one site: the token. So the active set of every layer follows from the list of visible patches alone
(`ActivePatches`), and what a window reads beyond its patch follows from the patch's visible neighbours.
"""

import functools
import itertools

import torch
from einops import rearrange, repeat

from scott_sparse.shapes import Bool, Float, Int, Tensor

KERNEL = 7
PADDING = 3
BLOCKS = (-2, -1, 0, 1)  # a 7-wide window at 2o-3 .. 2o+3 touches the 2-wide blocks o-2 .. o+1
REACH = 2  # patches between a site and the farthest one that it reads, at two sites per patch


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

    @functools.cached_property
    def neighbours(self) -> Int[Tensor, "5 5 S"]:
        """Of each visible patch, those up to REACH rows and columns away, as rows among the visible patches.

        `neighbours[REACH + down, REACH + right]`; S where that patch is hidden or beyond the border.
        """
        h, w = self.grid
        device, wide = self.patch.device, w + 2 * REACH
        lookup = torch.full((len(self.visible), h + 2 * REACH, wide), len(self), device=device)
        at = (self.image * lookup.shape[1] + self.patch // w + REACH) * wide + self.patch % w + REACH
        lookup = lookup.flatten().index_copy(0, at, torch.arange(len(self), device=device))
        away = torch.arange(-REACH, REACH + 1, device=device)
        return lookup[at + (away[:, None] * wide + away)[..., None]]

    def rulebook(self, side: int) -> tuple[Int[Tensor, "2 k n"], Int[Tensor, " k"]]:
        """Pairs (input block, output site) for each of the 4x4 kernel positions at `side` output sites per patch.

        `pairs[0, k, :counts[k]]` are rows of the block features, `pairs[1, k, :counts[k]]` rows of the output.
        """
        if side not in self._rulebooks:
            self._rulebooks[side] = self._build_rulebook(side)
        return self._rulebooks[side]

    def _build_rulebook(self, side: int):
        """Affine in the patch: within a patch the sites of one kernel position fall into at most four neighbours."""
        device = self.patch.device

        @functools.cache
        def neighbours(away_y: int, away_x: int) -> tuple[Tensor, Tensor]:
            """First site of each visible patch with a visible neighbour there, and first site of that neighbour."""
            there = self.neighbours[REACH + away_y, REACH + away_x].int()
            here = (there < len(self)).nonzero()[:, 0]
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
