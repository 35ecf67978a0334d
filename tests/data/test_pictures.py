"""Pictures as cameras, scanners and web sites write them: what must be at the first pixel of each, or why not.

A case is one line of CASES: the name of the file, its bytes (or what makes them), the RGB value of its first pixel
within 2, or a part of the reason why it is refused, and the flags with which it is read. Files are written here byte by
byte where Pillow would not write them.
"""

import io
import os
import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from scott_sparse.data.dataset import DataConfig, UnreadableImages, open_data
from scott_sparse.data.decode import decode
from scott_sparse.data.readers import Selection, Unreadable, picture_extensions, prepare_pillow
from scott_sparse.data.sources import folder_source

ICC = 34675  # the tag of a TIFF
P3_RED, SRGB_RED = (234, 51, 35), (255, 0, 0)  # the same colour, as in https://webkit.org/blog-files/color-gamut/
NAVY, WHITE = (10, 20, 90), (255, 255, 255)


def icc(space: str, tags: dict[str, bytes]) -> bytes:
    """An ICC profile of version 4 (ICC.1:2022, 7): header, table of tags, tags."""
    table, data = struct.pack(">I", len(tags)), b""
    for name, tag in tags.items():
        table += struct.pack(">4sII", name.encode(), 132 + 12 * len(tags) + len(data), len(tag))
        data += tag + bytes(-len(tag) % 4)
    pcs = "Lab " if "A2B0" in tags else "XYZ "
    header = struct.pack(
        ">I4xI4s4s4s12x4s", 128 + len(table + data), 0x04300000, b"mntr", space.encode(), pcs.encode(), b"acsp"
    )
    return (header + bytes(28) + numbers(0.9642, 1, 0.8249)).ljust(128, b"\0") + table + data


