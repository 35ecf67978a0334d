"""How much do more images help? Pretraining on growing shares of the images under one budget, each probed.

Every run has the same number of optimizer steps and sees as many images, counted with repetition, as a run on all
images; a linear probe is fitted on all labels of train. The two baselines are the untrained encoder, probed likewise,
and the same encoder trained with labels from scratch on as many images.
"""

import dataclasses
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from matplotlib.figure import Figure

from scott_sparse.data.colour import choose_colours
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.evaluation.finetune import FinetuneConfig
from scott_sparse.files import read_json, write_json
from scott_sparse.training.plan import show_time
from scott_sparse.training.recipe import parse
from scott_sparse.training.resume import RECIPE, SUMMARY, changed_settings
from scott_sparse.training.saver import EXIT_RESUME

CURVE = "learning_curve.json"


@dataclasses.dataclass(frozen=True)
class CurveConfig:
    """Flags of eval/learning_curve.py."""

    recipe: tyro.conf.Positional[str] = "small-data"
    """Recipe of train/pretrain.py."""
    source: DataConfig = DataConfig()
    out: Path = Path("runs/learning-curve")
    """Folder for the runs, learning_curve.json and learning_curve.png."""
    epochs: float | None = None
    """Passes over all images, which set the number of steps of every run. Default: those of the recipe."""
    shares: tuple[float, ...] = (1 / 8, 1 / 4, 1 / 2, 1.0)
    """Shares of the images to pretrain on, in (0, 1], increasing."""
    pretrain: str = ""
    """More flags of train/pretrain.py, as in --pretrain="--batch-size 32"."""

    @property
    def data_flags(self) -> list[str]:
        """The flags of `source` that differ from their defaults."""
        flags: list[str] = []
        for field in dataclasses.fields(self.source):
            value = getattr(self.source, field.name)
            if value != field.default:
                values = [] if value is True else map(str, value if isinstance(value, tuple) else [value])
                flags += [f"--{field.name.replace('_', '-')}", *values]
        return flags

    def validate(self) -> None:
        """Raises ValueError for shares that are none, or do not grow."""
        if (
            not self.shares
            or list(self.shares) != sorted({*self.shares})
            or not 0 < self.shares[0] <= self.shares[-1] <= 1
        ):
            raise ValueError(f"shares {self.shares} must increase within (0, 1], as in --shares .25 .5 1.")


@dataclasses.dataclass(frozen=True)
class Point:
    """A run on a share of the images: how many, and top-1 of its probe on test with the 95 % interval."""

    images: int
    top1: float
    interval: tuple[float, float]

    @property
    def margin(self) -> float:
        return (self.interval[1] - self.interval[0]) / 2


