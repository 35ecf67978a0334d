"""Decode one picture to upright 8-bit RGB, or say in one line why it cannot be read.

Pixels are those that an image viewer shows: EXIF orientation is applied, transparency is composited over white, 16-bit
grey is scaled to 8 bits, and of an animation the first frame is taken.
"""

import contextlib
import functools
import hashlib
import io
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from scott_sparse.shapes import Tensor, UInt8

Picture = Path | io.BytesIO | Image.Image
# Formats of photo collections. Pillow knows others, some of which start a program (EPS) or fetch a URL.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PICTURE_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses more, and warns above half of it


class Unreadable(ValueError):
    """A picture cannot be read; the message is the reason in one line, without the path."""


@functools.cache
def prepare_pillow() -> tuple[str, ...]:
    """Load Pillow's format plugins, silence its warnings, and return those of FORMATS that this build reads.

    The warnings are about damaged EXIF blocks and large pictures. Both changes affect the whole process, and warning
    filters are not thread-safe: call this function before threads that decode are started.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def decode(picture: Picture, short_side: int) -> UInt8[Tensor, "h w 3"]:
    """Decode a picture; one whose shorter side exceeds `short_side` pixels is resized to it (bicubic, antialiased).

    Raises Unreadable if the picture is not an image that can be decoded from the first byte to the last.
    """
    formats = prepare_pillow()
    try:
        if isinstance(picture, Path):
            _check_file(picture)
        if not isinstance(picture, Image.Image):
            picture = Image.open(picture, formats=formats)
        with picture:
            return _upright_rgb(picture, short_side)
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PICTURE_PIXELS // 10**6} million pixels: a decompression bomb") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in one of the formats {', '.join(formats)}") from None
    except Exception as error:  # On arbitrary bytes Pillow raises nearly any exception; each is reported as the reason.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(" ".join(reason.split())[:200] or type(error).__name__) from None


def pixel_digest(pixels: np.ndarray) -> int:
    """64 bits (a signed integer) of a BLAKE2b hash of an image's pixels."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
    return int.from_bytes(digest[:8], signed=True)


def _check_file(path: Path) -> None:
    """Refuse what is not a regular file: reading a pipe or a device may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not a regular file")
    if status.st_size == 0:
        raise Unreadable("an empty file")


def _upright_rgb(image: Image.Image, short_side: int) -> UInt8[Tensor, "h w 3"]:
    image.draft("RGB", _shrunk_size(image.size, short_side))  # JPEG: decode at 1/2, 1/4 or 1/8, not below this size
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block: the orientation is unknown, the pixels are intact
        image = ImageOps.exif_transpose(image)
    image = _rgb(image)
    if min(image.size) > short_side:
        image = image.resize(_shrunk_size(image.size, short_side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def _shrunk_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(round(size[0] * scale), short_side), max(round(size[1] * scale), short_side)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise Unreadable("floating-point pixels have no stated range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise Unreadable(f"integer pixels from {values.min()} to {values.max()}, expected 0 to 65535")
        image = Image.fromarray((values / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
