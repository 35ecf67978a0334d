"""Fine-tuning: the loop, its evaluations on val, and the run folder that both share with pretraining.

A run is a folder in RUN/eval/finetune, named by a hash of all that decides it, with recipe.json, metrics.jsonl,
checkpoints and, in the end, summary.json, encoder.safetensors and head.safetensors. The same command resumes it, to the
same weights bit for bit, and a finished one is not trained again. Unlike crops and order, what mixup, cutmix and
erasing draw depends on the number of processes.
"""

import contextlib
import copy
import dataclasses
import hashlib
import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from filelock import FileLock
from rich.console import Console
from torch import nn

from scott_sparse.cli import exit_with_error
from scott_sparse.data.images import Images
from scott_sparse.data.splits import PRETRAIN_IMAGES, save_digests
from scott_sparse.data.views import ViewConfig, make_views
from scott_sparse.distributed import main_then_broadcast, on_all_processes, rank
from scott_sparse.evaluation.encoders import FrozenEncoder, fingerprint
from scott_sparse.evaluation.features import Features, extract
from scott_sparse.evaluation.finetune import (
    Augment,
    Classifier,
    FinetuneConfig,
    balanced_weights,
    linear_head,
    load_classifier,
    save_classifier,
)
from scott_sparse.evaluation.metrics import score
from scott_sparse.evaluation.probe import LabelledData, file_name, open_labelled, write_result
from scott_sparse.evaluation.report import print_scores
from scott_sparse.evaluation.subject import EncoderUnderTest, load_all_digests, load_start_digests, open_encoder
from scott_sparse.files import read_json
from scott_sparse.model.jepa import update_target
from scott_sparse.model.vit import Encoder
from scott_sparse.randomness import batch_indices
from scott_sparse.shapes import Float, Tensor
from scott_sparse.training.accumulation import seed_dropout
from scott_sparse.training.log import Log
from scott_sparse.training.optim import adamw, nonfinite_flag, poison_if_nonfinite, set_schedules
from scott_sparse.training.recipe import Recipe
from scott_sparse.training.resume import CHECKPOINTS, RECIPE, SUMMARY
from scott_sparse.training.run import Run, RunFailed, accelerator_of, open_run, tune_allocator
from scott_sparse.training.saver import EXIT_RESUME, Interrupted, Saver

EPOCHS, MIN_STEPS = 30.0, 300
BASE_LR, BASE_WIDTH, LAYER_DECAY = 3e-3, 96, 0.75  # Adam's rate goes with 1 / width (arXiv 2203.03466)


