"""Fixed crops of an image: the centre, or eight whose features are averaged.

The mean over several views describes an image better than one view, as each is a sample of what training saw. The eight
are the four corners and their mirror images, as in torchvision's TenCrop without the centre; other layouts of the same
cost were no better (benchmarks/EVIDENCE.md).
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from scott_sparse.shapes import Bool, Float, Int, Tensor

CORNER_SIDE = 0.7  # of a corner crop, as a share of the largest box


def fixed_crops(
    sizes: Int[Tensor, "B 2"], *, size: tuple[int, int], crops: int = 1
) -> tuple[Int[Tensor, "B V 4"], Bool[Tensor, " V"]]:
    """V = `crops` boxes (top, left, height, width) in images of (height, width) = `sizes`, and which to mirror.

    1: the largest centred box of the aspect ratio of `size`. 8: boxes of `CORNER_SIDE` times its side in the corners of
    the image, twice, the second time mirrored. Raises ValueError for another number.
    """
    if crops not in (1, 8):
        raise ValueError(f"crops is {crops}; expected 1, the centre crop, or 8, the corners and their mirror images.")
    aspect, side = torch.tensor(size), 1.0 if crops == 1 else CORNER_SIDE
    scale = side * (sizes / aspect).amin(1, keepdim=True)
    extents = torch.minimum((scale * aspect).round().long().clamp(min=1), sizes)
    slack = sizes - extents
    corners = [slack * torch.tensor(corner) for corner in itertools.product((0, 1), repeat=2)]
    places = [slack // 2] if crops == 1 else [*corners, *corners]
    return torch.stack([torch.cat([place, extents], 1) for place in places], 1), torch.arange(crops) >= 4


def cut_crops(
    images: Float[Tensor, "B C H W"], *, size: tuple[int, int], crops: int = 1
) -> Iterator[Float[Tensor, "B C h w"]]:
    """The fixed crops of a batch of images, one after the other, resized to `size` = (h, w)."""
    boxes, mirrored = fixed_crops(torch.tensor([images.shape[2:]]), size=size, crops=crops)
    for (top, left, height, width), mirror in zip(boxes[0].tolist(), mirrored.tolist()):
        crop = images[:, :, top : top + height, left : left + width]
        if (height, width) != size:
            crop = F.interpolate(crop, size, mode="bicubic", antialias=True)
        yield crop.flip(3) if mirror else crop
