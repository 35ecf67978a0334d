"""What a run will cost, by a few of its own steps: before it starts (--plan), or in one line as it starts.

The steps are those of train/pretrain.py, on a copy of the model: the run that follows is the same as without a plan.
"""

import copy
import dataclasses
import itertools
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sized
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate.utils import gather_object
from rich.console import Console
from rich.filesize import decimal

from scott_sparse.data.cache import MappedPixels
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import BATCH, extract
from scott_sparse.evaluation.visualize import form_of_run
from scott_sparse.model.jepa import make_target
from scott_sparse.model.vit import Encoder
from scott_sparse.training.health import rankme
from scott_sparse.training.monitor import LIDAR_VIEWS, OnlineReport
from scott_sparse.training.pictures import FIGURE_IMAGES, bank_of
from scott_sparse.training.run import Run, RunFailed, accelerator_of, peak_memory_mib
from scott_sparse.training.saver import EXIT_RESUME, Interrupted

WARM_UP_STEPS, TIMED_STEPS = 2, 3
FIGURE_SECONDS = 3.0  # the report: what is drawn without the encoder
LINE_BYTES = 350  # of metrics.jsonl
MIB = 2**20


class DoesNotFit(ValueError):
    """The run needs more memory than there is; the message says what fits."""


class FirstSteps:
    """Times the first steps of a run, then prints what all of it takes; `after_step` is called after each step."""

    def __init__(self, run: Run, count: int | None = None):
        self.run, self.device = run, run.accelerator.device
        self.group = max(run.workers, 1)  # steps that are timed together: workers deliver their batches in turns
        prefetched = 2 * run.workers  # batches that were ready before the first step
        self.count = count or WARM_UP_STEPS + prefetched + TIMED_STEPS * self.group
        self.times = [time.perf_counter()]

    def after_step(self, done: int, report: OnlineReport) -> None:
        """`done`: optimizer steps of the run so far."""
        if len(self.times) > self.count:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        if len(self.times) > self.count or done == self.run.schedules.total_steps:
            self.end(done, report)

    @property
    def seconds(self) -> float:
        """Of a step: the median of the last three groups, or of the last three steps where a run has fewer."""
        group = self.group if len(self.times) > TIMED_STEPS * self.group else 1
        times = self.times[::-group][: TIMED_STEPS + 1]
        return statistics.median((end - start) / group for end, start in itertools.pairwise(times))

    def end(self, done: int, report: OnlineReport) -> None:
        """Print the plan in a line. What a report takes is known if the run has made one: a resumed one has not."""
        made = 1 + done // report.every_steps if report.every_steps and done < len(self.times) else 0
        report_seconds = report.seconds / made if made else 0.0
        batch_seconds = report_seconds / max(_batches_of_report(self.run, report), 1)
        plan = Plan(self.run, report, self.seconds, report_seconds, batch_seconds, peak_memory_mib(self.device))
        self.run.console.print(plan.line(), highlight=False, markup=False, soft_wrap=True)


class _Rehearsal(FirstSteps):
    """The first steps of a run that has no others."""

    class Over(Exception):
        pass

    def end(self, done: int, report: OnlineReport) -> None:
        raise self.Over


