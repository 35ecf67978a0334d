"""Pretrain an encoder with SCOTT and MIM-JEPA. Read from top to bottom.

    accelerate launch train/pretrain.py                                     # the demo
    accelerate launch train/pretrain.py --data PHOTOS --image-size 64       # your own folder
    accelerate launch train/pretrain.py flowers102 --batch-size 128         # the paper's recipe and data

The run folder (`--out`, default runs/RECIPE) ends with `encoder.safetensors` (the target), `context.safetensors`,
`encoder.json`, `metrics.jsonl` (one line per optimizer step), `recipe.json`, `tokens.png`, `summary.json` and, if
images were left out, `unreadable.txt`.
"""

import contextlib
import dataclasses
import json
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from online import Collapse, OnlineReport
from recipes import Recipe, parse
from report import draw_tokens, knn_report, knn_table
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scott_sparse import MIMJEPA, save_encoder
from scott_sparse.batches import Batches, default_workers, load
from scott_sparse.command import plain_errors, stop
from scott_sparse.crosscrop import draw_directions
from scott_sparse.data import Data, open_data, short_side_for, unreadable_lines
from scott_sparse.jepa import make_target, target_features, update_target
from scott_sparse.optimizer import adamw, set_schedules
from scott_sparse.randomness import generator_at, seed_at
from scott_sparse.sparse import choose_engine
from scott_sparse.views import make_views
from scott_sparse.weights import CONFIG, WEIGHTS, write_beside

RUN_FILES = ("recipe.json", "metrics.jsonl", "reports.jsonl", *WEIGHTS.values(), CONFIG, "tokens.png", "summary.json")
RUN_FILES += ("unreadable.txt",)


def main() -> None:
    started = time.perf_counter()
    with plain_errors():
        name, recipe, out, accelerator, data, model = prepare(sys.argv[1:])
    console = Console(quiet=not accelerator.is_main_process)
    target = make_target(model.encoder)
    initial = make_target(model.encoder)
    engine = describe_engine(recipe, accelerator.device)
    parameters = sum(p.numel() for p in model.encoder.parameters())
    console.print(
        f"{name}: {len(data.pretrain):,} images ({recipe.source.protocol} protocol) at {recipe.sides[0]} x "
        f"{recipe.sides[1]} px, encoder {recipe.size} "
        f"({parameters / 1e6:.1f} M parameters), engine {engine}, {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}; "
        f"loss terms: {', '.join(recipe.objective.terms)}"
    )
    if data.unreadable:
        console.print(f"{len(data.unreadable):,} images cannot be read and are left out: see {out / 'unreadable.txt'}")
    if data.leaked:
        console.print(
            f"{data.leaked:,} of the {len(data.report):,} test images are also in the training set, pixel for pixel"
        )
    try:
        training = train(recipe, out, accelerator, data, model, target, console)
    except Collapse as end:
        stop(str(end))

    device = accelerator.device
    knn = knn_report(data, initial.to(device), target, size=recipe.sides)
    if accelerator.is_main_process:
        save_encoder(target, out)
        save_encoder(model.encoder, out, weights="context")
        draw_tokens(out / "tokens.png", data, initial, target, recipe=recipe, device=device)
        summary = {
            "recipe": name,
            "knn": knn,
            "seconds": round(time.perf_counter() - started, 1),
            **training,
            "peak_memory_mib": peak_memory_mib(device),
            "engine": engine,
            "terms": recipe.objective.terms,
            "data": {
                "source": recipe.source.data,
                "protocol": recipe.source.protocol,
                "fingerprint": data.fingerprint,
                "images": {"pretrain": len(data.pretrain), "fit": len(data.fit), "test": len(data.report or ())},
                "unreadable": len(data.unreadable),
                "test_images_also_in_training": data.leaked,
            },
            "encoder_parameters": parameters,
            "processes": accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "mixed_precision": accelerator.mixed_precision,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_beside(out / "summary.json", lambda path: path.write_text(json.dumps(summary, indent=2) + "\n"))
        table = knn_table(data, knn, recipe.objective.terms)
        if table is not None:
            console.print(table)
        console.print(
            f"{summary['seconds']:.0f} s in all, {100 * summary['input_share']:.0f} % of training waited for input; "
            f"results in {out}: summary.json, tokens.png, encoder.safetensors"
        )
    accelerator.end_training()


def prepare(arguments: list[str]) -> tuple[str, Recipe, Path, Accelerator, Data, MIMJEPA]:
    """Everything that can be wrong with what was asked for is found here; nothing is written before it is right."""
    name, recipe = parse(arguments)
    out = recipe.out or Path("runs") / name
    if (out / "summary.json").exists() and not recipe.overwrite:
        raise ValueError(f"{out} holds a finished run; choose another --out or pass --overwrite to replace it.")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several CPU processes would not find each other
        gradient_accumulation_steps=recipe.accumulate,
        log_with=recipe.tracker,
        project_dir=out if recipe.tracker else None,
    )
    slices = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % slices:
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide into {accelerator.num_processes} processes x "
            f"{recipe.accumulate} accumulation steps; nearest: {max(round(recipe.batch_size / slices), 1) * slices}."
        )
    if recipe.tokenizer == "scott":
        choose_engine(recipe.engine, accelerator.device)
    data = open_data(recipe.source, short_side=short_side_for(recipe.sides))
    if recipe.batch_size > len(data.pretrain):
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the data set ({len(data.pretrain)} images to train on); "
            f"use --batch-size {len(data.pretrain) // slices * slices or slices} or less."
        )
    set_seed(recipe.seed)
    model = MIMJEPA(recipe.encoder, recipe.objective, engine=recipe.engine)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        for file in RUN_FILES:  # of an unfinished run, or of a finished one that --overwrite gave up
            (out / file).unlink(missing_ok=True)
        shutil.rmtree(out / "eval", ignore_errors=True)  # says something of weights that are no more
        fields = json.dumps({"recipe": name, **dataclasses.asdict(recipe)}, indent=2, default=str) + "\n"
        write_beside(out / "recipe.json", lambda path: path.write_text(fields))
        if data.unreadable:
            (out / "unreadable.txt").write_text("\n".join([*unreadable_lines(data.unreadable), ""]))
    accelerator.wait_for_everyone()
    return name, recipe, out, accelerator, data, model


