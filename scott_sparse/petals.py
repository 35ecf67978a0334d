"""Petals: drawn flowers for trying self-supervised learning with nothing to download.

The class of a flower is its geometry alone: how many petals, of which shape, in how many layers, around which centre.
Colours, pose, light, background and clutter are drawn anew for every image, so neither colours nor raw pixels give the
class away, while a look at the shape does. Every image comes with the mask of the geometry that was painted.

Image `index` is a pure function of (seed, split, index): each of its random numbers is a hash of those three and of a
running slot number, never the state of a generator, so it does not matter how many others are drawn, or in what order.
Everything is computed in float64: the last bit of a sine or a power depends on where in a vector it is computed (and
on the machine), and in float64 that bit does not reach a byte of the image.

Axes: N images, H W pixels. Lengths are in half image sides (the image is [-1, 1]^2), so `size` changes only the
sampling of a scene; lengths inside a flower are in flower radii.
"""

import math
import os
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from scott_sparse.shapes import Float, Int, Tensor, UInt8

VERSION = 1  # part of every cache file's name; raise it whenever a pixel changes
SPLITS = ("train", "val", "test")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "scott_sparse"

COUNTS = (3, 4, 5, 6, 8)
# name: exponent towards the tip, exponent towards the base, roundness (0: straight sides, 1: elliptic),
#       widest point, largest half width, share of its sector that a petal may fill, depth of the notch in the tip
SHAPES = {
    "round": (2.0, 2.0, 1.0, 0.62, 0.40, 1.00, 0.0),
    "pointed": (1.3, 1.6, 0.0, 0.42, 0.27, 1.00, 0.0),
    "notched": (2.6, 1.2, 1.0, 0.68, 0.42, 0.98, 0.55),
    "narrow": (6.0, 4.0, 1.0, 0.60, 0.125, 0.60, 0.0),
    "spoon": (2.0, 0.45, 1.0, 0.74, 0.25, 0.85, 0.0),
}
CENTRES = {"disc": (0.20, 0.0), "wide disc": (0.33, 0.0), "ring": (0.27, 0.15)}  # name: radius, radius of its hole
# Layers and centre alternate along counts and shapes, so that classes alike in one respect differ in another.
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


def _scramble(x: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * (factor - (1 << 64) if factor >> 63 else factor)
    return x


class _Draws:
    """Uniform numbers of N images: a counter-based generator, one slot per number."""

    def __init__(self, indices: Int[Tensor, " N"], split: str, seed: int):
        start = torch.tensor((seed + (1 << 63)) % (1 << 64) - (1 << 63))
        self.key = _scramble(_scramble(_scramble(start) + 1 + SPLITS.index(split)) + indices)
        self.uniform = ((self.bits(1, 512) >> 11) & ((1 << 53) - 1)).double() * 2.0**-53
        self.used = 0

    def bits(self, first: int, count: int) -> Int[Tensor, "N count"]:
        """64 random bits for each of the slots from `first` on; 0x9E37... is 2^64 / golden ratio, as in SplitMix64."""
        return _scramble(self.key[:, None] + torch.arange(first, first + count) * (0x9E3779B97F4A7C15 - (1 << 64)))

    def __call__(self, low: float, high: float, *count: int) -> Float[Tensor, "N ..."]:
        """The next number in [low, high) of each image, (N, 1, 1); with a count, as many of them, (N, count)."""
        first, self.used = self.used, self.used + math.prod(count)
        assert self.used <= self.uniform.shape[1]
        return low + (high - low) * self.uniform[:, first : self.used].reshape(-1, *(count or (1, 1)))


def _colour(lightness: Tensor, chroma: Tensor, hue: Tensor) -> Float[Tensor, "N 3 1 1"]:
    """sRGB in [0, 1] of OKLCh colours (Ottosson 2020, "A perceptual color space for image processing"), clipped."""
    a, b = chroma * hue.cos(), chroma * hue.sin()
    long = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    medium = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    short = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    red = 4.0767416621 * long - 3.3077115913 * medium + 0.2309699292 * short
    green = -1.2684380046 * long + 2.6097574011 * medium - 0.3413193965 * short
    blue = -0.0041960863 * long - 0.7034186147 * medium + 1.7076147010 * short
    linear = torch.stack((red, green, blue), dim=1).clamp(0, 1)
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=1e-9) ** (1 / 2.4) - 0.055)