def numbers(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def curve(*parameters: float) -> bytes:
    """A power, or with five parameters the curve of sRGB."""
    return b"para" + struct.pack(">4xH2x", 3 if len(parameters) > 1 else 0) + numbers(*parameters)


def matrix_profile(red, green, blue, trc: bytes) -> bytes:
    primaries = {f"{name}XYZ": b"XYZ \0\0\0\0" + numbers(*xyz) for name, xyz in zip("rgb", (red, green, blue))}
    return icc("RGB ", primaries | {f"{name}TRC": trc for name in "rgb"})


def cmyk_profile() -> bytes:
    """An ink of L* 50, neutral, in the place of cyan; the others print nothing."""
    corners = np.array([[255, 128, 128], [128, 128, 128]], np.uint8).repeat(8, 0)  # L*, a*, b* without and with cyan
    ramp = bytes(range(256))
    head = b"mft1" + struct.pack(">4xBBBx", 4, 3, 2) + numbers(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return icc("CMYK", {"A2B0": head + 4 * ramp + corners.tobytes() + 3 * ramp})


SRGB_CURVE = curve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
P3 = matrix_profile((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841), SRGB_CURVE)
SRGB = matrix_profile((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7139), SRGB_CURVE)
LINEAR_GREY = icc("GRAY", {"kTRC": curve(1.0)})


def solid(mode, value, format, **options):
    """Bytes of an image of one colour."""
    out = io.BytesIO()
    Image.new(mode, (16, 16), value).save(out, format, **options)
    return out.getvalue()


def halves(left, right, dtype=np.uint16):
    """Pixels (8, 8) or (8, 8, C), of one value on the left and another, the brightest of the set, on the right."""
    pixels = np.empty((8, 8, *np.shape(left)), dtype)
    pixels[:, :4], pixels[:, 4:] = left, right
    return pixels


def png16(pixels):
    """Pillow writes grey of 16 bits only."""
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[pixels[0, 0].size]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, colour_type, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + n + data + struct.pack(">I", zlib.crc32(n + data)) for n, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(*pages, order="<", photometric=1, planar=1, **tags):
    """Uncompressed pages of any number of bands; more tags as t338=(0,), or bytes."""
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    for page in pages:
        planes = np.moveaxis(page, 2, 0) if planar == 2 else [page]
        strips = [np.ascontiguousarray(plane).astype(plane.dtype.newbyteorder(order)).tobytes() for plane in planes]
        (height, width), bands = page.shape[:2], page[0, 0].size
        kind = {"u": 1, "i": 2, "f": 3}[page.dtype.kind]
        fields = {256: (width,), 257: (height,), 258: (8 * page.itemsize,) * bands, 259: (1,), 262: (photometric,)}
        fields |= {273: (0,) * len(strips), 277: (bands,), 278: (height,), 279: tuple(map(len, strips)), 284: (planar,)}
        fields |= {339: (kind,) * bands, **{int(name[1:]): value for name, value in tags.items()}}
        values = {
            tag: value if isinstance(value, bytes) else struct.pack(f"{order}{len(value)}I", *value)
            for tag, value in sorted(fields.items())
        }
        ends = len(out) + 6 + 12 * len(values)  # of the directory, then of the values that do not fit into it
        at = ends + sum(len(value) for value in values.values() if len(value) > 4)
        starts = np.cumsum([at, *map(len, strips)])
        values[273] = struct.pack(f"{order}{len(strips)}I", *starts[:-1])
        directory, beside = struct.pack(order + "H", len(values)), b""
        for tag, value in values.items():
            place = value if len(value) == 4 else struct.pack(order + "I", ends + len(beside))
            directory += (
                struct.pack(order + "HHI", tag, *((7, len(value)) if tag == ICC else (4, len(value) // 4))) + place
            )
            beside += value if len(value) > 4 else b""
        following = 0 if page is pages[-1] else starts[-1]
        out += directory + struct.pack(order + "I", following) + beside + b"".join(strips)
    return out


def plugin(module, mode, value, format, **options):
    """As `solid`, when the test runs, if the plugin is installed."""

    def make():
        pytest.importorskip(module)
        prepare_pillow()
        return solid(mode, value, format, **options)

    return make


def with_tifffile(data):
    return lambda: pytest.importorskip("tifffile") and data


RGBA16 = halves((1024, 2048, 3072, 4095), (4095, 4095, 4095, 4095))
SIX = np.stack([halves(40 * band, 255, np.uint8) for band in range(6)], 2)
FOUR, THREE = SIX[..., 1:5], SIX[..., 1:4]
GREYS = [np.full((8, 8), 50 * page, np.uint8) for page in (1, 2, 3)]

CASES = {
    # Colour profiles
    "P3 in JPEG": ("a.jpg", solid("RGB", P3_RED, "JPEG", quality=100, subsampling=0, icc_profile=P3), SRGB_RED),
    "P3 in PNG": ("a.png", solid("RGB", P3_RED, "PNG", icc_profile=P3), SRGB_RED),
    "P3 in TIFF": ("a.tif", solid("RGB", P3_RED, "TIFF", icc_profile=P3), SRGB_RED),
    "P3 in WebP": ("a.webp", solid("RGB", P3_RED, "WEBP", lossless=True, icc_profile=P3), SRGB_RED),
    "P3 in AVIF": ("a.avif", plugin("PIL._avif", "RGB", P3_RED, "AVIF", quality=100, icc_profile=P3), SRGB_RED),
    "P3 in HEIC": ("a.heic", plugin("pillow_heif", "RGB", P3_RED, "HEIF", quality=100, icc_profile=P3), SRGB_RED),
    "P3 under alpha": ("a.png", solid("RGBA", (*P3_RED, 255), "PNG", icc_profile=P3), SRGB_RED),
    "P3 palette": ("a.png", lambda: palette(P3_RED, icc_profile=P3), SRGB_RED),
    "P3 in 16 bits": ("a.tif", tiff(halves([257 * c for c in P3_RED], 65535), photometric=2, t34675=P3), SRGB_RED),
    "profile of sRGB": ("a.png", solid("RGB", NAVY, "PNG", icc_profile=SRGB), NAVY),
    "broken profile": ("a.png", solid("RGB", P3_RED, "PNG", icc_profile=P3[:200]), P3_RED),
    "profile of grey for RGB": ("a.png", solid("RGB", NAVY, "PNG", icc_profile=LINEAR_GREY), NAVY),
    "linear grey": ("a.jpg", solid("L", 55, "JPEG", quality=100, icc_profile=LINEAR_GREY), (128, 128, 128)),
    "linear grey, alpha": ("a.png", solid("LA", (55, 255), "PNG", icc_profile=LINEAR_GREY), (128, 128, 128)),
    "profile of RGB for grey": ("a.jpg", solid("L", 55, "JPEG", quality=100, icc_profile=P3), (55, 55, 55)),
    "CMYK": ("a.jpg", solid("CMYK", (255, 0, 0, 0), "JPEG", quality=100), (0, 255, 255)),
    "CMYK with profile": ("a.jpg", solid("CMYK", (255, 0, 0, 0), "JPEG", icc_profile=cmyk_profile()), (119, 119, 119)),
    # More than 8 bits: 1024 of 4095 is 64 of 255
    "12-bit PNG": ("a.png", png16(halves(1024, 4095)), (64, 64, 64)),
    "12-bit TIFF": ("a.tif", tiff(halves(1024, 4000)), (64, 64, 64)),
    "12-bit TIFF, big-endian": ("a.tif", tiff(halves(1024, 4095), order=">"), (64, 64, 64)),
    "12-bit TIFF of 32 bits": ("a.tif", tiff(halves(1024, 4095, np.uint32)), (64, 64, 64)),
    "12-bit TIFF, signed": ("a.tif", tiff(halves(1024, 4095, np.int16)), (64, 64, 64)),
    "14-bit PNG": ("a.png", png16(halves(4096, 16000)), (64, 64, 64)),
    "10-bit PNG": ("a.png", png16(halves(256, 1023)), (64, 64, 64)),
    "8-bit values in 16 bits": ("a.png", png16(halves(64, 255)), (64, 64, 64)),
    "16-bit PNG": ("a.png", png16(halves(64 * 257, 65535)), (64, 64, 64)),
    "dark TIFF that states 12 bits": ("a.tif", tiff(halves(100, 200), t281=(4095,)), (6, 6, 6)),
    "PGM that states 12 bits": ("a.pgm", b"P5 2 1 4095\n" + struct.pack(">2H", 1024, 2048), (64, 64, 64)),
    "white is zero, 8 bits": ("a.tif", tiff(halves(1, 255, np.uint8), photometric=0), (254, 254, 254)),
    "white is zero, 12 bits": ("a.tif", tiff(halves(1024, 4095), photometric=0), (191, 191, 191)),
    "white is zero, big-endian": (
        *("a.tif", with_tifffile(tiff(halves(1024, 4095), photometric=0, order=">")), (191, 191, 191)),
    ),
    "12-bit RGB PNG": ("a.png", png16(RGBA16[..., :3]), (64, 128, 191)),
    "12-bit RGB TIFF": ("a.tif", tiff(RGBA16[..., :3], photometric=2), (64, 128, 191)),
    "12-bit RGB TIFF, big-endian": ("a.tif", tiff(RGBA16[..., :3], photometric=2, order=">"), (64, 128, 191)),
    "12-bit RGB TIFF, planes": ("a.tif", with_tifffile(tiff(RGBA16[..., :3], photometric=2, planar=2)), (64, 128, 191)),
    "12-bit RGB PNG, alpha": ("a.png", png16(RGBA16), (64, 128, 191)),
    "12-bit RGB PNG, 16-bit alpha": ("a.png", png16(halves((4080, 0, 0, 32768), 4095)), (254, 127, 127)),
    "12-bit grey PNG, alpha": ("a.png", png16(halves((1024, 4095), (4095, 0))), (64, 64, 64)),
    "12-bit JPEG XL": ("a.jxl", plugin("pillow_jxl", "I;16", 4095, "JXL", lossless=True), WHITE),
    # Floating point: 0.5 of 1 is 128 of 255; above 1 the range ends at the next power of two
    "floats": ("a.tif", tiff(halves(0.5, 0.9, np.float32)), (128, 128, 128)),
    "floats of 64 bits": ("a.tif", tiff(halves(0.5, 1, np.float64)), (128, 128, 128)),
    "floats of 16 bits": ("a.tif", with_tifffile(tiff(halves(0.5, 1, np.float16))), (128, 128, 128)),
    "floats above 1": ("a.tif", tiff(halves(0.5, 1.2, np.float32)), (64, 64, 64)),
    "floats of a 12-bit camera": ("a.tif", tiff(halves(1024, 4000, np.float32)), (64, 64, 64)),
    "small floats": ("a.tif", tiff(halves(1e-30, 2e-30, np.float32)), (81, 81, 81)),
    "floats, big-endian": ("a.tif", tiff(halves(0.5, 1, np.float32), order=">"), (128, 128, 128)),
    "floats, white is zero": (
        *("a.tif", with_tifffile(tiff(halves(0.25, 1, np.float32), photometric=0)), (191, 191, 191)),
    ),
    "floats, RGB": (
        *("a.tif", with_tifffile(tiff(halves((0.25, 0.5, 1), (1, 1, 1), np.float32), photometric=2)), (64, 128, 255)),
    ),
    "floats, alpha": (
        *("a.tif", with_tifffile(tiff(halves((0, 1, 2, 0.5), (2, 2, 2, 1), np.float32), photometric=2, t338=(2,)))),
        (127, 191, 255),
    ),
    "PFM": ("a.pfm", b"Pf 2 1 -1.0\n" + struct.pack("<2f", 0.5, 1), (128, 128, 128)),
    "floats below 0": (
        "a.tif",
        tiff(halves(0.5, -1, np.float32)),
        "floating-point pixels from -1.0 to 0.5, expected 0",
    ),
    "floats with NaN": ("a.tif", tiff(halves(0.5, np.nan, np.float32)), "floating-point pixels from nan"),
    "floats with inf": ("a.tif", tiff(halves(0.5, np.inf, np.float32)), "to inf, expected 0 to 65535"),
    "floats of no data": ("a.tif", tiff(halves(0.5, -3.4e38, np.float32)), r"from -3.*e.38 to 0.5, expected"),
    "16-bit CMYK": ("a.tif", tiff(halves((65535, 0, 0, 0), 0), photometric=5), (0, 255, 255)),
    "16-bit premultiplied alpha": ("a.tif", tiff(halves((0, 0, 0, 0), 65535), photometric=2, t338=(1,)), WHITE),
    "upside down, 12-bit RGB TIFF": (*("a.tif", tiff(RGBA16[:, ::-1, :3], photometric=2, t274=(3,)), (64, 128, 191)),),
    "upside down, 6 bands": (
        *("a.tif", with_tifffile(tiff(SIX[:, ::-1], t274=(3,))), (200, 0, 40), {"bands": (5, 0, 1)}),
    ),
    # Bands and pages
    "TIFF, 4th is alpha": ("a.tif", tiff(halves((9, 9, 9, 0), 255, np.uint8), photometric=2, t338=(2,)), WHITE),
    "TIFF, 4th unnamed": ("a.tif", tiff(FOUR, photometric=2), "4 bands.*--bands 0 1 2"),
    "TIFF, 4th unnamed, chosen": ("a.tif", tiff(FOUR, photometric=2), (160, 120, 40), {"bands": (3, 2, 0)}),
    "TIFF, 4th unspecified": ("a.tif", with_tifffile(tiff(FOUR, photometric=2, t338=(0,))), "4 bands.*--bands 0 1 2"),
    "TIFF, 4th unspecified, chosen": (
        *("a.tif", with_tifffile(tiff(FOUR, photometric=2, t338=(0,))), (160, 40, 80), {"bands": (3, 0, 1)}),
    ),
    "TIFF, alpha not wanted": (
        *(
            "a.tif",
            tiff(halves((9, 8, 7, 0), 255, np.uint8), photometric=2, t338=(2,)),
            (9, 8, 7),
            {"bands": (0, 1, 2)},
        ),
    ),
    "TIFF, 3 bands, no colours": ("a.tif", with_tifffile(tiff(THREE)), "3 bands.*--bands"),
    "TIFF, 6 bands": ("a.tif", with_tifffile(tiff(SIX)), "6 bands.*--bands"),
    "TIFF, 6 bands, three chosen": ("a.tif", with_tifffile(tiff(SIX)), (200, 0, 40), {"bands": (5, 0, 1)}),
    "TIFF, 6 planes, one chosen": ("a.tif", with_tifffile(tiff(SIX, planar=2)), (80, 80, 80), {"bands": (2,)}),
    "TIFF, 6 bands of 12 bits": (
        *("a.tif", with_tifffile(tiff(16 * SIX.astype(np.uint16))), (199, 0, 40), {"bands": (5, 0, 1)}),
    ),
    "TIFF, 6 bands, LZW": ("a.tif", lambda: lzw(SIX), (200, 0, 40), {"bands": (5, 0, 1)}),
    "TIFF, no such band": ("a.tif", with_tifffile(tiff(SIX)), "no band 6", {"bands": (6,)}),
    "TIFF, 3 pages": ("a.tif", tiff(*GREYS), (50, 50, 50)),
    "TIFF, 3 pages, the last": ("a.tif", tiff(*GREYS), (150, 150, 150), {"page": 2}),
    "TIFF, 3 pages, no such": ("a.tif", tiff(*GREYS), "no page 3", {"page": 3}),
    "JPEG among such": ("a.jpg", solid("L", 55, "JPEG", quality=100), (55, 55, 55), {"page": 2}),
    "grey, bands chosen for others": ("a.png", solid("L", 55, "PNG"), (55, 55, 55), {"bands": (3, 2, 1)}),
    "RGB, one band": ("a.png", solid("RGB", NAVY, "PNG"), (90, 90, 90), {"bands": (2,)}),
    "JPEG 2000, 4th is alpha": ("a.jp2", solid("RGBA", (9, 9, 9, 0), "JPEG2000"), WHITE),
    "JPEG 2000, 4th unnamed": ("a.j2k", solid("RGBA", (9, 9, 9, 0), "JPEG2000", no_jp2=True), "4 bands.*--bands"),
    # Names
    "JPEG XL": ("a.jxl", plugin("pillow_jxl", "RGB", NAVY, "JXL", lossless=True), NAVY),
    "no extension": ("IMG_0001", solid("RGB", NAVY, "PNG"), NAVY),
    "no extension, HEIC": ("IMG_0001", plugin("pillow_heif", "RGB", NAVY, "HEIF", quality=100), NAVY),
    "no extension, JPEG XL": ("IMG_0001", plugin("pillow_jxl", "RGB", NAVY, "JXL", lossless=True), NAVY),
    "another extension": ("a.HEIC", plugin("pillow_heif", "RGB", NAVY, "JPEG", quality=100, subsampling=0), NAVY),
}


def lzw(pixels):
    pytest.importorskip("imagecodecs")
    out = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "contig", "compression": "lzw"}
    pytest.importorskip("tifffile").imwrite(out, pixels, **options)
    return out.getvalue()


def palette(colour, **options):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, *colour])
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize("case", CASES)
def test_first_pixel(case, cache, tmp_path):
    name, data, expected, *flags = CASES[case]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(data() if callable(data) else data)
    config = DataConfig(data=str(tmp_path / "photos"), cache=cache, cache_dir=tmp_path, **(flags[0] if flags else {}))
    if isinstance(expected, str):
        with pytest.raises(UnreadableImages, match=expected):
            open_data(config, short_side=32)
        return
    assert images_of(config)[0][0, 0] == pytest.approx(expected, abs=2)


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_read_as_files(case, tmp_path):
    """As pictures of a Hub set are."""
    name, data, _, *flags = CASES[case]
    data = data() if callable(data) else data
    (tmp_path / name).write_bytes(data)
    results = []
    for picture in (tmp_path / name, io.BytesIO(data)):
        try:
            results.append(decode(picture, 64, Selection(**(flags[0] if flags else {}))).tolist())
        except Unreadable as reason:
            results.append(str(reason))
    assert results[0] == results[1]


def images_of(config):
    images = open_data(config, short_side=64).pretrain
    return [images.read(row).astype(int) for row in images.rows.tolist()]


def write_folder(root, files):
    root.mkdir()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


@pytest.mark.parametrize("cache", ["disk", "none"])
@pytest.mark.parametrize("format", ["png", "tif"])
@pytest.mark.parametrize("bits", [12, 14])
def test_bright_and_dark_images_of_a_set_keep_their_relation(bits, format, cache, tmp_path):
    """256 grey levels, and the dark image, decoded first, is as dark beside the bright one as the camera saw it."""
    ramp = np.arange(2**bits, dtype=np.uint16).reshape(64, -1)
    encode = png16 if format == "png" else tiff
    root = write_folder(tmp_path / "set", {f"a.{format}": encode(ramp // 16), f"b.{format}": encode(ramp)})
    config = DataConfig(data=str(root), cache=cache, cache_dir=tmp_path)
    for _ in range(2):  # from the files, then from the cache
        dark, bright = images_of(config)
        assert len(np.unique(bright)) == 256 and dark.max() == 16
        assert abs(bright[..., 0] - ramp * (255 / (2**bits - 1))).max() <= 0.5
        assert open_data(config, short_side=64).about["notes"] == [
            f"values of more than 8 bits are taken as {bits}-bit (0 to {2**bits - 1})",
        ]


@pytest.mark.parametrize("cache", ["disk", "none"])
def test_floats_of_a_set_keep_their_relation(cache, tmp_path):
    files = {f"{name}.tif": tiff(halves(0.25, top, np.float32)) for name, top in (("a", 0.5), ("b", 3.0))}
    root = write_folder(tmp_path / "set", files)
    config = DataConfig(data=str(root), cache=cache, cache_dir=tmp_path)
    for _ in range(2):
        assert [image[0, [0, -1], 0].tolist() for image in images_of(config)] == [[16, 32], [16, 191]]
        assert open_data(config, short_side=64).about["notes"] == ["floating-point values are taken as 0 to 4"]


def test_another_image_of_more_bits_rescales_the_set(tmp_path):
    root = write_folder(tmp_path / "set", {"a.png": png16(halves(1024, 4095))})
    config = DataConfig(data=str(root), cache_dir=tmp_path)
    assert images_of(config)[0][0, 0, 0] == 64
    (root / "b.png").write_bytes(png16(halves(0, 65535)))
    assert [image[0, 0, 0] for image in images_of(config)] == [4, 0]


def test_what_was_chosen_is_said_and_has_a_cache_of_its_own(tmp_path):
    deep = [halves(257 * 50 * page, 65535) for page in (1, 2, 3)]
    files = {"a.tif": tiff(*GREYS), "b.tif": tiff(*deep), "c.jpg": solid("L", 7, "JPEG")}
    root = write_folder(tmp_path / "set", files)
    for page, value in ((0, 50), (1, 100), (0, 50)):
        config = DataConfig(data=str(root), cache_dir=tmp_path, page=page)
        assert [image[0, 0, 0] for image in images_of(config)] == [value, value, 7]
        assert (
            open_data(config, short_side=64).about["notes"][0] == f"page {page} of TIFFs with several pages (2 images)"
        )
    rgba = tiff(FOUR, photometric=2)
    root = write_folder(tmp_path / "other", {"a.tif": rgba})
    config = DataConfig(data=str(root), cache_dir=tmp_path, bands=(3, 2, 1))
    assert open_data(config, short_side=64).about["notes"] == ["bands 3 2 1 of pictures with several bands"]


@pytest.mark.parametrize("flags", [{"bands": (0, 1)}, {"bands": (-1,)}, {"page": -1}])
def test_flags_that_select_nothing(flags, tmp_path):
    root = write_folder(tmp_path / "set", {"a.jpg": solid("L", 7, "JPEG")})
    with pytest.raises(ValueError, match=r"--(bands|page) .*numbered from 0"):
        open_data(DataConfig(data=str(root), cache_dir=tmp_path, **flags), short_side=64)


def test_files_that_are_no_pictures_are_passed_over(tmp_path):
    files = {"LICENSE": b"Copyright", "empty": b"", "notes.txt": b"x", "a.xyz": solid("L", 7, "PNG")}
    root = write_folder(tmp_path / "set", files | {"a": solid("L", 7, "PNG")})
    os.mkfifo(root / "pipe")  # reading it would never end
    assert folder_source(root).names == ["a"]


def test_without_plugins_their_files_are_passed_over(tmp_path, monkeypatch):
    """HEIC and JPEG XL by extension and content; a TIFF of many bands says what to install."""
    for module in ("pillow_heif", "pillow_jxl", "tifffile"):
        monkeypatch.setitem(sys.modules, module, None)
    for format in ("HEIF", "JXL"):
        monkeypatch.delitem(Image.OPEN, format, raising=False)
    prepare_pillow.cache_clear(), picture_extensions.cache_clear()
    heic = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    files = {"a.heic": heic, "b": heic, "c.jxl": b"\xff\n", "d.tif": tiff(SIX), "e.jpg": solid("L", 7, "JPEG")}
    root = write_folder(tmp_path / "set", files)
    assert folder_source(root).names == ["d.tif", "e.jpg"]
    with pytest.raises(UnreadableImages, match=r"d\.tif: .*pip install 'scott-sparse\[formats\]'"):
        open_data(DataConfig(data=str(root), cache_dir=tmp_path), short_side=64)
    prepare_pillow.cache_clear(), picture_extensions.cache_clear()


def test_a_damaged_tiff_of_many_bands_is_refused_at_once():
    """tifffile would fill in millions of strips that the file does not have."""
    pytest.importorskip("tifffile")
    damaged = tiff(SIX).replace(struct.pack("<HHII", 257, 4, 1, 8), struct.pack("<HHII", 257, 4, 1, 8_000_000))
    with pytest.raises(Unreadable, match="damaged: the file has fewer strips"):
        decode(io.BytesIO(damaged), 64, Selection(bands=(0,)))
