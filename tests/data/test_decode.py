"""Pictures of many formats are decoded correctly; damaged ones are refused with a reason in one line."""

import io
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, features

from scott_sparse.data.cache import decode_once
from scott_sparse.data.decode import Unreadable, decode, prepare_pillow
from scott_sparse.data.sources import folder_source

H, W = 24, 36


def ramp(channels=3):
    """Smooth, so that JPEG keeps it, and different in every corner and channel."""
    y, x = np.mgrid[0:H, 0:W]
    planes = [7 * x, 10 * y, 3 * x + 5 * y, 255 - 7 * x][:channels]
    return np.stack(planes, -1).clip(0, 255).astype(np.uint8)


def encoded(image, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, **options)
    return out.getvalue()


def decoded(data: bytes, short_side=256):
    image = decode(io.BytesIO(data), short_side)
    assert image.dtype == torch.uint8 and image.shape[2] == 3
    return image.numpy().astype(int)


RGB = Image.fromarray(ramp())


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"format": "PNG"}, 0),
        ({"format": "BMP"}, 0),
        ({"format": "TIFF", "compression": "tiff_lzw"}, 0),
        ({"format": "PPM"}, 0),
        ({"format": "WEBP", "lossless": True}, 0),
        ({"format": "JPEG", "quality": 95}, 9),
        ({"format": "JPEG", "quality": 95, "progressive": True}, 9),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_formats(options, tolerance):
    assert abs(decoded(encoded(RGB, **options)) - ramp()).max() <= tolerance


def test_grey_and_one_bit():
    grey = ramp()[..., 0]
    assert (decoded(encoded(Image.fromarray(grey), format="PNG")) == grey[..., None]).all()
    bits = Image.fromarray(grey > 100)
    assert bits.mode == "1"
    assert (decoded(encoded(bits, format="PNG")) == 255 * (grey > 100)[..., None]).all()


def test_sixteen_bit_grey_is_scaled_not_clipped():
    grey = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    for format in ("PNG", "TIFF"):
        out = decoded(encoded(Image.fromarray(grey), format=format))
        assert abs(out - np.rint(grey / 257)[..., None]).max() == 0


def test_numbers_without_a_range_are_refused():
    for values, reason in (
        (np.full((4, 4), 0.5, np.float32), "floating-point"),
        (np.full((4, 4), 70000, np.int32), "integer pixels from 70000 to 70000"),
        (np.full((4, 4), -1, np.int32), "integer pixels from -1"),
    ):
        with pytest.raises(Unreadable, match=reason):
            decoded(encoded(Image.fromarray(values), format="TIFF"))


def test_cmyk():
    """Full cyan has no red. Also in Adobe's JPEGs, whose values are inverted."""
    cyan = Image.new("CMYK", (W, H), (255, 0, 0, 0))
    assert (decoded(encoded(cyan, format="TIFF")) == [0, 255, 255]).all()
    assert abs(decoded(encoded(cyan, format="JPEG", quality=95)) - [0, 255, 255]).max() <= 3


