"""Decode one picture to upright 8-bit sRGB, or say in one line why it cannot be read.

Pixels are those that an image viewer shows: EXIF orientation and colour profile (ICC) are applied, transparency is
composited over white, and of an animation the first frame is taken. Values of more than 8 bits are scaled by the range
of the whole data set (`white_for`), so that its images stay comparable.
"""

import contextlib
import functools
import hashlib
import io
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageCms, ImageOps

from scott_sparse.data.readers import (
    FIRST_PAGE,
    MAX_PICTURE_PIXELS,
    SELECTED,
    SEVERAL_PAGES,
    DeepPixels,
    Picture,
    Selection,
    Unreadable,
    open_bands,
    open_picture,
    prepare_pillow,
)
from scott_sparse.shapes import Tensor, UInt8

BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners
SAME_COLOUR = 2  # a profile that changes no value of 0 to 255 by more is that of sRGB, in one of its many variants
ICC_SPACES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # what a profile says it is for, and Pillow's mode


def decode(
    picture: Picture,
    short_side: int,
    selection: Selection = FIRST_PAGE,
    *,
    find_white: Callable[[], int | float | None] = lambda: None,
    note: Callable[[str], object] = lambda text: None,
) -> UInt8[Tensor, "h w C"]:
    """Decode a picture; one whose shorter side exceeds `short_side` pixels is resized to it (bicubic, antialiased).

    Args:
        find_white: Called for a picture of more than 8 bits: which value becomes 255 (see `white_for`). Default: 65535;
            floating-point pixels have none.
        note: Called with what a user should know about how the picture was read.

    Raises Unreadable if the picture is not an image that can be decoded from the first byte to the last.
    """
    with _one_line_reasons():
        if not selection.as_colours:
            bands = open_bands(picture, selection)
            if bands.values.dtype != np.uint8:
                bands = bands._replace(values=_eight_bits(bands.values, find_white()))
            return _upright_bands(bands, short_side)
        image = open_picture(picture, selection)
        if isinstance(image, DeepPixels):
            image = _to_8_bits(image, find_white())
        with image:
            if image.info.get(SEVERAL_PAGES):
                note(f"page {selection.page} of TIFFs with several pages")
            return _upright_colours(image, short_side, selection)


def largest_value(picture: Picture, selection: Selection) -> int | float:
    """Largest value of a picture of more than 8 bits, or that its file says is possible; 0 for any other picture.
    An int, or a float of floating-point pixels.

    Of pictures of 8 bits only the header is read. Raises as `decode`.
    """
    with _one_line_reasons():
        if not selection.as_colours:
            bands = open_bands(picture, selection)
            return 0 if bands.values.dtype == np.uint8 else _largest(bands.values, bands.stated)
        image = open_picture(picture, selection)
        if isinstance(image, DeepPixels):
            colours = image.values[..., :3] if image.values.ndim == 3 else image.values
            return _largest(colours, image.stated)
        with image:
            return 0


def _largest(values: np.ndarray, stated: int) -> int | float:
    largest = values.max().item()
    return max(largest, type(largest)(stated))


def white_for(largest: int | float) -> int | float:
    """The value that becomes 255, from the largest of a data set, 0 to 65535.

    Of integers the largest of the smallest bit depth in use: 4095 for 4000. Of floating-point pixels, which have no bit
    depth, the smallest power of two: 1. for .9, 2. for 1.1; they start at 0 too.
    """
    if isinstance(largest, float):
        return 2.0 ** math.ceil(math.log2(largest)) if largest else 1.0
    return next(2**bits - 1 for bits in BIT_DEPTHS if largest < 2**bits)


