"""Pictures: tokens lie where their patches do, the foreground is found of either sign, any name can be drawn."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from einops import rearrange
from PIL import Image

from scott_sparse import Encoder
from scott_sparse.data.images import Images
from scott_sparse.evaluation import visualize
from scott_sparse.evaluation.encoders import FrozenEncoder


def disc(*, inside, outside, height=12, width=16, dim=8):
    """Tokens of an image with a disc, noise included, and where the disc is."""
    down, across = torch.meshgrid(torch.linspace(-1, 1, height), torch.linspace(-1, 1, width), indexing="ij")
    where = down.square() + across.square() < 0.5
    tokens = torch.where(where[..., None], torch.tensor(inside), torch.tensor(outside))
    return torch.cat([tokens, 0.1 * torch.randn(height, width, dim - tokens.shape[-1])], dim=-1), where


@pytest.mark.parametrize("size", [(16, 16), (24, 40)])
@pytest.mark.parametrize("stride", [8, 4, 2, 1])
def test_a_token_is_that_of_the_patch_around_its_place(size, stride):
    """The mean of a patch as its feature: a box filter of the image, mirrored at its borders."""
    images = torch.randn(2, 3, *size)

    def means(view):
        return rearrange(view, "b c (h p) (w q) -> b (h w) c (p q)", p=8, q=8).mean(-1)

    fine = visualize.on_fine_grid(means, images, patch_size=8, stride=stride)
    offset = stride // 2  # of the first patch in the padded image
    boxes = F.avg_pool2d(F.pad(images, (4, 4, 4, 4), mode="reflect")[..., offset:, offset:], 8, stride)
    expected = boxes[..., : size[0] // stride, : size[1] // stride].permute(0, 2, 3, 1)
    torch.testing.assert_close(fine, expected)


@pytest.mark.parametrize("stride", [0, -1, 3, 16])
def test_strides_that_do_not_divide_a_patch(stride):
    with pytest.raises(ValueError, match=f"stride {stride} does not divide patch_size 8"):
        visualize.on_fine_grid(lambda view: view, torch.zeros(1, 3, 16, 16), patch_size=8, stride=stride)


@pytest.mark.parametrize(
    "size, patch, stride", [((96, 96), 8, 2), ((448, 448), 16, 8), ((448, 600), 8, 8), ((7, 7), 7, 7)]
)
def test_default_stride(size, patch, stride):
    assert visualize.default_stride(size, patch) == stride


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_foreground_is_what_does_not_touch_the_border(sign):
    tokens, where = zip(*(disc(inside=[sign, 0.0], outside=[-sign, 0.0]) for _ in range(3)))
    assert torch.equal(visualize.foreground(torch.stack(tokens)), torch.stack(where))


def test_colours_are_shared_by_the_images():
    """Two discs of one kind have one colour, a third has another; what is around them is white."""
    kinds = ([5.0, 2.0], [5.0, 2.0], [5.0, -2.0])
    tokens, where = zip(*(disc(inside=kind, outside=[-5.0, 0.0]) for kind in kinds))
    tokens = torch.stack(tokens)
    colours = visualize.principal_colours(tokens, visualize.foreground(tokens))
    assert (colours[~torch.stack(where)] == 1).all() and colours.min() >= 0 and colours.max() <= 1
    first, second, third = (picture[disc_at].mean(0) for picture, disc_at in zip(colours, where))
    torch.testing.assert_close(first, second, atol=0.2, rtol=0)
    assert (first - third).abs().max() > 0.6


def test_images_of_one_colour():
    tokens = torch.ones(2, 4, 4, 8)
    assert visualize.principal_colours(tokens, visualize.foreground(tokens)).isfinite().all()


def test_similarity():
    tokens, where = disc(inside=[1.0, 0.0], outside=[0.0, 1.0])
    similarity = visualize.similarity_to(torch.stack([tokens, 7 * tokens]), (0.5, 0.5))
    assert similarity.shape == (2, 12, 16) and similarity[:, where].min() > 0.8 > similarity[:, ~where].max()
    assert similarity[0, 6, 8] == pytest.approx(1)
    assert visualize.similarity_to(tokens[None], (1.0, 0.0))[0, 11, 0] == pytest.approx(1)  # the last row
    with pytest.raises(ValueError, match=r"point -0.1 0.5 is outside the image"):
        visualize.similarity_to(tokens[None], (-0.1, 0.5))


def test_attention_received_is_one_on_average():
    encoder = FrozenEncoder(Encoder(TINY), span=(2, 2))
    attention = visualize.attention_of(encoder, torch.randn(2, 3, 32, 48), stride=8)
    assert attention.shape == (2, 4, 6, 4)
    torch.testing.assert_close(attention.mean((1, 2)), torch.ones(2, 4))


@pytest.mark.parametrize("labels, title", [([0, 2, -1], "[red]"), (None, "0")])
def test_drawing(tmp_path, labels, title):
    """A column for each image, a row for the images and each encoder, pictures as high and wide as the images."""
    pixels = torch.randint(0, 256, (3, 20, 20, 3), dtype=torch.uint8)
    images = Images.of(pixels, None if labels is None else torch.tensor(labels))
    titles = visualize.titles_of(
        images, ("[red]", "b", "$x_ \N{BLOSSOM} \udcff\n a class of many words, too many to be shown")
    )
    assert titles[0] == title and titles[2] == "2"
    encoders = {name: FrozenEncoder(Encoder(dataclasses.replace(TINY, patch_size=8))) for name in ("before", "after")}
    how = {"size": (16, 32), "titles": titles}
    tokens = visualize.draw_tokens(tmp_path / "tokens.png", images, encoders, stride=4, **how)
    assert [tuple(each.shape) for each in tokens.values()] == [(3, 4, 8, 32)] * 2
    visualize.draw_similarity(tmp_path / "similarity.png", images, tokens, points=[(0.5, 0.5), (0.0, 1.0)], **how)
    visualize.draw_attention(tmp_path / "attention.png", images, encoders["after"], stride=8, **how)
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("tokens", "similarity", "attention")]
    assert heights[0] == heights[1] == heights[2]  # 1 + 2 * 2, 1 + 2 * 2 and 1 + 4 rows