def train(recipe: Recipe, out: Path, accelerator: Accelerator, data: Data, model, target, console) -> dict:
    """The loop. Returns what the summary says of it."""
    steps_per_epoch = len(data.pretrain) // recipe.batch_size
    schedules = recipe.schedules(steps_per_epoch)
    total_steps = schedules.total_steps
    optimizer = adamw(model)
    target.to(accelerator.device)
    if recipe.compile:
        model.compile()
        target.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    encoder = accelerator.unwrap_model(model, keep_torch_compile=False).encoder
    if recipe.tracker:
        accelerator.init_trackers("tensorboard")

    model.train()
    log = Log(recipe, out, accelerator, console, total_steps, steps_per_epoch)
    report = OnlineReport(recipe, out, accelerator, data, target, encoder, console)
    batches = load_batches(recipe, accelerator, data, range(total_steps))
    with log:
        report.after(0, None)
        for step in range(total_steps):
            with log.input_time():
                parts = next(batches)
            set_schedules(optimizer, schedules, step)
            torch.manual_seed(seed_at(recipe.seed, "dropout", step, accelerator.process_index))
            directions = directions_at(recipe, step, accelerator.device)
            losses = []
            for number, part in enumerate(parts):
                with log.input_time():
                    cuts = part.cuts.to(accelerator.device, non_blocking=True)
                    context, uncovered = make_views(cuts, part.views, size=recipe.sides)
                visible = part.visible.to(accelerator.device, non_blocking=True)
                # 1. The target encoder looks at the whole of each image's first crop.
                targets = None
                if recipe.objective.mim:
                    with accelerator.autocast():
                        targets = target_features(target, uncovered, blocks=recipe.objective.target_blocks)
                # 2. The context encoder sees what is visible, the predictor answers for what is hidden.
                last = number == recipe.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    terms = model(context, visible, targets, directions)
                    accelerator.backward(terms["loss"])
                losses.append({key: value.detach() for key, value in terms.items()})
            # 3. Update, and let the target follow.
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip or float("inf"))
            loss = torch.stack([part["loss"] for part in losses]).mean()
            if not torch.isfinite(loss) or not (torch.isfinite(norm) or accelerator.mixed_precision == "fp16"):
                raise RuntimeError(
                    f"loss is {loss.item()}, gradient norm {norm.item()} at step {step} (last finite loss "
                    f"{log.last_loss}, lr {schedules.lr_at(step):.2g}); nothing was updated."
                )
            optimizer.step()
            optimizer.zero_grad()
            if not optimizer.step_was_skipped:  # fp16 skips a step whose scaled gradients overflow
                update_target(target, encoder, schedules.momentum_at(step))
            terms = {key: torch.stack([part[key] for part in losses]).mean() for key in losses[0]}
            rates = {"lr": schedules.lr_at(step), "weight_decay": schedules.weight_decay_at(step)}
            log.add(step, {**terms, "gradient_norm": norm}, {**rates, "momentum": schedules.momentum_at(step)})
            report.after(step + 1, terms["loss"])
    return {**log.summary(), "report_share": round(report.seconds / log.seconds, 4), "verdict": report.verdict}


