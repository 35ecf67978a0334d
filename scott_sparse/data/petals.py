"""Petals: a data set of drawn flowers, to try self-supervised learning without a download.

The class of a flower is its geometry alone: how many petals, of which shape, in how many layers, around which centre.
Colours, pose, light, background and clutter are drawn at random for each image, so that neither colours nor raw pixels
predict the class. The segmentation mask is computed from the geometry that is painted.

Image `index` is a pure function of (seed, split, index): each of its random numbers is a hash of those three and of a
slot number, without the state of a generator. Everything is computed in float64: the last bit of a sine depends on its
place in a vector and on the machine, and in float64 that bit does not reach a byte of the image.

Axes: n images, H W pixels. Lengths are in half image sides (an image is [-1, 1]^2), so that `size` changes only the
sampling of a scene; within a flower they are in flower radii. A shape is a `field`, negative inside the shape.
"""

import functools
import math
import threading
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from scott_sparse.data.sources import Source, split_ranges
from scott_sparse.shapes import Float, Int, Tensor, UInt8

VERSION = 1  # raise it whenever a pixel changes: cached flowers of another version are drawn again
SPLITS = ("train", "val", "test")
SPLIT_SIZES = {"train": 4000, "val": 1000, "test": 1000}
CHUNK = 32  # flowers that are drawn together for the data set: a single one takes twice as long per flower

COUNTS = (3, 4, 5, 6, 8)
# name: exponents of the outline towards tip and base; 1 for elliptic, 0 for straight sides; place of the widest point;
#       half width there; share of its sector that a petal may fill there; depth of the notch at the tip
SHAPES = {
    "round": (2.0, 2.0, 1.0, 0.62, 0.40, 1.00, 0.0),
    "pointed": (1.3, 1.6, 0.0, 0.42, 0.27, 1.00, 0.0),
    "notched": (2.6, 1.2, 1.0, 0.68, 0.42, 0.98, 0.55),
    "narrow": (6.0, 4.0, 1.0, 0.60, 0.125, 0.60, 0.0),
    "spoon": (2.0, 0.45, 1.0, 0.74, 0.25, 0.85, 0.0),
}
CENTRES = {"disc": (0.20, 0.0), "wide disc": (0.33, 0.0), "ring": (0.27, 0.15)}  # radius, its eye's radius
# Layers and centre alternate along counts and shapes, so that neighbouring classes differ in three properties.
_DESIGN = [
    (count, shape, 1 + (c + s) % 2, (2 * c + s) % len(CENTRES))
    for s, shape in enumerate(SHAPES)
    for c, count in enumerate(COUNTS)
]
CLASSES: tuple[str, ...] = tuple(
    f"{count} {shape} petals, {'one layer' if layers == 1 else 'two layers'}, {list(CENTRES)[centre]}"
    for count, shape, layers, centre in _DESIGN
)
_GEOMETRY = torch.tensor(
    [(n, layers, *list(CENTRES.values())[c], *SHAPES[s]) for n, s, layers, c in _DESIGN], dtype=torch.float64
)


