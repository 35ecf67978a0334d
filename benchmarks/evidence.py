"""What does each part contribute? One recipe, one part changed at a time, three seeds, frozen probes (clean protocol).

    python benchmarks/evidence.py petals
    python benchmarks/evidence.py PHOTOS --jobs 2            # a folder with train/, val/ and test/

Every cell sees the same number of images with the same encoder, on one thread, unless its name says "equal seconds":
then it sees as many as fit the seconds of the recipe. `--jobs` cells run side by side, the first seed of all before
the second of any. Each run becomes a line of benchmarks/evidence.jsonl; what is there is not run again, so that a bench
that was stopped goes on. In the end the same as benchmarks/evidence.csv, a table, and a figure of each data set.
"""

import concurrent.futures
import csv
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import shutil
import statistics
import sys
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "train"), str(ROOT / "eval")]

import pretrain  # noqa: E402 - a neighbour of the scripts in train/
import supervised  # noqa: E402

from scott_sparse.evaluation import probe as protocol  # noqa: E402
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels  # noqa: E402
from scott_sparse.evaluation.features import Features, extract  # noqa: E402
from scott_sparse.evaluation.knn import KNNProbe  # noqa: E402
from scott_sparse.evaluation.linear import LinearProbe, fit_linear  # noqa: E402
from scott_sparse.evaluation.metrics import score  # noqa: E402
from scott_sparse.model.jepa import make_target  # noqa: E402
from scott_sparse.shapes import Tensor  # noqa: E402
from scott_sparse.training.run import open_run  # noqa: E402

RUNS = ROOT / "benchmarks" / "evidence.jsonl"
# Fewer than eval/linear.py tries: it would take longer than some cells train.
PENALTIES = (1e-2, 1e-3, 3e-4, 1e-4, 3e-5)
CACHE = Path(".cache/evidence")
MEASURES = ("knn_val", "linear_val", "knn_test", "linear_test")


@dataclasses.dataclass(frozen=True)
class Cell:
    flags: tuple[str, ...] = ()
    """What differs from the recipe."""
    seconds_of: str | None = None
    """A cell that differs from the recipe in the same: this one sees more or fewer images, in the recipe's seconds."""
    how: str = "pretrained"


# One part of the recipe each.
PARTS = {
    "without MIM-JEPA": ("--mim", "0"),
    "patch embedding": ("--tokenizer", "patch"),
    "context all": ("--context", "all"),
    "uniform masks": ("--mask", "uniform"),
    "hide .25": ("--hide-ratio", "0.25"),
    "hide .4": ("--hide-ratio", "0.4"),
    "hide .5": ("--hide-ratio", "0.5"),
    "hide .6": ("--hide-ratio", "0.6"),
    "hide .75": ("--hide-ratio", "0.75"),
    "EMA .996 to 1": ("--ema-momentum", "0.996", "1.0"),
    "lr / 2": ("--lr", "0.0015"),
    "lr / 4": ("--lr", "0.00075"),
    "batches of 64": ("--batch-size", "64"),
    "predictor depth 3": ("--predictor-depth", "3"),
    "target mean of 3 blocks": ("--target-blocks", "3"),
    "crops from .5": ("--crop-scale", "0.5", "1.0"),
    "drop path .1": ("--drop-path", "0.1"),
    "the paper's colours": ("--colour", ".6", "--jitter", ".4", ".4", ".2", ".1", "--jitter-p", ".8", "--grey", ".1"),
    "two crops": ("--crops", "2"),
    "two masks per crop": ("--masks", "2"),
    "four crops, hide .75": ("--crops", "4", "--hide-ratio", "0.75"),
    "four crops": ("--crops", "4"),
}
# What small-data and the demo were before.
FORMS = {
    "four crops half hidden": ("--crops", "4", "--hide-ratio", "0.5"),
    "two crops .4 hidden": ("--crops", "2", "--hide-ratio", "0.4"),
}
LOSSES = {
    "MIM-JEPA alone": ("--invariance", "0", "--crops", "1"),
    "SIGReg": ("--spread", "sigreg", "--invariance", "1"),
    "SIGReg, weight 3": ("--spread", "sigreg", "--invariance", "3"),
    "VICReg": ("--spread", "vicreg", "--invariance", "1", "--spread-share", "0.5"),
}
CHANGES = [{"": (), **changes} for changes in (FORMS, LOSSES, PARTS)]
COMBINED = (list(zip(*chosen)) for chosen in itertools.product(*(changes.items() for changes in CHANGES)))
CELLS = {
    "pixels": Cell(how="pixels"),
    "random init": Cell(how="random"),
    "supervised from scratch": Cell(how="supervised"),
    **{
        ", ".join(filter(None, names)) or "the recipe": Cell(tuple(itertools.chain(*flags)))
        for names, flags in COMBINED
    },
}
DEFAULT = tuple(name for name in CELLS if name in (*list(CELLS)[:4], *FORMS, *LOSSES, *PARTS))
CELLS |= {f"{name}, equal seconds": Cell(cell.flags, seconds_of=name) for name, cell in CELLS.items() if cell.flags}


