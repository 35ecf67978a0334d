"""Pictures in a run's report: views and masks, tokens, attention, nearest neighbours.

Each section is a file RUN/report/SECTION.json that the page embeds (`html_report`): strips with a title, of small
pictures with a label each, as data URIs. So the page can be written again in a moment, and without the images.
"""

import base64
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from matplotlib import colormaps
from PIL import Image

from scott_sparse.data.dataset import Data, evenly_spaced
from scott_sparse.data.images import Images
from scott_sparse.data.splits import load_digests
from scott_sparse.data.views import make_views
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import Features, eval_images, extract
from scott_sparse.evaluation.knn import nearest
from scott_sparse.evaluation.visualize import (
    attention_of,
    colours_of,
    draw_tokens,
    foreground,
    form_of_run,
    pictures_of,
    principal_colours,
    titles_of,
    unscaled,
)
from scott_sparse.files import load_strictly, read_json, write_atomically
from scott_sparse.model.pretrained import first_encoder
from scott_sparse.model.vit import Encoder
from scott_sparse.model.weights import WEIGHTS, load_encoder
from scott_sparse.randomness import batch_indices
from scott_sparse.shapes import Float, Int, Tensor
from scott_sparse.training.checkpoint import newest_valid, step_of
from scott_sparse.training.recipe import Recipe
from scott_sparse.training.resume import CHECKPOINTS, PICTURES, RECIPE, TOKENS
from scott_sparse.training.run import batches_of, open_images, preprocess_of

FIGURE_IMAGES = 8  # of tokens and attention
VIEWED_IMAGES, QUERIES, NEIGHBOURS, PAIRS = 6, 12, 5, 8
MAX_BANK_IMAGES = 4096  # among which neighbours are found
MAX_SIDE = 96  # pixels of a picture
HIDDEN_GREY = 0.55


class Strip(NamedTuple):
    title: str
    cells: Sequence[tuple[str, str]]
    """A label and a data URI of each picture."""


