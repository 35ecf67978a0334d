"""The run folder: who may write to it, and the checkpoint in it from which a run resumes."""

import shutil
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from scott_sparse.data.dataset import Data, unreadable_lines
from scott_sparse.data.splits import save_digests
from scott_sparse.files import read_json, write_json
from scott_sparse.model.weights import CONFIG, PREDICTOR, PREDICTOR_CONFIG, WEIGHTS
from scott_sparse.training.checkpoint import check, checkpoints, newest_valid, read_state
from scott_sparse.training.recipe import Recipe

RECIPE, METRICS, REPORTS, CHECKPOINTS = "recipe.json", "metrics.jsonl", "reports.jsonl", "checkpoints"
UNREADABLE, NONFINITE, TOKENS, SUMMARY = "unreadable.txt", "nonfinite.txt", "tokens.png", "summary.json"
REPORT, PICTURES = "report.html", "report"  # the page, and the folder of the pictures in it
RESULTS = (*WEIGHTS.values(), CONFIG, PREDICTOR, PREDICTOR_CONFIG, TOKENS, SUMMARY)  # of a run that came to its end
RUN_FILES = (RECIPE, METRICS, REPORTS, UNREADABLE, NONFINITE, REPORT, *RESULTS)

LOCK_TIMEOUT_S = 10.0  # that another process may take to end: a run about to finish, or the workers of a killed one
RESUMABLE_FIELDS = {  # may differ when a run resumes: where files are, what is printed, how long it runs
    *("out", "overwrite", "resume", "epochs", "workers", "tracker", "report_every", "stop_on_collapse", "log_every"),
    *("save_every", "keep_last", "keep_every", "minutes", "on_nonfinite", "plan", "time_budget"),
    "precision",  # what comes of it is compared by itself
    *(f"source.{name}" for name in ("data", "data_root", "cache", "cache_dir", "ram_gib", "skip_unreadable")),
}
NUMBER = (float, type(None))
STATE_FORM = {  # of a checkpoint's state
    "log": {"seconds": float, "input_seconds": float, "first_loss": NUMBER, "last_loss": NUMBER, "skipped": int},
    "report": {"reports": list, "losses": list},
    "precision": str,
    "recipe": dict,
    "fingerprint": str,
}


def open_folder(
    name: str, recipe: Recipe, out: Path, data: Data, precision: str, console: Console, lock: FileLock
) -> Path | None:
    """Lock a run folder, find the checkpoint to resume from, and remove what the new or longer run makes untrue.

    The lock comes first: a start that waits for a run about to end then finds a finished run. Raises ValueError for a
    finished run, for one with other settings, and if the folder is in use.
    """
    out.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire(timeout=LOCK_TIMEOUT_S)
    except Timeout:
        raise ValueError(f"another run is writing to {out}; choose another --out, or end that run first.") from None
    if (out / SUMMARY).exists() and not recipe.overwrite and not extends_finished_run(recipe, out):
        raise ValueError(
            f"{out} holds a finished run; choose another --out, pass --overwrite to replace it, or give more --epochs "
            "to extend it."
        )
    checkpoint = find_checkpoint(recipe, out, data.fingerprint, precision, console)
    is_new = checkpoint is None or not is_checkpoint_of(checkpoint, out)
    for file in RUN_FILES if is_new else RESULTS:
        (out / file).unlink(missing_ok=True)
    if is_new:
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        if checkpoint:  # of another run, whose first steps this one shares
            shutil.copy(checkpoint.parent.parent / METRICS, out / METRICS)
    for folder in ("eval", PICTURES):  # of weights that are replaced
        shutil.rmtree(out / folder, ignore_errors=True)
    write_json(out / RECIPE, {"recipe": name, **recipe.to_json()})
    save_digests(out, data.pretrain.digests)
    if data.unreadable:
        (out / UNREADABLE).write_text("\n".join([*unreadable_lines(data.unreadable), ""]), encoding="utf-8")
    return checkpoint


def find_checkpoint(recipe: Recipe, out: Path, fingerprint: str, precision: str, console: Console) -> Path | None:
    """The checkpoint to resume from, or None for a new run.

    Raises ValueError if all checkpoints are damaged, or the run was started with other settings or images.
    """
    path: Path | None
    if recipe.resume != "auto":
        path = Path(recipe.resume)
        check(path)
        if not is_checkpoint_of(path, out) and checkpoints(out / CHECKPOINTS) and not recipe.overwrite:
            raise ValueError(f"{out} has checkpoints of its own; choose another --out, or pass --overwrite.")
    elif recipe.overwrite:
        return None
    else:
        path, damaged = newest_valid(out / CHECKPOINTS)
        for one, reason in damaged.items():
            console.print(f"{one} is damaged and skipped: {reason}", soft_wrap=True)
        if path is None and damaged:
            names = ", ".join(one.name for one in damaged)
            raise ValueError(
                f"{out / CHECKPOINTS} has damaged checkpoints only ({names}); use --overwrite to start anew."
            )
    if path is not None:
        check_same_run(read_state(path, STATE_FORM), recipe, fingerprint, precision, path)
    return path


def check_same_run(saved: dict, recipe: Recipe, fingerprint: str, precision: str, path: Path) -> None:
    """Raises ValueError, naming the fields, unless resuming gives what an uninterrupted run of `recipe` would give."""
    changed = changed_settings(saved["recipe"], recipe)
    changes = {
        f"was started with other settings ({changed})": bool(changed),
        f"had precision {saved['precision']}, now {precision}": saved["precision"] != precision,
        "was started with other images than --data has now": saved["fingerprint"] != fingerprint,
    }
    for change, is_true in changes.items():
        if is_true:
            remedy = "resume it as it was, choose another --out, or start anew with --overwrite"
            raise ValueError(f"the run of {path} {change}: {remedy}.")


def changed_settings(saved: dict, recipe: Recipe) -> str:
    """In which settings that decide a result a recipe differs from a saved one, in one line; "" in none."""
    then, now = flatten(saved), flatten(recipe.to_json())
    names = sorted((now.keys() | then.keys()) - RESUMABLE_FIELDS)
    return "; ".join(
        f"{name} was {then.get(name)}, now {now.get(name)}" for name in names if then.get(name) != now.get(name)
    )


def is_checkpoint_of(path: Path, out: Path) -> bool:
    """Whether a checkpoint is one of the run in `out`."""
    return path.resolve().parent == (out / CHECKPOINTS).resolve()


def extends_finished_run(recipe: Recipe, out: Path) -> bool:
    """Whether more epochs are asked for than the finished run in `out` had."""
    epochs = read_json(out / RECIPE).get("epochs")
    return isinstance(epochs, int | float) and recipe.epochs > epochs and (out / CHECKPOINTS).is_dir()


def flatten(fields: dict, prefix: str = "") -> dict:
    flat: dict = {}
    for name, value in fields.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
