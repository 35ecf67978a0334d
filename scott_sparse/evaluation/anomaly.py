"""Defects, found by an encoder that has seen good images: a map of each test image, and a score, its largest value.

* `neighbours`: the distance of a patch's features (last block) to the nearest of a coreset of good patches (PatchCore,
  arXiv 2106.08265, without its re-weighting and its averaging over 3 x 3 patches, which are a large part of a small
  grid; attention has mixed neighbours already).
* `prediction`: how far the predictor of MIM-JEPA is off where a patch is hidden, by the loss of pretraining, averaged
  over masks that hide every patch several times. Needs the run's predictor.

A fifth of the good images is held out: a quantile of their scores is the threshold above which an image is defective.
No defective image is used but to compute the results.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from rich.console import Console
from rich.progress import track
from torchvision.transforms.v2.functional import gaussian_blur

from scott_sparse.data.dataset import Data, DataConfig, evenly_spaced, short_side_for
from scott_sparse.data.defects import Inspection, open_inspection
from scott_sparse.data.images import Images
from scott_sparse.data.segmentation import read_masks
from scott_sparse.data.sources import printable
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.coreset import k_centre, random_projection
from scott_sparse.evaluation.encoders import FrozenEncoder, ImageEncoder, Pixels
from scott_sparse.evaluation.features import BATCH, eval_images
from scott_sparse.evaluation.metrics import auroc, auroc_of_counts, check_finite
from scott_sparse.evaluation.probe import write_entry
from scott_sparse.evaluation.report import make_table
from scott_sparse.evaluation.subject import EncoderUnderTest, ProbeConfig, count_pretrained_test_images, open_encoder
from scott_sparse.evaluation.visualize import draw_rows
from scott_sparse.model.jepa import target_features
from scott_sparse.model.masks import draw_visible
from scott_sparse.model.weights import load_encoder, load_predictor
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8

HELD_OUT = 5  # each fifth good image
SHOWN = 10  # images
LEVELS = 2**16  # to which the scores of pixels are rounded for their AUROC
PATHS = ("good", "test", "masks")
Scorer = Callable[[Float[Tensor, "B c H W"]], Float[Tensor, "B h w"]]


@dataclasses.dataclass(frozen=True)
class AnomalyConfig(ProbeConfig):
    """The flags of eval/anomaly.py."""

    good: Path | None = None
    """Folder of images of good parts, in place of --data."""
    test: Path | None = None
    """Folder of images to test, with --good; with folders good and DEFECT in it, or without."""
    masks: Path | None = None
    """Folder of masks of the defective images of --test: DEFECT/NAME_mask.png or DEFECT/NAME.png."""
    method: Literal["both", "neighbours", "prediction"] = "both"
    """neighbours: distance to features of good patches. prediction: error of the run's predictor. both: as far as the
    run has what they need."""
    coreset: int = 5000
    """How many good patches neighbours are searched among, at most: those that cover the others best. More are slower,
    and better where good images differ much."""
    hidings: int = 4
    """How often each patch is hidden and predicted, at least."""
    quantile: float = 0.95
    """Share of the held-out good images that the threshold lets pass."""

    @property
    def own_settings(self) -> dict:
        return {name: value for name, value in super().own_settings.items() if name not in PATHS}


def run_anomaly(config: AnomalyConfig) -> None:
    """Fit on good images, score the test images, write and print the result.

    Raises ValueError for values out of range, fewer than `HELD_OUT` good images, --method prediction without a
    predictor, and as `open_encoder` and `open_inspection`.
    """
    started, state = time.perf_counter(), process_state()
    _check(config)
    if not state.is_main_process:
        return
    encoder, folders = open_encoder(config), {name: getattr(config, name) for name in PATHS}
    source = encoder.source(config.source)
    inspection = open_inspection(source, **folders, short_side=short_side_for(encoder.size))
    data = inspection.data
    assert data.test is not None
    if len(data.train) < HELD_OUT:
        raise ValueError(f"{len(data.train)} good images are too few; {HELD_OUT} or more are needed, better 50.")

    def reopen(again: DataConfig, *, short_side: int) -> Data:
        again = dataclasses.replace(again, data=source.data)  # with two folders none is named
        return open_inspection(again, **folders, short_side=short_side).data

    config = dataclasses.replace(config, source=dataclasses.replace(source, data=source.data or str(config.test)))
    pretrained_on = count_pretrained_test_images(encoder, config.source, data, reopen=reopen)
    masks = _masks(inspection, data.test, encoder.size)
    number = torch.arange(len(data.train))
    held_out, rest = data.train[number[::HELD_OUT]], data.train[number[number % HELD_OUT > 0]]
    encoder.model.to(state.device).eval()
    methods, maps = {}, {}
    for method, scorer in _scorers(config, encoder, rest, state.device):
        of_good = score_maps(scorer, held_out, encoder, state.device, f"{method}, held-out good images")
        maps[method] = score_maps(scorer, data.test, encoder, state.device, f"{method}, test images")
        threshold = of_good.amax((1, 2)).quantile(config.quantile).item()
        methods[method] = {"threshold": threshold, **results(maps[method], inspection.kinds, masks, threshold)}
    scores = {method: each.amax((1, 2)).tolist() for method, each in maps.items()}
    rows = zip(data.test.names, inspection.kinds, *scores.values())
    named = [dict(zip(("image", "kind", *scores), row)) for row in rows]
    images = {"good": len(rest), "held_out": len(held_out), "test": len(data.test)}
    result = {"images": images, "methods": methods, "scores": named, "cells": _cells(methods)}
    seconds = time.perf_counter() - started
    _, path = write_entry(config, "anomaly", encoder, data, result, pretrained_on=pretrained_on, seconds=seconds)
    draw_maps(path.with_suffix(".png"), data.test, inspection.kinds, masks, maps, methods, encoder.size)
    folder = write_maps(path.with_suffix(""), data.test, maps, methods)
    print(printable(f"{path}, {path.with_suffix('.png').name}, {folder.name}/ (maps: 128 is the threshold)"))
    print_methods(encoder.name, methods, inspection.kinds)


def _check(config: AnomalyConfig) -> None:
    if config.crops > 1:
        raise ValueError(f"--crops {config.crops} averages features over views; a map is of one: use --crops 1.")
    if not 0 < config.quantile <= 1:
        raise ValueError(f"quantile {config.quantile:g} must lie above 0 and not above 1.")
    for name in ("coreset", "hidings"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} {getattr(config, name)} must be 1 or more.")


def _masks(inspection: Inspection, test: Images, size: tuple[int, int]) -> UInt8[Tensor, "n H W"] | None:
    """1 where a test image is defective; None where there are no masks."""
    if inspection.read_mask is None:
        return None
    defective = torch.tensor([i for i, kind in enumerate(inspection.kinds) if kind != "good"], dtype=torch.int64)
    masks = torch.zeros(len(test), *size, dtype=torch.uint8)
    masks[defective] = read_masks(test[defective], inspection.read_mask, size=size, what="defects")
    return masks


def _scorers(
    config: AnomalyConfig, encoder: EncoderUnderTest, good: Images, device: torch.device
) -> Iterator[tuple[str, Scorer]]:
    if config.method != "prediction":
        yield "neighbours", nearest_good(encoder.model, good, encoder.size, device, config.coreset)
    if config.method == "neighbours":
        return
    try:
        if not isinstance(encoder.model, FrozenEncoder) or config.init:
            raise ValueError(f"{encoder.name} has no predictor, which only a pretrained run has.")
        scorer = prediction_error(encoder.run, encoder.model.span, config.hidings, device)
    except ValueError as reason:
        if config.method == "prediction":
            raise
        print(printable(f"note: no prediction error: {reason}"))
        return
    yield "prediction", scorer


def nearest_good(
    encoder: ImageEncoder, good: Images, size: tuple[int, int], device: torch.device, count: int
) -> Scorer:
    """Scores patches by the distance to the nearest patch of good images, or of a coreset of `count` of them."""
    parts = []
    for rows in track(torch.arange(len(good)).split(BATCH), description="features of good images", transient=True):
        images = eval_images(good, rows, size=size, statistics=encoder.statistics)
        parts.append(_patches(encoder, images.to(device)).flatten(0, 2))
    patches = torch.cat(parts)
    check_finite(patches)
    if len(patches) > count:
        patches = patches[k_centre(random_projection(patches), count, what="coreset")[0]]

    def score(images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B h w"]:
        features = _patches(encoder, images)
        return torch.stack(
            [torch.cdist(of_image.flatten(0, 1), patches).amin(1).view(of_image.shape[:2]) for of_image in features]
        )

    return score


@torch.inference_mode()
def _patches(encoder: ImageEncoder, images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B h w C"]:
    """Features of the last block; of raw pixels all those of a patch."""
    maps = encoder.maps(images)
    return rearrange(maps["patch" if isinstance(encoder, Pixels) else "last"].float(), "b c h w -> b h w c")


def prediction_error(run: str, span: tuple[int, int] | None, hidings: int, device: torch.device) -> Scorer:
    """Scores patches by the error of a run's predictor where they are hidden. Raises as `load_predictor`."""
    model, hide_ratio, shape = load_predictor(run)
    model, target = model.to(device), load_encoder(run).to(device)

    @torch.inference_mode()
    def score(images: Float[Tensor, "B c H W"]) -> Float[Tensor, "B h w"]:
        grid = model.encoder.tokenizer.grid(images)
        targets = target_features(target, images, span, of=model.objective.mim_target)
        total, count = targets.new_zeros(targets.shape[:2]), targets.new_zeros(targets.shape[1])
        for visible in covering_masks(grid, hidings=hidings, hide_ratio=hide_ratio, shape=shape):
            hidden = ~visible.to(device)
            predictions = model.predict_hidden(images, visible.to(device).expand(len(images), -1), span).float()
            total += F.smooth_l1_loss(predictions, targets, reduction="none").mean(2) * hidden
            count += hidden
        return rearrange(total / count, "b (h w) -> b h w", h=grid[0])

    return score