def draw_views(out: Path, recipe: Recipe, data: Data) -> None:
    """Write what the first step sees of a few images: the target view, and each crop with its hidden patches in grey.

    `out`: the run folder. Raises OSError if the disk is full.
    """
    images, patch, (h, w) = data.pretrain, recipe.patch_size, recipe.grid
    # Of so many processes the first has the images that are shown.
    batch = batches_of(recipe, images, processes=max(recipe.batch_size // VIEWED_IMAGES, 1))[0][0]
    context, target = make_views(batch.crops, batch.views, size=recipe.sides, **unscaled(images.channels))
    scale = torch.ones(patch, patch)
    visible = torch.kron(batch.visible.unflatten(-1, (h, w)).float(), scale)[..., None].bool()  # B V H W 1
    crops = colours_of(context)
    crops = torch.where(visible, crops, 0.15 * crops.mean(-1, keepdim=True) + 0.85 * HIDDEN_GREY)
    coloured = recipe.views.crops - recipe.views.plain_crops
    labels = [f"crop {i + 1}{', plain' if i >= coloured else ''}" for i in range(recipe.views.crops)]
    rows = batch_indices(0, images=len(images), batch=recipe.batch_size, seed=recipe.seed)[:VIEWED_IMAGES]
    few, strips = images[rows], []
    for i, title in enumerate(titles_of(few, data.classes)):
        whole = rearrange(torch.tensor(few.read(int(few.rows[i]))) / 255, "H W c -> c H W")
        cells = [("image", data_uri(colours_of(whole)))]
        if recipe.objective.mim_weight:
            cells.append(("target", data_uri(colours_of(target[i]))))
        strips.append(Strip(title, [*cells, *zip(labels, map(data_uri, crops[i]))]))
    _write(out, "views", strips)


def bank_of(data: Data) -> Images:
    """The images among which neighbours are found: those of pretraining, at most `MAX_BANK_IMAGES` of them."""
    return data.pretrain[evenly_spaced(len(data.pretrain), MAX_BANK_IMAGES)]


def draw_learned(
    out: Path, recipe: Recipe, data: Data, encoders: Mapping[str, Encoder], features: Features, *, note: str = ""
) -> None:
    """Write tokens.png, and what the encoders see, of which one is called "pretrained".

    `features` are the pretrained encoder's of `bank_of` the data. Raises OSError if the disk is full.
    """
    device = next(encoders["pretrained"].parameters()).device
    few = data.val or data.pretrain
    few = few[evenly_spaced(len(few), FIGURE_IMAGES)]
    titles, pictures = titles_of(few, data.classes), _thumbnails(few, recipe)
    size, stride = form_of_run(recipe.sides, recipe.patch_size)
    on_grid = {name: FrozenEncoder(encoder.to(device), recipe.grid) for name, encoder in encoders.items()}
    tokens = draw_tokens(out / TOKENS, few, on_grid, size=size, stride=stride)
    maps = {"image": pictures}
    for name, each in tokens.items():
        inside = foreground(each)
        for label, where in ((name, torch.ones_like(inside)), (f"{name}, foreground", inside)):
            colours = torch.cat([principal_colours(each, where), where[..., None]], dim=-1)  # elsewhere transparent
            maps[label] = [data_uri(picture, lossless=True) for picture in colours]
    _write(out, "tokens", _columns(titles, maps), note)

    statistics = on_grid["pretrained"].statistics
    views = eval_images(few, torch.arange(len(few)), size=size, statistics=statistics)
    maps = {"image": pictures}
    for number, head in enumerate(attention_of(on_grid["pretrained"], views, stride=stride).unbind(-1), 1):
        highest = head.flatten(1).quantile(0.98, dim=1)[:, None, None]  # the maximum may be that of a single patch
        shares = (head / highest.clamp(min=1e-6)).clamp(max=1).numpy()
        maps[f"head {number}"] = [data_uri(torch.from_numpy(colormaps["inferno"](x)[..., :3])) for x in shares]
    _write(out, "attention", _columns(titles, maps), note)
    _draw_neighbours(out, recipe, data, features, note)


def _draw_neighbours(out: Path, recipe: Recipe, data: Data, features: Features, note: str) -> None:
    """Write the nearest others of a dozen images, and of all images the pairs that are closest and farthest."""
    bank = bank_of(data)
    titles, (similarity, index) = titles_of(bank, data.classes), others(features.mean, NEIGHBOURS)

    @functools.cache
    def picture(i: int) -> str:
        return _thumbnails(bank[torch.tensor([i])], recipe)[0]

    strips = []
    for i in evenly_spaced(len(bank), QUERIES).tolist():
        found = [(f"{s:.3f} {titles[j]}", picture(j)) for s, j in zip(similarity[i].tolist(), index[i].tolist())]
        strips.append(Strip(titles[i], [(Path(bank.names[i]).name, picture(i)), *found]))
    _write(out, "neighbours", strips, note)

    nearest_others = zip(similarity[:, :1].flatten().tolist(), index[:, :1].flatten().tolist())
    pairs = {frozenset((i, j)): (s, i, j) for i, (s, j) in enumerate(nearest_others)}  # each once
    in_order = sorted(pairs.values(), reverse=True)
    for name, some in (("closest", in_order[:PAIRS]), ("isolated", in_order[::-1][:PAIRS])):
        strips = [Strip(f"{s:.4f}", [(bank.names[n], picture(n)) for n in (i, j)]) for s, i, j in some]
        _write(out, name, strips, note)


def draw_again(out: Path, *, data: str | None = None, every: bool = False) -> None:
    """Draw the pictures of a run that are missing in its folder, or `every` one, from its images and weights.

    Of a run that has not come to its end the newest checkpoint is taken, if there is one. `data`: where the images are
    now. Raises ValueError if they are not those of the run, and as `open_data`.
    """
    recipe = Recipe.from_json({k: v for k, v in read_json(out / RECIPE).items() if k != "recipe"})
    drawn = set() if every else {path.stem for path in (out / PICTURES).glob("*.json")}
    checkpoint = None if (out / WEIGHTS["target"]).is_file() else newest_valid(out / CHECKPOINTS)[0]
    missing = {"views", "isolated"} - drawn
    if checkpoint is None and not (out / WEIGHTS["target"]).is_file():
        missing.discard("isolated")
    if not missing:
        return
    source = dataclasses.replace(recipe.source, data=data or recipe.source.data)
    images, digests = open_images(dataclasses.replace(recipe, source=source)), load_digests(out)
    if digests is not None and not torch.equal(digests, images.pretrain.digests):
        raise ValueError(f"the images of {source.data} are not those that {out} was pretrained on.")
    if "views" in missing:
        draw_views(out, recipe, images)
    if "isolated" not in missing:  # the last that is drawn
        return
    initial = first_encoder(recipe.encoder, seed=recipe.seed, init=recipe.init)
    if checkpoint:
        pretrained = Encoder(initial.config)
        load_strictly(pretrained, checkpoint / "target.safetensors")
        pretrained.preprocess = preprocess_of(recipe, images.pretrain)
    else:
        pretrained = load_encoder(out)
    initial.preprocess = pretrained.preprocess
    features = extract(FrozenEncoder(pretrained), bank_of(images), size=recipe.sides)
    assert features is not None  # there is one process
    note = f"By the checkpoint after step {step_of(checkpoint):,}." if checkpoint else ""
    draw_learned(out, recipe, images, {recipe.start_name: initial, "pretrained": pretrained}, features, note=note)


def others(features: Float[Tensor, "n C"], k: int) -> tuple[Float[Tensor, "n m"], Int[Tensor, "n m"]]:
    """Cosine similarity and index of the m = min(k, n - 1) nearest others of each of n features, best first."""
    found = nearest(features, features, k=min(k + 1, len(features)))
    similarity, index = (torch.cat(parts) for parts in zip(*found))
    # Of equal images any may come first: its own index goes last, wherever it is, and is cut off.
    order = (index == torch.arange(len(index))[:, None]).int().argsort(dim=1, stable=True)[:, : index.shape[1] - 1]
    return similarity.gather(1, order), index.gather(1, order)


def data_uri(picture: Float[Tensor, "H W C"], *, lossless: bool = False) -> str:
    """A picture with values in [0, 1], made smaller than `MAX_SIDE`, as WebP for the `src` of an HTML image."""
    image = Image.fromarray((picture * 255).round().byte().cpu().numpy())
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=80, lossless=lossless)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def _thumbnails(images: Images, recipe: Recipe) -> list[str]:
    """The centre crop of each image, which evaluations see, in full size."""
    height, width = (max(round(side * MAX_SIDE / max(recipe.sides)), 1) for side in recipe.sides)
    return [data_uri(picture) for picture in pictures_of(images, size=(height, width))]


def _columns(titles: Sequence[str], maps: Mapping[str, Sequence[str]]) -> list[Strip]:
    """A strip for each image, of one picture from each of the maps by label."""
    return [Strip(title, list(zip(maps, pictures))) for title, *pictures in zip(titles, *maps.values())]


def _write(out: Path, section: str, strips: Iterable[Strip], note: str = "") -> None:
    content = {"strips": [strip._asdict() for strip in strips], "note": note}
    write_atomically(out / PICTURES / f"{section}.json", json.dumps(content))