@dataclasses.dataclass(frozen=True)
class Bench:
    data: tyro.conf.Positional[str]
    """petals, or a folder of photos."""
    epochs: float = 3.0
    batch_size: int = 32
    """Smaller than the recipes': what is short needs steps. Rates follow."""
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = DEFAULT
    """Cells by name; all that there are: each part also with another form, another loss or both, and each cell as
    "..., equal seconds"."""
    jobs: int = 2

    @property
    def label(self) -> str:
        return f"{Path(self.data).name}-{self.epochs:g}"


def main() -> None:
    bench = tyro.cli(Bench)
    unknown = set(bench.only) - set(CELLS)
    if unknown:
        sys.exit(f"error: unknown cells {sorted(unknown)}; expected some of {', '.join(CELLS)}.")
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started below
    for seed in bench.seeds:
        for by_seconds in (False, True):  # these last, as they need the seconds of the others
            names = [name for name in bench.only if bool(CELLS[name].seconds_of) == by_seconds]
            run_cells(bench, names, seed)
    rows = read(bench)
    if not rows:
        sys.exit("error: no cell came to its end.")
    write_csv()
    report(bench.label, rows)


def run_cells(bench: Bench, names: list[str], seed: int) -> None:
    """Run those that have not been run, and append them to the file."""
    done = {row["cell"]: row for row in read(bench) if row["seed"] == seed}
    missing = [name for name in names if name not in done and (name != "pixels" or seed == bench.seeds[0])]
    # A process each: what a run leaves in its process (seeds, Accelerate's state) must not reach the next.
    with concurrent.futures.ProcessPoolExecutor(
        bench.jobs, mp_context=multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        running = {}
        for name in missing:
            same, length = CELLS[name].seconds_of, 1.0
            if same:
                length = done["the recipe"]["train_seconds"] / done[same]["train_seconds"]
            running[pool.submit(run_cell, bench, name, seed, length)] = name
        for ended in concurrent.futures.as_completed(running):
            if ended.exception():
                print(f"{running[ended]} failed: {ended.exception()}", flush=True)
                continue
            with RUNS.open("a") as file:
                file.write(json.dumps(ended.result()) + "\n")
            print(json.dumps(ended.result()), flush=True)


def read(bench: Bench | None = None) -> list[dict]:
    """The runs of a bench, or all of them."""
    rows = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    return [row for row in rows if bench is None or row["bench"] == bench.label]


def run_cell(bench: Bench, name: str, seed: int, length: float) -> dict:
    """Train a cell as train/pretrain.py does, and ask its frozen features what eval/ asks."""
    cell = CELLS[name]
    out = Path("runs/evidence", re.sub(r"[^\w.-]+", "-", f"{bench.label}-{seed}-{name}"))
    flags = ["demo" if bench.data == "petals" else "small-data", "--data", bench.data, "--seed", seed, "--out", out]
    flags += ["--epochs", bench.epochs * length, "--batch-size", bench.batch_size, "--report-every", 0, "--overwrite"]
    flags += ["--cache-dir", CACHE, *cell.flags]
    run = open_run([str(flag) for flag in flags])
    recipe, data, encoder, told = run.recipe, run.data, make_target(run.model.encoder), {}
    if cell.how == "pretrained":
        told = pretrain.train(run, encoder)
    elif cell.how == "supervised":
        encoder, told = supervised.train(recipe, data)
    subject = Pixels(recipe.patch_size) if cell.how == "pixels" else FrozenEncoder(encoder)
    fit, choose, test = (extract(subject, part, size=recipe.sides) for part in (data.train, data.val, data.test))
    row = {"bench": bench.label, "cell": name, "seed": seed}
    for probe_name, probe in probes(fit, data.train.labels, len(data.classes)).items():
        choice, val, _ = protocol.val(probe, choose, data.val.labels)
        (answers,) = probe.answers(test, [choice])
        row |= {f"{probe_name}_val": round(val.top1, 2)}
        row |= {f"{probe_name}_test": round(score(answers, data.test.labels).top1, 2)}
        row |= {f"{probe_name}_choice": probe.settings[choice]}
    row |= {key: told.get(key) for key in ("train_seconds", "steps", "own_test")}
    shutil.rmtree(out)
    row |= {"flags": cell.flags, "length": length, "precision": run.accelerator.mixed_precision}
    return {**row, "commit": protocol.commit(), "torch": torch.__version__}


def probes(fit: Features, labels: Tensor, classes: int) -> dict[str, KNNProbe | LinearProbe]:
    on = {"classes": classes, "device": torch.device("cpu")}
    linear = fit_linear(fit, labels, solver="lbfgs", penalties=PENALTIES, **on)
    return {"knn": KNNProbe(fit.mean, labels, **on), "linear": linear}


def write_csv() -> None:
    rows = sorted(read(), key=lambda row: (row["bench"], list(CELLS).index(row["cell"]), row["seed"]))
    columns = ("bench", "cell", "seed", *MEASURES, "own_test", "train_seconds", "steps", "commit")
    with RUNS.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def report(label: str, rows: list[dict]) -> None:
    """Print mean and spread over seeds, also as Markdown, and draw them."""
    table = Table(title=f"{label} epochs: mean ± deviation over seeds, %")
    lines = [f"| {label} epochs | seeds | {' | '.join(MEASURES)} | seconds |", "|---" * (len(MEASURES) + 3) + "|"]
    for column in ("", "seeds", *MEASURES, "seconds"):
        table.add_column(column, justify="right")
    names = [name for name in CELLS if any(row["cell"] == name for row in rows)]
    figure = Figure(figsize=(7, 0.24 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(names):
        of_cell = [row for row in rows if row["cell"] == name]
        cells = [name, str(len(of_cell))]
        for measure in MEASURES:
            values = [row[measure] for row in of_cell]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
            if measure in ("knn_test", "linear_test"):
                colour = {"knn_test": "tab:orange", "linear_test": "tab:blue"}[measure]
                axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.6, markersize=4)
                axes.plot(statistics.mean(values), height, "|", color=colour, markersize=14)
        seconds = [row["train_seconds"] for row in of_cell if row["train_seconds"]]
        cells.append(f"{statistics.median(seconds):.0f}" if seconds else "")
        table.add_row(*cells)
        lines.append(f"| {' | '.join(cells)} |")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test top-1, %: k-NN orange, linear blue", title=f"{label} epochs")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(RUNS.with_name(f"evidence-{label}.png"), dpi=110)
    Console(width=130).print(table)
    print("\n".join(["", *lines]))


if __name__ == "__main__":
    main()
