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
    """Pixels of the image in a row of the store, (h, w, C) uint8."""
    rows: Int[Tensor, " n"]
    """Row of each image in the store."""
    sizes: Int[Tensor, "n 2"]
    """Height and width in pixels."""
    digests: Int[Tensor, " n"]
    """64 bits of a hash of each image's pixels; comparable between images decoded to the same short side."""
    labels: Int[Tensor, " n"] | None
    names: list[str]
    channels: int = 3

    @classmethod
    def of(
        cls, images: Sequence[UInt8[Tensor, "_ _ C"]] | UInt8[Tensor, "n _ _ C"], labels: Tensor | None = None
    ) -> "Images":
        """Images in memory: a list, or the rows of one tensor."""
        pixels = [image.numpy() for image in images]
        sizes = torch.tensor([image.shape[:2] for image in pixels])
        digests = torch.tensor([pixel_digest(image) for image in pixels])
        names = [str(i) for i in range(len(pixels))]
        channels = pixels[0].shape[2] if pixels else 3
        return cls(pixels.__getitem__, torch.arange(len(pixels)), sizes, digests, labels, names, channels)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Int[Tensor, " m"]) -> "Images":
        labels = None if self.labels is None else self.labels[indices]
        names = [self.names[i] for i in indices.tolist()]
        rows, sizes, digests = self.rows[indices], self.sizes[indices], self.digests[indices]
        return Images(self.read, rows, sizes, digests, labels, names, self.channels)

    def crop(self, indices: Int[Tensor, " B"], boxes: Int[Tensor, "B V 4"]) -> UInt8[Tensor, "B V H W C"]:
        """V boxes, (top, left, height, width) in pixels, of each of B images; padded below and right to the largest.

        Images are cropped before they are batched: one of 1 x 5000 pixels does not make the whole batch as wide.
        """
        H, W = boxes[..., 2:].amax((0, 1)).tolist()
        padded = torch.zeros(*boxes.shape[:2], H, W, self.channels, dtype=torch.uint8)
        for crops, row, image_boxes in zip(padded.numpy(), self.rows[indices].tolist(), boxes.tolist()):
            image = self.read(row)
            for crop, (top, left, height, width) in zip(crops, image_boxes):
                crop[:height, :width] = image[top : top + height, left : left + width]
        return padded


def evenly_spaced(total: int, count: int) -> Int[Tensor, " n"]:
    """`count` of the numbers 0 to total - 1, or all of them, the first and the last included."""
    return torch.linspace(0, total - 1, min(count, total)).long()


def channel_statistics(images: Images, count: int = 1000) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` of each channel, where values are 0 to 1, over the pixels of `count` evenly spaced images.

    A channel of one value gets the deviation of one step of 8 bits.
    """
    pixels, sums, squares = 0, np.zeros(images.channels), np.zeros(images.channels)
    for row in images.rows[evenly_spaced(len(images), count)].tolist():
        values = images.read(row).reshape(-1, images.channels).astype(np.float64) / 255
        pixels, sums, squares = pixels + len(values), sums + values.sum(0), squares + np.square(values).sum(0)
    mean = sums / pixels
    std = np.sqrt(np.maximum(squares / pixels - mean**2, 255**-2))
    return {name: tuple(round(value, 4) for value in of.tolist()) for name, of in (("mean", mean), ("std", std))}
