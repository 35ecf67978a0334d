"""One picture in, upright 8-bit RGB out, or a plain reason why not.

What a viewer shows is what is read: EXIF orientation is applied, transparency lies over white, 16-bit grey is scaled,
of an animation the first frame counts.
"""

import contextlib
import errno
import io
import stat
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from scott_sparse.shapes import Tensor, UInt8

# What collections of photos hold. Pillow knows others, some of which start a program (EPS) or fetch what they name.
Image.init()
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
FORMATS = [name for name in FORMATS if name in Image.OPEN]
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS  # Pillow refuses more, and warns from half of it on

# Of damaged EXIF blocks and large pictures. Not around each call: warning filters are shared by all threads.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(ValueError):
    """A picture that cannot be read; the message is the reason, one line without the path."""


def decode(picture: Path | io.BytesIO | Image.Image, short_side: int) -> UInt8[Tensor, "h w 3"]:
    """Read a picture; a shorter side above `short_side` pixels is shrunk to it (bicubic, antialiased).

    Raises:
        Unreadable: for whatever is not an image that can be read from the first byte to the last.
    """
    try:
        if isinstance(picture, Path):
            _check_file(picture)
        if not isinstance(picture, Image.Image):
            picture = Image.open(picture, formats=FORMATS)
        with picture:
            return _upright_rgb(picture, short_side)
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MOST_PIXELS // 10**6} million pixels: a decompression bomb") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except Exception as error:  # On arbitrary bytes Pillow raises nearly anything; all of it is listed, none lost.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(" ".join(reason.split())[:200] or type(error).__name__) from None


def _check_file(path: Path) -> None:
    """A pipe or a device would be waited for without end."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise Unreadable("no such file, or a link to none") from None
    except OSError as error:
        raise Unreadable("a link to itself" if error.errno == errno.ELOOP else error.strerror) from None
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not a regular file")
    if status.st_size == 0:
        raise Unreadable("an empty file")


def _upright_rgb(image: Image.Image, short_side: int) -> UInt8[Tensor, "h w 3"]:
    image.draft("RGB", _at_least(image.size, short_side))  # JPEG: decode at 1/2, 1/4 or 1/8, not below this size
    image.load()
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing of the orientation; the pixels are whole
        image = ImageOps.exif_transpose(image)
    image = _rgb(image)
    if min(image.size) > short_side:
        image = image.resize(_at_least(image.size, short_side), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def _at_least(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return tuple(max(round(side * scale), short_side) for side in size)


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
