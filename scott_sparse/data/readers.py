"""Open one picture with the reader that has all of its bands and bits: Pillow, its plugins, or tifffile.

Where a picture holds more than one image, nothing is mixed or guessed: a band beyond the colours is alpha only if the
file says so, other bands are chosen by `Selection`. Values of more than 8 bits are returned as they are in the file,
since Pillow would keep one byte of each.
"""

import contextlib
import functools
import importlib.metadata
import io
import logging
import math
import stat
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile

Picture = Path | io.BytesIO | Image.Image
# Formats of photo collections. Pillow knows others, some of which start a program (EPS) or fetch a URL.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "HEIF", "JXL")
PACKAGES = ("pillow", "pillow-heif", "pillow-jxl-plugin", "tifffile", "imagecodecs")
MAX_PICTURE_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses more, and warns above half of it
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# TIFF tags, then values of PhotometricInterpretation, PlanarConfiguration and ExtraSamples
BITS_PER_SAMPLE, PHOTOMETRIC, ORIENTATION, MAX_SAMPLE, PLANAR, EXTRA_SAMPLES, S_MAX_SAMPLE, ICC_PROFILE = (
    *(258, 262, 274, 281, 284, 338, 341, 34675),
)
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB = 0, 1, 2
SEPARATE_PLANES = 2
UNSPECIFIED, UNASSOCIATED_ALPHA = 0, 2
MAX_CHANNELS = 1024


SELECTED, SEVERAL_PAGES = "bands are selected", "TIFF with several pages"  # truth values in `Image.info`


class Unreadable(ValueError):
    """A picture cannot be read; the message is the reason in one line, without the path."""


@dataclass(frozen=True)
class Selection:
    """What to read of a picture that holds more than one image. Fields are those of `DataConfig`."""

    page: int = 0
    bands: tuple[int, ...] = ()
    channels: int = 3

    def __post_init__(self):
        if self.page < 0:
            raise ValueError(f"--page {self.page}: pages are numbered from 0.")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ValueError(f"--channels {self.channels} is outside 1 to {MAX_CHANNELS}.")
        if len(self.bands) not in (0, 1 if self.channels == 3 else 0, self.channels) or min(self.bands, default=0) < 0:
            bands = " ".join(map(str, self.bands))
            if self.channels != 3:
                raise ValueError(f"--bands {bands}: expected {self.channels} (--channels), numbered from 0.")
            raise ValueError(f"--bands {bands}: expected one band (grey) or three (as RGB), numbered from 0.")

    @property
    def as_colours(self) -> bool:
        """Whether pictures are read as grey or RGB, not as bands of any meaning."""
        return self.channels in (1, 3)

    def of(self, planes: list) -> list:
        """The selected ones of a picture's bands."""
        if max(self.bands) >= len(planes):
            raise Unreadable(f"no band {max(self.bands)} (--bands) among its {len(planes)}, which are numbered from 0")
        return [planes[band] for band in self.bands]


FIRST_PAGE = Selection()


class DeepPixels(NamedTuple):
    """Values of more than 8 bits; how many of them are used, a file rarely says."""

    values: np.ndarray
    """uint16 or float32; (h, w), (h, w, 3), or (h, w, 4) where the last band is alpha."""
    stated: int
    """The largest value that the file says is possible, or 0."""
    white_is_zero: bool
    info: dict[Any, Any]
    """EXIF data, colour profile and more, as in `Image.info`."""


@functools.cache
def prepare_pillow() -> tuple[str, ...]:
    """Load Pillow's format plugins, silence warnings, and return those of FORMATS that can be read here.

    The warnings are about damaged metadata and large pictures. Both changes affect the whole process, and warning
    filters are not thread-safe: call this function before threads that decode are started.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    for reader in ("PIL", "tifffile"):
        logging.getLogger(reader).setLevel(logging.CRITICAL)
    Image.init()
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener(thumbnails=False)
    with contextlib.suppress(ImportError):
        import pillow_jxl  # noqa: F401 - registers itself
    return tuple(name for name in FORMATS if name in Image.OPEN)


def reader_versions() -> dict[str, str]:
    """Versions of the installed packages on which pixels depend."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@functools.cache
