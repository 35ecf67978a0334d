"""The flags of the scripts in eval/, the encoder that they name, and the test images that it was pretrained on."""

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import torch
import tyro

from scott_sparse.cli import ADVANCED, exit_on_user_error, parse_flags
from scott_sparse.data.batches import default_workers
from scott_sparse.data.dataset import Data, DataConfig, open_data, short_side_for
from scott_sparse.data.splits import load_digests
from scott_sparse.distributed import rank
from scott_sparse.evaluation.encoders import FrozenEncoder, ImageEncoder, Pixels, TimmModel
from scott_sparse.files import read_json
from scott_sparse.model.pretrained import first_encoder
from scott_sparse.model.weights import load_encoder, trained_by
from scott_sparse.shapes import Int, Tensor

Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
    """Flags of every script in eval/; a probe with flags of its own adds them in a subclass."""

    run: tyro.conf.Positional[str | None] = None
    """Run folder of train/pretrain.py, or a repository OWNER/NAME of the Hugging Face Hub. Not needed with --timm."""
    init: Literal["pixels", "random"] | None = None
    """Evaluate a baseline instead: the raw pixels, or the run's encoder before its first step: untrained, or the
    weights that pretraining started from."""
    timm: str | None = None
    """Evaluate a model of timm with its published weights instead of a run: its name, such as resnet18."""
    weights: Literal["target", "context"] = "target"
    """Which encoder of the run: the EMA target, or the context encoder, which the optimizer trained."""
    image_size: int | tuple[int, int] | None = None
    """Side, or height and width, of the evaluated images in pixels. Default: as in training (timm: as published).
    At another size the positions are interpolated: an image spans the same extent as in training."""
    crops: Literal[1, 8] = 1
    """Views averaged. 1: the centre crop. 8: features are averaged over the four corners of each image and their mirror
    images, the attentive probe's logits likewise, for eight times the work."""
    source: DataConfig = DataConfig()
    out: Path | None = None
    """Folder for the results. Default: RUN/eval."""

    @property
    def workers(self) -> int:
        """Processes that read images."""
        return default_workers(streamed=self.source.cache == "none", on_gpu=torch.cuda.is_available())

    @property
    def own_settings(self) -> dict:
        """--crops and the flags of a subclass, where they differ from their defaults."""
        shared = {field.name for field in dataclasses.fields(ProbeConfig)} - {"crops"}
        own = {field.name: field.default for field in dataclasses.fields(self) if field.name not in shared}
        return {name: getattr(self, name) for name, default in own.items() if getattr(self, name) != default}


@dataclasses.dataclass(frozen=True)
class LabelBudgetConfig(ProbeConfig):
    """Flags of the scripts that fit on one set of labels."""

    label_budget: str = "100%"
    """Labels of train to use: a share of each class (10%), or a number of images of each class (5). Val, on which
    settings are chosen, and test stay whole."""
    label_seed: Annotated[int, ADVANCED] = 0
    """Seed of the draw of these images; with one seed a larger budget includes a smaller one."""


@dataclasses.dataclass(frozen=True)
class EncoderUnderTest:
    """An encoder, and how to evaluate it."""

    name: str
    """A key of TRAINED, random, start (of a run with --init), pixels, or the name of a timm model."""
    run: str
    """As it was given, or timm:NAME."""
    model: ImageEncoder
    size: tuple[int, int]
    """Height and width of the evaluated images in pixels."""
    out: Path
    pretraining: dict | None = None
    """Of a pretrained encoder, if its run folder says it: `data` of summary.json, and `image_size`."""

    def source(self, source: DataConfig) -> DataConfig:
        """The data that flags name, with the channels of the encoder. Raises ValueError where flags ask for others."""
        channels = len(self.model.statistics["mean"])
        if source.channels not in (None, channels):
            raise ValueError(f"--channels {source.channels}: {self.run} takes {channels}; leave the flag out.")
        return dataclasses.replace(source, channels=channels)


def run_script(config_type: type[Config], main: Callable[[Config], None]) -> None:
    """Parse the command line into `config_type` and call `main` with it; a user's mistake ends in one line.

    --help begins with the docstring of the script.
    """
    # Indented lines stay lines, others are joined to paragraphs.
    description = re.sub(r"^(?=python |accelerate )", "    ", sys.modules["__main__"].__doc__ or "", flags=re.MULTILINE)
    with exit_on_user_error():
        main(parse_flags(config_type, description=description or None))


