"""When a run saves, how it ends early, and from where it goes on.

A run that is told to stop (SIGTERM, SIGINT, SIGUSR1: what schedulers and people send) saves after the step it is in and
ends with exit code 75, "try again": the same command then goes on from there, to the same weights bit for bit.
"""

import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from scott_sparse.files import read_json
from scott_sparse.training.checkpoint import (
    check,
    checkpoints,
    load_checkpoint,
    newest_valid,
    prune,
    read_state,
    save_checkpoint,
    step_of,
    tensors_of,
)
from scott_sparse.training.recipe import Recipe, as_json

RESUME_ME = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
LINGER = 10.0  # seconds that workers of a killed run may take to end; they hold its lock
INSIST = 1.0  # seconds after which another SIGINT means it; launchers pass on the one that the terminal sent already
FOLDER = "checkpoints"
NUMBER = (float, type(None))
MAY_CHANGE = {  # between the parts of a run: where things lie, what is told, how long it goes on
    *("out", "overwrite", "resume", "epochs", "workers", "tracker", "report_every", "stop_on_collapse", "log_every"),
    *("save_every", "keep", "keep_every", "minutes", "on_nonfinite"),
    *(f"source.{name}" for name in ("data", "data_root", "cache", "cache_dir", "ram_gib", "skip_unreadable")),
}


FORM = {  # of a checkpoint's state
    "log": {"seconds": float, "input_seconds": float, "first_loss": NUMBER, "last_loss": NUMBER, "skipped": int},
    "report": {"reports": list, "losses": list},
    "precision": str,
    "recipe": dict,
    "fingerprint": str,
}


class Interrupted(Exception):
    """The run was told to stop, and has saved."""


class SaveFailed(Exception):
    """The last checkpoint could not be written."""


class Signals:
    """While it is entered: remembers that the run was told to stop; a second SIGINT ends it at once."""

    def __init__(self):
        self.name: str | None = None
        self.at = 0.0

    def __enter__(self):
        self.before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT" and time.monotonic() - self.at > INSIST:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        if self.name is None:
            self.name, self.at = signal.Signals(number).name, time.monotonic()


def lock(out: Path) -> FileLock:
    """Hold a run folder until this process ends, however it ends. Raises ValueError where another run holds it."""
    held = FileLock(out / ".lock")
    try:
        held.acquire(timeout=LINGER)
    except Timeout:
        raise ValueError(f"another run is writing to {out}; choose another --out, or end that run first.") from None
    return held


def find_checkpoint(recipe: Recipe, out: Path, fingerprint: str, precision: str, console) -> Path | None:
    """Where to go on from, or None for a new run.

    Raises ValueError where all checkpoints are damaged, and where the run was begun with other settings or images.
    """
    if recipe.resume != "auto":
        path = Path(recipe.resume)
        check(path)
        if not belongs(path, out) and checkpoints(out / FOLDER) and not recipe.overwrite:
            raise ValueError(f"{out} has checkpoints of its own; choose another --out, or pass --overwrite.")
    else:
        if recipe.overwrite:
            return None
        path, damaged = newest_valid(out / FOLDER)
        for one, reason in damaged.items():
            console.print(f"{one} is damaged and passed over: {reason}", soft_wrap=True)
        if damaged and path is None:
            names = ", ".join(one.name for one in damaged)
            raise ValueError(
                f"no checkpoint in {out / FOLDER} is whole ({names}); repair one, or start anew with --overwrite."
            )
    if path is not None:
        check_same_run(read_state(path, FORM), recipe, fingerprint, precision, path)
    return path


def check_same_run(saved: dict, recipe: Recipe, fingerprint: str, precision: str, path: Path) -> None:
    """Raises ValueError, naming the fields, unless going on gives what a run with these settings would have given."""
    then, now = _flat(saved["recipe"]), _flat(as_json(recipe))
    remedy = "go on as it began, choose another --out, or start anew with --overwrite"
    changed = [name for name in now.keys() | then.keys() if name not in MAY_CHANGE and then.get(name) != now.get(name)]
    if changed:
        fields = "; ".join(f"{name} was {then.get(name)}, now {now.get(name)}" for name in sorted(changed))
        raise ValueError(f"the run of {path} was begun with other settings ({fields}): {remedy}.")
    if saved["precision"] != precision:
        raise ValueError(f"the run of {path} had precision {saved['precision']}, now {precision}: {remedy}.")
    if saved["fingerprint"] != fingerprint:
        raise ValueError(f"the run of {path} began with other images than --data has now: {remedy}.")