def covering_masks(grid: tuple[int, int], *, hidings: int, hide_ratio: float, shape: str) -> list[Bool[Tensor, " N"]]:
    """Masks of pretraining, as many as it takes to hide each patch `hidings` times; the same at every call."""
    masks, hidden = [], torch.zeros(grid[0] * grid[1], dtype=torch.int64)
    generator = generator_at("masks of an evaluation")
    while hidden.min() < hidings:
        (visible,) = draw_visible(1, grid, hide_ratio=hide_ratio, shape=shape, generator=generator)
        masks.append(visible)
        hidden += ~visible
    return masks


def score_maps(
    scorer: Scorer, images: Images, encoder: EncoderUnderTest, device: torch.device, what: str
) -> Float[Tensor, "n H W"]:
    """Maps at the size of the images: resized bilinearly and blurred by half a patch, as in PatchCore."""
    maps, size, statistics = [], encoder.size, encoder.model.statistics
    for rows in track(torch.arange(len(images)).split(BATCH), description=what, transient=True):
        views = eval_images(images, rows, size=size, statistics=statistics)
        patches = scorer(views.to(device)).float()[:, None]
        pixels = F.interpolate(patches, size=size, mode="bilinear", align_corners=False)
        sigma = size[0] / patches.shape[2] / 2
        radius = min(round(3 * sigma), min(size) - 1)
        maps.append(gaussian_blur(pixels, [2 * radius + 1] * 2, [sigma] * 2)[:, 0].cpu())
    result = torch.cat(maps)
    check_finite(result)
    return result


