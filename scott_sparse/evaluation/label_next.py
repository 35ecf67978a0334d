"""Which images to label next: k-centre over the pooled features, so that few labels cover what the images show."""

import csv
import dataclasses
import io
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from scott_sparse.data.dataset import open_data, short_side_for
from scott_sparse.data.images import Images
from scott_sparse.data.sources import printable
from scott_sparse.evaluation.coreset import k_centre
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.metrics import check_finite
from scott_sparse.evaluation.probe import file_name
from scott_sparse.evaluation.subject import ProbeConfig, open_encoder
from scott_sparse.evaluation.visualize import pictures_of
from scott_sparse.files import write_atomically
from scott_sparse.shapes import Float, Tensor

SHEET_COLUMNS, THUMBNAIL = 10, 96  # pixels


@dataclasses.dataclass(frozen=True)
class LabelNextConfig(ProbeConfig):
    """The flags of eval/label_next.py."""

    count: int = 50
    """How many images to choose."""
    keep_labelled: bool = False
    """Images that have a label are the first centres, and are not chosen: for data of which a part is labelled."""


def choose_next(config: LabelNextConfig) -> None:
    """Write the chosen images as CSV and as contact sheet, the one that shows most that is new first.

    Raises ValueError where fewer images than `count` can be chosen, and as `open_encoder` and `open_data`.
    """
    encoder = open_encoder(config)
    source = encoder.source(config.source)
    images = open_data(source, short_side=short_side_for(encoder.size)).pretrain
    labelled = torch.zeros(len(images), dtype=torch.bool)
    if config.keep_labelled:
        if images.labels is None or not (images.labels >= 0).any():
            raise ValueError(f"--keep-labelled: no image of --data {source.data} has a label; leave the flag out.")
        labelled = images.labels >= 0
    free = (~labelled).nonzero()[:, 0]
    if not 1 <= config.count <= len(free):
        which = "images without a label; leave out --keep-labelled" if config.keep_labelled else "images of --data"
        raise ValueError(f"count {config.count} is outside 1 to {len(free)}, the number of {which}.")
    features = extract(encoder.model, images, size=encoder.size, crops=config.crops, workers=config.workers)
    if features is None:  # not the main process
        return
    check_finite(features.mean)
    directions = F.normalize(features.mean, dim=1)  # as k-NN compares them
    starts = directions[labelled] if labelled.any() else None
    rows, distances = k_centre(directions[free], config.count, starts=starts, what="images to label")
    chosen = images[free[rows]]
    path = encoder.out / f"label-next-{file_name(str(source.data))}.csv"
    write_atomically(path, _table(chosen, distances, Path(str(source.data)).expanduser()))
    write_sheet(path.with_suffix(".png"), chosen)
    print(printable(f"{path}, {path.with_suffix('.png').name}: {config.count} of {len(free):,} images"))
    if (far := distances[-1].item()) < float("inf"):
        print(f"each other image is within a distance of {far:.2f} of a chosen or labelled one (0 equal, 2 opposite)")


def _table(images: Images, distances: Float[Tensor, " k"], folder: Path) -> bytes:
    """CSV: rank, the image's path (or name in a set without files), distance to the nearest one before it."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("rank", "image", "distance"))
    for rank, (name, distance) in enumerate(zip(images.names, distances.tolist()), 1):
        where = str(folder / name) if folder.is_dir() else name
        writer.writerow((rank, where, "" if distance == float("inf") else f"{distance:.4f}"))
    return text.getvalue().encode("utf-8", "surrogateescape")  # names of files may be no text


def write_sheet(path: Path, images: Images) -> None:
    """Write a contact sheet as PNG: the images row by row, each with its rank."""
    views = pictures_of(images, size=(THUMBNAIL, THUMBNAIL))
    columns, step = min(len(images), SHEET_COLUMNS), THUMBNAIL + 4
    sheet = Image.new("RGB", (columns * step, -(-len(images) // columns) * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, view in enumerate((255 * views.numpy()).round().astype(np.uint8)):
        corner = (i % columns * step + 2, i // columns * step + 2)
        sheet.paste(Image.fromarray(view), corner)
        draw.rectangle((*corner, corner[0] + 8 + 6 * len(str(i + 1)), corner[1] + 13), fill="black")
        draw.text((corner[0] + 4, corner[1] + 1), str(i + 1), fill="white")
    sheet.save(path, optimize=True)
