"""Images of any sizes, read one at a time, and cropped before they are batched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from scott_sparse.data.decode import pixel_digest
from scott_sparse.shapes import Int, Tensor, UInt8


@dataclass(frozen=True)
class Images:
    """n images of any sizes, read one at a time."""

    read: Callable[[int], np.ndarray]
    """Pixels of the image in a row of the store, (h, w, 3) uint8."""
    rows: Int[Tensor, " n"]
    """Row of each image in the store."""
    sizes: Int[Tensor, "n 2"]
    """Height and width in pixels."""
    digests: Int[Tensor, " n"]
    """64 bits of a hash of each image's pixels; comparable between images decoded to the same short side."""
    labels: Int[Tensor, " n"] | None
    names: list[str]

    @classmethod
    def of(
        cls, images: Sequence[UInt8[Tensor, "_ _ 3"]] | UInt8[Tensor, "n _ _ 3"], labels: Tensor | None = None
    ) -> "Images":
        """Images in memory: a list, or the rows of one tensor."""
        pixels = [image.numpy() for image in images]
        sizes = torch.tensor([image.shape[:2] for image in pixels])
        digests = torch.tensor([pixel_digest(image) for image in pixels])
        names = [str(i) for i in range(len(pixels))]
        return cls(pixels.__getitem__, torch.arange(len(pixels)), sizes, digests, labels, names)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Int[Tensor, " m"]) -> "Images":
        labels = None if self.labels is None else self.labels[indices]
        names = [self.names[i] for i in indices.tolist()]
        return Images(self.read, self.rows[indices], self.sizes[indices], self.digests[indices], labels, names)

    def crop(self, indices: Int[Tensor, " B"], boxes: Int[Tensor, "B V 4"]) -> UInt8[Tensor, "B V H W 3"]:
        """V boxes, (top, left, height, width) in pixels, of each of B images; padded below and right to the largest.

        Images are cropped before they are batched: one of 1 x 5000 pixels does not make the whole batch as wide.
        """
        H, W = boxes[..., 2:].amax((0, 1)).tolist()
        padded = torch.zeros(*boxes.shape[:2], H, W, 3, dtype=torch.uint8)
        for crops, row, image_boxes in zip(padded.numpy(), self.rows[indices].tolist(), boxes.tolist()):
            image = self.read(row)
            for crop, (top, left, height, width) in zip(crops, image_boxes):
                crop[:height, :width] = image[top : top + height, left : left + width]
        return padded
