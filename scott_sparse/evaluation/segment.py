"""Semantic segmentation on frozen feature maps: a linear head, a small convolutional one, and k-means without labels.

A head gives logits on the grid of the patches. They are resized bilinearly to the pixels of the mask, where loss and
IoU are computed and ignored pixels left out (as in the linear segmentation of DINOv2, arXiv 2304.07193, section 7.4).
Masks are those of the evaluated images: cropped and resized with them. Which maps (the last block or the last four) and
which learning rate: chosen on val for each head, which sees test once.

k-means clusters the features of training patches into as many clusters as there are classes. Labels name the clusters:
one class each, so that most training pixels are right (Hungarian matching, as in PiCIE, arXiv 2103.17070).
"""

import dataclasses
import functools
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from scipy.cluster.vq import kmeans2
from scipy.optimize import linear_sum_assignment
from torch import nn

from scott_sparse.data.dataset import DataConfig, evenly_spaced, short_side_for
from scott_sparse.data.images import Images
from scott_sparse.data.segmentation import IGNORE, class_names, open_segmentation, read_masks
from scott_sparse.data.sources import printable
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.encoders import ImageEncoder
from scott_sparse.evaluation.features import BATCH, eval_images
from scott_sparse.evaluation.metrics import PixelScores, check_finite, score_pixels
from scott_sparse.evaluation.probe import roles_of, write_entry
from scott_sparse.evaluation.report import make_table
from scott_sparse.evaluation.subject import ProbeConfig, count_pretrained_test_images, open_encoder
from scott_sparse.evaluation.visualize import draw_rows, pictures_of
from scott_sparse.randomness import generator_at, seed_at
from scott_sparse.shapes import Float, Int, Tensor, UInt8

HEADS = ("linear", "conv", "kmeans")
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WIDTH = 128  # of the convolutional head
TRAIN_BATCH = 32
CLUSTERED, RESTARTS = 20_000, 4  # features for k-means; the restart with the smallest distances counts
SHOWN = 8  # images
Maps = dict[str, Float[Tensor, "n _ _ _"]]


@dataclasses.dataclass(frozen=True)
class SegmentConfig(ProbeConfig):
    """The flags of eval/segment.py."""

    steps: int = 500
    """Optimizer steps of 32 images for the linear and the convolutional head."""


@dataclasses.dataclass
class Candidate:
    """A fitted head: one setting of the sweep."""

    head: str
    setting: dict
    model: nn.Module


