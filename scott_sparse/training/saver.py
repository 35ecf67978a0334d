"""When a run saves, and how it ends early.

A run that is told to stop (SIGTERM, SIGINT, SIGUSR1: what schedulers and people send) saves after the step it is in and
ends with exit code 75, "try again": the same command resumes it, to the same weights bit for bit.
"""

import os
import signal
import time
from types import FrameType
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list

from scott_sparse.data.batches import STOP_SIGNALS
from scott_sparse.training.checkpoint import (
    checkpoint_tensors,
    load_checkpoint,
    prune,
    read_state,
    save_checkpoint,
    step_of,
)
from scott_sparse.training.log import Log
from scott_sparse.training.resume import CHECKPOINTS, STATE_FORM
from scott_sparse.training.run import Run, RunFailed

EXIT_RESUME = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes
SECOND_SIGINT_S = 1.0  # a SIGINT after this ends the run at once; launchers repeat the one that the terminal sent


class Interrupted(Exception):
    """The run was told to stop, and has saved."""


class Signals:
    """A context that remembers that the run was told to stop; a second SIGINT ends it at once."""

    def __init__(self):
        self.name: str | None = None
        self.received = 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._remember) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT" and time.monotonic() - self.received > SECOND_SIGINT_S:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self.name is None:
            self.name, self.received = signal.Signals(number).name, time.monotonic()


@runtime_checkable
class Report(Protocol):
    """What is measured while a run trains."""

    def state(self) -> dict[str, Any]: ...  # what a checkpoint keeps; all processes take part

    def resume(self, state: dict[str, Any]) -> None: ...


class Saver:
    """Saves checkpoints; `after_step` is called after every optimizer step, on all processes."""

    def __init__(self, run: Run, log: Log, report: Report, **modules):
        """`modules`: model, target and optimizer."""
        self.run, self.log, self.report, self.modules = run, log, report, modules
        self.folder, self.total_steps = run.out / CHECKPOINTS, run.schedules.total_steps
        self.every_steps, self.every_seconds = run.recipe.save_interval
        self.started = self.last_save = time.monotonic()
        self.signals = Signals()
        self.failure: str | None = None  # why the last checkpoint could not be written
        # The hosts agree among themselves, so that no GPU is waited for.
        several = torch.distributed.is_initialized() and run.accelerator.num_processes > 1
        self.group: Any = torch.distributed.new_group(backend="gloo") if several else None

    def resume(self) -> int:
        """Restore the run's checkpoint, if it has one; returns how many steps are done."""
        path, scaler = self.run.checkpoint, self.run.accelerator.scaler
        if path is None:
            return 0
        state, step = read_state(path, STATE_FORM), step_of(path)
        if step > self.total_steps:
            raise ValueError(f"{path} is beyond the end of this run, {self.total_steps} steps; use more --epochs.")
        load_checkpoint(path, **self.modules)
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
        self.log.resume(step, state["log"])
        self.report.resume(state["report"])
        self._prune(step)
        self.run.console.print(f"resuming after step {step} of {self.total_steps}, from {path}", soft_wrap=True)
        return step

    def after_step(self, done: int) -> None:
        """Save if it is time to. `done`: optimizer steps so far.

        Raises Interrupted after the save of a run that was told to stop, and RunFailed if that save failed.
        """
        now, recipe, accelerator = time.monotonic(), self.run.recipe, self.run.accelerator
        late = self.every_seconds is not None and now - self.last_save > self.every_seconds
        over = recipe.minutes is not None and now - self.started > 60 * recipe.minutes
        stop, late = self._on_any_process(self.signals.name is not None or over, late)
        finished = done == self.total_steps
        if not (stop or finished or late or (self.every_steps and done % self.every_steps == 0)):
            return
        self.log.flush()
        state = {"log": self.log.state(), "report": self.report.state(), "precision": accelerator.mixed_precision}
        state |= {"recipe": recipe.to_json(), "fingerprint": self.run.data.fingerprint}
        if accelerator.scaler is not None:
            state["scaler"] = accelerator.scaler.state_dict()
        tensors, failure = checkpoint_tensors(**self.modules), None
        if accelerator.is_main_process:
            try:
                self.log.write()
                save_checkpoint(self.folder, done, tensors, state)
                self._prune(done)
            except OSError as error:
                failure = f"step {done}: no checkpoint could be written ({error.strerror or error})"
                later = "" if stop or finished else ", trying again later"
                self.run.console.print(f"{failure}; the one before is kept{later}")
        self.last_save = time.monotonic()
        (self.failure,) = broadcast_object_list([failure])
        if stop and self.failure:
            raise RunFailed(f"{self.failure}; make room, and the same command resumes from the one before.")
        if stop:
            reason = self.signals.name or ("time is up" if over else "told to stop")
            raise Interrupted(f"{reason}: saved after step {done} of {self.total_steps}; the same command resumes.")

    def check_last_save(self) -> None:
        """Raises RunFailed if the checkpoint of the finished run could not be written."""
        if self.failure:
            raise RunFailed(f"{self.failure}; the weights are saved. Make room, and the same command ends the run.")

    def _prune(self, step: int) -> None:
        """Also removes checkpoints of later steps, which are not of a run that has resumed from `step`."""
        if self.run.accelerator.is_main_process:
            prune(self.folder, step, last=self.run.recipe.keep_last, every=self.run.recipe.keep_every)

    def _on_any_process(self, *flags: bool) -> list[bool]:
        """Whether each flag is true on any process."""
        if self.group is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in agreed.tolist()]