def open_encoder(config: ProbeConfig) -> EncoderUnderTest:
    """Load what the flags name.

    Raises ValueError for a run without weights, for flags that exclude each other, and without an image size.
    """
    size = None if config.image_size is None else _height_width(config.image_size)
    if config.timm:
        if config.run or config.init:
            raise ValueError("--timm stands in place of a run and of --init; give only one of them.")
        model, folder = TimmModel(config.timm), Path("runs", f"timm-{config.timm.replace('/', '-')}")
        out = config.out or folder / "eval"
        return EncoderUnderTest(config.timm, f"timm:{config.timm}", model, size or model.size, out)
    if config.run is None:
        raise ValueError("nothing to evaluate: name a run folder (as in eval/knn.py runs/demo), or --timm MODEL.")
    encoder = load_encoder(config.run, weights=config.weights)  # for a baseline too: without weights it is not a run
    folder = Path(config.run)
    out = config.out or (folder / "eval" if folder.is_dir() else Path("runs", folder.name, "eval"))
    files = (folder / name for name in ("recipe.json", "summary.json"))
    recipe, summary = (read_json(file) if file.is_file() else {} for file in files)
    trained = _height_width(recipe["image_size"]) if "image_size" in recipe else None
    if trained is None and encoder.preprocess is not None:
        trained = encoder.preprocess.image_size
    if size is None:
        if trained is None:
            raise ValueError(f"{config.run} does not say at which image size it was trained; give --image-size.")
        size = trained
    p = encoder.config.patch_size
    span = None if trained in (None, size) else (trained[0] // p, trained[1] // p)
    if config.init == "pixels":
        return EncoderUnderTest("pixels", config.run, Pixels(p, encoder.preprocess), size, out)
    if config.init == "random":
        if "seed" not in recipe:
            raise ValueError(f"{config.run} has no recipe.json with the seed of its initial weights.")
        initial = first_encoder(encoder.config, seed=recipe["seed"], init=recipe.get("init"))
        initial.preprocess = encoder.preprocess
        name = "start" if recipe.get("init") else "random"
        return EncoderUnderTest(name, config.run, FrozenEncoder(initial, span), size, out)
    pretraining = None
    if "data" in summary and "image_size" in recipe:
        pretraining = {**summary["data"], "image_size": recipe["image_size"]}
    name = trained_by(recipe, summary) if config.weights == "target" else "context"
    return EncoderUnderTest(name, config.run, FrozenEncoder(encoder, span), size, out, pretraining)


def count_pretrained_test_images(
    encoder: EncoderUnderTest, source: DataConfig, data: Data, *, reopen: Callable[..., Data] = open_data
) -> int | None:
    """How many images of `data.test` the encoder was pretrained on, pixel for pixel; None if its run did not record it.

    `reopen` opens the data again as `open_data` does, for another size. Prints a line if the run was pretrained on
    another data set. Raises ValueError under the clean protocol if the encoder was pretrained on test images of which
    the data set holds no copy among its other images.
    """
    run = encoder.pretraining
    if run is None:
        return None
    # Digests and fingerprint depend on the size of the decoded images, the fingerprint on the protocol too.
    short_side, protocol = short_side_for(_height_width(run["image_size"])), run.get("protocol", source.protocol)
    same_side = short_side == short_side_for(encoder.size)
    if not same_side or protocol != source.protocol:
        cache = source.cache if same_side else "none"  # only the digests are needed
        data = reopen(dataclasses.replace(source, protocol=protocol, cache=cache), short_side=short_side)
    same_data = data.fingerprint == run.get("fingerprint")
    if not same_data and rank() == 0:
        print(f"note: {encoder.run} was pretrained on other images ({run.get('source')}) than --data {source.data}.")
    test, pretrain, digests = data.test, data.pretrain, load_all_digests(Path(encoder.run))
    assert test is not None
    if digests is None:
        count, unexplained = None, len(test) if same_data and protocol == "paper" else 0
    else:
        pretrained_on = torch.isin(test.digests, digests)
        copies = torch.isin(test.digests, pretrain.digests[~torch.isin(pretrain.rows, test.rows)])
        count, unexplained = int(pretrained_on.sum()), int((pretrained_on & ~copies).sum())
    if unexplained and source.protocol == "clean":
        raise ValueError(
            f"{encoder.run} was pretrained on {unexplained:,} of the {len(test):,} test images of --data "
            f"{source.data}: evaluate with --protocol paper, or on another test split."
        )
    return count


def load_all_digests(run: Path) -> Int[Tensor, " n"] | None:
    """`load_digests` of a run, and of the run that it started from (--init), if that folder is still there.

    Digests are of images as they were decoded: those of runs at another image size match nothing.
    """
    digests, before = load_digests(run), load_start_digests(run)
    return digests if digests is None or before is None else torch.cat([digests, before]).unique()


def load_start_digests(run: Path) -> Int[Tensor, " n"] | None:
    """`load_all_digests` of the run that a run started from; None without one."""
    recipe = run / "recipe.json"
    start = read_json(recipe).get("init") if recipe.is_file() else None
    if not start or start.startswith("timm:"):
        return None
    return load_all_digests(Path(start) if Path(start).is_dir() else Path(start).parent)


def _height_width(size) -> tuple[int, int]:
    """From one side, or from height and width, as flags and JSON give them."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