def picture_extensions() -> frozenset[str]:
    """Extensions (".jpg") of the formats that can be read here."""
    formats = prepare_pillow()
    return frozenset(extension for extension, name in Image.registered_extensions().items() if name in formats)


def is_picture_file(path: Path) -> bool:
    """Whether a file is to be decoded, by its extension or, without one, by its first bytes."""
    if path.suffix:
        return path.suffix.lower() in picture_extensions()
    if not path.is_file():  # reading a pipe would never end
        return False
    try:
        prefix = _first_bytes(path, 16)
    except OSError:  # may not be opened
        return False
    accepts = (Image.OPEN[name][1] for name in prepare_pillow())
    return any(accept is not None and accept(prefix) is True for accept in accepts)


def open_picture(picture: Picture, selection: Selection) -> Image.Image | DeepPixels:
    """The selected page: an image of 8-bit bands, not yet loaded, or the values of more bits.

    Raises Unreadable, or nearly any exception on a damaged file.
    """
    if isinstance(picture, Image.Image):
        return picture if not picture.mode.startswith(("I", "F")) else _deep(np.asarray(picture), {}, {})
    if isinstance(picture, Path):
        _check_file(picture)
    try:
        image = _open_page(picture, selection)
    except Image.UnidentifiedImageError:
        if _first_bytes(picture, 4) not in TIFF_MAGIC:
            raise
        return _open_tiff(picture, selection)
    tags = getattr(image, "tag_v2", {})
    planar_16_bit = tags.get(PLANAR) == SEPARATE_PLANES and max(tags[BITS_PER_SAMPLE]) == 16
    if UNSPECIFIED in tags.get(EXTRA_SAMPLES, ()) or planar_16_bit:  # Pillow would drop the band, or misread the planes
        with image:  # closes a file, not bytes
            return _open_tiff(picture, selection)
    undecided = selection.as_colours and not selection.bands
    if image.mode in ("LA", "RGBA") and undecided and not _has_alpha(image, tags, picture):
        raise Unreadable(_choose_bands(len(image.getbands())))
    rawmode = _rawmode(image)
    if image.mode.startswith(("I", "F")):
        with image:
            return _deep(np.asarray(image), tags, image.info)
    if rawmode.split(";16")[0] in ("RGB", "RGBA", "LA") and ";16" in rawmode:
        with image:
            return _deep(_both_bytes(image, picture, selection, rawmode), tags, image.info)
    return image


