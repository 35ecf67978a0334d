"""Do the colours of images go with their shapes? Measured without labels or training, for `--colour auto`.

Where colours tell what an image shows (fruit, stains, crops in a field), images of similar shapes are also more similar
in colour than any two images are. Where colours are drawn independently of it (dyes, paint, light), they are not; an
encoder then learns more if no crop keeps its colours, by which crops of an image are found without any other feature.

Shapes are compared by histograms of oriented gradients of the grey image (Dalal and Triggs, CVPR 2005), which depend
neither on hue nor on which side of an edge is brighter, and colours by histograms of hue, weighted by chroma. Checked
on sets whose answer is known: benchmarks/EVIDENCE.md.
"""

from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scott_sparse.data.images import Images, evenly_spaced
from scott_sparse.data.views import ViewConfig
from scott_sparse.shapes import Float, Tensor, UInt8

MIN_IMAGES, MAX_IMAGES = 100, 3000
NEIGHBOURS = 5
SIDE, CELL = 64, 16  # pixels
ANGLES, HUES = 9, 12  # bins
INDEPENDENT = 0.53  # agreement, with twice its error, below which there is none (benchmarks/EVIDENCE.md)


@dataclass(frozen=True)
class ColourAgreement:
    """How similar in colour images of similar shapes are."""

    mean: float
    """Share of all images, 0 to 1, that are less similar to an image in colour than one of its five nearest by shape
    is; mean over images and neighbours. 0.5 if colours and shapes are independent."""
    error: float
    """Standard error of the mean over images."""
    images: int
    """How many images were compared."""

    @property
    def independent(self) -> bool:
        """Whether colours say nothing of shapes. False also for grey images, and if there are too few to tell."""
        return self.images >= MIN_IMAGES and self.error > 0 and self.mean + 2 * self.error < INDEPENDENT

    def __str__(self) -> str:
        if not self.error:  # no hues to compare
            return "grey images"
        percent = f"{100 * self.mean:.1f} ± {100 * self.error:.1f} %"
        return f"images of similar shapes are closer in colour than {percent} of all pairs (chance 50 %)"


def choose_colours(config: ViewConfig, images: Images) -> tuple[ViewConfig, str]:
    """A config in which `colour` auto is a number, and one line for the user that says why ("" if it was a number)."""
    if config.colour != "auto":
        return config, ""
    ignore, why = False, "grey images" if images.channels == 1 else f"images of {images.channels} channels"
    if images.channels == 3:
        agreement = colour_agreement(images)
        ignore, why = agreement.independent, str(agreement)
    config = config.decided(ignore_colours=ignore)
    kept = f"{config.plain_crops} of {config.crops}" if config.plain_crops else "none"
    return config, f"--colour auto: {why}; crops that keep their colours: {kept}"


def colour_agreement(images: Images) -> ColourAgreement:
    """Compare evenly spaced images, at most `MAX_IMAGES`; about two seconds on one core.

    Raises ValueError unless the images have three channels.
    """
    if images.channels != 3:
        raise ValueError(f"hues need images of 3 channels, not {images.channels}.")
    rows = images.rows[evenly_spaced(len(images), MAX_IMAGES)].tolist()
    pictures = [cv2.resize(images.read(row), (SIDE, SIDE), interpolation=cv2.INTER_AREA) for row in rows]
    shapes = torch.stack([_gradients(picture) for picture in pictures])
    colours = torch.stack([_hues(picture) for picture in pictures])
    by_shape, by_colour = _similarity(shapes - shapes.mean(0)), _similarity(colours)
    neighbours = by_shape.topk(min(NEIGHBOURS, len(rows) - 1)).indices
    others, theirs = by_colour.sort().values[:, 1:].contiguous(), by_colour.gather(1, neighbours)
    less, up_to = (torch.searchsorted(others, theirs, right=ties) for ties in (False, True))
    rank = (less + up_to) / 2
    share = rank.mean(1) / others.shape[1]
    return ColourAgreement(share.mean().item(), share.std().item() / len(rows) ** 0.5, len(rows))


def _gradients(picture: UInt8[np.ndarray, "H W C"]) -> Float[Tensor, " d"]:
    """Square roots of a histogram of the directions of edges, without sign, for each cell; weighted by contrast."""
    grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY).astype(np.float32)
    contrast, angle = cv2.cartToPolar(cv2.Sobel(grey, cv2.CV_32F, 1, 0), cv2.Sobel(grey, cv2.CV_32F, 0, 1))
    direction = (angle % np.pi / np.pi * ANGLES).astype(int).clip(0, ANGLES - 1)
    cell = np.arange(SIDE) // CELL
    bins = (cell[:, None] * (SIDE // CELL) + cell) * ANGLES + direction
    return _histogram(bins, contrast, ANGLES * (SIDE // CELL) ** 2)


def _hues(picture: UInt8[np.ndarray, "H W C"]) -> Float[Tensor, " d"]:
    """Square roots of a histogram of hues, weighted by chroma, and of what is grey."""
    hue, saturation, value = cv2.split(cv2.cvtColor(picture, cv2.COLOR_RGB2HSV_FULL) / np.float32(255))
    chroma = saturation * value
    bins = (hue * HUES).astype(int).clip(0, HUES - 1)
    return _histogram(np.stack([bins, np.full_like(bins, HUES)]), np.stack([chroma, 1 - chroma]), HUES + 1)


def _histogram(bins: np.ndarray, weights: np.ndarray, count: int) -> Float[Tensor, " d"]:
    return torch.from_numpy(np.bincount(bins.ravel(), weights.ravel(), count)).float().sqrt()


def _similarity(x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """Cosine similarities of all pairs; with itself each has the lowest, -2."""
    x = F.normalize(x, dim=-1)
    return (x @ x.T).fill_diagonal_(-2)