def run_segmentation(config: SegmentConfig) -> None:
    """Fit all heads, choose on val, score on test, write and print the result.

    Raises ValueError for --crops 8, too few images, and as `open_encoder`, `open_segmentation`, `class_names`.
    """
    started, state = time.perf_counter(), process_state()
    if config.crops > 1:
        raise ValueError(f"--crops {config.crops} averages features over views; a mask belongs to one: use --crops 1.")
    if config.steps < 1:
        raise ValueError(f"steps {config.steps} must be 1 or more.")
    if not state.is_main_process:
        return
    encoder = open_encoder(config)
    source = encoder.source(config.source)
    data_set = open_segmentation(source, short_side=short_side_for(encoder.size))
    data = data_set.data
    if data.val is None or data.test is None:
        role = "val" if data.val is None else "test"
        raise ValueError(f"--data {source.data} has too few images with masks to set some aside for {role}; add some.")

    def reopen(again: DataConfig, *, short_side: int):
        return open_segmentation(again, short_side=short_side).data

    pretrained_on = count_pretrained_test_images(encoder, source, data, reopen=reopen)
    roles = {"train": data.train, "val": data.val, "test": data.test}
    masks = {role: read_masks(part, data_set.read_mask, size=encoder.size, what=role) for role, part in roles.items()}
    classes = class_names(masks, data_set.classes)
    model = encoder.model.to(state.device).eval()
    view = {"size": encoder.size}
    maps = concatenated(batches_of_maps(model, data.train, what="train", **view), len(data.train))
    scales = scales_of(maps)
    standardise(maps, scales)
    how = {"classes": len(classes), "device": state.device}
    candidates = [*fit_heads(maps, masks["train"], steps=config.steps, **how), *fit_kmeans(maps, masks["train"], **how)]
    del maps

    def scored(candidates: Sequence[Candidate], role: str) -> list[PixelScores]:
        """Of all candidates in one pass, so that no more than a batch of maps is kept."""
        batches = (standardise(batch, scales) for batch in batches_of_maps(model, roles[role], what=role, **view))
        return [score_pixels(counts) for counts in confusions(candidates, batches, masks[role], **how)]

    val = [*zip(candidates, scored(candidates, "val"))]
    best = {head: max((pair for pair in val if pair[0].head == head), key=lambda pair: pair[1].miou) for head in HEADS}
    chosen = {head: candidate for head, (candidate, _) in best.items()}
    test = dict(zip(chosen, scored([*chosen.values()], "test")))
    heads = {
        head: {"choice": candidate.setting, "val": _json(of_val), "test": _json(test[head])}
        for head, (candidate, of_val) in best.items()
    }
    tried = [{"head": one.head, **one.setting, "miou": round(scores.miou, 2)} for one, scores in val]
    cells = {f"segment-{head}, mIoU": _with_interval(scores) for head, scores in test.items()}
    result = {**roles_of(data), "classes": list(classes), "heads": heads, "settings_tried": tried, "cells": cells}
    seconds = time.perf_counter() - started
    _, path = write_entry(config, "segment", encoder, data, result, pretrained_on=pretrained_on, seconds=seconds)
    some, picture = evenly_spaced(len(data.test), SHOWN), path.with_suffix(".png")
    shown = data.test[some]
    maps = standardise(next(batches_of_maps(model, shown, what="a picture", **view)), scales)
    draw_masks(picture, shown, masks["test"][some], maps, chosen, classes=classes, device=state.device)
    print(printable(f"{path}, {picture.name}"))
    print_heads(encoder.name, heads, classes, result["images"], result["chosen_on"])


def batches_of_maps(encoder: ImageEncoder, images: Images, *, size: tuple[int, int], what: str) -> Iterator[Maps]:
    """Feature maps of the evaluation views of images, in half precision, on the CPU, `BATCH` images at a time."""
    device = next(iter(encoder.state_dict().values()), torch.empty(0)).device
    for rows in track(torch.arange(len(images)).split(BATCH), description=f"features of {what}", transient=True):
        with torch.no_grad():
            batch = encoder.maps(eval_images(images, rows, size=size, statistics=encoder.statistics).to(device))
        maps = {name: each.half().cpu() for name, each in batch.items()}
        for each in maps.values():
            check_finite(each)
        yield maps


def concatenated(batches: Iterator[Maps], count: int) -> Maps:
    """Those of all `count` images."""
    maps: Maps = {}
    for number, batch in enumerate(batches):  # filled in place: lists of batches would take twice the memory
        for name, each in batch.items():
            if name not in maps:
                maps[name] = torch.empty(count, *each.shape[1:], dtype=each.dtype)
            maps[name][number * BATCH :][: len(each)] = each
    return maps


