"""Recipes by name. A recipe is everything that decides a run; every field is a flag of train/pretrain.py."""

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_type_hints

from scott_sparse.cli import ADVANCED, parse_flags
from scott_sparse.data.dataset import DataConfig
from scott_sparse.data.views import ViewConfig
from scott_sparse.model.engines import check_engine
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.masks import visible_count
from scott_sparse.model.pretrained import Start
from scott_sparse.model.tokenizer import patches_along
from scott_sparse.model.vit import EncoderConfig
from scott_sparse.training.optim import Schedules

EMA_WINDOW = 0.04  # of a run's steps


@dataclasses.dataclass(frozen=True)
class Recipe:
    source: DataConfig = DataConfig()
    out: Path | None = None
    """Run folder, for weights, checkpoints and logs. Default: runs/RECIPE."""
    overwrite: bool = False
    """Delete the run that --out holds, finished or not, and start anew."""
    plan: bool = False
    """Print what the run would cost (steps, time, memory, disk), measured by a few real steps, and where it would
    write; then exit. Only the decoded images stay, for the run."""
    time_budget: float = 60.0
    """Minutes that a run may take on a GPU where --data FOLDER comes without the name of a recipe: the largest recipe
    that fits is then taken. On a CPU it is small-data, whatever it takes."""
    share: Annotated[float, ADVANCED] = 1.0
    """Share of the images to pretrain on, in (0, 1], drawn by --seed; a larger one includes a smaller one. Probes use
    all images whatever it is. For eval/learning_curve.py."""
    seed: int = 0
    """Seed of everything random: first weights, order of the images, crops, masks, dropout."""
    init: str | None = None
    """Weights to start from instead of new ones: timm:NAME, a safetensors file of a ViT of timm, or a run (its folder,
    encoder.safetensors or Hub repository). --size must fit; blocks and positions are then those of the start. Use a
    lower --lr than for new weights."""

    # The model.
    image_size: int | tuple[int, int] = 224
    """Side of the views, or height and width, in pixels; multiples of the patch size."""
    size: str = "paper"
    """Depth and width of the encoder: demo, tiny, small, paper, base or large."""
    patch_size: int = 16
    """Side of a patch, which becomes one token, in pixels."""
    mean: Annotated[tuple[float, ...], ADVANCED] = ()
    """Mean of each channel, by which images are normalised, where values are 0 to 1. Default: ImageNet's for RGB, that
    of the images to pretrain on for other --channels."""
    std: Annotated[tuple[float, ...], ADVANCED] = ()
    """Standard deviation of each channel, as --mean."""
    tokenizer: Annotated[str, ADVANCED] = "scott"
    """scott: the sparse convolutional stem. patch: one linear layer per patch, as in a plain ViT."""
    stem_width: Annotated[int, ADVANCED] = 64
    """Channels of the sparse convolutional stem's first layer."""
    engine: Annotated[str, ADVANCED] = "auto"
    """What computes the sparse stem, with the same result: dense, halo, spconv, or auto, the fastest of them here."""
    ffn: Annotated[Literal["swiglu", "mlp"], ADVANCED] = "swiglu"
    """Feed-forward layers of the encoder's blocks."""
    registers: Annotated[int, ADVANCED] = 0
    """Register tokens of the encoder (arXiv 2309.16588)."""
    dropout: float = 0.0
    """Dropout rate of the encoder's features while it trains, 0 to 1."""
    attention_dropout: Annotated[float, ADVANCED] = 0.0
    """Dropout rate of the attention weights, 0 to 1."""
    drop_path: Annotated[float, ADVANCED] = 0.0
    """Rate at which residual branches are skipped (stochastic depth), 0 to 1."""

    # The task.
    hide_ratio: float = 0.6
    """Share of each crop's patches that is hidden from the context encoder and predicted, between 0 and 1."""
    mask_shape: Annotated[Literal["block", "uniform"], ADVANCED] = "block"
    """block: the visible patches form rectangles. uniform: each patch is drawn by itself."""
    objective: ObjectiveConfig = ObjectiveConfig()
    views: ViewConfig = ViewConfig()

    # The optimization; schedules follow optimizer steps.
    epochs: float = 300.0
    """Passes over the images; a fraction is allowed."""
    batch_size: int = 64
    """Images per optimizer step, over all processes and accumulation steps."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step: for batches that are larger than memory."""
    lr: float = 5e-4
    """Highest learning rate of AdamW, reached after warm-up."""
    lr_batch_size: Annotated[int | None, ADVANCED] = None
    """Multiply --lr by sqrt(batch_size / lr_batch_size), as suits Adam (arXiv 2205.10287). None: --lr as it is."""
    lr_start: Annotated[float, ADVANCED] = 1e-6
    """Learning rate at the start of warm-up."""
    lr_final: Annotated[float, ADVANCED] = 1e-5
    """Learning rate at the end of the run."""
    warmup_epochs: float | None = 40.0
    """Epochs over which the learning rate rises linearly. None: a tenth of the run."""
    flat_fraction: Annotated[float, ADVANCED] = 0.72
    """Share of the steps after warm-up at the highest learning rate; a cosine to --lr-final follows."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the first and at the last step, linear between."""
    ema_momentum: Annotated[tuple[float, float] | None, ADVANCED] = (0.996, 1.0)
    """EMA momentum of the target at the first and last step. None: constant, an average over 4 % of the run's steps."""
    clip_grad: Annotated[float | None, ADVANCED] = None
    """Gradients of a larger norm are scaled down to it. None: no limit."""

    # What happens to the run.
    resume: str = "auto"
    """auto: resume from the newest undamaged checkpoint in --out, if there is one. Or the path of a checkpoint."""
    save_every: str = "10min"
    """Between checkpoints: optimizer steps (500) or minutes (10min)."""
    keep_last: Annotated[int, ADVANCED] = 2
    """How many of the newest checkpoints are kept."""
    keep_every: Annotated[int | None, ADVANCED] = None
    """Checkpoints at multiples of so many optimizer steps are kept as well."""
    minutes: float | None = None
    """End after so many minutes with a checkpoint and exit code 75; the same command resumes (for limited queues)."""
    on_nonfinite: Annotated[Literal["stop", "skip"], ADVANCED] = "stop"
    """A step with nan or inf in its loss or gradient updates nothing. stop: end the run. skip: count it and go on."""
    report_every: float | None = None
    """Epochs between reports (k-NN on val, ranks of the features). None: a tenth of the run, 2 at least. 0: none."""
    stop_on_collapse: Annotated[bool, ADVANCED] = False
    """End the run when a report says that the features are collapsing."""

    # The machine.
    precision: Annotated[Literal["no", "bf16"], ADVANCED] = "no"
    """Mixed precision on devices that have it. accelerate launch --mixed_precision bf16 or fp16 wins over it; no: fp32
    unless launched so."""
    workers: int | None = None
    """Processes that prepare batches. None: by the cores with --cache none or on a GPU, else 0, as the CPU trains."""
    compile: bool = False
    """torch.compile the trained model and the target encoder."""
    deterministic: Annotated[bool, ADVANCED] = False
    """Use only kernels that give the same bits every time: on a GPU a resumed run is then the same run, and slower."""
    tracker: Literal["tensorboard"] | None = None
    """Also write the metrics as TensorBoard event files into --out."""
    log_every: Annotated[int, ADVANCED] = 10
    """Optimizer steps between updates of the progress bar and writes to metrics.jsonl."""

    def validate(self) -> None:
        """Raise ValueError for values that do not go together, naming field, value and remedy."""
        positive = (
            "epochs",
            "batch_size",
            "accumulate",
            "lr",
            "keep_last",
            "keep_every",
            "minutes",
            "log_every",
            "time_budget",
        )
        for name in (*positive, "workers", "report_every"):
            value = getattr(self, name)
            if value is not None and (not value >= 0 or (name in positive and value == 0)):
                raise ValueError(f"{name} {value} must be {'positive' if name in positive else '0 or more'}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share {self.share} is outside (0, 1].")
        self.save_interval  # noqa: B018 - validates save_every
        if self.warmup_epochs is not None and not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs:g} must be less than epochs {self.epochs:g}; "
                f"use --warmup-epochs {self.epochs / 10:g}."
            )
        if self.ema_momentum is not None and not all(0 <= momentum <= 1 for momentum in self.ema_momentum):
            raise ValueError(f"ema_momentum {self.ema_momentum} must lie in [0, 1].")
        check_engine(self.engine)
        self.encoder  # noqa: B018 - validates size, tokenizer and rates
        given, channels = (len(self.mean), len(self.std)), self.source.selection.channels
        if given not in ((0, 0), (channels, channels)) or min(self.std, default=1) <= 0:
            raise ValueError(f"--mean and --std need {channels} values each (--channels), std above 0, got {given}.")
        visible_count(self.grid[0] * self.grid[1], self.hide_ratio)
        coloured, plain = self.views.crops - self.views.plain_crops, self.views.plain_crops
        if self.objective.cross_crop_weight and (coloured < 2 or plain == 1):
            groups = f"{coloured} and {plain} (plain_share {self.views.plain_share:g})" if plain else f"{coloured}"
            remedy = "--crops 4 or --plain-share 0" if plain else "--crops 2 or --cross-crop-weight 0"
            raise ValueError(
                f"cross_crop_weight {self.objective.cross_crop_weight:g} compares crops of an image, but crops is "
                f"{groups}; use {remedy}."
            )
        if "ntxent" in self.objective.weights and self.batch_size < 2:
            raise ValueError(f"ntxent compares images, but batch_size is {self.batch_size}; use 2 or more.")

    @property
    def sides(self) -> tuple[int, int]:
        """Image height and width in pixels."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def save_interval(self) -> tuple[int | None, float | None]:
        """Optimizer steps, or seconds, between checkpoints; the other is None. Raises ValueError for other words."""
        match = re.fullmatch(r"(\d+|\d*\.\d+(?=min))(min)?", self.save_every)
        if not match or not float(match[1]):
            raise ValueError(f"save_every {self.save_every!r} is no number of steps (500) or minutes (10min).")
        return (None, 60 * float(match[1])) if match[2] else (int(match[1]), None)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        height, width = self.sides
        return patches_along(height, self.patch_size), patches_along(width, self.patch_size)

    def schedules(self, steps_per_epoch: int) -> Schedules:
        """The schedules of a run of `epochs` epochs."""
        steps = max(round(self.epochs * steps_per_epoch), 1)
        warmup = self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs
        constant = max(1 - 1 / (EMA_WINDOW * steps), 0.0)
        scale = math.sqrt(self.batch_size / self.lr_batch_size) if self.lr_batch_size else 1.0
        return Schedules(
            total_steps=steps,
            warmup_steps=round(warmup * steps_per_epoch),
            lr=self.lr * scale,
            lr_start=self.lr_start,
            lr_final=self.lr_final * scale,
            flat_fraction=self.flat_fraction,
            weight_decay=self.weight_decay,
            momentum=self.ema_momentum or (constant, constant),
        )

    @property
    def encoder(self) -> EncoderConfig:
        fields = ("tokenizer", "patch_size", "stem_width", "ffn", "registers")
        rates = ("dropout", "attention_dropout", "drop_path")
        values = {name: getattr(self, name) for name in (*fields, *rates)}
        return EncoderConfig.named(self.size, in_channels=self.source.selection.channels, **values)

    @property
    def start_name(self) -> str:
        """What reports call the encoder before its first step."""
        return "start" if self.init else "untrained"

    def model(self, *, engine: str | None = None, start: Start | None = None) -> MIMJEPA:
        """The model with new weights, from torch's global generator, for those of `start` to be loaded into.

        `engine` None: that of the recipe. Raises ValueError for a start of another size.
        """
        return MIMJEPA(
            start.config(self.encoder) if start else self.encoder,
            self.objective,
            plain_crops=self.views.plain_crops,
            engine=engine or self.engine,
            count=visible_count(self.grid[0] * self.grid[1], self.hide_ratio),
        )

    def to_json(self) -> dict[str, Any]:
        """The fields as they are written to recipe.json and into checkpoints."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Recipe":
        """From what `to_json` returned. Raises ValueError for fields that there are not, as of another version."""
        try:
            return _from_json(cls, fields)
        except TypeError as error:
            raise ValueError(f"recipe.json is of another version: {error}.") from None