def _coverage(field: Float[Tensor, "N H W"], blur: Tensor | float = 0.0) -> Float[Tensor, "N H W"]:
    """Share of each pixel inside `field < 0`: over .5 exactly where its middle is. The edge is one pixel wide, or
    `blur` half image sides where that is more."""
    down, right = torch.gradient(field, dim=(1, 2))
    distance = field / (down.square() + right.square()).sqrt().clamp(min=1e-6)  # in pixels
    if isinstance(blur, Tensor):
        distance = distance / (blur * field.shape[-1] / 2).clamp(min=1)
    return (0.5 - distance).clamp(0, 1)


def _leaf(x, y, tip_x, tip_y, angle, length, width):
    """A lens from its tip backwards along `angle`: its field (negative inside) and its shading, both (N, H, W)."""
    dx, dy = x - tip_x, y - tip_y
    along = (dx * angle.cos() + dy * angle.sin()) / length
    across = (dy * angle.cos() - dx * angle.sin()) / width
    side = across.abs()
    rib = 0.25 * (1 - 8 * side).clamp(min=0)
    return (2 * along - 1).square() + side - 1, 1 + 0.10 * across.clamp(-1, 1) + rib + 0.04 * (
        (22 * along - 5 * side).sin()
    )


def _ring_of_petals(draw, u, v, polar, geometry, start, scale):
    """One layer of petals.

    Args:
        u, v, polar: place in the flower's plane, in flower radii and radians, (N, H, W).
        geometry: columns of `_GEOMETRY` from the count and the petal shape, each (N, 1, 1).
        start, scale: angle of the first petal, (N, 1, 1), and length of the longest, in flower radii.

    Returns:
        field (negative inside), place along a petal's axis (0 base, 1 tip) and across it (-1 .. 1), nearness to the
        next petal (0 on the axis, 1 on the seam), cosine and sine of the axis, and the petal's own lightness, (N, H, W).
    """
    count, tip, base, roundness, widest, half_width, fill, notch = geometry
    turn = 2 * math.pi / count
    # The petal whose axis is nearest owns the pixel: neighbours meet in a seam half-way between them.
    sector = (polar - start) / turn
    petal = sector.round().remainder(count).long()

    def own(of_petal: Float[Tensor, "N petals"]) -> Float[Tensor, "N H W"]:
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
    return field, along, side, 2 * (sector - sector.round()).abs(), cos, sin, own(draw(0.92, 1.08, most))


def _paint(image, colour, cover):
    """Lay a colour, (N, 3, H or 1, W or 1), over the image, (N, 3, H, W), where the cover, (N, H, W), says."""
    return torch.lerp(image, colour.expand_as(image), cover[:, None])


def _background(draw, x, y, lightness) -> Float[Tensor, "N 3 H W"]:
    """Two kindred colours mixed by a random wave pattern (clouds to stripes), and leaves out of focus on it."""
    wave = 0
    for octave in range(4):
        angle, pace = draw(0, 2 * math.pi), draw(1, 3) * 1.5**octave
        phase = pace * (x * angle.cos() + y * angle.sin()) + draw(0, 2 * math.pi)
        wave = wave + draw(0.2, 1) * 1.3**-octave * (phase + 0.6 * wave).sin()
    hue, chroma = draw(0, 2 * math.pi), draw(0.01, 0.14)
    dark = _colour(lightness - draw(0.0, 0.10), chroma, hue)
    light = _colour(lightness + draw(0.0, 0.05), chroma, hue + draw(-0.8, 0.8))
    image = torch.lerp(dark, light, torch.sigmoid(wave * draw(1, 8))[:, None])
    for _ in range(5):
        angle, length, width = draw(0, 2 * math.pi), draw(0.4, 1.4), draw(0.08, 0.35)
        field, shade = _leaf(x, y, draw(-1.2, 1.2), draw(-1.2, 1.2), angle, length, width)
        colour = _colour(lightness + draw(-0.14, 0.10), draw(0.02, 0.15), hue + draw(-1.2, 1.2))
        image = _paint(image, colour * shade[:, None], draw(0.5, 1) * _coverage(field, blur=draw(0.0, 0.2)))
    return image