def _check_file(path: Path) -> None:
    """Refuse what is not a regular file: reading a pipe or a device may never end."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise Unreadable("not a regular file")
    if status.st_size == 0:
        raise Unreadable("an empty file")


def _first_bytes(picture: Path | io.BytesIO, count: int) -> bytes:
    if isinstance(picture, io.BytesIO):
        return picture.getvalue()[:count]
    with picture.open("rb") as file:
        return file.read(count)


def _open_page(picture: Path | io.BytesIO, selection: Selection) -> ImageFile.ImageFile:
    image: Any = Image.open(picture, formats=prepare_pillow())
    if selection.page and getattr(image, "is_animated", False):  # a photo among TIFFs of several pages has but one
        try:
            image.seek(selection.page)
        except EOFError:
            raise Unreadable(_no_page(selection.page)) from None
    image.info[SEVERAL_PAGES] = image.format == "TIFF" and image.is_animated
    return image


def _no_page(number: int) -> str:
    return f"no page {number} (--page); pages are numbered from 0"


def _choose_bands(count: int) -> str:
    return f"{count} bands, not grey, RGB or with alpha as the file says: name one or three, as in --bands 0 1 2"


def _has_alpha(image: Image.Image, tags: Any, picture: Path | io.BytesIO) -> bool:
    """Whether the file says that its last band is alpha; of the formats here, two may hold any four bands."""
    if image.format == "TIFF":
        return bool(tags.get(EXTRA_SAMPLES))
    if image.format == "JPEG2000":  # the box cdef: a count, then number, type and association of each channel
        header = _first_bytes(picture, 2**16).partition(b"jp2c")[0]
        definitions = np.frombuffer(header.partition(b"cdef")[2][2 : 2 + 6 * len(image.getbands())], ">u2")
        return bool(np.isin(definitions[1::3], (1, 2)).any())
    return True


def _rawmode(image: ImageFile.ImageFile) -> str:
    """How Pillow's decoder finds the pixels in the file, as in "RGB;16B": here big-endian values of 16 bits."""
    arguments = image.tile[0].args if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _both_bytes(
    image: ImageFile.ImageFile, picture: Path | io.BytesIO, selection: Selection, rawmode: str
) -> np.ndarray:
    """16-bit colours, of which Pillow keeps one byte: read again in the other byte order, the file gives the second."""

    def read_as(rawmode: str) -> np.ndarray:
        with _open_page(picture, selection) as again:
            tile = again.tile[0]
            rest = tile.args[1:] if isinstance(tile.args, tuple) else None
            again.tile = [part._replace(args=rawmode if rest is None else (rawmode, *rest)) for part in again.tile]
            return np.asarray(again).astype(np.uint16)

    if rawmode == "LA;16B":
        grey, grey_low, alpha, alpha_low = np.moveaxis(read_as("RGBA"), 2, 0)
        return np.stack([*[grey << 8 | grey_low] * 3, alpha << 8 | alpha_low], 2)
    little = rawmode.endswith("L") or (rawmode.endswith("N") and sys.byteorder == "little")
    return np.asarray(image).astype(np.uint16) << 8 | read_as(rawmode[:-1] + ("B" if little else "L"))


def _deep(values: np.ndarray, tags: Any, info: dict[Any, Any]) -> DeepPixels:
    kind, dtype = ("floating-point", np.float32) if values.dtype.kind == "f" else ("integer", np.uint16)
    low, high = values.min().item(), values.max().item()
    if not (low >= 0 and high <= 65535):  # nor NaN
        raise Unreadable(f"{kind} pixels from {low} to {high}, expected 0 to 65535")
    stated = [*np.ravel(tags.get(MAX_SAMPLE, 0)), *np.ravel(tags.get(S_MAX_SAMPLE, 0))]
    stated += [2 ** int(bits) - 1 for bits in np.ravel(tags.get(BITS_PER_SAMPLE, 0))]
    largest = int(max((value for value in stated if value < 65535), default=0))  # 65535 is what writers put by default
    info = {key: value for key, value in info.items() if key != "transparency"}
    return DeepPixels(values.astype(dtype), largest, tags.get(PHOTOMETRIC) == WHITE_IS_ZERO, info)


def open_bands(picture: Picture, selection: Selection) -> DeepPixels:
    """All bands of a picture, or the selected ones, as they are in the file, alpha included: (h, w, C) in 8 or 16 bits.

    Raises Unreadable unless there are as many as `selection.channels`, and as `open_picture`.
    """
    if not isinstance(picture, Image.Image) and _first_bytes(picture, 4) in TIFF_MAGIC:
        if isinstance(picture, Path):
            _check_file(picture)
        with _tiff_file(picture) as file:
            first = _tiff_page(file, selection.page if len(file.pages) > 1 else 0)
            if first.samplesperpixel == 1 and len(file.pages) > 1:  # a stack
                wanted = selection.bands or range(selection.channels)
                if max(wanted) >= len(file.pages) or (not selection.bands and len(file.pages) != selection.channels):
                    raise Unreadable(_other_bands(len(file.pages), selection))
                parts = [_tiff_page(file, number) for number in wanted]
                if any(page.shape != first.shape or page.dtype != first.dtype for page in parts):
                    raise Unreadable("pages of different sizes or types, expected a stack of bands")
                planes = [page.asarray() for page in parts]
            else:
                planes = _planes(first)
                planes = selection.of(planes) if selection.bands else planes
            tags, info = _tiff_tags(first)
    else:
        image = open_picture(picture, selection)
        if isinstance(image, Image.Image):
            with image:
                values = np.asarray(image.convert("RGB") if image.mode == "P" else image)
            tags, info = {}, image.info
        else:
            values, tags, info = image.values, {}, image.info
        planes = [values] if values.ndim == 2 else list(np.moveaxis(values, 2, 0))
        planes = selection.of(planes) if selection.bands else planes
    if len(planes) != selection.channels:
        raise Unreadable(_other_bands(len(planes), selection))
    values = np.stack(planes, 2)
    return DeepPixels(values, 0, False, info) if values.dtype == np.uint8 else _deep(values, tags, info)