def _from_json(config: type, fields: dict[str, Any]) -> Any:
    hints, values = get_type_hints(config), {}
    for name, value in fields.items():
        hint = hints.get(name)
        if dataclasses.is_dataclass(hint):
            value = _from_json(cast(type, hint), value)
        elif isinstance(value, str) and Path in (hint, *get_args(hint)):
            value = Path(value)
        values[name] = tuple(value) if isinstance(value, list) else value
    return config(**values)


FLOWERS102 = Recipe(source=DataConfig(data="flowers102"), dropout=0.2, attention_dropout=0.1, drop_path=0.1)

# What gains on eight sets of different kind in ten CPU minutes (benchmarks/EVIDENCE.md): eight crops with a quarter
# visible. Contrast makes features blind to whatever crops differ in, and finds crops by colour where they do not: half
# of the crops have changed colours and half keep theirs, compared apart, unless colours say nothing of the images.
# Rates follow batch and length: --epochs and --batch-size can be changed alone.
SMALL_DATA = Recipe(
    image_size=64,
    size="demo",
    patch_size=8,
    stem_width=32,
    hide_ratio=0.75,
    objective=ObjectiveConfig(predictor_depth=1, context="visible", cross_crop_weight=0.5),
    views=ViewConfig(crops=8, crop_scale=(0.4, 1.0), colour="auto", grey=0.2, plain_share=0.5),
    epochs=24.0,
    lr=3e-3,
    lr_batch_size=64,
    warmup_epochs=None,
    flat_fraction=0.5,
    weight_decay=(0.04, 0.04),
    ema_momentum=None,
    clip_grad=1.0,
    precision="bf16",
)