def directions_at(recipe: Recipe, step: int, device: torch.device) -> torch.Tensor | None:
    """SIGReg's random directions of a step, the same for all processes and crops."""
    if not recipe.objective.invariance or recipe.objective.spread != "sigreg":
        return None
    generator = generator_at(recipe.seed, "directions", step)
    return draw_directions(recipe.objective.projector[1], recipe.objective.directions, generator=generator).to(device)


def load_batches(recipe: Recipe, accelerator: Accelerator, data: Data, steps: range):
    """This process's batches of some steps, prepared by as many workers as serve."""
    batches = Batches(
        data.pretrain,
        recipe.views,
        recipe.grid,
        recipe.hide_ratio,
        recipe.mask,
        recipe.batch_size,
        recipe.seed,
        masks=recipe.masks,
        accumulate=recipe.accumulate,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    on_gpu = accelerator.device.type == "cuda"
    streamed = recipe.source.cache == "none"
    workers = default_workers(streamed=streamed, on_gpu=on_gpu) if recipe.workers is None else recipe.workers
    return load(batches, steps, workers=workers, pin=on_gpu)


class Log:
    """metrics.jsonl, tracker and progress bar. Values stay on the device until every `log_every`-th step."""

    def __init__(self, recipe, out, accelerator, console, total_steps, steps_per_epoch):
        self.recipe, self.accelerator, self.steps_per_epoch = recipe, accelerator, steps_per_epoch
        self.total_steps, self.console = total_steps, console
        self.last_loss: float | None = None
        self.first_loss: float | None = None
        self.waiting: list[tuple[int, dict, dict]] = []
        self.file = (out / "metrics.jsonl").open("w") if accelerator.is_main_process else None
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s  ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not accelerator.is_main_process,
        )
        self.task = self.progress.add_task("", total=total_steps, epoch="1", loss="-", rate="-")
        self.started, self.seconds, self.done = time.perf_counter(), 0.0, 0
        self.input_seconds = 0.0

    def __enter__(self):
        self.progress.start()

    def __exit__(self, *_):
        self.flush()
        self.progress.stop()
        if self.file:
            self.file.close()

    @contextlib.contextmanager
    def input_time(self):
        """Counts what the step waits for its input: on a GPU the launch of the work on views, not the work."""
        started = time.perf_counter()
        yield
        self.input_seconds += time.perf_counter() - started

    def add(self, step: int, tensors: dict, numbers: dict) -> None:
        self.waiting.append((step, tensors, numbers))
        self.done = step + 1
        if self.done % self.recipe.log_every == 0 or self.done == self.total_steps:
            self.flush()

    def flush(self) -> None:
        if not self.waiting:
            return
        table = torch.stack([torch.stack(list(tensors.values())).float() for _, tensors, _ in self.waiting])
        table = self.accelerator.reduce(table, reduction="mean").tolist()
        self.seconds = time.perf_counter() - self.started
        rate = self.done * self.recipe.batch_size / self.seconds
        for (step, tensors, numbers), row in zip(self.waiting, table):
            line = {"step": step, "epoch": step // self.steps_per_epoch, **dict(zip(tensors, row)), **numbers}
            line |= {"images_per_second": round(rate, 1)}
            if self.file:
                self.file.write(json.dumps(line) + "\n")
            self.accelerator.log(line, step=step)
        if self.file:
            self.file.flush()
        self.waiting.clear()
        self.last_loss = line["loss"]
        self.first_loss = self.first_loss if self.first_loss is not None else dict(zip(tensors, table[0]))["loss"]
        epoch = min((self.done - 1) // self.steps_per_epoch + 1, max(round(self.recipe.epochs), 1))
        self.progress.update(
            self.task,
            completed=self.done,
            epoch=f"{epoch}/{self.recipe.epochs:g}",
            loss=f"{self.last_loss:.4f}",
            rate=f"{rate:.0f}",
        )

    def summary(self) -> dict:
        return {
            "train_seconds": round(self.seconds, 1),
            "images_per_second": round(self.done * self.recipe.batch_size / self.seconds, 1),
            "input_share": round(self.input_seconds / self.seconds, 4),
            "steps": self.done,
            "loss": {"first": self.first_loss, "last": self.last_loss},
        }


def describe_engine(recipe: Recipe, device: torch.device) -> str:
    """The engine that the context encoder's tokenizer runs on: spconv, dense, or patch embedding."""
    return choose_engine(recipe.engine, device) if recipe.tokenizer == "scott" else "patch"


def peak_memory_mib(device: torch.device) -> int:
    """Peak resident memory of this process, or peak allocated memory of its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