def results(
    maps: Float[Tensor, "n H W"], kinds: list[str | None], masks: UInt8[Tensor, "n H W"] | None, threshold: float
) -> dict:
    """AUROC of images and pixels, for all defects and for each against the good images, and what the threshold does.

    AUROC is None without good or without defective test images, or without masks; rates are in per cent.
    """
    scores = maps.amax((1, 2))
    good = torch.tensor([kind == "good" for kind in kinds])
    counts = {} if masks is None else _pixel_counts(maps, kinds, masks)

    def against_good(*names: str) -> dict:
        defective = torch.tensor([kind in names for kind in kinds])
        rows = good | defective
        pixels = [counts[kind] for kind in ("good", *names) if kind in counts]
        return {
            "image_auroc": _rounded(auroc(scores[rows], defective[rows])),
            "pixel_auroc": _rounded(auroc_of_counts(*torch.stack(pixels).sum(0)) if pixels else None),
            "found": _rounded(100 * (scores[defective] > threshold).double().mean().item())
            if defective.any()
            else None,
        }

    false_alarms = _rounded(100 * (scores[good] > threshold).double().mean().item()) if good.any() else None
    defects = sorted({kind for kind in kinds if kind not in ("good", None)})
    by_defect = {name: against_good(name) for name in defects}
    above = int((scores > threshold).sum())
    return {**against_good(*defects), "false_alarms": false_alarms, "above": above, "defects": by_defect}


