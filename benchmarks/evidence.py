"""What does each part contribute? One recipe, one part changed at a time, three seeds, frozen probes (clean protocol).

    python benchmarks/evidence.py petals
    python benchmarks/evidence.py PHOTOS --jobs 2            # a folder with train/, val/ and test/

Every cell sees the same number of images with the same encoder, on one thread; `--jobs` run side by side. A cell is a
run folder under runs/evidence: what is there is not run again, so that a bench that was stopped goes on. Each time it
writes benchmarks/evidence.csv (a row for each cell, merged with what is there) and a figure of each data set beside
it.
"""

import concurrent.futures
import csv
import dataclasses
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
CSV = ROOT / "benchmarks" / "evidence.csv"
CACHE = ".cache/evidence"
MIM_ONLY = ("--invariance", "0", "--crops", "1")

CELLS = {
    "pixels": None,
    "random init": None,
    "supervised from scratch": ("supervised",),
    "the recipe": (),
    "MIM-JEPA alone": MIM_ONLY,
    "MIM-JEPA alone, patch embedding": (*MIM_ONLY, "--tokenizer", "patch"),
    "MIM-JEPA alone, context all": (*MIM_ONLY, "--context", "all"),
    "MIM-JEPA alone, hide .6": (*MIM_ONLY, "--hide-ratio", "0.6"),
    "patch embedding": ("--tokenizer", "patch"),
    "context all": ("--context", "all"),
    "uniform masks": ("--mask", "uniform"),
    "hide .25": ("--hide-ratio", "0.25"),
    "hide .4": ("--hide-ratio", "0.4"),
    "hide .6": ("--hide-ratio", "0.6"),
    "hide .75": ("--hide-ratio", "0.75"),
    "EMA from .996": ("--momentum", "0.996", "1.0"),
    "EMA .9": ("--momentum", "0.9", "0.9"),
    "lr / 2": ("--lr", "0.001"),
    "lr x 2": ("--lr", "0.004"),
    "predictor depth 3": ("--predictor-depth", "3"),
    "target: mean of 3 blocks": ("--target-blocks", "3"),
    "VICReg for SIGReg": ("--spread", "vicreg", "--spread-share", "0.5"),
    "two masks per crop": ("--masks", "2"),
    "four crops, hide .75": ("--crops", "4", "--hide-ratio", "0.75"),
    "cross-crop term x 10": ("--invariance", "10"),
}
MEASURES = ("knn_val", "linear_val", "knn_test", "linear_test")


@dataclasses.dataclass(frozen=True)
class Bench:
    data: tyro.conf.Positional[str]
    """petals, or a folder of photos."""
    epochs: float = 6.0
    seeds: int = 3
    only: tuple[str, ...] = ()
    """Cells by name; default all."""
    jobs: int = 2
    runs: Path = Path("runs/evidence")


def main() -> None:
    bench = tyro.cli(Bench)
    unknown = set(bench.only) - set(CELLS)
    if unknown:
        sys.exit(f"error: unknown cells {sorted(unknown)}; expected some of {', '.join(CELLS)}.")
    cells = [(name, seed) for seed in range(bench.seeds) for name in (bench.only or CELLS)]
    # Baselines last: they are those of a run, which is there by then.
    cells.sort(key=lambda cell: CELLS[cell[0]] is None)
    with concurrent.futures.ThreadPoolExecutor(bench.jobs) as pool:
        rows = [row for row in pool.map(lambda cell: measure(bench, *cell), cells) if row is not None]
    if not rows:
        sys.exit("error: no cell came to its end.")
    everything = merge(rows)
    report(Path(bench.data).name, everything)


def measure(bench: Bench, name: str, seed: int) -> dict | None:
    """Run a cell if it has not been run, and read its results. A cell that fails is printed, and left out."""
    label = Path(bench.data).name
    words = "".join(c if c.isalnum() else "-" for c in name)
    out = bench.runs / f"{label}-{bench.epochs:g}" / f"{words}-{seed}"
    changes, init = CELLS[name], []
    recipe = "demo" if bench.data == "petals" else "photos"
    if changes is None:  # a baseline is that of a run
        out = out.with_name(f"the-recipe-{seed}")
        init = ["--init", "pixels" if name == "pixels" else "random"]
        changes = ()
    script = "train/pretrain.py"
    if changes == ("supervised",):
        script, changes = "benchmarks/supervised.py", ()
    if not (out / "summary.json").exists():
        training = [script, recipe, "--data", bench.data, "--seed", seed, "--epochs", bench.epochs, "--out", out]
        training += ["--warmup-epochs", bench.epochs / 10, "--report-every", "0", "--cache-dir", CACHE, *changes]
        if not run(training, out):
            return None
    suffix = f"-{init[1]}" if init else ""
    answers = {}
    for probe in ("knn", "linear"):
        file = out / "eval" / f"{probe}-{label}{suffix}.json"
        if not file.exists():
            asked = [f"eval/{probe}.py", out, "--data", bench.data, "--cache-dir", CACHE, *init]
            if not run(asked, out):
                return None
        answers[probe] = json.loads(file.read_text())
    summary = json.loads((out / "summary.json").read_text())
    row = {"data": label, "epochs": bench.epochs, "cell": name, "seed": seed}
    row |= {f"{probe}_{split}": answers[probe][split]["top1"] for probe in answers for split in ("val", "test")}
    row |= {"own_test": summary.get("own_test", ""), "seconds": 0 if init else summary["train_seconds"]}
    row["commit"] = answers["linear"]["commit"]
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return row


def run(arguments: list, out: Path) -> bool:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{out.name} failed: {(done.stderr or done.stdout).strip().splitlines()[-1]}", flush=True)
    return done.returncode == 0


def merge(rows: list[dict]) -> list[dict]:
    """New rows replace old ones of the same cell."""
    old = list(csv.DictReader(CSV.open())) if CSV.exists() else []
    keyed = {tuple(str(row[k]) for k in ("data", "epochs", "cell", "seed")): row for row in [*old, *rows]}
    every = [{key: str(value) for key, value in row.items()} for row in keyed.values()]
    with CSV.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(every[0]))
        writer.writeheader()
        writer.writerows(every)
    return every


def report(label: str, rows: list[dict]) -> None:
    """Print mean and spread over seeds, and draw them."""
    rows = [row for row in rows if row["data"] == label]
    table = Table(title=f"{label}: mean ± deviation over seeds, %")
    for column in ("", "seeds", *MEASURES, "seconds"):
        table.add_column(column, justify="right")
    names = [name for name in CELLS if any(row["cell"] == name for row in rows)]
    figure = Figure(figsize=(7, 0.3 * len(names) + 1.2), layout="constrained")
    axes = figure.subplots()
    for height, name in enumerate(reversed(names)):
        of_cell = [row for row in rows if row["cell"] == name]
        cells = []
        for measure in MEASURES:
            values = [float(row[measure]) for row in of_cell]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
            if measure in ("knn_test", "linear_test"):
                colour = {"knn_test": "tab:orange", "linear_test": "tab:blue"}[measure]
                axes.plot(values, [height] * len(values), "o", color=colour, alpha=0.6, markersize=4)
                axes.plot(statistics.mean(values), height, "|", color=colour, markersize=14)
        seconds = statistics.median(float(row["seconds"]) for row in of_cell)
        table.add_row(name, str(len(of_cell)), *cells, f"{seconds:.0f}")
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=8)
    axes.set(xlabel="test top-1, % (orange k-NN, blue linear; dots are seeds)", title=label)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(CSV.with_name(f"evidence-{label}.png"), dpi=110)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