def _other_bands(count: int, selection: Selection) -> str:
    return f"{count} bands, expected {selection.channels} (--channels); name as many with --bands"


def _tiff_file(picture: Path | io.BytesIO) -> Any:
    try:
        import tifffile
    except ImportError:
        raise Unreadable("a TIFF of more bands than Pillow reads: pip install 'scott-sparse[formats]'") from None
    if isinstance(picture, io.BytesIO):
        picture.seek(0)
    return tifffile.TiffFile(picture)


def _tiff_page(file: Any, number: int) -> Any:
    """A page of pixels that can be read, not yet decoded."""
    if number >= len(file.pages):
        raise Unreadable(_no_page(number))
    page = file.pages[number].aspage()
    if page.imagewidth * page.imagelength > MAX_PICTURE_PIXELS:
        raise Image.DecompressionBombError
    if getattr(page.dtype, "kind", "") not in ("u", "i", "f") or page.ndim != min(page.samplesperpixel, 2) + 1:
        raise Unreadable(f"pixels of type {page.dtype} and shape {page.shape}, expected integers or floats")
    if len(page.dataoffsets) < math.prod(page.chunked):  # tifffile would make up millions of strips
        raise Unreadable("damaged: the file has fewer strips or tiles of pixels than it says")
    return page


def _planes(page: Any) -> list[np.ndarray]:
    """The bands of a page."""
    values = page.asarray()
    if page.samplesperpixel == 1:
        return [values]
    return list(values if page.planarconfig == SEPARATE_PLANES else np.moveaxis(values, 2, 0))


def _tiff_tags(page: Any) -> tuple[dict[int, Any], dict[Any, Any]]:
    """The tags of a page, and what of them `Image.info` would hold."""
    tags, exif = {tag.code: tag.value for tag in page.tags}, Image.Exif()
    exif[ORIENTATION] = tags.get(ORIENTATION, 1)
    return tags, {"exif": exif.tobytes(), "icc_profile": tags.get(ICC_PROFILE)}


def _open_tiff(picture: Path | io.BytesIO, selection: Selection) -> Image.Image | DeepPixels:
    """A TIFF that Pillow does not read: more bands than colours and alpha, 16-bit planes, rare kinds of grey."""
    with _tiff_file(picture) as file:
        pages = len(file.pages)
        page = _tiff_page(file, selection.page if pages > 1 else 0)
        count = page.samplesperpixel
        if (page.photometric, count, *page.extrasamples) not in _COLOURS and not (count > 1 and selection.bands):
            raise Unreadable(_choose_bands(count) if count > 1 else f"a TIFF of colours {page.photometric}")
        planes, (tags, info) = _planes(page), _tiff_tags(page)
    planes = selection.of(planes) if count > 1 and selection.bands else planes
    values = planes[0] if len(planes) == 1 else np.stack(planes, 2)
    info |= {SELECTED: bool(selection.bands), SEVERAL_PAGES: pages > 1}
    if values.dtype != np.uint8:
        return _deep(values, tags, info)
    image = Image.fromarray(255 - values if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO else values)
    image.info = info
    return image


# What a TIFF says of its bands that needs no choice: photometric interpretation, number of bands, extra samples
_COLOURS = ((WHITE_IS_ZERO, 1), (BLACK_IS_ZERO, 1), (RGB, 3), (RGB, 4, UNASSOCIATED_ALPHA))