# MIM-JEPA alone, with what lets it learn in minutes instead of the published hours: a target encoder that follows fast,
# visible patches only, a higher learning rate, and the features of all layers as target (benchmarks/EVIDENCE.md).
MIM_JEPA = dataclasses.replace(
    SMALL_DATA,
    hide_ratio=0.6,
    objective=ObjectiveConfig(predictor_depth=1, mim_target="all", context="visible"),
    views=ViewConfig(crops=1, crop_scale=(0.3, 1.0), colour=0.0),
    epochs=60.0,
)

# small-data with the colours of all crops changed, and strongly: for images whose colours say nothing of the classes.
# In demo half of the crops without changes cost 34 points of k-NN, a jitter of .4 .4 .4 .1 25 (benchmarks/EVIDENCE.md).
COLOUR_INVARIANT = dataclasses.replace(SMALL_DATA, views=SMALL_DATA.views.decided(ignore_colours=True))

# colour-invariant for petals, chosen on their val split.
DEMO = dataclasses.replace(
    COLOUR_INVARIANT,
    source=DataConfig(data="petals"),
    image_size=48,
    hide_ratio=0.5,
    views=dataclasses.replace(COLOUR_INVARIANT.views, crops=6, crop_scale=(0.7, 1.0)),
    epochs=5.0,
    batch_size=32,
    precision="no",  # so that its published numbers come out on any CPU
    report_every=2.5,
)

