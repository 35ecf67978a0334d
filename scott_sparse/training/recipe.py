"""Recipes by name. A recipe is everything that decides a run; every field is a flag of train/pretrain.py."""

import dataclasses
import difflib
import functools
import json
import math
import re
from pathlib import Path
from typing import Literal

import tyro

from scott_sparse.cli import parse_flags
from scott_sparse.data.dataset import DataConfig
from scott_sparse.data.views import ViewConfig
from scott_sparse.model.jepa import ObjectiveConfig
from scott_sparse.model.masks import visible_count
from scott_sparse.model.tokenizer import patches_along
from scott_sparse.model.vit import EncoderConfig
from scott_sparse.training.schedules import Schedules

EMA_WINDOW = 0.04  # of a run's steps


@dataclasses.dataclass(frozen=True)
class Recipe:
    source: DataConfig = DataConfig()
    out: Path | None = None
    """Run folder; default runs/RECIPE."""
    overwrite: bool = False
    """Replace the finished run that --out holds."""
    seed: int = 0

    # The model.
    image_size: int | tuple[int, int] = 224
    """Side, or height and width, in pixels; multiples of the patch size."""
    size: str = "paper"
    """demo, tiny, small, paper, base or large."""
    tokenizer: str = "scott"
    """scott, the sparse tokenizer, or patch, the plain one."""
    patch_size: int = 16
    stem_width: int = 64
    engine: str = "auto"
    """Of the sparse tokenizer: auto (the fastest), dense, halo or spconv."""
    ffn: Literal["swiglu", "mlp"] = "swiglu"
    registers: int = 0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path: float = 0.0

    # The task.
    hide_ratio: float = 0.6
    mask: Literal["block", "uniform"] = "block"
    objective: ObjectiveConfig = ObjectiveConfig()
    views: ViewConfig = ViewConfig()

    # The optimization; schedules follow optimizer steps.
    epochs: float = 300.0
    batch_size: int = 64
    """Images per optimizer step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step."""
    lr: float = 5e-4
    lr_start: float = 1e-6
    lr_final: float = 1e-5
    lr_batch: int | None = None
    """Batch size that `lr` is meant for: another one trains with lr * sqrt(batch_size / lr_batch), as suits Adam (arXiv
    2205.10287). Default: `lr` as it is."""
    warmup_epochs: float | None = 40.0
    """None: a tenth of the run."""
    flat_fraction: float = 0.72
    weight_decay: tuple[float, float] = (0.04, 0.4)
    momentum: tuple[float, float] | None = (0.996, 1.0)
    """Of the EMA target, first and last step. None: constant, so that it averages over 4 % of the run's steps."""
    clip: float | None = None
    """Largest gradient norm."""

    # What happens to the run.
    resume: str = "auto"
    """auto: go on from the newest whole checkpoint in --out, if there is one. Or the path of a checkpoint."""
    save_every: str = "10min"
    """Between checkpoints: optimizer steps (500) or minutes (10min)."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    keep_every: int | None = None
    """Keep those at multiples of so many steps as well."""
    minutes: float | None = None
    """End after so many, with a checkpoint and exit code 75: the same command goes on. For queues with a limit."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a step with nan or inf in loss or gradient: end the run, or leave the step out and count it."""

    # The machine.
    workers: int | None = None
    """Processes that prepare batches ahead. Default: as many as the cores allow where images are decoded in every epoch
    or a GPU trains, else 0: on a CPU they would take the cores that train."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: on a GPU a resumed run then is the run, and slower."""
    compile: bool = False
    """torch.compile the trained model and the target encoder."""
    tracker: Literal["tensorboard"] | None = None
    report_every: float | None = None
    """Epochs between online reports; default a tenth of the run, 0 for none."""
    stop_on_collapse: bool = False
    """End the run when an online report says that it is collapsing."""
    log_every: int = 10
    """Optimizer steps between progress updates and writes to metrics.jsonl."""

    def validate(self) -> None:
        """Raise ValueError for values that do not go together, naming field, value and remedy."""
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers {self.workers} must be 0 or more.")
        for name in ("epochs", "batch_size", "accumulate", "lr", "log_every"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} must be positive.")
        if self.keep < 1 or (self.keep_every is not None and self.keep_every < 1):
            raise ValueError(f"keep {self.keep} and keep_every {self.keep_every} must be 1 or more.")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes {self.minutes} must be positive.")
        self.saves  # noqa: B018 - validates save_every
        if (self.report_every or 0) < 0:
            raise ValueError(f"report_every {self.report_every} must be 0 (none) or more epochs.")
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} must be less than epochs {self.epochs:g}; "
                f"use --warmup-epochs {self.epochs / 10:g}."
            )
        if self.momentum is not None and not all(0 <= momentum <= 1 for momentum in self.momentum):
            raise ValueError(f"momentum {self.momentum} must lie in [0, 1].")
        self.encoder  # noqa: B018 - validates size, tokenizer and rates
        visible_count(self.grid[0] * self.grid[1], self.hide_ratio)
        if self.objective.cross_crop_weight and self.views.crops < 2:
            raise ValueError(
                f"cross_crop_weight {self.objective.cross_crop_weight:g} compares crops of an image, but crops is "
                f"{self.views.crops}; use --crops 2 or --cross-crop-weight 0."
            )
        if "ntxent" in self.objective.weights and self.batch_size < 2:
            raise ValueError(f"ntxent compares images, but batch_size is {self.batch_size}; use 2 or more.")

    @property
    def sides(self) -> tuple[int, int]:
        """Image height and width."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def saves(self) -> tuple[int | None, float | None]:
        """Steps, or seconds, between checkpoints. Raises ValueError for other words."""
        found = re.fullmatch(r"(\d+|\d*\.\d+(?=min))(min)?", self.save_every)
        if not found or not float(found[1]):
            raise ValueError(f"save_every {self.save_every!r} is no number of steps (500) or minutes (10min).")
        return (None, 60 * float(found[1])) if found[2] else (int(found[1]), None)

    @property
    def grid(self) -> tuple[int, int]:
        return tuple(patches_along(side, self.patch_size) for side in self.sides)

    def schedules(self, steps_per_epoch: int) -> Schedules:
        """Of a run of `epochs` epochs."""
        steps = max(round(self.epochs * steps_per_epoch), 1)
        warmup = self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs
        constant = max(1 - 1 / (EMA_WINDOW * steps), 0.0)
        scale = math.sqrt(self.batch_size / self.lr_batch) if self.lr_batch else 1.0
        return Schedules(
            total_steps=steps,
            warmup_steps=round(warmup * steps_per_epoch),
            lr=self.lr * scale,
            lr_start=self.lr_start,
            lr_final=self.lr_final * scale,
            flat_fraction=self.flat_fraction,
            weight_decay=self.weight_decay,
            momentum=self.momentum or (constant, constant),
        )

    @property
    def encoder(self) -> EncoderConfig:
        fields = ("tokenizer", "patch_size", "stem_width", "ffn", "registers")
        rates = ("dropout", "attention_dropout", "drop_path")
        return EncoderConfig.named(self.size, **{name: getattr(self, name) for name in (*fields, *rates)})


FLOWERS102 = Recipe(source=DataConfig(data="flowers102"), dropout=0.2, attention_dropout=0.1, drop_path=0.1)

# What measures best in minutes (benchmarks/EVIDENCE.md): eight crops with a quarter visible, for the price of four with
# half. Rates follow batch and length: --epochs and --batch-size can be changed alone. Colours stay as they are: a
# cross-crop term makes features blind to whatever views differ in.
SMALL_DATA = Recipe(
    image_size=64,
    size="demo",
    patch_size=8,
    stem_width=32,
    hide_ratio=0.75,
    objective=ObjectiveConfig(predictor_depth=1, context="visible", cross_crop_weight=0.5),
    views=ViewConfig(crops=8, colour=0.0),
    epochs=24.0,
    lr=3e-3,
    lr_batch=64,
    warmup_epochs=None,
    flat_fraction=0.5,
    weight_decay=(0.04, 0.04),
    momentum=None,
    clip=1.0,
)

# The same for petals, chosen on their val split. Strong colour jitter and grey: in drawn flowers colour says nothing.
DEMO = dataclasses.replace(
    SMALL_DATA,
    source=DataConfig(data="petals"),
    image_size=48,
    hide_ratio=0.5,
    views=ViewConfig(crops=6, crop_scale=(0.7, 1.0), colour=1.0, jitter=(0.6, 0.6, 0.6, 0.5), jitter_p=1.0, grey=0.3),
    epochs=5.0,
    batch_size=32,
    report_every=1.0,
)

RECIPES = {
    "demo": ("MIM-JEPA and NT-Xent of six crops on petals at 48 px: five minutes on two CPU cores", DEMO),
    "small-data": ("MIM-JEPA and NT-Xent of eight crops at 64 px; what a plain --data FOLDER runs", SMALL_DATA),
    "flowers102": ("the paper's recipe as published, and its data set: 224 px, 300 epochs", FLOWERS102),
}


def as_json(recipe: Recipe) -> dict:
    """As it is written to recipe.json and into checkpoints."""
    return json.loads(json.dumps(dataclasses.asdict(recipe), default=str))


def parse(arguments: list[str]) -> tuple[str, Recipe]:
    """(name, recipe) from `[NAME] [--field value ...]`. Raises ValueError for mistakes.

    No name is the demo, or `small-data` where --data is something other than petals.
    """
    if arguments and not arguments[0].startswith("-"):
        name, arguments = arguments[0], arguments[1:]
    else:
        name, recipe = parse(["demo", *arguments])
        if recipe.source.data == "petals":
            return name, recipe
        name = "small-data"
    if name not in RECIPES:
        known = ", ".join(f"{key} ({about})" for key, (about, _) in RECIPES.items())
        raise ValueError(f"unknown recipe {name!r}; expected one of: {known}.")
    about, default = RECIPES[name]
    recipe, unknown = parse_flags(
        functools.partial(
            tyro.cli,
            Recipe,
            prog=f"train/pretrain.py {name}",
            description=f"{about}. Other recipes: {', '.join(key for key in RECIPES if key != name)}.",
            default=default,
            args=arguments,
            return_unknown_args=True,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    )
    if unknown:
        fields = {
            field.name
            for part in (Recipe, DataConfig, ObjectiveConfig, ViewConfig)
            for field in dataclasses.fields(part)
        }
        flags = [f"--{field.replace('_', '-')}" for field in sorted(fields)]
        close = difflib.get_close_matches(unknown[0], flags, n=1)
        meant = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown option {unknown[0]}; {meant}--help lists all.")
    recipe.objective.refuse_ignored(vars(default.objective))
    recipe.validate()
    return name, recipe
