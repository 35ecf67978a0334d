"""metrics.jsonl, tracker and progress bar. Values stay on the device until every `log_every`-th step."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

METRICS = "metrics.jsonl"
KEPT = ("seconds", "input_seconds", "first_loss", "last_loss", "skipped")


class NonFinite(RuntimeError):
    """Loss or gradient was nan or inf in a step."""

    def __init__(self, step: int, loss: float, norm: float, last_loss: float | None):
        super().__init__(f"loss is {loss}, gradient norm {norm} at step {step}")
        self.step, self.loss, self.norm, self.last_loss = step, loss, norm, last_loss


class Log:
    """A line per optimizer step, each once, also after the run was cut and resumed."""

    def __init__(self, recipe, out: Path, accelerator, console, total_steps: int, steps_per_epoch: int):
        self.recipe, self.accelerator, self.steps_per_epoch = recipe, accelerator, steps_per_epoch
        self.total_steps, self.console = total_steps, console
        self.last_loss: float | None = None
        self.first_loss: float | None = None
        self.waiting: list[tuple[int, dict, dict, torch.Tensor]] = []
        self.lines: list[str] = []  # not yet in the file
        self.file = (out / METRICS).open("ab", buffering=0) if accelerator.is_main_process else None
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
        self.started, self.seconds, self.earlier, self.done = time.perf_counter(), 0.0, 0.0, 0
        self.input_seconds, self.skipped = 0.0, 0

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {name: getattr(self, name) for name in KEPT}

    def resume(self, step: int, state: dict) -> None:
        """Go on after `step` steps: what a lost run wrote of later ones is taken out of the file."""
        for name in KEPT:
            setattr(self, name, state[name])
        self.earlier, self.done = self.seconds, step
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
        if failure is None or self.accelerator.num_processes == 1:  # else the others may not take part
            self.flush()
        try:
            self.write()
        except OSError as error:
            if failure is None:
                raise
            self.console.print(f"the last lines of {METRICS} cannot be written ({error.strerror})")
        finally:
            if self.file:
                self.file.close()

    @contextlib.contextmanager
    def input_time(self):
        """Counts what the step waits for its input: on a GPU the launch of the work on views, not the work."""
        started = time.perf_counter()
        yield
        self.input_seconds += time.perf_counter() - started

    def add(self, step: int, tensors: dict, numbers: dict, *, nonfinite: torch.Tensor) -> None:
        """`nonfinite` is 1 where the step updated nothing. What raises is `flush`, some steps later."""
        self.waiting.append((step, tensors, numbers, nonfinite))
        self.done = step + 1
        if self.done % self.recipe.log_every == 0 or self.done == self.total_steps:
            self.flush()
            try:
                self.write()
            except OSError as error:  # a full disk must not end the run: the lines are kept, and written with the next
                self.console.print(
                    f"step {self.done}: {METRICS} cannot be written ({error.strerror}); trying again later"
                )

    def flush(self) -> None:
        """Values of the steps since the last flush become lines; all processes take part.

        Raises NonFinite at the first step that was, unless such are to be skipped: the lines then end before it.
        """
        self.seconds = self.earlier + time.perf_counter() - self.started
        if not self.waiting:
            return
        waiting, self.waiting = self.waiting, []
        columns = [torch.stack([*tensors.values(), nonfinite]).float() for _, tensors, _, nonfinite in waiting]
        table = self.accelerator.reduce(torch.stack(columns), reduction="mean").tolist()
        rate = self.done * self.recipe.batch_size / self.seconds
        for (step, tensors, numbers, _), (*row, nonfinite) in zip(waiting, table):
            if nonfinite and self.recipe.on_nonfinite == "stop":
                found = dict(zip(tensors, row))
                raise NonFinite(step, found["loss"], found["gradient_norm"], self.last_loss)
            self.skipped += nonfinite > 0
            values = {name: value if math.isfinite(value) else None for name, value in zip(tensors, row)}
            line = {"step": step, "epoch": step // self.steps_per_epoch, **values, **numbers}
            line |= {"images_per_second": round(rate, 1)}
            self.lines.append(json.dumps(line) + "\n")
            self.accelerator.log(line, step=step)
            self.last_loss = self.last_loss if nonfinite else line["loss"]
            self.first_loss = self.last_loss if self.first_loss is None else self.first_loss
        epoch = min((self.done - 1) // self.steps_per_epoch + 1, max(round(self.recipe.epochs), 1))
        self.progress.update(
            self.task,
            completed=self.done,
            epoch=f"{epoch}/{self.recipe.epochs:g}",
            loss="-" if self.last_loss is None else f"{self.last_loss:.4f}",
            rate=f"{rate:.0f}",
        )

    def write(self) -> None:
        """Put the lines into the file, all or none. Raises OSError where the disk is full."""
        if self.file and self.lines:
            data, end = "".join(self.lines).encode(), os.fstat(self.file.fileno()).st_size
            try:
                while data:
                    data = data[self.file.write(data) :]
            except OSError:
                os.ftruncate(self.file.fileno(), end)
                raise
        self.lines.clear()

    def summary(self) -> dict:
        return {
            "train_seconds": round(self.seconds, 1),
            "images_per_second": round(self.done * self.recipe.batch_size / self.seconds, 1),
            "input_share": round(self.input_seconds / self.seconds, 4),
            "steps": self.done,
            "loss": {"first": self.first_loss, "last": self.last_loss},
            "skipped": self.skipped,
        }