# small-data for a GPU, with the published stem. Learning rates are for batches of 256: DINO's for a ViT-S (5e-4, arXiv
# 2104.14294, section 3.2), and twice that at half its width, as Adam's rate goes with 1 / width (arXiv 2203.03466).
SMALL_DATA_224 = dataclasses.replace(
    SMALL_DATA,
    image_size=224,
    size="small",
    patch_size=16,
    stem_width=64,
    epochs=100.0,
    lr=5e-4,
    lr_batch_size=256,
)
SMALL_DATA_128 = dataclasses.replace(SMALL_DATA_224, image_size=128, size="tiny", lr=1e-3)

RECIPES = {
    "demo": ("MIM-JEPA and NT-Xent of six crops on petals at 48 px: five minutes on two CPU cores", DEMO),
    "small-data": ("MIM-JEPA and NT-Xent of eight crops at 64 px; what --data FOLDER runs on a CPU", SMALL_DATA),
    "colour-invariant": ("small-data, strong colour jitter of all crops: if colours tell nothing", COLOUR_INVARIANT),
    "mim-jepa": ("MIM-JEPA alone at 64 px, in minutes: compares no crops, changes no colours", MIM_JEPA),
    "small-data-128": ("small-data at 128 px with a ViT-Ti/16 in bf16, 100 epochs: for a GPU", SMALL_DATA_128),
    "small-data-224": ("small-data at 224 px with a ViT-S/16 in bf16, 100 epochs: for a GPU", SMALL_DATA_224),
    "flowers102": ("the paper's recipe as published, and its data set: 224 px, 300 epochs", FLOWERS102),
}
BY_SIZE = ("small-data-224", "small-data-128", "small-data")  # what --data FOLDER may mean, the largest first
SIZE_FLAGS = {"--image-size", "--size", "--patch-size"}  # of what they all differ in