Train = Callable[[Run, Encoder, FirstSteps], dict]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a whole run takes, its images being decoded."""

    run: Run
    report: OnlineReport
    step_seconds: float
    report_seconds: float
    """Of one online report."""
    batch_seconds: float
    """Of `BATCH` images through the encoder, without gradient."""
    peak_mib: int
    """Of a process, as in `Run.write_summary`."""

    @property
    def steps(self) -> int:
        return self.run.schedules.total_steps

    @property
    def reports(self) -> int:
        every = self.report.every_steps
        return 1 + self.steps // every if every else 0

    @property
    def end_seconds(self) -> float:
        """Of k-NN with the first and the last encoder, and the pictures: tokens of both, attention, neighbours."""
        batches = 2 * _batches(self.run, self.run.data.train, self.run.val) if self.run.val else 0
        batches += _batches(self.run, bank_of(self.run.data))
        recipe = self.run.recipe
        size, stride = form_of_run(recipe.sides, recipe.patch_size)
        shifts, pixels = (recipe.patch_size / stride) ** 2, math.prod(size) / math.prod(recipe.sides)
        figure = FIGURE_IMAGES * shifts * pixels / BATCH
        return (batches + 3 * figure) * self.batch_seconds + FIGURE_SECONDS

    @property
    def seconds(self) -> float:
        return self.steps * self.step_seconds + self.reports * self.report_seconds + self.end_seconds

    @property
    def run_bytes(self) -> int:
        """Of the run folder, while a checkpoint is written and the one that it replaces is still there."""
        model, recipe = self.run.model, self.run.recipe
        all_values, encoder = (sum(t.numel() for t in m.state_dict().values()) for m in (model, model.encoder))
        kept = recipe.keep_last + 1 + (self.steps // recipe.keep_every if recipe.keep_every else 0)
        return 4 * (kept * (all_values + encoder + 2 * _trained(self.run)) + 2 * encoder) + LINE_BYTES * self.steps

    def check_disk(self) -> None:
        """Raises ValueError if the run folder has no room."""
        free = _free_bytes(self.run.out)
        if self.run_bytes > free:
            raise ValueError(
                f"checkpoints and weights need {decimal(self.run_bytes)}, {decimal(free)} are free for {self.run.out}; "
                "make room, or choose another --out."
            )

    def line(self) -> str:
        """In short, as a run starts."""
        free = decimal(_free_bytes(self.run.out))
        return (
            f"plan: {self.steps:,} steps of {self.step_seconds:.3g} s and {self.reports} reports of "
            f"{self.report_seconds:.2g} s take {show_time(self.seconds)}; memory {decimal(self.peak_mib * MIB)}, "
            f"checkpoints and weights {decimal(self.run_bytes)} of {free} in {self.run.out}"
        )

    def table(self) -> str:
        """In full, for --plan."""
        run, recipe, pixels = self.run, self.run.recipe, self.run.data.pretrain.read
        decoded = where = ""
        if isinstance(pixels, MappedPixels):
            decoded, where = f"; {decimal(pixels.pixels.nbytes)} decoded images", f"; decoded images in {pixels.path}"
        training, reporting = map(show_time, (self.steps * self.step_seconds, self.reports * self.report_seconds))
        limit = _memory_limit_mib(run.accelerator.device)
        rows = {
            "images": f"{len(run.data.pretrain):,} to pretrain on, {recipe.sides[0]} x {recipe.sides[1]} px",
            "parameters": f"{run.encoder_parameters / 1e6:.1f} M encoder, {_trained(run) / 1e6:.1f} M trained in all",
            "steps": f"{self.steps:,} of {recipe.batch_size} images, {self.step_seconds:.3g} s each (measured)",
            "time": f"{show_time(self.seconds)}: steps {training}, {self.reports} reports {reporting}, k-NN and "
            f"figure at the end {show_time(self.end_seconds)}",
            "memory": f"{decimal(self.peak_mib * MIB)} of {decimal(limit * MIB)}",
            "disk": f"{decimal(self.run_bytes)} checkpoints and weights, {decimal(_free_bytes(run.out))} free{decoded}",
            "writes to": f"{run.out}{where}",
        }
        return "\n".join(f"{name:<12}{text}" for name, text in rows.items())


def rehearse(run: Run, train: Train) -> Plan:
    """The plan of a run, by steps of its own; all processes take part.

    Micro-batches grow up to that of the run, and each is tried only if by those before it will fit. Raises DoesNotFit.
    """
    recipe, device, pretrain = run.recipe, run.accelerator.device, run.data.pretrain
    slices = run.accelerator.num_processes * recipe.accumulate
    whole = recipe.batch_size // slices
    sizes = [whole]
    while sizes[-1] >= 8 and not recipe.compile:
        sizes.append(sizes[-1] // 2)
    limit = min(gather_object([_memory_limit_mib(device)]))
    before = max(gather_object([peak_memory_mib(device)]))
    peaks = {0: before + 12 * _trained(run) // MIB}  # by micro-batch; at first with gradients and moments
    seconds = 0.0
    for size in reversed(sizes):
        batch = dataclasses.replace(recipe, batch_size=size * slices)
        last, peak, slope = _trend(peaks)
        if peak + slope * (size - last) > limit:
            raise DoesNotFit(_what_fits(peaks, limit, run, last + int((limit - peak) / max(slope, 1e-3))))
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        count = None if size == whole else 2
        try:
            seconds = _step_seconds(dataclasses.replace(run, recipe=batch), train, count)
        except torch.OutOfMemoryError:
            raise DoesNotFit(_what_fits(peaks, limit, run, last)) from None
        peaks[size] = max(gather_object([peak_memory_mib(device)]))
    target = make_target(run.model.encoder).to(device)
    report, times = OnlineReport(run, target, run.model.encoder), [time.perf_counter()]
    few = pretrain[torch.arange(min(BATCH, len(pretrain)))]
    for _ in range(2):  # the first warms up
        extract(FrozenEncoder(target), few, size=recipe.sides, tokens=True)
        times.append(time.perf_counter())
    evaluating = max(gather_object([peak_memory_mib(device)]))  # pictures and k-NN at the end take whole batches too
    rankme(torch.randn(len(report.bank), run.model.encoder.config.dim))
    batch_seconds, rank_seconds = times[2] - times[1], time.perf_counter() - times[2]
    report_seconds = batch_seconds * _batches_of_report(run, report) + rank_seconds
    every = zip(*gather_object([(seconds, report_seconds, batch_seconds)]))
    seconds, report_seconds, batch_seconds = map(max, every)  # of the slowest process
    is_mapped = device.type == "cpu" and isinstance(pretrain.read, MappedPixels)
    mapped = (
        pretrain.channels * int(pretrain.sizes.prod(1).sum()) // MIB if is_mapped else 0
    )  # pages of the file, as they are used
    return Plan(run, report, seconds, report_seconds, batch_seconds, max(peaks[whole], evaluating) + mapped)


def _step_seconds(run: Run, train: Train, count: int | None) -> float:
    """Of a step of a run, by its first `count` steps (None: as `FirstSteps` takes), in a folder that is removed."""
    recipe = dataclasses.replace(run.recipe, report_every=0.0, save_every="99999999", minutes=None, tracker=None)
    accelerator, model = accelerator_of(recipe, run.out), copy.deepcopy(run.model)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        rehearsal = dataclasses.replace(
            run, recipe=recipe, out=Path(folder), accelerator=accelerator, model=model, console=Console(quiet=True)
        )
        steps = _Rehearsal(rehearsal, count)
        try:
            train(rehearsal, make_target(model.encoder), steps)
        except _Rehearsal.Over:
            pass
        except Interrupted:
            sys.exit(EXIT_RESUME)
        except RunFailed as failure:
            raise ValueError(str(failure)) from None
        finally:
            accelerator.free_memory()
    return steps.seconds


def _trend(peaks: dict[int, int]) -> tuple[int, int, float]:
    """The largest micro-batch so far, its peak in MiB, and how many more another image takes."""
    *_, (before, base), (last, peak) = [(-1, peaks[0]), *peaks.items()]
    return last, peak, (peak - base) / (last - before)


def _what_fits(peaks: dict[int, int], limit: int, run: Run, fits: int) -> str:
    """Why a run does not fit `limit` MiB, and what does if a micro-batch of `fits` images does."""
    recipe, processes = run.recipe, run.accelerator.num_processes
    batch, (last, peak, slope) = recipe.batch_size // processes, _trend(peaks)
    needed = peak + slope * (batch // recipe.accumulate - last)
    parts = [parts for parts in range(2, batch + 1) if batch % parts == 0 and batch // parts <= fits]
    remedy = "use a smaller --image-size or --size"
    if parts:
        remedy = f"use --accumulate {parts[0]} (the same loss) or --batch-size {batch // parts[0] * processes}"
    return (
        f"batch_size {recipe.batch_size} needs about {decimal(round(needed * MIB))} of memory, "
        f"{decimal(limit * MIB)} can be had; {remedy}."
    )


def _memory_limit_mib(device: torch.device) -> int:
    """Memory that this process may grow to, in MiB: its own, and its share of what is free."""
    if device.type == "cuda":
        return (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)) // MIB
    limit = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    limit += psutil.Process().memory_info().rss
    container = Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (text := container.read_text().strip()).isdigit():
        limit = min(limit, int(text) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return limit // MIB


def _trained(run: Run) -> int:
    """Parameters that are trained, predictor and projector included."""
    return sum(p.numel() for p in run.model.parameters() if p.requires_grad)


def _batches(run: Run, *images: Sized | None, copies: int = 1) -> int:
    """Batches that a process extracts features of."""
    per_process = BATCH * run.accelerator.num_processes
    return copies * sum(-(-len(part) // per_process) for part in images if part)


def _batches_of_report(run: Run, report: OnlineReport) -> int:
    return _batches(run, report.bank, report.queries) + _batches(run, report.viewed, copies=LIDAR_VIEWS)


def _free_bytes(folder: Path) -> int:
    """Of the disk that a folder, which need not exist, is on, with what the folder holds."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return shutil.disk_usage(existing).free + held


def show_time(seconds: float) -> str:
    """As 1:02:03."""
    return str(timedelta(seconds=round(seconds)))