def _flower(draw, image, x, y, radius, middle, geometry, lightness):
    """Paint the flower over the image, (N, 3, H, W); returns it with the mask, (N, H, W)."""
    count, layers, disc, hole, *shape = geometry
    # Pose: a plane tilted about a random axis, with mild perspective, turned and scaled; (u, v) in flower radii.
    tilt_axis, tilt, spin = draw(0, 2 * math.pi), draw(0, 0.75), draw(0, 2 * math.pi)
    dx, dy = x - middle[0], y - middle[1]
    flat, steep = dx * tilt_axis.cos() + dy * tilt_axis.sin(), dy * tilt_axis.cos() - dx * tilt_axis.sin()
    depth = radius * (1 + draw(-0.3, 0.3) * tilt * steep)
    flat, steep = flat / depth, steep / (depth * tilt.cos())
    u, v = flat * spin.cos() - steep * spin.sin(), flat * spin.sin() + steep * spin.cos()
    polar, reach = torch.atan2(v, u), (u.square() + v.square()).sqrt()

    hue, chroma, sun = draw(0, 2 * math.pi), draw(0.04, 0.24), draw(0, 2 * math.pi)
    base_hue, base_lightness, base_extent = hue + draw(-1.2, 1.2), lightness + draw(-0.12, 0.12), draw(0.3, 0.9)
    vein, seam, curl, cup = draw(0, 0.12), draw(0.25, 0.5), draw(0.05, 0.25), draw(-0.2, 0.3)
    mask = torch.zeros(image.shape[0], *image.shape[2:], dtype=torch.uint8)
    for scale, shift, present in ((1.0, 0.0, layers > 0), (0.70, 0.5, layers > 1)):
        start = shift * 2 * math.pi / count
        field, along, side, border, cos, sin, own = _ring_of_petals(
            draw, u, v, polar, (count, *shape), start, scale
        )
        tip_colour = _colour(lightness + shift * draw(-0.2, 0.2), chroma, hue + shift * draw(-1.5, 1.5))
        base_colour = _colour(base_lightness, chroma, base_hue)
        petal = torch.lerp(tip_colour, base_colour, (1 - along / base_extent).clamp(0, 1)[:, None])
        towards_sun, past_sun = cos * sun.cos() + sin * sun.sin(), cos * sun.sin() - sin * sun.cos()
        shade = own + curl * side.clamp(-1, 1) * past_sun + cup * (along - 0.5) * (1 + towards_sun) / 2
        shade = shade - vein * (0.5 + 0.5 * (9 * side).cos()) - seam * (4 * (border - 0.75)).clamp(0, 1) * (field < 0)
        # A soft contact shadow around the layer, on whatever lies beneath.
        image = image * (1 - present * 0.45 * torch.exp(-3 * field.clamp(min=0)))[:, None]
        cover = present * _coverage(field)
        image = _paint(image, petal * shade[:, None], cover)
        mask[cover > 0.5] = 1

    centre_lightness = lightness + torch.where(lightness > 0.62, -1, 1) * draw(0.22, 0.38)
    rim = _colour(centre_lightness, draw(0.04, 0.17), draw(0, 2 * math.pi))
    eye = _colour(lightness + draw(-0.05, 0.05), draw(0.04, 0.17), draw(0, 2 * math.pi))
    image = image * (1 - 0.45 * torch.exp(-14 * (reach - disc).clamp(min=0)))[:, None]
    cover = _coverage(reach - disc)
    dots = 1 + draw(0.05, 0.2) * (34 * u).sin() * (34 * v).sin() + 0.3 * (0.5 - reach / disc)
    image = _paint(image, rim * dots[:, None], cover)
    image = _paint(image, eye, (hole > 0) * _coverage(reach - hole))
    mask[cover > 0.5] = 2
    return image, mask


def _scene(indices: Int[Tensor, " N"], split: str, seed: int, size: int):
    """Paint one chunk of images from back to front: background, flower, leaves before it, light, lens."""
    draw = _Draws(indices, split, seed)
    geometry = _GEOMETRY[indices % len(CLASSES)].T[:, :, None, None]
    grid = (torch.arange(size, dtype=torch.float64) + 0.5) * (2 / size) - 1
    x, y = grid[None, None, :], grid[None, :, None]

    # The petals are clearly lighter or clearly darker than the background; all hues are free.
    low, gap, petals_light = draw(0.34, 0.52), draw(0.28, 0.46), draw(0, 1) < 0.6
    high = (low + gap).clamp(max=0.93)
    image = _background(draw, x, y, torch.where(petals_light, low, high))
    radius = draw(0.68, 0.95)
    middle = [draw(-1, 1) * (1.05 - radius) for _ in "xy"]
    image, mask = _flower(draw, image, x, y, radius, middle, geometry, torch.where(petals_light, high, low))

    for chance in (0.4, 0.2):  # leaves before the flower, reaching in from outside
        angle, inwards = draw(0, 2 * math.pi), draw(0.45, 1.0) * radius
        tip = middle[0] + inwards * angle.cos(), middle[1] + inwards * angle.sin()
        field, shade = _leaf(x, y, *tip, angle + draw(-0.4, 0.4), draw(1.2, 2.5), draw(0.07, 0.2))
        colour = _colour(draw(0.3, 0.8), draw(0.02, 0.15), draw(0, 2 * math.pi))
        cover = (draw(0, 1) < chance) * _coverage(field)
        image = _paint(image, colour * shade[:, None], cover)
        mask[cover > 0.5] = 0

    light, vignette = draw(0, 2 * math.pi), draw(0, 0.2)
    lit = 1 + draw(0, 0.25) * (x * light.cos() + y * light.sin()) - vignette * (x.square() + y.square())
    image = 0.5 + draw(0.85, 1.15)[:, None] * (image * lit[:, None] - 0.5) + draw(-0.03, 0.07)[:, None]
    pixel = torch.arange(size, dtype=torch.float64)
    blur = torch.softmax(-0.5 * ((pixel - pixel[:, None]) * 72 / size).square(), dim=1)  # sigma: 1/72 of the side
    soft = blur @ image @ blur.T
    image = torch.lerp(image, soft, draw(0, 0.5)[:, None])
    noise = draw.bits(1024, size * size).view(-1, 1, size, size) >> torch.tensor([0, 21, 42])[:, None, None] & ((1 << 21) - 1)
    image = image + draw(0, 0.07)[:, None] * (noise.double() * 2.0**-21 - 0.5)
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), mask