def scales_of(maps: Maps) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and deviation of each channel over the training images; a channel of one value gets the deviation 1."""
    scales = {}
    for name, train in maps.items():
        sums = torch.stack([torch.stack([x.sum((0, 2, 3)), x.square().sum((0, 2, 3))]) for x in _chunks(train)]).sum(0)
        mean, square = (sums / train[:, 0].numel()).float()[..., None, None]
        variance = square - mean.square()
        scales[name] = mean, variance.sqrt().where(variance > 1e-7, 1.0)  # below: rounding of a mean of squares near 1
    return scales


def standardise(maps: Maps, scales: dict[str, tuple[Tensor, Tensor]]) -> Maps:
    """The same maps, whose values are replaced by those of mean 0 and deviation 1."""
    for name, (mean, deviation) in scales.items():
        for rows in maps[name].split(BATCH):
            rows.copy_((rows.float() - mean) / deviation)
    return maps


def _chunks(maps: Float[Tensor, "n _ _ _"]) -> Iterator[Tensor]:
    return (chunk.double() for chunk in maps.split(BATCH))


def fit_heads(
    maps: Maps, masks: UInt8[Tensor, "n H W"], *, classes: int, steps: int, device: torch.device
) -> Iterator[Candidate]:
    """The linear and the convolutional head on each kind of map at each of `RATES`: AdamW with cosine decay.

    All heads on a kind of map see the same batches and are trained side by side. Maps of single pixels get no
    convolutional head.
    """
    for kind, features in maps.items():
        settings = [(head, rate) for head in HEADS[: 1 if kind == "pixel" else 2] for rate in RATES]
        with torch.random.fork_rng():
            torch.manual_seed(seed_at("segmentation heads"))
            heads = nn.ModuleList(_head(name, features.shape[1], classes) for name, _ in settings).to(device)
        groups = [{"params": head.parameters(), "lr": rate} for head, (_, rate) in zip(heads, settings)]
        optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in track(range(steps), description=f"heads on {kind}", transient=True):
            rows = torch.randint(len(masks), (TRAIN_BATCH,), generator=generator_at("images of a head", step))
            x, target = features[rows].to(device).float(), masks[rows].to(device).long()
            valid = (target != IGNORE).sum().clamp(min=1)
            optimizer.zero_grad()
            for head in heads:  # one by one: logits are as large as images, times the classes
                (_loss(head(x), target) / valid).backward()
            optimizer.step()
            schedule.step()
        for head, (name, rate) in zip(heads, settings):
            yield Candidate(name, {"features": kind, "lr": rate}, head.eval())


def _head(name: str, channels: int, classes: int) -> nn.Module:
    if name == "linear":
        return nn.Conv2d(channels, classes, 1)
    reduce, mix = nn.Conv2d(channels, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
    return nn.Sequential(reduce, nn.ReLU(), mix, nn.ReLU(), nn.Conv2d(WIDTH, classes, 1))


def _loss(logits: Float[Tensor, "B K h w"], masks: Int[Tensor, "B H W"]) -> Float[Tensor, ""]:
    return F.cross_entropy(_to_pixels(logits, masks.shape[1:]), masks, ignore_index=IGNORE, reduction="sum")


def _to_pixels(logits: Float[Tensor, "B K h w"], size) -> Float[Tensor, "B K H W"]:
    if logits.shape[2:] == size:
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def fit_kmeans(maps: Maps, masks: UInt8[Tensor, "n H W"], *, classes: int, device: torch.device) -> Iterator[Candidate]:
    """k-means on each kind of map, as a linear head: the nearest of the centres c has the largest 2 c x - |c|².

    Where patches have fewer different features than there are classes, so many clusters are made and a line says so.
    """
    for kind, features in maps.items():
        drawn = torch.randperm(features[:, 0].numel(), generator=generator_at("patches for k-means"))[:CLUSTERED]
        patches = features.flatten(2)  # n c (h w)
        points = patches[drawn // patches.shape[2], :, drawn % patches.shape[2]].float().numpy()
        clusters = min(classes, len(np.unique(points, axis=0)))
        if clusters < classes:
            print(
                f"note: k-means on {kind} finds {clusters} different features for {classes} classes, as of blank "
                "images or a collapsed encoder."
            )
        fits = []
        for restart in track(range(RESTARTS), description=f"k-means on {kind}", transient=True):
            with warnings.catch_warnings():  # a cluster that loses all of its points keeps its centre
                warnings.filterwarnings("ignore", "One of the clusters is empty")
                centres, labels = kmeans2(points, clusters, iter=30, minit="++", rng=restart)
            fits.append((float(np.square(points - centres[labels]).sum()), centres))
        centres = torch.from_numpy(min(fits, key=lambda fit: fit[0])[1]).float()
        centres = F.pad(centres, (0, 0, 0, classes - clusters), value=torch.nan)  # clusters that are nowhere
        head = nn.Conv2d(features.shape[1], classes, 1).to(device)
        candidate = Candidate("kmeans", {"features": kind}, head)
        _set_linear(head, centres)
        batches = ({kind: batch} for batch in features.split(BATCH))
        (counts,) = confusions([candidate], batches, masks, classes=classes, device=device)
        _, cluster_of = linear_sum_assignment(counts.sum(0).numpy(), maximize=True)
        _set_linear(head, centres[torch.from_numpy(cluster_of)])
        yield candidate


def _set_linear(head: nn.Conv2d, centres: Float[Tensor, "K C"]) -> None:
    bias = -centres.square().sum(1).nan_to_num(1e30)
    head.load_state_dict({"weight": 2 * centres.nan_to_num(0)[..., None, None], "bias": bias})


@torch.no_grad()
def predict(candidate: Candidate, maps: Maps, *, size: tuple[int, int], device: torch.device) -> UInt8[Tensor, "B H W"]:
    """Classes of the pixels of images of `size`."""
    features = maps[candidate.setting["features"]].to(device).float()
    return _to_pixels(candidate.model(features), size).argmax(1).to(torch.uint8).cpu()


def confusions(
    candidates: Sequence[Candidate],
    batches: Iterable[Maps],
    masks: UInt8[Tensor, "n H W"],
    *,
    classes: int,
    device: torch.device,
) -> list[Int[Tensor, "n K K"]]:
    """Of each candidate, counts of pixels by class in the mask (row) and predicted class (column), for each image.

    `batches` are maps of `BATCH` images; each is used once.
    """
    size, counts = (masks.shape[1], masks.shape[2]), [torch.zeros(len(masks), classes**2).long() for _ in candidates]
    for number, (maps, expected) in enumerate(zip(batches, masks.split(BATCH))):
        for candidate, own in zip(candidates, counts):
            predicted = predict(candidate, maps, size=size, device=device)
            for row, (one, other) in enumerate(zip(expected.long(), predicted.long()), number * BATCH):
                own[row] = torch.bincount((one * classes + other)[one != IGNORE], minlength=classes**2)
    return [own.unflatten(1, (classes, classes)) for own in counts]


def draw_masks(
    path: Path,
    images: Images,
    masks: UInt8[Tensor, "n H W"],
    maps: Maps,
    heads: dict[str, Candidate],
    *,
    classes: tuple[str, ...],
    device: torch.device,
) -> None:
    """Write a PNG with a column for each image; rows: images, masks, and what each head predicts, laid over them."""
    size, colours = (masks.shape[1], masks.shape[2]), torch.from_numpy(palette(len(classes)))
    photos = pictures_of(images, size=size)
    layers = {"mask": masks, **{head: predict(one, maps, size=size, device=device) for head, one in heads.items()}}
    rows = [(name, torch.lerp(photos, colours[layer.long()], 0.6)) for name, layer in layers.items()]
    legend = {name: (red, green, blue) for name, (red, green, blue) in zip(classes, colours.tolist())}
    draw_rows(path, images, rows, size, None, legend=legend)


@functools.cache
def palette(classes: int) -> Float[np.ndarray, "256 3"]:
    """A colour for each value of a mask; ignored pixels are black."""
    colours = np.zeros((IGNORE + 1, 3), dtype=np.float32)
    colours[:classes] = matplotlib.colormaps["tab10" if classes <= 10 else "gist_ncar"](
        np.arange(classes) if classes <= 10 else np.linspace(0.05, 0.95, classes)
    )[:, :3]
    return colours


def print_heads(encoder: str, heads: dict, classes: tuple[str, ...], images: dict, chosen_on: str) -> None:
    rows = []
    for head, of_head in heads.items():
        choice, test = ", ".join(map(str, of_head["choice"].values())), of_head["test"]
        iou = ["-" if value is None else f"{value:.1f}" for value in test["iou"][:8]]
        low, high = test["miou_interval"]
        means = f"{of_head['val']['miou']:.1f}", f"{test['miou']:.1f} ± {(high - low) / 2:.1f}"
        rows.append([head, choice, *means, *iou])
    title = f"segmentation on {encoder} features: IoU, {images['test']:,} test images"
    columns = ("head", f"chosen on {chosen_on}", "val, mean", "test, mean", *classes[:8])
    Console().print(make_table(title, columns, rows))


def _json(scores: PixelScores) -> dict:
    return {
        "miou": round(scores.miou, 2),
        "miou_interval": [round(value, 2) for value in scores.miou_interval],
        "iou": [None if value is None else round(value, 2) for value in scores.iou],
        "accuracy": round(scores.accuracy, 2),
    }


def _with_interval(scores: PixelScores) -> str:
    low, high = scores.miou_interval
    return f"{scores.miou:.1f} ± {(high - low) / 2:.1f}"