def _signed(word: int) -> int:
    """The int64 with the bits of `word` modulo 2^64."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _scramble(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators")."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return x


class _Draws:
    """Random numbers of n images; each call takes the next slots."""

    def __init__(self, indices: Int[Tensor, " n"], split: str, seed: int):
        stream = _scramble(_scramble(torch.tensor(_signed(seed))) + 1 + SPLITS.index(split))
        self.key = _scramble(stream + indices)
        self.uniform = (self.bits(0, 256) >> 11 & (1 << 53) - 1).double() * 2.0**-53
        self.used = 0

    def bits(self, first: int, count: int) -> Int[Tensor, "n count"]:
        """64 random bits for each of `count` slots from `first` on; SplitMix64 steps by 2^64 / golden ratio."""
        slots = torch.arange(first + 1, first + count + 1)
        return _scramble(self.key[:, None] + slots * _signed(0x9E3779B97F4A7C15))

    def __call__(self, low: float, high: float, *count: int) -> Float[Tensor, "n ..."]:
        """A number in [low, high) for each image, (n, 1, 1), or `count` numbers for each, (n, count)."""
        first, self.used = self.used, self.used + math.prod(count)
        assert self.used <= self.uniform.shape[1]
        return low + (high - low) * self.uniform[:, first : self.used].reshape(-1, *(count or (1, 1)))


def _colour(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Float[Tensor, "n 3 1 1"]:
    """OKLCh to sRGB clipped to [0, 1] (Ottosson 2020, "A perceptual color space for image processing")."""
    a, b = chroma * hue.cos(), chroma * hue.sin()
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = torch.stack((red, green, blue), dim=1).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _coverage(field: Float[Tensor, "n H W"], blur: float | Tensor = 0.0) -> Float[Tensor, "n H W"]:
    """Share of each pixel inside a shape (above 0.5 if its centre is); edges are `blur` wide, at least a pixel."""
    down, right = torch.gradient(field, dim=(1, 2))
    distance = field / (down.square() + right.square()).sqrt().clamp(min=1e-6)  # in pixels
    return (0.5 - distance / torch.as_tensor(blur * field.shape[-1] / 2).clamp(min=1)).clamp(0, 1)


def _paint(image, colour, cover):
    """Blend a colour over an image, both (n, 3, H or 1, W or 1), with the opacity `cover`, (n, H, W)."""
    return torch.lerp(image, colour, cover[:, None])


def _leaf(x, y, tip_x, tip_y, angle, length, width):
    """A lens-shaped leaf from its tip along `angle`: field and brightness factor, both (n, H, W)."""
    dx, dy = x - tip_x, y - tip_y
    along = (dx * angle.cos() + dy * angle.sin()) / length
    across = (dy * angle.cos() - dx * angle.sin()) / width
    side = across.abs()
    veins = 0.25 * (1 - 8 * side).clamp(min=0) + 0.04 * (22 * along - 5 * side).sin()
    return (2 * along - 1).square() + side - 1, 1 + 0.1 * across.clamp(-1, 1) + veins


def _layer(draw, u, v, polar, geometry, start, scale):
    """One layer of petals; u, v, polar: coordinates in the flower's plane; start: angle of the first petal.

    Returns, all (n, H, W): the field; the position along the axis of the pixel's petal (0 base, 1 tip) and across it
    (-1 .. 1); the distance to the axis (0) relative to the seam with the next petal (1); cosine and sine of the axis;
    the petal's brightness factor; its number.
    """
    count, tip, base, roundness, widest, half_width, fill, notch = geometry
    turn = math.tau / count
    # A pixel belongs to the petal whose axis is nearest: neighbours meet in a seam half-way between them.
    sector = (polar - start) / turn
    petal = sector.round().remainder(count).long()

    def own(of_petal):  # (n, petals) -> (n, H, W)
        return of_petal.gather(1, petal.flatten(1)).view_as(petal)

    most = max(COUNTS)
    axis = start[..., 0] + turn[..., 0] * (torch.arange(most) + draw(-0.06, 0.06, most))
    cos, sin, length = own(axis.cos()), own(axis.sin()), own(scale * draw(0.90, 1.0, most))
    along, across = (u * cos + v * sin) / length, (v * cos - u * sin) / length
    side = across / torch.minimum(half_width, fill * widest * (math.pi / count).tan())
    forward = (along - widest) / torch.where(along > widest, 1 - widest, widest)
    notched = forward * (1 + notch * (1 - (1.8 * side).abs()).clamp(min=0))
    reach = notched.abs().clamp(min=1e-9) ** torch.where(forward > 0, tip, base)
    field = reach + torch.where(roundness > 0, side.square(), side.abs()) - 1
    return field, along, side, 2 * (sector - sector.round()).abs(), cos, sin, own(draw(0.92, 1.08, most)), petal


def _background(draw, x, y, lightness) -> Float[Tensor, "n 3 H W"]:
    """Two similar colours mixed by a random wave pattern (clouds to stripes), and blurred leaves."""
    wave = 0
    for octave in range(4):
        angle, pace = draw(0.0, math.tau), draw(1.0, 3.0) * 1.5**octave
        phase = pace * (x * angle.cos() + y * angle.sin()) + draw(0.0, math.tau)
        wave = wave + draw(0.2, 1.0) * 1.3**-octave * (phase + 0.6 * wave).sin()
    hue, chroma = draw(0.0, math.tau), draw(0.01, 0.14)
    dark = _colour(lightness - draw(0.0, 0.14), chroma, hue)
    light = _colour(lightness + draw(0.0, 0.08), chroma, hue + draw(-0.8, 0.8))
    image = _paint(dark, light, torch.sigmoid(wave * draw(1.0, 8.0)))
    for _ in range(5):
        angle, length, width = draw(0.0, math.tau), draw(0.4, 1.4), draw(0.08, 0.35)
        field, shade = _leaf(x, y, draw(-1.2, 1.2), draw(-1.2, 1.2), angle, length, width)
        colour = _colour(lightness + draw(-0.14, 0.10), draw(0.02, 0.15), hue + draw(-1.2, 1.2))
        image = _paint(image, colour * shade[:, None], draw(0.5, 1.0) * _coverage(field, blur=draw(0.0, 0.2)))
    return image


def _flower(draw, image, x, y, radius, middle, geometry, lightness, petal_missing):
    """Paint the flower over the image, (n, 3, H, W); returns the image and the mask, (n, H, W)."""
    count, layers, disc, hole, *shape = geometry
    # Pose: a plane tilted about a random axis, in mild perspective, and turned; (u, v) are in flower radii.
    tilt_axis, tilt, spin = draw(0.0, math.tau), draw(0.0, 0.75), draw(0.0, math.tau)
    dx, dy = x - middle[0], y - middle[1]
    flat, steep = dx * tilt_axis.cos() + dy * tilt_axis.sin(), dy * tilt_axis.cos() - dx * tilt_axis.sin()
    depth = radius * (1 + draw(-0.3, 0.3) * tilt * steep)
    flat, steep = flat / depth, steep / (depth * tilt.cos())
    u, v = flat * spin.cos() - steep * spin.sin(), flat * spin.sin() + steep * spin.cos()
    polar, reach = torch.atan2(v, u), (u.square() + v.square()).sqrt()

    hue, chroma, sun = draw(0.0, math.tau), draw(0.04, 0.24), draw(0.0, math.tau)
    base_colour = _colour(lightness + draw(-0.12, 0.12), chroma, hue + draw(-1.2, 1.2))
    vein, seam, curl, cup = draw(0.0, 0.12), draw(0.25, 0.5), draw(0.05, 0.25), draw(-0.2, 0.3)
    mask = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.uint8)
    for scale, shift, present in ((1.0, 0.0, layers > 0), (0.70, 0.5, layers > 1)):
        start = shift * math.tau / count
        field, along, side, border, cos, sin, shade, number = _layer(draw, u, v, polar, (count, *shape), start, scale)
        tip_colour = _colour(lightness + shift * draw(-0.2, 0.2), chroma, hue + shift * draw(-1.5, 1.5))
        petal = _paint(tip_colour, base_colour, (1 - along / draw(0.3, 0.9)).clamp(0, 1))
        towards_sun, past_sun = cos * sun.cos() + sin * sun.sin(), cos * sun.sin() - sin * sun.cos()
        shade = shade + curl * side.clamp(-1, 1) * past_sun + cup * (along - 0.5) * (1 + towards_sun) / 2
        shade = shade - vein * (0.5 + 0.5 * (9 * side).cos()) - seam * (4 * border - 3).clamp(0, 1)
        # A soft shadow of the layer on what lies beneath.
        shadow, cover = present * 0.45 * torch.exp(-3 * field.clamp(min=0)), present * _coverage(field)
        if petal_missing and shift == 0:  # in its sector lies the end of its neighbours' shadow
            shadow, cover = torch.where(number == 0, shadow * border**4, shadow), cover * (number != 0)
        image = image * (1 - shadow)[:, None]
        image = _paint(image, petal * shade[:, None], cover)
        mask[cover > 0.5] = 1

    centre_lightness = lightness + torch.where(lightness > 0.62, -1, 1) * draw(0.22, 0.38)
    rim = _colour(centre_lightness, draw(0.04, 0.17), draw(0.0, math.tau))
    eye = _colour(lightness + draw(-0.05, 0.05), draw(0.04, 0.17), draw(0.0, math.tau))
    image = image * (1 - 0.45 * torch.exp(-14 * (reach - disc).clamp(min=0)))[:, None]
    cover = _coverage(reach - disc)
    dots = 1 + draw(0.05, 0.2) * (34 * u).sin() * (34 * v).sin() + 0.3 * (0.5 - reach / disc)
    image = _paint(image, rim * dots[:, None], cover)
    image = _paint(image, eye, (hole > 0) * _coverage(reach - hole))
    mask[cover > 0.5] = 2
    return image, mask


def _scene(indices: Int[Tensor, " n"], split: str, seed: int, size: int, petal_missing: bool):
    """Images, (n, 3, H, W), and masks, (n, H, W), both uint8, painted from back to front."""
    draw = _Draws(indices, split, seed)
    geometry = _GEOMETRY[indices % len(CLASSES)].T[:, :, None, None]
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    x, y = grid[None, None, :], grid[None, :, None]

    # The petals are clearly lighter or clearly darker than the background; all hues are free.
    low, gap, petals_light = draw(0.34, 0.52), draw(0.28, 0.46), draw(0.0, 1.0) < 0.6
    high = (low + gap).clamp(max=0.93)
    image = _background(draw, x, y, torch.where(petals_light, low, high))
    radius = draw(0.62, 0.95)
    middle = [draw(-1.0, 1.0) * (1.10 - radius) for _ in "xy"]
    lightness = torch.where(petals_light, high, low)
    image, mask = _flower(draw, image, x, y, radius, middle, geometry, lightness, petal_missing)

    for chance in (0.4, 0.2):  # leaves before the flower, reaching in from outside
        angle, inwards = draw(0.0, math.tau), draw(0.45, 1.0) * radius
        tip = middle[0] + inwards * angle.cos(), middle[1] + inwards * angle.sin()
        field, shade = _leaf(x, y, *tip, angle + draw(-0.4, 0.4), draw(1.2, 2.5), draw(0.07, 0.2))
        colour = _colour(draw(0.3, 0.8), draw(0.02, 0.15), draw(0.0, math.tau))
        cover = (draw(0.0, 1.0) < chance) * _coverage(field)
        image = _paint(image, colour * shade[:, None], cover)
        mask[cover > 0.5] = 0

    light, vignette = draw(0.0, math.tau), draw(0.0, 0.2)
    lit = 1 + draw(0.0, 0.25) * (x * light.cos() + y * light.sin()) - vignette * (x.square() + y.square())
    image = 0.5 + draw(0.85, 1.15)[:, None] * (image * lit[:, None] - 0.5) + draw(-0.03, 0.07)[:, None]
    pixel = torch.arange(size, dtype=torch.float64)
    spread = (pixel - pixel[:, None]) * (72 / size)  # a standard deviation is 1/72 of the image side
    lens = torch.softmax(-0.5 * spread.square(), dim=1)
    image = torch.lerp(image, lens @ image @ lens.T, draw(0.0, 0.5)[:, None])
    # Noise: for each pixel a slot after those of `draw`, for each channel 21 of its 64 bits.
    noise = draw.bits(256, size * size).view(-1, 1, size, size) >> torch.tensor([0, 21, 42])[:, None, None]
    image = image + draw(0.0, 0.07)[:, None] * ((noise & (1 << 21) - 1).double() * 2.0**-21 - 0.5)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask


def render(
    indices: Sequence[int] | Int[Tensor, " n"],
    *,
    split: str,
    seed: int = 0,
    size: int = 64,
    petal_missing: bool = False,
) -> tuple[UInt8[Tensor, "n 3 side side"], UInt8[Tensor, "n side side"], Int[Tensor, " n"]]:
    """Draw flowers by index (from 0): images, 0 to 255; masks, 0 background, 1 petals, 2 centre; labels.

    `split` is one of SPLITS, `size` the side in pixels. The label of flower `index` is `index % len(CLASSES)`. The same
    (seed, split, index) at another size is the same picture at another resolution, except for the noise of the camera;
    with `petal_missing` it is the same without the first petal of the outer layer.
    """
    indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices)).long()
    assert split in SPLITS and size >= 16 and (indices >= 0).all(), (split, size, indices)
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(indices), size, size, dtype=torch.uint8)
    chunk = max(1, 2**17 // size**2)  # larger chunks are slower: they exceed the processor's cache
    for i in range(0, len(indices), chunk):
        images[i : i + chunk], masks[i : i + chunk] = _scene(indices[i : i + chunk], split, seed, size, petal_missing)
    return images, masks, indices % len(CLASSES)


def petals_source(size: int, *, chunk: int = CHUNK) -> Source:
    """The data set of SPLIT_SIZES flowers, `size` pixels a side, as published splits with labels.

    `chunk` neighbouring flowers are drawn together, which suits their use in order.
    """
    names = [f"v{VERSION}/{split}/{i}" for split, count in SPLIT_SIZES.items() for i in range(count)]
    labels = [i % len(CLASSES) for count in SPLIT_SIZES.values() for i in range(count)]
    splits = split_ranges({split: range(count) for split, count in SPLIT_SIZES.items()})
    return Source(functools.partial(_picture, names, size, chunk), names, labels, splits, CLASSES, files=())


_DRAWING = threading.Lock()  # without it every thread that decodes would draw the same chunk


def _picture(names: Sequence[str], size: int, chunk: int, i: int) -> Image.Image:
    _, split, index = names[i].split("/")
    with _DRAWING:
        pictures = _chunk(split, int(index) // chunk, chunk, size)
    return Image.fromarray(pictures[int(index) % chunk])


def petals_mask(name: str, size: int) -> UInt8[np.ndarray, "side side"]:
    """The mask, as `render` gives it, of a picture of `petals_source` by its name; neighbours are drawn together."""
    _, split, index = name.split("/")
    return _chunk_masks(split, int(index) // CHUNK, size)[int(index) % CHUNK]


@functools.lru_cache(maxsize=2)
def _chunk_masks(split: str, number: int, size: int):
    return render(range(number * CHUNK, (number + 1) * CHUNK), split=split, size=size)[1].numpy()


@functools.lru_cache(maxsize=16)
def _chunk(split: str, number: int, chunk: int, size: int):
    indices = range(number * chunk, (number + 1) * chunk)
    return render(indices, split=split, size=size)[0].permute(0, 2, 3, 1).contiguous().numpy()