def render(
    indices: Sequence[int] | Int[Tensor, " N"], *, split: str, seed: int = 0, size: int = 64
) -> tuple[UInt8[Tensor, "N 3 side side"], UInt8[Tensor, "N side side"], Int[Tensor, " N"]]:
    """Draw the flowers with these indices.

    The class of image `index` is `index % len(CLASSES)`. The same (seed, split, index) at another `size` is the same
    picture at another resolution, but for the noise of the camera.

    Returns:
        images, 0 .. 255; masks, 0 background (and what hides the flower), 1 petals, 2 centre; labels, int64.

    Raises:
        ValueError: unknown split, a size below 16, or indices that are not a row of non-negative integers.
    """
    if split not in SPLITS:
        raise ValueError(f"petals has no split {split!r}; choose one of {', '.join(SPLITS)}.")
    if size < 16:
        raise ValueError(f"petals of size {size} cannot be told apart; choose a size of 16 pixels or more.")
    indices = torch.as_tensor(indices if isinstance(indices, Tensor) else list(indices)).cpu()
    if indices.numel() == 0:
        indices = indices.long()
    if indices.ndim != 1 or indices.is_floating_point() or (indices < 0).any():
        raise ValueError(f"indices must be a row of integers from 0 on, got {indices}; pass for example range(16).")
    indices = indices.long()
    images = torch.empty(len(indices), 3, size, size, dtype=torch.uint8)
    masks = torch.empty(len(indices), size, size, dtype=torch.uint8)
    chunk = max(1, 2**17 // size**2)  # keeps the working set near the processor's cache
    for i in range(0, len(indices), chunk):
        images[i : i + chunk], masks[i : i + chunk] = _scene(indices[i : i + chunk], split, seed, size)
    return images, masks, indices % len(CLASSES)


def petals(
    split: str, count: int, *, seed: int = 0, size: int = 64, cache: Path | None = CACHE
) -> tuple[UInt8[Tensor, "N 3 side side"], UInt8[Tensor, "N side side"], Int[Tensor, " N"]]:
    """Flowers 0 .. count - 1 of a split, as `render` draws them, kept in one safetensors file in the folder `cache`.

    A file that is torn, of another shape, or whose last flower is not what `render` draws today is drawn anew; one
    that cannot be written costs a warning. `cache=None` neither reads nor writes.
    """
    if count < 1:
        raise ValueError(f"petals needs a count of at least 1, got {count}.")
    last = dict(zip(("images", "masks", "labels"), render([count - 1], split=split, seed=seed, size=size), strict=True))
    path = cache and Path(cache) / f"petals-v{VERSION}-seed{seed}-{split}-{count}x{size}.safetensors"
    if path and path.is_file():
        try:
            kept = load_file(path)
        except (SafetensorError, OSError):
            kept = {}  # torn: drawn anew below
        if kept.keys() == last.keys() and all(
            len(kept[k]) == count and kept[k].dtype == last[k].dtype and torch.equal(kept[k][-1:], last[k]) for k in last
        ):
            return kept["images"], kept["masks"], kept["labels"]
    flowers = render(range(count), split=split, seed=seed, size=size)
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".tmp", delete=False) as file:
                try:
                    file.write(save(dict(zip(last, flowers, strict=True))))
                    file.close()
                    os.replace(file.name, path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError as error:
            warnings.warn(f"the flowers are drawn but not kept: {error}. Pass a folder you can write as cache.", stacklevel=2)
    return flowers
