"""Which sites are active after a stride-2 layer? Those of the visible patches, and no others.

A plain strided sparse convolution also activates every output whose window touches an active input, so that visible
regions grow into hidden ones layer by layer. In a *submanifold* convolution (arXiv 1711.10275) the active set never
grows: with patches of P pixels, a stride-2 layer maps the P x P active sites of each visible patch to P/2 x P/2, the
next one to P/4 x P/4, down to one site, the token. The active sites of every layer therefore follow from the list of
visible patches alone, and what a window reads beyond its own patch follows from the neighbours of that patch.
"""

import torch
from einops import rearrange, repeat

from scott_sparse.shapes import Bool, Float, Int, Tensor


class ActiveSites:
    """The S visible patches of a batch in packed order (image by image, raster order), and their sites.

    `visible` is (B, N) with N = h * w patches; `image` and `patch`, both (S,), are the indices of its True entries.
    With `side` sites per patch and axis (P at the pixels, 1 at the tokens) there are S * side**2 active sites, ordered
    (patch, row, column). `count` is the number of visible patches of every image, if that is known: the indices are
    then found without waiting for a GPU, and shapes are static, for a compiler.
    """

    def __init__(self, visible: Bool[Tensor, "B N"], grid: tuple[int, int], count: int | None = None):
        assert visible.shape[1] == grid[0] * grid[1], f"{visible.shape[1]} patches do not fill a {grid} grid"
        self.visible, self.grid = visible, grid
        self._neighbours: dict[int, Tensor] = {}
        if count is None:
            self.image, self.patch = visible.nonzero(as_tuple=True)
        else:
            self.patch = visible_indices(visible, count).flatten()
            self.image = torch.arange(len(visible), device=visible.device).repeat_interleave(count)

    def __len__(self) -> int:
        return len(self.image)

    def dense_map(self, side: int) -> Bool[Tensor, "B 1 H W"]:
        """True at the active sites of a dense map with `side` sites per patch and axis."""
        h, w = self.grid
        return repeat(self.visible, "b (h w) -> b 1 (h p) (w q)", h=h, w=w, p=side, q=side)

    def gather(self, dense: Float[Tensor, "B C H W"]) -> Float[Tensor, "S s s C"]:
        """The active sites of a dense map, patch by patch."""
        h, w = self.grid
        patches = rearrange(dense, "b c (h p) (w q) -> (b h w) p q c", h=h, w=w)
        return patches[self.image * (h * w) + self.patch]

    def scatter(self, patches: Float[Tensor, "S s s C"]) -> Float[Tensor, "B C H W"]:
        """The dense map whose active sites are `patches`, with zeros elsewhere."""
        h, w = self.grid
        dense = patches.new_zeros(len(self.visible) * h * w, *patches.shape[1:])
        dense = dense.index_copy(0, self.image * (h * w) + self.patch, patches)
        return rearrange(dense, "(b h w) p q c -> b c (h p) (w q)", h=h, w=w)

    def neighbours(self, reach: int) -> Int[Tensor, "m m S"]:
        """Packed indices of the patches up to `reach` rows and columns away from each visible patch; m = 2 reach + 1.

        Entry [reach + down, reach + right] is S where that patch is hidden or beyond the border of the image.
        """
        if reach in self._neighbours:
            return self._neighbours[reach]
        h, w = self.grid
        device, width = self.patch.device, w + 2 * reach
        lookup = torch.full((len(self.visible), h + 2 * reach, width), len(self), device=device)
        at = (self.image * lookup.shape[1] + self.patch // w + reach) * width + self.patch % w + reach
        lookup = lookup.flatten().index_copy(0, at, torch.arange(len(self), device=device))
        offset = torch.arange(-reach, reach + 1, device=device)
        found = lookup[at + (offset[:, None] * width + offset)[..., None]]
        self._neighbours[reach] = found
        return found


def visible_indices(visible: Bool[Tensor, "B N"], count: int) -> Int[Tensor, "B n"]:
    """The indices of the True entries of each row, ascending; every row has `count` of them."""
    return visible.int().argsort(dim=1, descending=True, stable=True)[:, :count]


def complete_patches(
    indices: Int[Tensor, "n 3"], batch: int, grid: tuple[int, int], side: int
) -> tuple[ActiveSites, Int[Tensor, " n"]]:
    """The patches of side x side sites that the (image, row, column) of active sites make up, and the packed order.

    Raises ValueError for a site outside of the grid or named twice, and unless each patch has all of its sites or none.
    """
    h, w = grid
    image, row, column = indices.long().T
    if ((indices < 0) | (indices >= indices.new_tensor([batch, h * side, w * side]))).any():
        raise ValueError(f"an active site is outside of {batch} images of {h * side} x {w * side} sites.")
    patch = (image * h + row // side) * w + column // side
    site, order = ((patch * side + row % side) * side + column % side).sort()
    counts = patch.bincount(minlength=batch * h * w)
    if (site[1:] == site[:-1]).any() or not ((counts == 0) | (counts == side**2)).all():
        raise ValueError(f"{len(indices)} active sites do not fill patches; expected each of {side} x {side}, once.")
    return ActiveSites((counts > 0).view(batch, h * w), grid), order