def _pixel_counts(
    maps: Float[Tensor, "n H W"], kinds: list[str | None], masks: UInt8[Tensor, "n H W"]
) -> dict[str | None, Int[Tensor, "2 K"]]:
    """How many good and defective pixels have each of `LEVELS` scores, by the kind of their image.

    Image by image: to rank the pixels of a thousand images of 224 pixels at once takes gigabytes.
    """
    low, high = maps.min(), maps.max()
    counts = {kind: torch.zeros(2, LEVELS, dtype=torch.int64) for kind in kinds}
    for kind, scores, mask in zip(kinds, maps, masks):
        levels = ((scores - low) / (high - low).clamp(min=1e-12) * (LEVELS - 1)).long() + LEVELS * (mask > 0)
        counts[kind] += levels.flatten().bincount(minlength=2 * LEVELS).view(2, LEVELS)
    return counts


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def _cells(methods: dict) -> dict[str, str]:
    """For eval/table.py; nothing where there are no labels."""
    columns = {
        f"anomaly-{method}, {what} AUROC": of_method[f"{what}_auroc"]
        for method, of_method in methods.items()
        for what in ("image", "pixel")
    }
    return {name: f"{value:.1f}" for name, value in columns.items() if value is not None}


def draw_maps(
    path: Path,
    images: Images,
    kinds: list[str | None],
    masks: UInt8[Tensor, "n H W"] | None,
    maps: dict[str, Float[Tensor, "n H W"]],
    methods: dict,
    size: tuple[int, int],
) -> None:
    """Write a PNG with a column for some test images; rows: images, masks, maps (half bright is the threshold)."""
    some = evenly_spaced(len(images), SHOWN)
    rows = [] if masks is None else [("mask", masks[some].float())]
    rows += [(name, _brightness(each[some], methods[name]["threshold"])) for name, each in maps.items()]
    draw_rows(path, images[some], rows, size, [kinds[i] or images.names[i] for i in some.tolist()])


def write_maps(folder: Path, images: Images, maps: dict[str, Tensor], methods: dict) -> Path:
    """A grey PNG of each map in METHOD/NAME.png, in which 128 is the threshold."""
    for method, each in maps.items():
        for name, scores in zip(images.names, each):
            pixels = (255 * _brightness(scores, methods[method]["threshold"])).round().to(torch.uint8)
            inside = [part for part in Path(name).with_suffix(".png").parts if part not in ("/", "..")]
            file = Path(folder, method, *inside)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.numpy()).save(file)
    return folder


def _brightness(maps: Float[Tensor, "*n H W"], threshold: float) -> Float[Tensor, "*n H W"]:
    return (maps / (2 * max(threshold, 1e-12))).clamp(0, 1)


def print_methods(encoder: str, methods: dict, kinds: list[str | None]) -> None:
    """Print a table of results, or how many images are above the threshold where nothing is known of them."""
    if set(kinds) <= {"good"} or "good" not in kinds:
        known = f"all {len(kinds):,} are good" if set(kinds) == {"good"} else "none is known to be good"
        print(f"note: AUROC needs good and defective test images, {known}; put them into folders good and DEFECT.")
    rows = []
    for method, result in methods.items():
        for name, part in {"all": result, **result["defects"]}.items():
            values = (part["image_auroc"], part["pixel_auroc"], part["found"], result["false_alarms"])
            rows.append([method, name, *("-" if value is None else f"{value:.1f}" for value in values)])
        above = f"{result['above']:,} of {len(kinds):,} test images are above the threshold"
        print(f"{method}: {above}, {result['threshold']:.3g}")
    columns = ("method", "defect", "image AUROC", "pixel AUROC", "found, %", "false alarms, %")
    Console().print(make_table(f"anomaly detection on {encoder} features", columns, rows))