def run_curve(config: CurveConfig, scripts: Path) -> None:
    """Run what is not finished, by the scripts in the folder `scripts`; write the results and print the answer.

    Raises ValueError for a user's mistake, and where a script fails; ends with its exit code if one was told to stop.
    """
    config.validate()
    flags = [config.recipe, *config.data_flags, *shlex.split(config.pretrain)]
    _, recipe = parse(flags if config.epochs is None else [*flags, "--epochs", str(config.epochs)])
    if recipe.init:
        raise ValueError(
            "--init: the baselines of a learning curve are untrained encoders; leave it out of --pretrain."
        )
    data = open_data(recipe.source, short_side=short_side_for(recipe.sides))
    if data.classes is None or data.test is None or data.val is None:
        raise ValueError(f"--data {config.source.data} needs labels, and enough of them for val and test.")
    counts = [round(share * len(data.pretrain)) for share in config.shares]
    if counts[0] < recipe.batch_size:
        raise ValueError(
            f"share {config.shares[0]:g} is {counts[0]} images, fewer than --batch-size {recipe.batch_size}."
        )
    views, _ = choose_colours(recipe.views, data.pretrain)
    recipe = dataclasses.replace(recipe, views=views)
    steps = max(round(recipe.epochs * (len(data.pretrain) // recipe.batch_size)), 1)
    runs = [config.out / f"images-{count}" for count in counts]
    for run, share in zip(runs, config.shares):
        if is_finished(run):
            summary = read_json(run / SUMMARY)
            if (summary["steps"], summary["data"]["fingerprint"]) != (steps, data.fingerprint):
                raise ValueError(f"{run} is of other images or another number of steps; choose another --out.")
            saved = {name: value for name, value in read_json(run / RECIPE).items() if name != "recipe"}
            if changed := changed_settings(saved, dataclasses.replace(recipe, share=share)):
                raise ValueError(f"{run} is of other settings ({changed}); choose another --out.")

    def script(name: str, *arguments: object, **options) -> str:
        """What a script prints, if it is captured. Raises ValueError where it fails."""
        done = subprocess.run([sys.executable, str(scripts / name), *map(str, arguments)], text=True, **options)
        if done.returncode == EXIT_RESUME:
            sys.exit(EXIT_RESUME)
        if done.returncode:
            raise ValueError(f"{name} failed with exit code {done.returncode}, see above.")
        return done.stdout or ""

    missing = sum(not is_finished(run) for run in runs)
    if missing:
        plan = script("train/pretrain.py", *flags, "--epochs", recipe.epochs, "--plan", stdout=subprocess.PIPE)
        (found,) = re.findall(r"^time +(?:(\d+) days?, )?(\d+):(\d+):(\d+)", plan, re.MULTILINE)
        each = sum(unit * int(number or 0) for unit, number in zip((86400, 3600, 60, 1), found))
        time = f"{missing} runs of {steps:,} steps take {show_time(missing * each)}"
        print(f"plan: {time} by a few measured steps; then supervised training, and probes", flush=True)
    for share, count, run in zip(config.shares, counts, runs):
        if not is_finished(run):
            epochs = steps / (count // recipe.batch_size)
            script("train/pretrain.py", *flags, "--epochs", epochs, "--share", share, "--out", run)

    def probe(run: Path, name: str, subject: str, count: int, settings: dict, *arguments: object) -> Point:
        """The result of a script of eval/ on these images, which runs if there is none. Results of others are kept."""
        expected: dict = {"subject": subject, "data_fingerprint": data.fingerprint, "protocol": recipe.source.protocol}
        expected |= {"image_size": list(recipe.sides), "settings": settings}
        for attempt in range(2):
            for path in sorted((run / "eval").glob(f"{name}-*.json")):
                result = read_json(path)
                if expected.items() <= result.items():
                    return Point(count, result["test"]["top1"], tuple(result["test"]["top1_interval"]))
            if attempt == 0:
                script(f"eval/{name}.py", run, *config.data_flags, *arguments)
        raise ValueError(f"{name} left no result on the images of --data; if they have changed, choose another --out.")

    points = [probe(run, "linear", "pretrained", count, {}) for run, count in zip(runs, counts)]
    untrained = probe(runs[-1], "linear", "random", 0, {}, "--init", "random")
    seen = FinetuneConfig(epochs=steps * recipe.batch_size / len(data.train), batch_size=recipe.batch_size)
    how = ("--from-scratch", "--epochs", seen.epochs, "--batch-size", seen.batch_size)
    supervised = probe(runs[-1], "finetune", "random", len(data.train), seen.own_settings, *how)
    sentence = answer(points, untrained, supervised)
    about: dict[str, Any] = {"answer": sentence, "data": config.source.data, "recipe": config.recipe, "steps": steps}
    about["pretrained"] = [dataclasses.asdict(point) for point in points]
    about |= {"untrained": dataclasses.asdict(untrained), "supervised": dataclasses.asdict(supervised)}
    write_json(config.out / CURVE, about)
    draw(config.out / "learning_curve.png", points, untrained, supervised)
    print(f"{config.out}: {CURVE}, learning_curve.png\n{sentence}")


def is_finished(run: Path) -> bool:
    return (run / SUMMARY).exists()


def answer(points: Sequence[Point], untrained: Point, supervised: Point) -> str:
    """One sentence; more images are said to help where the last step gained more than test images can be wrong by."""
    last = points[-1]
    gains = f"{last.top1 - untrained.top1:.1f} points over the untrained encoder and {last.top1 - supervised.top1:.1f}"
    start = f"Pretraining on all {last.images:,} images gains {gains} over supervised training (± {last.margin:.1f})"
    if len(points) == 1:
        return f"{start}."
    before = points[-2]
    gain, margin = last.top1 - before.top1, math.hypot(last.margin, before.margin)
    verdict = "more images would help" if gain > margin else "more images would not help measurably"
    return (
        f"{start}; from {before.images:,} to {last.images:,} images it gained {gain:.1f} (± {margin:.1f}): {verdict}."
    )


def draw(path: Path, points: Sequence[Point], untrained: Point, supervised: Point) -> None:
    """Top-1 by the number of images, and the baselines as lines."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    images, top1, margins = zip(*((point.images, point.top1, point.margin) for point in points))
    axes.errorbar(images, top1, margins, fmt="o-", capsize=3, label="pretrained without labels, linear probe")
    axes.axhline(supervised.top1, color="C1", linestyle="--", label="supervised from scratch")
    axes.axhline(untrained.top1, color="grey", linestyle=":", label="untrained, linear probe")
    axes.set_xscale("log", base=2)
    axes.set_xticks(images, [f"{count:,}" for count in images])
    axes.set(xlabel="images to pretrain on", ylabel="test top-1, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