def test_transparency_lies_over_white():
    alpha = np.full((H, W), 255, np.uint8)
    alpha[:, : W // 3], alpha[:, W // 3 : W // 2] = 0, 128
    over_white = np.rint(255 + (ramp() - 255.0) * (alpha / 255)[..., None])
    rgba = Image.fromarray(np.dstack([ramp(), alpha]))
    for format in ("PNG", "TIFF"):
        assert abs(decoded(encoded(rgba, format=format)) - over_white).max() <= 1
    grey = ramp()[..., :1]
    out = decoded(encoded(Image.fromarray(np.dstack([grey, alpha])), format="PNG"))
    assert abs(out - np.rint(255 + (grey - 255.0) * (alpha / 255)[..., None])).max() <= 1


def test_palettes():
    palette = Image.new("P", (W, H), 1)
    palette.putpalette([9, 9, 9, 200, 100, 50, 1, 2, 3])
    palette.paste(2, (0, 0, 10, H))
    for format in ("PNG", "GIF", "BMP"):
        out = decoded(encoded(palette, format=format))
        assert (out[:, :10] == [1, 2, 3]).all() and (out[:, 10:] == [200, 100, 50]).all()
    out = decoded(encoded(palette, format="PNG", transparency=2))
    assert (out[:, :10] == 255).all() and (out[:, 10:] == [200, 100, 50]).all()


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(format):
    frames = [Image.new("RGB", (W, H), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    out = decoded(encoded(frames[0], format=format, save_all=True, append_images=frames[1:], **options))
    assert (out == [255, 0, 0]).all()


# What a viewer does with the stored picture to show it, by the values of EXIF tag 274.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    expected = UPRIGHT[orientation](ramp().astype(int))
    assert (decoded(encoded(RGB, format="PNG", exif=exif)) == expected).all()
    out = decoded(encoded(RGB, format="JPEG", quality=95, exif=exif))
    assert out.shape == expected.shape and abs(out - expected).max() <= 9


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0" + bytes(range(256))])
def test_a_damaged_exif_block_costs_nothing_but_itself(exif):
    assert abs(decoded(encoded(RGB, format="JPEG", quality=95, exif=exif)) - ramp()).max() <= 9


def test_pillows_warnings_are_silenced_from_the_first_picture_on(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", H * W - 1)  # Pillow warns above it
    prepare_pillow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decoded(encoded(RGB, format="PNG")) == ramp()).all()
    prepare_pillow.cache_clear()


def test_a_wrong_extension_does_not_matter(tmp_path):
    path = tmp_path / "photo.jpg"
    path.write_bytes(encoded(RGB, format="PNG"))
    assert (decode(path, 256).numpy() == ramp()).all()


@pytest.mark.parametrize(
    "sides, short_side, expected",
    [
        ((1, 1), 64, (1, 1)),
        ((1, 5000), 64, (1, 5000)),
        ((5000, 1), 64, (5000, 1)),
        ((64, 64), 64, (64, 64)),
        ((300, 200), 64, (96, 64)),
        ((65, 1000), 64, (64, 985)),
    ],
)
def test_sides(sides, short_side, expected):
    image = Image.new("RGB", sides[::-1], (10, 20, 30))
    for format in ("PNG", "JPEG"):
        out = decoded(encoded(image, format=format), short_side)
        assert out.shape[:2] == expected and abs(out - [10, 20, 30]).max() <= 2


def test_shrinking_is_pillows_antialiased_bicubic():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    theirs = Image.fromarray(noise).resize((96, 64), Image.Resampling.BICUBIC)
    assert (decoded(encoded(Image.fromarray(noise), format="PNG"), 64) == np.asarray(theirs)).all()


def png_that_claims(width: int, height: int) -> bytes:
    """A header and next to nothing behind it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


JPEG = encoded(RGB, format="JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n"


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "cannot identify|not an image"),
        (bytes(2000), "not an image"),
        (b"<html>404 Not Found</html>", "not an image"),
        (JPEG[: len(JPEG) // 2], "(?i)truncated"),
        (JPEG[:20], "(?i)truncated|not an image"),
        (encoded(RGB, format="PNG")[:-200], "(?i)truncated|not an image|broken"),
        (EPS, "not an image in one of the formats JPEG, PNG"),  # Pillow would start Ghostscript on it
        (
            png_that_claims(60000, 60000),
            "more than 178 million pixels: a decompression bomb",
        ),
    ],
    ids=["empty", "zeros", "html", "half", "head", "no-end", "eps", "bomb"],
)
def test_what_is_no_whole_picture_is_refused(data, reason):
    with pytest.raises(Unreadable, match=reason):
        decoded(data)


def test_what_is_no_file_is_refused(tmp_path):
    """Reading a pipe would never end."""
    (tmp_path / "directory.jpg").mkdir()
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    for name, reason in (
        ("directory", "not a regular file"),
        ("empty", "an empty file"),
        ("pipe", "not a regular file"),
        ("dangling", "No such file"),
        ("loop", "Too many levels of symbolic links"),
        ("missing", "No such file"),
    ):
        with pytest.raises(Unreadable, match=reason):
            decode(tmp_path / f"{name}.jpg", 64)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_refused(tmp_path):
    path = tmp_path / "secret.jpg"
    path.write_bytes(JPEG)
    path.chmod(0)
    with pytest.raises(Unreadable, match="Permission denied"):
        decode(path, 64)


def seeds_of_the_fuzz() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[274] = 6
    images = {
        "jpeg": encoded(RGB, format="JPEG", exif=exif),
        "progressive": encoded(RGB, format="JPEG", progressive=True),
        "cmyk": encoded(RGB.convert("CMYK"), format="JPEG"),
        "png": encoded(RGB, format="PNG", exif=exif),
        "palette": encoded(RGB.convert("P"), format="PNG", transparency=3),
        "grey16": encoded(Image.fromarray(ramp()[..., 0].astype(np.uint16) * 257), format="PNG"),
        "gif": encoded(RGB, format="GIF", save_all=True, append_images=[RGB.rotate(180)]),
        "webp": encoded(RGB, format="WEBP"),
        "tiff": encoded(RGB, format="TIFF", compression="tiff_deflate"),
        "bmp": encoded(RGB, format="BMP"),
        "ppm": encoded(RGB, format="PPM"),
    }
    if features.check("jpg_2000"):
        images["jp2"] = encoded(RGB, format="JPEG2000")
    if features.check("avif"):
        images["avif"] = encoded(RGB, format="AVIF")
    return images


def mutated(data: bytes, chance: random.Random) -> bytes:
    """One to three accidents: bytes changed, cut off, doubled, zeroed, or lengths in the header blown up."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data))
        end = min(at + chance.randint(1, 64), len(data))
        match chance.randrange(6):
            case 0:
                for i in chance.choices(range(len(data)), k=chance.randint(1, 20)):
                    data[i] = chance.randrange(256)
            case 1:
                del data[max(at, 1) :]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = bytes(end - at)
            case 4:
                del data[at : end - 1]
            case 5:
                start = chance.randrange(min(64, len(data)))
                data[start : start + 4] = b"\xff" * len(data[start : start + 4])
    return bytes(data)


def test_six_hundred_damaged_files_neither_crash_nor_hang_a_worker(tmp_path):
    """Through the threads that decode a data set: each file is an image or has a reason."""
    chance = random.Random(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    seeds = seeds_of_the_fuzz()
    for number in range(600):
        form = list(seeds)[number % len(seeds)]
        (folder / f"{number:03}.{form}.jpg").write_bytes(mutated(seeds[form], chance))
    images, unreadable, _ = decode_once(
        folder_source(folder),
        title="fuzz",
        short_side=32,
        keep_pixels=True,
        folder=tmp_path / "cache",
        read_ahead_bytes=0,
    )
    good = [i for i in range(600) if i not in unreadable]
    assert 50 < len(good) < 550  # neither did the damage miss, nor was everything thrown away
    for i in good:
        assert images.read(i).shape == (*images.sizes[i].tolist(), 3)
    for reason in unreadable.values():
        assert reason and "\n" not in reason and len(reason) <= 200