NO_GAIN = "was removed: it gained nothing (benchmarks/EVIDENCE.md)"
OLD_FLAGS = {
    "mask": "is --mask-shape now",
    "momentum": "is --ema-momentum now",
    "clip": "is --clip-grad now",
    "lr-batch": "is --lr-batch-size now",
    "keep": "is --keep-last now",
    "mim": "is --mim-weight now",
    "invariance": "is --cross-crop-weight now",
    "spread": "is --cross-crop-loss now (ntxent or sigreg)",
    "spread-share": "is --sigreg-weight now",
    "directions": "is --sigreg-projections now",
    "masks": NO_GAIN,
    "target-blocks": NO_GAIN,
}


def parse(arguments: list[str]) -> tuple[str, Recipe]:
    """(name, recipe) from `[NAME] [--field value ...]`. Raises ValueError for mistakes.

    No name is the demo, or `small-data` where --data is something other than petals.
    """
    names, flags = _names(arguments)
    return names[-1], parse_flags_of(names[-1], flags)


def alternatives(arguments: list[str]) -> dict[str, Recipe]:
    """The recipes that a command line may mean, the largest first: one, or those of `BY_SIZE`.

    A size that is given by a flag (`SIZE_FLAGS`) leaves small-data alone. Raises ValueError for mistakes.
    """
    names, flags = _names(arguments)
    if not SIZE_FLAGS.isdisjoint(flag.split("=")[0].replace("_", "-") for flag in flags):
        names = names[-1:]
    return {name: parse_flags_of(name, flags) for name in names}


def _names(arguments: list[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names of the recipes that a command line may mean, and its flags."""
    if arguments and not arguments[0].startswith("-"):
        return (arguments[0],), arguments[1:]
    words = [word for argument in arguments for word in argument.split("=", 1)]
    own_images = "--data" in words and "petals" not in words[words.index("--data") :][1:2]
    return BY_SIZE if own_images else ("demo",), arguments


def parse_flags_of(name: str, arguments: list[str]) -> Recipe:
    """The recipe of that name with some of its fields changed by flags. Raises ValueError for mistakes."""
    if name not in RECIPES:
        known = ", ".join(f"{key} ({about})" for key, (about, _) in RECIPES.items())
        raise ValueError(f"unknown recipe {name!r}; expected one of: {known}.")
    about, default = RECIPES[name]
    others = ", ".join(key for key in RECIPES if key != name)
    description = f"{about}. Other recipes: {others}."
    try:
        recipe = parse_flags(
            Recipe, arguments, default=default, prog=f"train/pretrain.py {name}", description=description
        )
    except ValueError as mistake:
        _refuse_old_flags(arguments)
        raise mistake
    recipe.objective.refuse_ignored(vars(default.objective))
    recipe.views.refuse_ignored(vars(default.views))
    recipe.validate()
    return recipe


def _refuse_old_flags(arguments: list[str]) -> None:
    """Raises ValueError for a flag of an earlier version, with what has become of it."""
    for argument, following in zip(arguments, [*arguments[1:], ""]):
        flag, _, value = argument.removeprefix("--").replace("_", "-").partition("=")
        if argument.startswith("--") and flag in OLD_FLAGS:
            vicreg = flag == "spread" and "vicreg" in (value, following)
            raise ValueError(f"--spread vicreg {NO_GAIN}." if vicreg else f"--{flag} {OLD_FLAGS[flag]}.")