@dataclasses.dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """The fields of a recipe that fine-tuning shares with pretraining, and its own settings by name."""

    settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is fine-tuned, and on what."""

    config: FinetuneConfig
    subject: EncoderUnderTest
    labelled: LabelledData

    @property
    def encoder(self) -> Encoder:
        assert isinstance(self.subject.model, FrozenEncoder)
        return self.subject.model.encoder

    @property
    def layer_decay(self) -> float:
        """New layers have nothing to keep, and learn at one rate."""
        default = 1.0 if self.config.from_scratch else LAYER_DECAY
        return default if self.config.layer_decay is None else self.config.layer_decay

    def features(self, classifier: Classifier, images: Images | None) -> Features | None:
        """Of the centre crop of each image, or averaged over several crops; None on all but the main process."""
        assert images is not None
        # A copy: `extract` moves it to the device in inference mode, after which its parameters could not be trained.
        model, size = FrozenEncoder(copy.deepcopy(classifier.encoder)), self.subject.size
        return extract(model, images, size=size, crops=self.config.crops, workers=self.config.workers)

    def logits(self, classifier: Classifier, images: Images | None) -> Float[Tensor, "n K"] | None:
        """Of the same; None on all but the main process."""
        features = self.features(classifier, images)
        return None if features is None else classifier.logits(features)

    def recipe(self, lr: float) -> FinetuneRecipe:
        """The settings of a run. Raises ValueError for a value out of range."""
        config, count = self.config, len(self.labelled.data.train)
        known = {field.name for field in dataclasses.fields(Recipe)}
        batch = max(min(config.batch_size, count), 1)
        steps_per_epoch = count // batch
        epochs = max(EPOCHS, MIN_STEPS / steps_per_epoch) if config.epochs is None else config.epochs
        window = config.ema * epochs * steps_per_epoch
        momentum = 1 - 1 / window if window > 1 else 0.0
        recipe = FinetuneRecipe(
            source=config.source,
            seed=config.seed,
            image_size=self.subject.size,
            patch_size=self.encoder.config.patch_size,
            views=self.views(),
            epochs=epochs,
            batch_size=min(batch, config.batch_size),
            lr=lr,
            lr_start=lr / 100,
            lr_final=lr / 100,
            warmup_epochs=epochs / 10,
            flat_fraction=0.0,
            weight_decay=(config.weight_decay, config.weight_decay),
            ema_momentum=(momentum, momentum),
            clip_grad=1.0,
            minutes=config.minutes,
            save_every=config.save_every,
            settings={
                "layer_decay": self.layer_decay,
                **{k: v for k, v in config.own_settings.items() if k not in known},
            },
        )
        recipe.validate()
        return recipe

    def views(self) -> ViewConfig:
        """One crop of each image, with the extent and the share of changed colours that pretraining had."""
        path, config = Path(self.subject.run, RECIPE), self.config
        saved = read_json(path).get("views", {}) if path.is_file() else {}
        known = {field.name for field in dataclasses.fields(ViewConfig)}
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items() if k in known}
        views = ViewConfig(**fields)
        assert views.colour != "auto"  # which a run decides before it writes its recipe
        colour = views.colour * (1 - views.plain_share) if config.colour is None else config.colour
        scale = config.crop_scale or views.crop_scale
        return dataclasses.replace(views, crops=1, plain_share=0.0, colour=colour, crop_scale=scale)

    def folder(self, recipe: FinetuneRecipe, precision: str) -> Path:
        """Of a run, named by its data and a hash of all that decides it."""
        passing = ("out", "source", "minutes", "save_every")
        settings = {name: value for name, value in recipe.to_json().items() if name not in passing}
        data, protocol = self.labelled.data, recipe.source.protocol
        images = [data.fingerprint, protocol, data.train.rows.tolist()]
        what = repr([fingerprint(self.subject.model), images, precision, sorted(settings.items())])
        key = hashlib.blake2b(what.encode(), digest_size=4).hexdigest()
        return self.subject.out / "finetune" / f"{file_name(str(recipe.source.data))}-{self.subject.name}-{key}"


def run_finetune(config: FinetuneConfig) -> None:
    """Train with each learning rate, choose rate and epoch on val, score on test once, write and print the result.

    Raises ValueError for a user's mistake; ends the process where a run was told to stop, or fails.
    """
    tune_allocator()
    started = time.perf_counter()
    subject = open_encoder(dataclasses.replace(config, init="random") if config.from_scratch else config)
    config.validate(subject.model)
    labelled = on_all_processes(lambda: open_labelled(config, subject))
    task = Task(config, subject, labelled)
    try:
        runs = [train(task, lr) for lr in config.lr or (BASE_LR * (BASE_WIDTH / task.encoder.config.dim),)]
    except Interrupted as interruption:
        if rank() == 0:
            print(interruption)
        sys.exit(EXIT_RESUME)
    except RunFailed as failure:
        exit_with_error(str(failure))
    tried = [{"lr": summary["lr"], **point, "folder": out} for out, summary in runs for point in summary["val"]]
    best = max(tried, key=lambda point: point["top1"])  # of equal ones the first, as in training
    classifier = load_classifier(best["folder"], len(labelled.classes))
    val, test = (task.logits(classifier, images) for images in (labelled.data.val, labelled.data.test))
    if val is None or test is None:  # not the main process
        return
    result = {
        "choice": {key: best[key] for key in ("lr", "epoch")},
        "val": score(val, labelled.val_labels).to_json(),
        "test": score(test, labelled.test_labels).to_json(),
        "settings_tried": [{key: point[key] for key in ("lr", "epoch", "top1")} for point in tried],
        "classifier": str(best["folder"]),
        "training": {key: runs[0][1][key] for key in ("steps", "mixed_precision", "processes")},
    }
    print_scores(write_result(config, "finetune", labelled, result, seconds=time.perf_counter() - started))


def train(task: Task, lr: float) -> tuple[Path, dict[str, Any]]:
    """One run: its folder, and its summary; those of a finished one as they are.

    Raises ValueError for a batch that does not divide, Interrupted if the run was told to stop, and RunFailed if it
    cannot go on.
    """
    config, subject, labelled, recipe = task.config, task.subject, task.labelled, task.recipe(lr)
    accelerator = accelerator_of(recipe, subject.out)
    out = task.folder(recipe, accelerator.mixed_precision)
    if recipe.batch_size % accelerator.num_processes:
        raise ValueError(f"batch_size {recipe.batch_size} does not divide into {accelerator.num_processes} processes.")
    finished = main_then_broadcast(lambda: read_json(out / SUMMARY) if (out / SUMMARY).exists() else None)
    if finished is not None:
        return out, finished
    set_seed(recipe.seed)
    model, data = Classifier(copy.deepcopy(task.encoder), len(labelled.classes)), labelled.data
    data = dataclasses.replace(data, pretrain=data.train)
    console = Console(quiet=not accelerator.is_main_process, markup=False, emoji=False)
    lock = FileLock(out / ".lock")
    run = open_run(Run("finetune", recipe, out, accelerator, data, model, "dense", console, None, lock))
    main_then_broadcast(lambda: record_images(run, subject))
    if run.checkpoint is None and not config.from_scratch:
        start_from_probe(task, model)
    model.freeze_below(config.blocks)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    console.print(
        f"{subject.name} encoder of {subject.run}: trains {trained / 1e6:.2f} M parameters, {len(data.train):,} "
        f"labelled images of {len(labelled.classes)} classes, {run.schedules.total_steps:,} steps of "
        f"{recipe.batch_size}, learning rate {lr:g}, {accelerator.num_processes} x {accelerator.device.type}, "
        f"precision {accelerator.mixed_precision}",
        soft_wrap=True,
    )
    averages = nn.ModuleDict({name: copy.deepcopy(model).requires_grad_(False).eval() for name in ("ema", "best")})
    log, points = loop(task, run, model, averages)
    best = averages["best"].cpu()
    assert isinstance(best, Classifier)

    def write() -> dict[str, Any]:
        save_classifier(best, out, size=subject.size)
        summary = run.write_summary(
            {**log, "val": points, "lr": lr, "subject": subject.name, "classes": list(labelled.classes)}, {}
        )
        shutil.rmtree(out / CHECKPOINTS)
        return summary

    return out, main_then_broadcast(write)


def loop(task: Task, run: Run, model: Classifier, averages: nn.ModuleDict) -> tuple[dict[str, Any], list[dict]]:
    """Train `model`; keep its average, and the average that was best on val, in `averages`.

    Returns what the summary says of the training, and top-1 on val at each evaluation.
    """
    config, labels, classes = task.config, task.labelled.train_labels, len(task.labelled.classes)
    recipe, accelerator, device, schedules = run.recipe, run.accelerator, run.accelerator.device, run.schedules
    averages.to(device)
    optimizer = adamw(model, lr_scale=model.lr_scale(task.layer_decay))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    log, report = Log(run), ValReport(task, run, averages)
    saver = Saver(run, log, report, model=model, target=averages, optimizer=optimizer.optimizer)
    start, total = saver.resume(), schedules.total_steps
    augment, statistics = Augment(config, classes), task.subject.model.statistics
    weights = balanced_weights(labels, classes).to(device) if config.class_weights == "balanced" else None
    share = recipe.batch_size // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)

    wrapped.train()
    with log, saver.signals, contextlib.closing(run.batches(range(start, total))) as batches:
        if start == 0:
            report.after_step(0)
        for step in range(start, total):
            with log.input_time():
                (part,) = next(batches)
                crops = part.crops.to(device, non_blocking=True)
                images, _ = make_views(crops, part.views, size=recipe.sides, **statistics)
                rows = batch_indices(step, images=len(labels), batch=recipe.batch_size, seed=recipe.seed)[own]
            set_schedules(optimizer, schedules, step)
            seed_dropout(recipe.seed, step, accelerator.process_index, 0)
            inputs, targets = augment(images[:, 0], labels[rows].to(device))
            with accelerator.autocast():
                logits = wrapped(inputs)
            loss = F.cross_entropy(logits.float(), targets, weight=weights, label_smoothing=config.label_smoothing)
            accelerator.backward(poison_if_nonfinite(loss))
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), recipe.clip_grad or math.inf)
            assert norm is not None
            nonfinite = nonfinite_flag(loss, norm, scaled=accelerator.scaler is not None)
            if accelerator.scaler is None:
                optimizer.optimizer.found_inf = nonfinite
            optimizer.step()
            if not optimizer.step_was_skipped:
                update_target(averages["ema"], model, schedules.momentum_at(step))
            optimizer.zero_grad()
            log.add(step, {"loss": loss.detach(), "gradient_norm": norm}, schedules.at(step), nonfinite)
            report.after_step(step + 1)
            saver.after_step(step + 1)
    saver.check_last_save()
    return log.summary(), report.reports


class ValReport:
    """Top-1 of the averaged weights on val; keeps those that were the best so far."""

    def __init__(self, task: Task, run: Run, averages: nn.ModuleDict):
        self.task, self.run, self.averages = task, run, averages
        self.steps = torch.linspace(0, run.schedules.total_steps, task.config.points + 1).round().int().tolist()
        self.reports: list[dict] = []

    def state(self) -> dict[str, Any]:
        return {"reports": self.reports, "losses": []}

    def resume(self, state: dict[str, Any]) -> None:
        self.reports = state["reports"]

    def after_step(self, done: int) -> None:
        """Evaluate if it is time to. `done`: optimizer steps so far."""
        if done not in self.steps:
            return
        average, labelled = self.averages["ema"], self.task.labelled
        assert isinstance(average, Classifier)
        logits = self.task.logits(average, labelled.data.val)
        top1 = main_then_broadcast(lambda: logits is not None and score(logits, labelled.val_labels).top1)
        point = {"epoch": round(done / self.run.steps_per_epoch, 2), "top1": round(top1, 2)}
        if all(point["top1"] > other["top1"] for other in self.reports):
            self.averages["best"].load_state_dict(average.state_dict())
        self.reports.append(point)
        self.run.console.print(f"epoch {point['epoch']:g}: {point['top1']:.1f} % of val")


def start_from_probe(task: Task, model: Classifier) -> None:
    """Set the head to that of a linear probe of the encoder."""
    labelled = task.labelled
    train, val = (task.features(model, images) for images in (labelled.data.train, labelled.data.val))

    def fit() -> tuple[Tensor, Tensor] | None:
        if train is not None and val is not None:
            return linear_head(train, labelled.train_labels, val, labelled.val_labels, classes=len(labelled.classes))
        return None

    fitted = main_then_broadcast(fit)
    assert fitted is not None
    model.head.load_state_dict(dict(zip(("weight", "bias"), fitted)))


def record_images(run: Run, subject: EncoderUnderTest) -> None:
    """Of the new encoder: the images that it is fine-tuned on and those that it was pretrained on, if that is known."""
    if subject.name == "random":
        return
    before = (load_start_digests if subject.name == "start" else load_all_digests)(Path(subject.run))
    if before is not None:
        save_digests(run.out, torch.cat([before, run.data.train.digests]).unique())
    elif subject.name != "start":  # weights of other packages, of which no images are counted
        (run.out / PRETRAIN_IMAGES).unlink()
