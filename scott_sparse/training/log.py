"""metrics.jsonl, tracker and progress bar. Values stay on the device until every `log_every`-th step."""

import contextlib
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from scott_sparse.data.sources import printable
from scott_sparse.distributed import all_mean_with_grad
from scott_sparse.randomness import batch_indices
from scott_sparse.shapes import Float, Tensor
from scott_sparse.training.resume import METRICS, NONFINITE
from scott_sparse.training.run import Run, RunFailed

STATE_FIELDS = ("seconds", "input_seconds", "first_loss", "last_loss", "skipped")


class Log:
    """A line per optimizer step, each once, also when the run was interrupted and resumed."""

    def __init__(self, run: Run):
        self.run, self.accelerator, self.total_steps = run, run.accelerator, run.schedules.total_steps
        self.first_loss: float | None = None
        self.last_loss: float | None = None
        self.pending: list[tuple[int, dict[str, Tensor], dict[str, float], Tensor]] = []  # steps, on the device
        self.lines: list[str] = []  # not yet in the file
        self.file = (run.out / METRICS).open("ab", buffering=0) if self.accelerator.is_main_process else None
        self.progress = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s  ETA"),
            TimeRemainingColumn(),
            console=run.console,
            disable=not self.accelerator.is_main_process,
        )
        self.task = self.progress.add_task("", total=self.total_steps, epoch="1", loss="-", rate="-")
        self.started, self.seconds, self.seconds_before, self.done = time.perf_counter(), 0.0, 0.0, 0
        self.input_seconds, self.skipped = 0.0, 0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in STATE_FIELDS}

    def resume(self, step: int, state: dict[str, Any]) -> None:
        """Continue after `step` steps; lines of later steps, which were lost, are removed from the file."""
        for name in STATE_FIELDS:
            setattr(self, name, state[name])
        self.seconds_before, self.done = self.seconds, step
        self.progress.update(self.task, completed=step)
        if self.file:
            path = Path(self.file.name)
            lines = path.read_bytes().splitlines(keepends=True)[:step]
            if [json.loads(line)["step"] for line in lines] != list(range(step)):
                raise ValueError(f"{path} does not have one line for each of the {step} steps done; was it edited?")
            os.truncate(path, sum(map(len, lines)))

    def __enter__(self):
        self.progress.start()

    def __exit__(self, failure, *_):
        self.progress.stop()
        if failure is None or self.accelerator.num_processes == 1:  # else other processes may not take part
            self.flush()
        self._try_to_write("its last lines are lost")
        if self.file:
            self.file.close()

    @contextlib.contextmanager
    def input_time(self):
        """Counts the seconds that a step waits for its input; of views made on a GPU only their launch is counted."""
        started = time.perf_counter()
        yield
        self.input_seconds += time.perf_counter() - started

    def add(self, step: int, values: dict[str, Tensor], rates: dict[str, float], nonfinite: Float[Tensor, ""]) -> None:
        """Log a step. `nonfinite` is 1 if it updated nothing; what that raises comes some steps later (see `flush`)."""
        self.pending.append((step, values, rates, nonfinite))
        self.done = step + 1
        if self.done % self.run.recipe.log_every == 0 or self.done == self.total_steps:
            self.flush()
            self._try_to_write("trying again later")

    def flush(self) -> None:
        """Make the values of the steps since the last flush into lines; all processes take part.

        Raises RunFailed at the first step that was not finite, unless such are skipped: the lines then end before it.
        """
        self.seconds = self.seconds_before + time.perf_counter() - self.started
        if not self.pending:
            return
        recipe, (pending, self.pending) = self.run.recipe, (self.pending, [])
        columns = [torch.stack([*values.values(), nonfinite]).float() for _, values, _, nonfinite in pending]
        table = all_mean_with_grad(torch.stack(columns)).tolist()
        images_per_second = round(self.done * recipe.batch_size / self.seconds, 1)
        for (step, values, rates, _), (*row, nonfinite) in zip(pending, table):
            numbers = dict(zip(values, row))
            if nonfinite and recipe.on_nonfinite == "stop":
                raise RunFailed(self._describe_nonfinite(step, numbers))
            self.skipped += nonfinite > 0
            numbers = {name: number if math.isfinite(number) else None for name, number in numbers.items()}
            line = {"step": step, "epoch": step // self.run.steps_per_epoch, **numbers, **rates}
            line["images_per_second"] = images_per_second
            self.lines.append(json.dumps(line) + "\n")
            self.accelerator.log(line, step=step)
            self.last_loss = self.last_loss if nonfinite else line["loss"]
            self.first_loss = self.last_loss if self.first_loss is None else self.first_loss
        epoch = min((self.done - 1) // self.run.steps_per_epoch + 1, max(round(recipe.epochs), 1))
        self.progress.update(
            self.task,
            completed=self.done,
            epoch=f"{epoch}/{recipe.epochs:g}",
            loss="-" if self.last_loss is None else f"{self.last_loss:.4f}",
            rate=f"{images_per_second:.0f}",
        )

    def _describe_nonfinite(self, step: int, numbers: dict[str, float]) -> str:
        """What is known about a step that was not finite; lists its batch's images in nonfinite.txt."""
        images, path = self.run.data.pretrain, self.run.out / NONFINITE
        if self.accelerator.is_main_process:
            recipe, count = self.run.recipe, len(images)
            rows = batch_indices(step, images=count, batch=recipe.batch_size, seed=recipe.seed)
            path.write_text("".join(f"{printable(name)}\n" for name in images[rows].names), encoding="utf-8")
        return (
            f"loss is {numbers['loss']}, gradient norm {numbers['gradient_norm']} at step {step} (last finite loss "
            f"{self.last_loss}); nothing was updated since. The batch's images are in {path}; --on-nonfinite skip "
            "leaves such steps out."
        )

    def write(self) -> None:
        """Append the lines to the file, all or none. Raises OSError if the disk is full."""
        if self.file and self.lines:
            data, end = "".join(self.lines).encode(), os.fstat(self.file.fileno()).st_size
            try:
                while data:
                    data = data[self.file.write(data) :]
            except OSError:
                os.ftruncate(self.file.fileno(), end)
                raise
        self.lines.clear()

    def _try_to_write(self, otherwise: str) -> None:
        """A full disk does not end the run: lines are kept, and written with the next ones."""
        try:
            self.write()
        except OSError as error:
            self.run.console.print(f"step {self.done}: {METRICS} cannot be written ({error.strerror}); {otherwise}")

    def summary(self) -> dict[str, Any]:
        """What the run's summary says of the training."""
        return {
            "train_seconds": round(self.seconds, 1),
            "images_per_second": round(self.done * self.run.recipe.batch_size / self.seconds, 1),
            "input_share": round(self.input_seconds / self.seconds, 4),
            "steps": self.done,
            "loss": {"first": self.first_loss, "last": self.last_loss},
            "skipped": self.skipped,
        }