def belongs(path: Path, out: Path) -> bool:
    """Whether a checkpoint is one of the run in `out`."""
    return path.resolve().parent == (out / FOLDER).resolve()


def goes_on(recipe: Recipe, out: Path) -> bool:
    """Whether a finished run is asked for more epochs than it had."""
    trained = read_json(out / "recipe.json").get("epochs")
    return isinstance(trained, int | float) and recipe.epochs > trained and (out / FOLDER).is_dir()


def _flat(fields: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in fields.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


class Saver:
    """Call `after(done, ...)` after every optimizer step, on all processes."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        accelerator: Accelerator,
        fingerprint: str,
        total_steps: int,
        console,
        **trained,
    ):
        """`trained`: model, target and optimizer."""
        self.recipe, self.folder, self.accelerator, self.console = recipe, out / FOLDER, accelerator, console
        self.fingerprint, self.total_steps, self.trained = fingerprint, total_steps, trained
        self.every, self.seconds = recipe.saves
        self.started = self.last = time.monotonic()
        self.signals = Signals()
        # Hosts agree among themselves, so that no GPU is waited for.
        several = torch.distributed.is_initialized() and accelerator.num_processes > 1
        self.group = torch.distributed.new_group(backend="gloo") if several else None

    def resume(self, path: Path, log, report) -> int:
        """Put everything back; returns how many steps are done."""
        state, step = read_state(path, FORM), step_of(path)
        if step > self.total_steps:
            raise ValueError(f"{path} is beyond the end of this run, {self.total_steps} steps; use more --epochs.")
        load_checkpoint(path, **self.trained)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        log.resume(step, state["log"])
        report.resume(state["report"])
        self.console.print(f"going on after step {step} of {self.total_steps}, from {path}", soft_wrap=True)
        return step

    def any(self, *flags: bool) -> list[bool]:
        """Whether each is true on any process."""
        if self.group is None:
            return list(flags)
        agreed = torch.tensor(flags, dtype=torch.int32)
        torch.distributed.all_reduce(agreed, torch.distributed.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in agreed.tolist()]

    def after(self, done: int, log, report) -> None:
        """Raises Interrupted after a save that a signal asked for, SaveFailed where the last save of a run fails."""
        now = time.monotonic()
        late = self.seconds is not None and now - self.last > self.seconds
        over = self.recipe.minutes is not None and now - self.started > 60 * self.recipe.minutes
        told, late = self.any(self.signals.name is not None or over, late)
        last = told or done == self.total_steps
        if not (last or late or (self.every and done % self.every == 0)):
            return
        log.flush()
        state = {"log": log.state(), "report": report.state(), "precision": self.accelerator.mixed_precision}
        state |= {"recipe": as_json(self.recipe), "fingerprint": self.fingerprint}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        tensors, failure = tensors_of(**self.trained), None
        if self.accelerator.is_main_process:
            try:
                log.write()
                save_checkpoint(self.folder, done, tensors, state)
                prune(self.folder, last=self.recipe.keep, every=self.recipe.keep_every)
            except OSError as error:
                failure = f"step {done}: no checkpoint could be written ({error.strerror or error})"
                self.console.print(f"{failure}; the one before is kept{'' if last else ', trying again later'}")
        self.last = time.monotonic()
        (failure,) = broadcast_object_list([failure])
        if last and failure:
            raise SaveFailed(f"{failure}; make room, and the same command goes on from the one before.")
        if told:
            name = self.signals.name or ("time is up" if over else "told to stop")
            raise Interrupted(f"{name}: saved after step {done} of {self.total_steps}; the same command goes on.")
