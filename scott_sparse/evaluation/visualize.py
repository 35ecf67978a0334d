"""Pictures of what an encoder sees: principal components, attention and similarity of its tokens.

Pretrained at 48 pixels with patches of 8, an encoder has 6 x 6 tokens for an image. `on_fine_grid` gives more, in two
ways that differ in what a token sees. In a larger image each patch is a smaller part of the scene: from about four
times the size of training on, tokens of petals tell outlines from areas, no longer one part from another. With
overlapping patches a token sees as much as before: the encoder runs on shifted copies of the image, and their tokens
interleave (shift-and-stitch, arXiv 1411.4038, section 3.2). Petals show best with both: images of twice the size of
training, and shifts to about `ROWS` rows of tokens. At another size than in training the positions must be
interpolated (`span` of `FrozenEncoder`): indices that were never seen in training show as a chequered pattern.
"""

import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from PIL import Image

from scott_sparse.data.images import Images
from scott_sparse.data.sources import printable
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import eval_images
from scott_sparse.shapes import Bool, Float, Tensor

SMALL_SIDE = 64  # pixels
ROWS = 40  # of tokens along the shorter side of an image by default, if four shifts along a side are enough
Point = tuple[float, float]
Row = tuple[str, Float[Tensor, "B h w *rgb"]]


