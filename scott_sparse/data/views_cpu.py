"""Views one by one and in bytes, with OpenCV: what a CPU wants, as a view then stays in its cache.

The same views as `views_gpu`, but that each operation rounds to bytes, as Pillow's do.
"""

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scott_sparse.data.views import BLUR_RADIUS, IDLE, IMAGENET_MEAN, IMAGENET_STD, Views
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8

cv2.setNumThreads(0)  # one small image at a time: threads would cost more than they save


def make_views(
    cuts: UInt8[Tensor, "B V H W 3"], views: Views, *, size: tuple[int, int]
) -> tuple[Float[Tensor, "B V 3 h w"], Float[Tensor, "B 3 h w"]]:
    """As `views.make_views`."""
    B, V = views.flip.shape
    context, target = torch.empty(B, V, 3, *size), torch.empty(B, 3, *size)
    extents, flips = views.boxes[..., 2:].tolist(), views.flip.tolist()
    ops, amounts = views.ops.tolist(), views.amounts.tolist()

    for b in range(B):
        for v in range(V):
            crop = _resize(cuts[b, v], extents[b][v], flips[b][v], size)
            _normalise(_colour(crop, ops[b][v][0], amounts[b][v][0]), out=context[b, v])
            if v == 0:
                _normalise(_colour(crop, ops[b][v][1], amounts[b][v][1]), out=target[b])
    return context, target


def resize(
    cuts: UInt8[Tensor, "B H W 3"],
    extents: Int[Tensor, "B 2"],
    flip: Bool[Tensor, " B"],
    *,
    size: tuple[int, int],
) -> Float[Tensor, "B 3 h w"]:
    """Resize each cut, (height, width) = `extents` at its top left, mirror where `flip`; normalised."""
    out = torch.empty(len(cuts), 3, *size)
    for view, cut, extent, mirror in zip(out, cuts, extents.tolist(), flip.tolist()):
        _normalise(_resize(cut, extent, mirror, size), out=view)
    return out


def _resize(cut: Tensor, extent: list[int], mirror: bool, size: tuple[int, int]) -> np.ndarray:
    height, width = extent
    image = cut[:height, :width].permute(2, 0, 1)[None]  # channels-last in memory, for which torch has a fast path
    image = F.interpolate(image, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0).numpy()
    return cv2.flip(image, 1) if mirror else image


def _normalise(image: np.ndarray, *, out: Tensor) -> None:
    """Bytes, (h, w, 3), to normalised planes; a table has the 256 values of each channel."""
    for plane, table, into in zip(cv2.split(image), NORMALISED, out.numpy()):
        cv2.LUT(plane, table, dst=into)


def _colour(image: np.ndarray, ops: list[int], amounts: list[float]) -> np.ndarray:
    for op, amount in zip(ops, amounts):
        if op != IDLE:
            image = KERNELS[op](image, amount)
    return image


def _brightness(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.convertScaleAbs(image, alpha=factor)


def _contrast(image: np.ndarray, factor: float) -> np.ndarray:
    mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0]
    levels = np.arange(256) * factor + (1 - factor) * mean
    return cv2.LUT(image, np.clip(levels + 0.5, 0, 255).astype(np.uint8))


def _grey(image: np.ndarray, _: float = 0.0) -> np.ndarray:
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def _saturation(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.addWeighted(image, factor, _grey(image), 1 - factor, 0)


def _hue(image: np.ndarray, turn: float) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # 256 hues, as Pillow's
    hsv[..., 0] += np.uint8(round(256 * turn) % 256)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    side = 2 * BLUR_RADIUS + 1
    return cv2.GaussianBlur(image, (side, side), sigma, borderType=cv2.BORDER_REFLECT_101)


KERNELS = (_brightness, _contrast, _saturation, _hue, _grey, _blur)  # in the order of OPS
_LEVELS = np.arange(256, dtype=np.float32) / 255
NORMALISED = [(_LEVELS - mean) / std for mean, std in zip(IMAGENET_MEAN, IMAGENET_STD)]
