"""Images of other than three channels: grey, and bands of any meaning, as they are in the file."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from scott_sparse.data import views_gpu
from scott_sparse.data.decode import decode, largest_value, white_for
from scott_sparse.data.images import Images, channel_statistics
from scott_sparse.data.readers import Selection, Unreadable
from scott_sparse.data.views import OPS, ViewConfig, draw_views, make_views
from scott_sparse.model.preprocess import Preprocess

RANDOM = np.random.default_rng(0)
BANDS = RANDOM.integers(0, 4000, (20, 24, 13)).astype(np.uint16)  # 12 bits
BYTES = RANDOM.integers(0, 256, (20, 24, 5)).astype(np.uint8)


def tiff(values, **how):
    tifffile = pytest.importorskip("tifffile")
    file = io.BytesIO()
    tifffile.imwrite(file, values, **how)
    return file


def png(values, mode):
    file = io.BytesIO()
    image = Image.fromarray(values)
    assert image.mode == mode
    image.save(file, "PNG")
    return file


def grey(rgb):
    return np.asarray(Image.fromarray(rgb).convert("L"))[..., None]


def eight_bits(values):
    return np.floor(values * 255.0 / 4095 + 0.5).astype(np.uint8)


BLACK = {"photometric": "minisblack"}
INSIDE, PLANES = {**BLACK, "planarconfig": "contig"}, {**BLACK, "planarconfig": "separate"}  # of one page
PAGES = np.moveaxis(BYTES, 2, 0), np.moveaxis(BANDS, 2, 0)
CASES = {  # name: file, selection, pixels
    "grey": (lambda: png(BYTES[..., 0], "L"), {"channels": 1}, BYTES[..., :1]),
    "grey of RGB": (lambda: png(BYTES[..., :3], "RGB"), {"channels": 1}, grey(BYTES[..., :3])),
    "grey, deep": (lambda: tiff(BANDS[..., 0]), {"channels": 1}, eight_bits(BANDS[..., :1])),
    "grey, one band": (lambda: tiff(BYTES, **INSIDE), {"channels": 1, "bands": (3,)}, BYTES[..., 3:4]),
    "interleaved": (lambda: tiff(BYTES, **INSIDE), {"channels": 5}, BYTES),
    "planes, deep": (lambda: tiff(PAGES[1], **PLANES), {"channels": 13}, eight_bits(BANDS)),
    "a page a band, deep": (lambda: tiff(PAGES[1], **BLACK), {"channels": 13}, eight_bits(BANDS)),
    "some pages": (lambda: tiff(PAGES[0], **BLACK), {"channels": 2, "bands": (4, 1)}, BYTES[..., [4, 1]]),
    "some bands, deep": (
        lambda: tiff(BANDS, **INSIDE),
        {"channels": 4, "bands": (12, 0, 0, 5)},
        eight_bits(BANDS[..., [12, 0, 0, 5]]),
    ),
    "floats": (
        lambda: tiff(BYTES.astype(np.float32) / 32, **INSIDE),
        {"channels": 5},
        np.floor(BYTES / 256 * 255 + 0.5).astype(np.uint8),
    ),
    "alpha is a band": (lambda: png(BYTES[..., :4], "RGBA"), {"channels": 4}, BYTES[..., :4]),
    "turned": (lambda: tiff(BYTES, extratags=[(274, 3, 1, 3, True)], **INSIDE), {"channels": 5}, BYTES[::-1, ::-1]),
}


@pytest.mark.parametrize("case", CASES)
def test_decoded_as_in_the_file(case):
    make, selection, expected = CASES[case]
    file, selection = make(), Selection(**selection)
    white = white_for(largest_value(file, selection))
    assert white == (8 if "floats" in case else 4095 if "deep" in case else 255)
    pixels = decode(file, 64, selection, find_white=lambda: white).numpy()
    assert np.array_equal(pixels, expected)
    small = decode(file, 10, selection, find_white=lambda: white)
    assert small.shape == (10, 12, expected.shape[2])
    for band in range(expected.shape[2]):
        resized = Image.fromarray(expected[..., band].copy()).resize((12, 10), Image.Resampling.BICUBIC)
        assert np.array_equal(small[..., band], np.asarray(resized))


@pytest.mark.parametrize(
    "make, selection, words",
    [
        (lambda: tiff(BYTES, **INSIDE), {"channels": 4}, r"5 bands, expected 4 \(--channels\)"),
        (lambda: tiff(PAGES[0], **BLACK), {"channels": 4}, "5 bands, expected 4"),
        (lambda: tiff(PAGES[0], **BLACK), {"channels": 2, "bands": (0, 9)}, "5 bands, expected 2"),
        (lambda: png(BYTES[..., :3], "RGB"), {"channels": 4}, "3 bands, expected 4"),
        (lambda: tiff(BYTES, **INSIDE), {"channels": 2, "bands": (0, 9)}, "no band 9"),
        (lambda: tiff(BYTES.astype(np.complex64), **INSIDE), {"channels": 5}, "complex64.*expected integers or floats"),
        (lambda: io.BytesIO(tiff(BYTES, **INSIDE).getvalue()[:200]), {"channels": 5}, "."),
    ],
)
def test_what_does_not_fit_is_named(make, selection, words):
    with pytest.raises(Unreadable, match=words):
        decode(make(), 64, Selection(**selection))


def test_flags():
    for flags, words in (
        ({"channels": 0}, "--channels 0 is outside 1 to 1024"),
        ({"channels": -3}, "--channels -3 is outside"),
        ({"channels": 4, "bands": (0, 1, 2)}, r"--bands 0 1 2: expected 4 \(--channels\)"),
        ({"channels": 1, "bands": (0, 1, 2)}, r"--bands 0 1 2: expected 1 \(--channels\)"),
        ({"bands": (0, 1)}, "one band .grey. or three"),
    ):
        with pytest.raises(ValueError, match=words):
            Selection(**flags)


def test_statistics_are_those_of_all_pixels():
    parts = [torch.from_numpy(BYTES[:8]), torch.from_numpy(BYTES[8:])]
    found = channel_statistics(Images.of(parts))
    values = BYTES.reshape(-1, 5) / 255
    assert_close(found["mean"], tuple(values.mean(0)), atol=1e-4, rtol=0)
    assert_close(found["std"], tuple(values.std(0)), atol=1e-4, rtol=0)
    constant = channel_statistics(Images.of([torch.full((4, 4, 1), 51, dtype=torch.uint8)]))
    assert constant == {"mean": (0.2,), "std": (0.0039,)}


@pytest.mark.parametrize("channels", [1, 2, 4, 13])
def test_views_of_any_number_of_channels(channels):
    """On a CPU and, but for rounding, as for a GPU; no operation that needs colours is applied."""
    images = Images.of(torch.randint(256, (6, 40, 48, channels), dtype=torch.uint8))
    config, generator = ViewConfig(crops=2, colour=1.0, grey=0.5), torch.Generator().manual_seed(0)
    views = draw_views(images.sizes, config, generator=generator)
    crops = images.crop(torch.arange(6), views.boxes)
    how = {"size": (32, 24), "mean": (0.4,) * channels, "std": (0.2,) * channels}
    context, target = make_views(crops, views, **how)
    assert context.shape == (6, 2, channels, 32, 24) and target.shape == (6, channels, 32, 24)
    applied = views.ops.clone()
    for name in ("saturation", "hue", "grey"):
        applied[applied == OPS.index(name)] = len(OPS)
    ops, amounts = applied[:, :, 0].flatten(0, 1), views.amounts[:, :, 0].flatten(0, 1)
    resized = views_gpu.resize(
        crops.flatten(0, 1), views.boxes.flatten(0, 1)[:, 2:], views.flip.flatten(), size=(32, 24)
    )
    coloured = views_gpu.colour(resized, ops=ops, amounts=amounts)
    assert (context.flatten(0, 1) * 0.2 + 0.4 - coloured).abs().mean() < 1 / 255
    with pytest.raises(ValueError, match=f"images have {channels} channels; mean and std are of 3, 3"):
        make_views(crops, views, size=(32, 24))


@pytest.mark.parametrize("channels, mode", [(1, "L"), (1, "RGB"), (4, "RGBA"), (13, None)])
def test_preprocess(channels, mode):
    preprocess = Preprocess((8, 16), mean=(0.25,) * channels, std=(0.5,) * channels)
    assert Preprocess.from_json({**preprocess.to_json(), **_as_json(preprocess)}) == preprocess
    pixels = torch.full((channels, 16, 32), 255, dtype=torch.uint8)
    assert_close(preprocess(pixels), torch.full((channels, 8, 16), 1.5))
    if mode:
        assert_close(preprocess(Image.new(mode, (32, 16), "white")), preprocess(pixels))
    with pytest.raises(ValueError, match=rf"expected torch.uint8 of shape \({channels}, H, W\)"):
        preprocess(torch.zeros(channels + 1, 16, 32, dtype=torch.uint8))


def _as_json(preprocess):
    return {name: list(getattr(preprocess, name)) for name in ("image_size", "mean", "std")}