def form_of_run(sides: tuple[int, int], patch_size: int) -> tuple[tuple[int, int], int]:
    """Size of the images and stride of the tokens in the picture of a run: fine for small images, else cheap."""
    if max(sides) > SMALL_SIDE:
        return sides, max(patch_size // 2, 1)
    size = (2 * sides[0], 2 * sides[1])
    return size, default_stride(size, patch_size)


def default_stride(size: tuple[int, int], patch_size: int) -> int:
    """The patch size halved until images of `size` have `ROWS` rows and columns of tokens, at most twice."""
    stride = patch_size
    while stride % 2 == 0 and min(size) // stride < ROWS and stride > patch_size // 4:
        stride //= 2
    return stride


@torch.inference_mode()
def on_fine_grid(
    features: Callable[[Float[Tensor, "B c H W"]], Float[Tensor, "B N C"]],
    images: Float[Tensor, "B c H W"],
    *,
    patch_size: int,
    stride: int,
) -> Float[Tensor, "B h w C"]:
    """Features of patches that are `stride` pixels apart, h = H / stride, on the CPU; `features` gives N of an image.

    The encoder runs (patch_size / stride)^2 times, on copies that are shifted by multiples of `stride`. Raises
    ValueError for a stride that does not divide the patch size, and sides that are no multiples of the patch size.
    """
    height, width = images.shape[-2:]
    if stride < 1 or patch_size % stride:
        raise ValueError(f"stride {stride} does not divide patch_size {patch_size}; use {patch_size} or half of it.")
    shifts, margin = patch_size // stride, patch_size // 2
    padded = F.pad(images, (margin, margin, margin, margin), mode="reflect")
    views = (
        padded[..., top : top + height, left : left + width]
        for top in range(stride // 2, stride // 2 + patch_size, stride)
        for left in range(stride // 2, stride // 2 + patch_size, stride)
    )
    stacked = torch.stack([features(view).float().cpu() for view in views])
    return rearrange(stacked, "(i j) b (h w) c -> b (h i) (w j) c", i=shifts, j=shifts, h=height // patch_size)


def tokens_of(
    encoder: FrozenEncoder, images: Float[Tensor, "B C H W"], *, stride: int | None = None
) -> Float[Tensor, "B h w D"]:
    """Tokens of the last block on a fine grid."""
    return _features(encoder, lambda view: encoder(view)[1], images, stride)


def attention_of(
    encoder: FrozenEncoder, images: Float[Tensor, "B C H W"], *, stride: int | None = None
) -> Float[Tensor, "B h w heads"]:
    """How much attention each patch receives in the last block, averaged over all patches that attend, by head.

    As there is no class token whose attention could be shown. 1 is the mean over the patches.
    """

    def received(view: Tensor) -> Tensor:
        one_by_one = (encoder.encoder.last_attention(image, encoder.span).mean(2).mT for image in view.split(1))
        weights = torch.cat(list(one_by_one))  # N x N weights of all images at once may not fit into memory
        return weights / weights.mean(1, keepdim=True)

    return _features(encoder, received, images, stride)


def _features(encoder: FrozenEncoder, features: Callable, images: Tensor, stride: int | None) -> Tensor:
    p, device = encoder.encoder.config.patch_size, next(encoder.parameters()).device
    stride = default_stride((images.shape[2], images.shape[3]), p) if stride is None else stride
    return on_fine_grid(features, images.to(device), patch_size=p, stride=stride)


def principal_components(tokens: Float[Tensor, "n D"], count: int) -> Float[Tensor, "n count"]:
    """Coordinates along the first principal components."""
    centred = tokens - tokens.mean(0)
    return centred @ torch.linalg.eigh(centred.T @ centred).eigenvectors.flip(1)[:, :count]


def foreground(tokens: Float[Tensor, "B h w D"]) -> Bool[Tensor, "B h w"]:
    """One side of the first principal component of all tokens: the one with less than half of the border patches."""
    B, h, w, _ = tokens.shape
    inside = rearrange(principal_components(tokens.flatten(0, 2), 1) > 0, "(b h w) 1 -> b h w", b=B, h=h)
    border = torch.ones(h, w, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    if inside[:, border].float().mean() > 0.5:
        inside = ~inside
    return inside if inside.any() else ~inside  # images of one colour


def principal_colours(tokens: Float[Tensor, "B h w D"], inside: Bool[Tensor, "B h w"]) -> Float[Tensor, "B h w 3"]:
    """The first three principal components of the tokens `inside` as red, green and blue in [0, 1]; the others white.

    The components are those of all images together, so that equal colours mean similar features (DINOv2, arXiv
    2304.07193, figure 1).
    """
    colours = principal_components(tokens[inside], 3)
    low, high = colours.quantile(torch.tensor([0.02, 0.98]), dim=0)
    picture = torch.ones(*inside.shape, 3)
    picture[inside] = ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1)
    return picture


def similarity_to(tokens: Float[Tensor, "B h w D"], point: Point) -> Float[Tensor, "B h w"]:
    """Cosine similarity of the token of the first image at `point`, (down, across) in 0 to 1, to all tokens."""
    h, w = tokens.shape[1:3]
    if not all(0 <= share <= 1 for share in point):
        raise ValueError(f"point {point[0]:g} {point[1]:g} is outside the image; give shares of its sides, 0 to 1.")
    directions = F.normalize(tokens, dim=-1)
    return directions @ directions[0, min(int(point[0] * h), h - 1), min(int(point[1] * w), w - 1)]


def titles_of(images: Images, classes: Sequence[str] | None) -> list[str]:
    """The class of each image, or the name of its file."""
    labels = [-1] * len(images) if images.labels is None else images.labels.tolist()
    named = zip(images.names, labels)
    return [classes[label] if classes and label >= 0 else Path(name).name for name, label in named]


def draw_tokens(
    path: Path,
    images: Images,
    encoders: Mapping[str, FrozenEncoder],
    *,
    size: tuple[int, int],
    stride: int | None = None,
    titles: Sequence[str] | None = None,
) -> dict[str, Float[Tensor, "B h w D"]]:
    """Write a PNG with a column for each image; rows: images, then the `principal_colours` for each encoder by name, of
    all patches and of the foreground.

    `size`: (height, width) of the images in pixels; `stride`: pixels between tokens. Returns the tokens by encoder.
    """
    tokens = {
        name: tokens_of(encoder, _views(images, encoder, size), stride=stride) for name, encoder in encoders.items()
    }
    rows = []
    for name, each in tokens.items():
        inside = foreground(each)
        rows.append((name, principal_colours(each, torch.ones_like(inside))))
        rows.append((f"{name},\nforeground", principal_colours(each, inside)))
    draw_rows(path, images, rows, size, titles)
    return tokens


def _views(images: Images, encoder: FrozenEncoder, size: tuple[int, int]) -> Float[Tensor, "B C h w"]:
    return eval_images(images, torch.arange(len(images)), size=size, statistics=encoder.statistics)


def draw_attention(
    path: Path,
    images: Images,
    encoder: FrozenEncoder,
    *,
    size: tuple[int, int],
    stride: int | None = None,
    titles: Sequence[str] | None = None,
) -> None:
    """As `draw_tokens`, with a row for each head of the last block (`attention_of`); each map in its own scale."""
    heads = attention_of(encoder, _views(images, encoder, size), stride=stride).unbind(-1)
    rows = [(f"head {i}", head / head.amax((1, 2), keepdim=True)) for i, head in enumerate(heads, 1)]
    draw_rows(path, images, rows, size, titles)


def draw_similarity(
    path: Path,
    images: Images,
    tokens: Mapping[str, Float[Tensor, "B h w D"]],
    *,
    points: Sequence[Point],
    size: tuple[int, int],
    titles: Sequence[str] | None = None,
) -> None:
    """As `draw_tokens`, with a row for each point of the first image and each encoder (`similarity_to`)."""
    rows = [
        (f"{chr(ord('A') + i)}, {name}", similarity_to(each, point).clamp(0, 1))
        for i, point in enumerate(points)
        for name, each in tokens.items()
    ]
    draw_rows(path, images, rows, size, titles, points)


def pictures_of(images: Images, *, size: tuple[int, int]) -> Float[Tensor, "B H W 3"]:
    """The centre crop of each image in colours."""
    return colours_of(eval_images(images, torch.arange(len(images)), size=size, statistics=unscaled(images.channels)))


def unscaled(channels: int) -> dict[str, tuple[float, ...]]:
    """The statistics by which views keep values from 0 to 1."""
    return {"mean": (0.0,) * channels, "std": (1.0,) * channels}


def colours_of(views: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B H W 3"]:
    """Colours of views with values from 0 to 1.

    Of other than three channels the first three bands are shown, of two the second twice, one as grey.
    """
    bands = views[..., [min(band, views.shape[-3] - 1) for band in range(3)], :, :]
    return rearrange(bands.clamp(0, 1), "... c H W -> ... H W c")


def draw_rows(
    path: Path,
    images: Images,
    rows: Sequence[Row],
    size: tuple[int, int],
    titles: Sequence[str] | None,
    points: Sequence[Point] = (),
    legend: Mapping[str, tuple[float, float, float]] | None = None,
) -> None:
    """A column for each image, with the image in the first row, in which `points` of the first image are marked.

    A row's pictures are colours, or maps with values in [0, 1], for an image of `size`. `legend`: colours by name.
    """
    height, width = size
    rows = [("image", pictures_of(images, size=(2 * height, 2 * width))), *rows]  # sharper than the maps
    layout = ConstrainedLayoutEngine(w_pad=0.01, h_pad=0.01, wspace=0, hspace=0)
    figsize = 1.3 * len(images) + 0.3, 1.33 * height / width * len(rows) + 0.35
    figure = Figure(figsize=figsize, dpi=90, layout=layout)
    grid = figure.subplots(len(rows), len(images), squeeze=False)
    for number, (axes, (name, pictures)) in enumerate(zip(grid, rows)):
        for axis, picture in zip(axes, pictures):
            smooth = "bicubic" if picture.ndim == 2 else "nearest" if number else "antialiased"
            extent = (0, width, height, 0)
            axis.imshow(picture.numpy(), interpolation=smooth, cmap="inferno", vmin=0, vmax=1, extent=extent)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        axes[0].set_ylabel(name, fontsize=8)
    for i, (down, across) in enumerate(points):
        style = {"color": "white", "fontsize": 8, "ha": "center", "va": "center", "weight": "bold"}
        box = {"boxstyle": "circle,pad=0.15", "facecolor": "black", "edgecolor": "white"}
        grid[0, 0].text(across * width, down * height, chr(ord("A") + i), bbox=box, **style)
    for axis, title in zip(grid[0], titles or ()):
        text = "\n".join(textwrap.wrap(printable(title), 20, max_lines=3, placeholder="…"))
        axis.set_title(text, fontsize=7, parse_math=False)
    if legend:
        patches = [Patch(color=colour, label=printable(name)) for name, colour in legend.items()]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(images), fontsize=7, frameon=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # an emoji in a file's name is drawn as a box
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]
    Image.fromarray(pixels & 0xFC | pixels >> 6).save(path, optimize=True)  # 6 bits a channel: files half as large