def pixel_digest(pixels: np.ndarray) -> int:
    """64 bits (a signed integer) of a BLAKE2b hash of an image's pixels."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()
    return int.from_bytes(digest[:8], signed=True)


@contextlib.contextmanager
def _one_line_reasons() -> Iterator[None]:
    try:
        yield
    except Unreadable:
        raise
    except Image.DecompressionBombError:
        raise Unreadable(f"more than {MAX_PICTURE_PIXELS // 10**6} million pixels: a decompression bomb") from None
    except Image.UnidentifiedImageError:
        raise Unreadable(f"not an image in one of the formats {', '.join(prepare_pillow())}") from None
    except Exception as error:  # On arbitrary bytes Pillow raises nearly any exception; each is reported as the reason.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise Unreadable(" ".join(reason.split())[:200] or type(error).__name__) from None


def _to_8_bits(deep: DeepPixels, white: int | float | None) -> Image.Image:
    """Values of 0 to `white` as 0 to 255; alpha, which may use all 16 bits beside 12-bit colours, by itself."""
    pixels = _eight_bits(deep.values, white)
    pixels = 255 - pixels if deep.white_is_zero else pixels
    if pixels.ndim == 3 and pixels.shape[2] == 4:
        alpha = deep.values[..., 3]
        own, other = (1, white) if alpha.dtype.kind == "f" else (white or 65535, 65535)
        pixels[..., 3] = _eight_bits(alpha, own if alpha.max() <= own else other)
    image = Image.fromarray(pixels)
    image.info = deep.info
    return image


def _eight_bits(values: np.ndarray, white: int | float | None) -> np.ndarray:
    if values.dtype.kind == "f":
        if white is None:
            raise Unreadable("floating-point pixels are scaled by the range of their data set, not one by one")
        return np.minimum(values / white * 255 + 0.5, 255).astype(np.uint8)
    return np.minimum(np.arange(2**16) * 255 / (white or 65535) + 0.5, 255).astype(np.uint8)[values]


def _upright_bands(bands: DeepPixels, short_side: int) -> UInt8[Tensor, "h w C"]:
    """Bands of any meaning, each by itself, of 8 bits."""
    planes = []
    for values in np.moveaxis(bands.values, 2, 0):
        image = Image.fromarray(np.ascontiguousarray(255 - values if bands.white_is_zero else values))
        image.info = bands.info
        planes.append(np.array(_shrink(_upright(image), short_side)))
    return torch.from_numpy(np.stack(planes, 2))


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # a damaged EXIF block: the orientation is unknown, the pixels are intact
        image = ImageOps.exif_transpose(image)
    return image


def _shrink(image: Image.Image, short_side: int) -> Image.Image:
    if min(image.size) <= short_side:
        return image
    return image.resize(_shrunk_size(image.size, short_side), Image.Resampling.BICUBIC)


def _upright_colours(image: Image.Image, short_side: int, selection: Selection) -> UInt8[Tensor, "h w C"]:
    image.draft("RGB", _shrunk_size(image.size, short_side))  # JPEG: decode at 1/2, 1/4 or 1/8, not below this size
    image.load()
    image = _rgb(_upright(image), selection)
    if selection.channels == 1:
        image = image.convert("L")  # of a grey picture the same values
    pixels = torch.from_numpy(np.array(_shrink(image, short_side)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _shrunk_size(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    scale = short_side / min(size)
    return max(round(size[0] * scale), short_side), max(round(size[1] * scale), short_side)


def _rgb(image: Image.Image, selection: Selection) -> Image.Image:
    """sRGB over white, or the selected bands."""
    grey = image.mode in ("1", "L", "LA", "La")
    space = "CMYK" if image.mode == "CMYK" else "L" if grey else "RGB"
    profile = _srgb_transform(image.info.get("icc_profile") or b"")
    select = selection.bands and not image.info.get(SELECTED) and image.mode not in ("1", "L")
    alpha = None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
    if profile and (profile.mode == space or (profile.mode, space) == ("RGB", "L")):  # as in many grey photos
        rgb = profile.transform.apply(image.convert(profile.mode))
    else:
        rgb = image.convert("RGB")
    if select:
        planes = selection.of([*rgb.split()[: 1 if grey else 3], *([alpha] if alpha else [])])
        rgb, alpha = Image.merge("RGB", planes if len(planes) == 3 else 3 * planes), None
    if alpha:
        rgb.putalpha(alpha)
        rgb = Image.alpha_composite(Image.new("RGBA", rgb.size, "white"), rgb).convert("RGB")
    return rgb


class _Profile(NamedTuple):
    mode: str
    transform: ImageCms.ImageCmsTransform


@functools.lru_cache(32)
def _srgb_transform(profile: bytes) -> _Profile | None:
    """How to bring pixels with an ICC profile to sRGB; None if they are as in sRGB, or the profile is broken."""
    if not profile:
        return None
    try:
        source: Any = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        mode = ICC_SPACES[source.profile.xcolor_space.strip()]
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, KeyError):
        return None
    if mode != "CMYK":
        levels = np.linspace(0, 255, 18).round().astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(18, -1, 3)
        probe = Image.fromarray(cube if mode == "RGB" else cube[..., 0])
        changed, before = np.asarray(transform.apply(probe)), np.asarray(probe.convert("RGB"))
        change = np.subtract(changed, before, dtype=np.int16)
        if abs(change).max() <= SAME_COLOUR:
            return None
    return _Profile(mode, transform)
