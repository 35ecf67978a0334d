"""What a run ends with: the k-NN table, and the picture of images, visible patches and tokens before and after."""

from pathlib import Path

import torch
from einops import rearrange
from matplotlib.figure import Figure
from rich.table import Table

from scott_sparse.data.dataset import Data
from scott_sparse.data.images import Images
from scott_sparse.data.views import IMAGENET_MEAN, IMAGENET_STD
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels
from scott_sparse.evaluation.features import eval_images, extract
from scott_sparse.evaluation.knn import knn_accuracy
from scott_sparse.model.masks import draw_visible
from scott_sparse.model.vit import Encoder
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Tensor


def knn_queries(data: Data) -> Images | None:
    """The val images, with which a pretraining run may be judged; None without labels, and if they are test images.

    Whoever compares runs by them does not tune on test. The paper protocol may have no val of its own.
    """
    if data.classes is None or data.val is None:
        return None
    is_test = data.test is not None and torch.isin(data.val.rows, data.test.rows).any()
    return None if is_test else data.val


def knn_on_val(data: Data, initial: Encoder, pretrained: Encoder, *, size: tuple[int, int]) -> dict[str, float] | None:
    """k-NN accuracy in per cent on val, of raw pixels and of both encoders; None without `knn_queries`.

    Every process takes its share of the images; the main process has the scores, the others have an empty dict.
    """
    models = {
        "pixels": Pixels(initial.config.patch_size),
        "init": FrozenEncoder(initial),
        "pretrained": FrozenEncoder(pretrained),
    }
    queries, scores = knn_queries(data), {}
    if queries is None:
        return None
    assert data.train.labels is not None and queries.labels is not None
    for name, model in models.items():
        bank, held = (extract(model, part, size=size) for part in (data.train, queries))
        if bank is not None and held is not None:
            scores[name] = round(knn_accuracy(bank.mean, data.train.labels, held.mean, queries.labels), 2)
    return scores


def knn_table(data: Data, knn: dict[str, float], terms: tuple[str, ...]) -> Table:
    """The scores of `knn_on_val` as a table."""
    classes, images = len(data.classes or ()), len(data.val or ())
    table = Table(title=f"k-NN on {images:,} val images, {classes} classes (chance {100 / classes:.1f} %)")
    table.add_column("features")
    table.add_column("accuracy", justify="right")
    table.add_row("raw pixels", f"{knn['pixels']:.1f} %")
    table.add_row("encoder at initialisation", f"{knn['init']:.1f} %")
    table.add_row(f"pretrained with {' + '.join(terms)}", f"[bold]{knn['pretrained']:.1f} %[/bold]")
    return table


@torch.inference_mode()
def draw_tokens(path: Path, data: Data, initial: Encoder, pretrained: Encoder, *, recipe, device, columns: int = 10):
    """Write a PNG with one column per image; rows: image, visible patches, PCA of the tokens before and after."""
    shown = data.val or data.pretrain
    indices = torch.linspace(0, len(shown) - 1, min(columns, len(shown))).long()
    images = eval_images(shown, indices, size=recipe.sides)
    visible = draw_visible(
        len(images),
        recipe.grid,
        hide_ratio=recipe.hide_ratio,
        shape=recipe.mask_shape,
        generator=generator_at(0, "figure"),
    )
    h, w = recipe.grid
    pixels = images * torch.tensor(IMAGENET_STD)[:, None, None] + torch.tensor(IMAGENET_MEAN)[:, None, None]
    pixels = rearrange(pixels.clamp(0, 1), "b c H W -> b H W c")
    shown_patches = visible.view(-1, h, w).repeat_interleave(recipe.patch_size, 1)
    shown_patches = shown_patches.repeat_interleave(recipe.patch_size, 2)[..., None]
    rows = [("image", pixels), ("visible patches", torch.where(shown_patches, pixels, 0.85))]
    for name, encoder in (("tokens before", initial), ("tokens after", pretrained)):
        tokens = encoder(images.to(device)).float().cpu()
        rows.append((name, rearrange(principal_colours(tokens), "b (h w) c -> b h w c", h=h)))

    figure = Figure(figsize=(1.1 * len(images) + 1.2, 1.15 * len(rows)), layout="constrained")
    for axes, (name, pictures) in zip(figure.subplots(len(rows), len(images), squeeze=False), rows):
        for axis, picture in zip(axes, pictures):
            axis.imshow(picture.numpy(), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[0].set_ylabel(name, fontsize=9)
    figure.savefig(path, dpi=130)


def principal_colours(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N 3"]:
    """The first three principal components over all tokens as RGB in [0, 1] (the usual PCA picture of DINOv2)."""
    flat = tokens.flatten(0, 1)
    flat = flat - flat.mean(0)
    components = torch.linalg.svd(flat, full_matrices=False).Vh[:3]
    colours = flat @ components.T
    low, high = colours.quantile(torch.tensor([0.02, 0.98]), dim=0)
    return ((colours - low) / (high - low).clamp(min=1e-6)).clamp(0, 1).view(*tokens.shape[:2], 3)
