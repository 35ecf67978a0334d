"""Views one image at a time and in bytes, with OpenCV, which is several times faster on a CPU than `views_gpu`.

The views are those of `views_gpu`, except that each operation rounds to bytes, as Pillow's operations do.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from scott_sparse.data.views import BLUR_RADIUS, IDLE, OPS
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8


def resize(
    crops: UInt8[Tensor, "B H W C"], extents: Int[Tensor, "B 2"], flip: Bool[Tensor, " B"], *, size: tuple[int, int]
) -> UInt8[Tensor, "B h w C"]:
    """Resize each crop, (height, width) = `extents` at its top left, to `size` and mirror it where `flip`."""
    images = torch.empty(len(crops), *size, crops.shape[-1], dtype=torch.uint8)
    for image, crop, (height, width), mirror in zip(images, crops, extents.tolist(), flip.tolist()):
        crop = crop[:height, :width].permute(2, 0, 1)[None]  # channels-last in memory, for which torch has a fast path
        view = F.interpolate(crop, size, mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        image.copy_(view.flip(1) if mirror else view)
    return images


def colour(
    images: UInt8[Tensor, "N h w C"], *, ops: Int[Tensor, "N S"], amounts: Float[Tensor, "N S"]
) -> UInt8[Tensor, "N h w C"]:
    """Apply colour operations, `ops` and `amounts` as in `Views`, in place."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # starting threads costs more than they save on a small image
    for view, view_ops, view_amounts in zip(images.numpy(), ops.tolist(), amounts.tolist()):
        image = view
        for op, amount in zip(view_ops, view_amounts):
            if op != IDLE:
                image = _apply(OPS[op], image, amount).reshape(view.shape)  # OpenCV drops an axis of one channel
        view[:] = image
    cv2.setNumThreads(threads)
    return images


def normalise(
    images: UInt8[Tensor, "N h w C"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "N C h w"]:
    """Values of 0 to 1 minus `mean` by `std`; a table holds the 256 values of each channel."""
    levels = np.arange(256, dtype=np.float32) / 255
    tables = [(levels - m) / s for m, s in zip(mean, std, strict=True)]
    out = torch.empty(len(images), images.shape[3], *images.shape[1:3])
    for image, into in zip(images.numpy(), out.numpy()):
        for channel, table, plane in zip(cv2.split(image), tables, into, strict=True):
            cv2.LUT(channel, table, dst=plane)
    return out


def _apply(op: str, image: np.ndarray, amount: float) -> np.ndarray:
    match op:
        case "brightness":
            return cv2.convertScaleAbs(image, alpha=amount)
        case "contrast":
            mean = cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] if image.shape[2] == 3 else image.mean()
            levels = np.arange(256) * amount + (1 - amount) * mean
            return cv2.LUT(image, np.clip(levels + 0.5, 0, 255).astype(np.uint8))
        case "saturation":
            return cv2.addWeighted(image, amount, _apply("grey", image, 0.0), 1 - amount, 0)
        case "hue":
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # 256 hues, as in Pillow
            hsv[..., 0] += np.uint8(round(256 * amount) % 256)
            return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
        case "grey":
            return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
        case _:
            side = 2 * BLUR_RADIUS + 1
            return cv2.GaussianBlur(image, (side, side), amount, borderType=cv2.BORDER_REFLECT_101)
