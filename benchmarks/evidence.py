"""What each part of the recipe contributes: one part changed at a time, several seeds, frozen probes, clean protocol.

    python benchmarks/evidence.py petals
    python benchmarks/evidence.py PHOTOS --epochs 6                            # a folder of class folders
    python benchmarks/evidence.py PHOTOS --epochs 24 --batch-size 64 --only "the recipe" supervised
    python benchmarks/evidence.py --tables                                     # of what has been run already

Every cell trains with train/pretrain.py (or benchmarks/supervised.py) and is judged by eval/knn.py and eval/linear.py,
each in a process of its own with one thread; `--jobs` cells run side by side. All cells of a bench see the same number
of images. A finished cell is one line of benchmarks/runs/evidence.jsonl and is not run again; a cell that was killed
continues from its checkpoint. At the end: tables on the terminal and one figure in benchmarks/figures/.
"""

import concurrent.futures
import dataclasses
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "benchmarks" / "runs" / "evidence.jsonl"
FIGURES = ROOT / "benchmarks" / "figures"

# Name of a cell: flags that differ from the recipe. Baselines have no flags of their own.
BASELINES = ("pixels", "untrained", "supervised")
CHANGES = {
    "the recipe": (),
    "without MIM-JEPA": ("--mim-weight", "0"),
    "MIM-JEPA alone": ("--cross-crop-weight", "0", "--crops", "1"),
    "SIGReg for NT-Xent": ("--cross-crop-loss", "sigreg", "--cross-crop-weight", "1"),
    "patch embedding": ("--tokenizer", "patch"),
    "context all": ("--context", "all"),
    "uniform masks": ("--mask-shape", "uniform"),
    "half hidden": ("--hide-ratio", "0.5"),
    "four crops": ("--crops", "4"),
    "EMA .996 to 1": ("--ema-momentum", "0.996", "1.0"),
    "the paper's colours": ("--colour", ".6", "--jitter", ".4", ".4", ".2", ".1", "--jitter-p", ".8", "--grey", ".1"),
    # More compute for the same images.
    "ten crops": ("--crops", "10"),
    "twenty crops": ("--crops", "20"),
}
CELLS = (*BASELINES, *CHANGES)
MEASURES = ("knn_val", "knn_test", "linear_val", "linear_test")


@dataclasses.dataclass(frozen=True)
class Bench:
    data: tyro.conf.Positional[str | None] = None
    """petals, or a folder of photos; not needed with --tables."""
    epochs: float = 3.0
    """Length of every cell."""
    batch_size: int = 32
    """Images per optimizer step. Learning rates follow the batch size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each cell runs once per seed; the first seed of all cells comes before the second of any."""
    only: tuple[str, ...] = CELLS[:-2]
    """Cells by name; the default is all but those with ten and twenty crops."""
    jobs: int = 2
    """Cells that run side by side, each on one thread."""
    tables: bool = False
    """Print tables and draw figures of all finished cells, and run none."""

    @property
    def name(self) -> str:
        return f"{Path(self.data or '').name}-{self.epochs:g}-{self.batch_size}"


def main() -> None:
    bench = tyro.cli(Bench)
    if unknown := set(bench.only) - set(CELLS):
        sys.exit(f"error: unknown cells {sorted(unknown)}; expected some of: {', '.join(CELLS)}.")
    if bench.tables:
        names = dict.fromkeys(row["bench"] for row in finished())
    elif bench.data:
        names = (bench.name,)
        todo = [
            (cell, seed) for seed in bench.seeds for cell in bench.only if cell != "pixels" or seed == bench.seeds[0]
        ]
        done = {(row["cell"], row["seed"]) for row in finished() if row["bench"] == bench.name}
        with concurrent.futures.ThreadPoolExecutor(bench.jobs) as pool:
            list(pool.map(lambda cell: run_cell(bench, *cell), (cell for cell in todo if cell not in done)))
    else:
        sys.exit("error: name the data (petals or a folder of photos), or pass --tables.")
    for name in names:
        rows = [row for row in finished() if row["bench"] == name]
        print("\n".join(["", *table(name, rows)]))
        if len({row["cell"] for row in rows}) > 4:
            draw(name, rows)


def finished() -> list[dict]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def run_cell(bench: Bench, cell: str, seed: int) -> None:
    """Train, probe, append one line to the file; a cell that fails is named and the others go on."""
    out = Path("runs/evidence", re.sub(r"[^\w.-]+", "-", f"{bench.name}-{seed}-{cell}"))
    train = ["demo" if bench.data == "petals" else "small-data", "--data", bench.data, "--seed", seed, "--out", out]
    length = ["--epochs", bench.epochs, "--batch-size", bench.batch_size]
    is_trained = (out / "summary.json").exists()  # a cell whose probes were cut short
    init = {"pixels": ["--init", "pixels"], "untrained": ["--init", "random"]}.get(cell, [])
    try:
        if cell == "supervised" and not is_trained:
            script("benchmarks/supervised.py", *train, *length)
        elif not is_trained:  # a baseline needs a run folder for image size, model and seed only
            length = ["--epochs", 0.001] if init else length
            script("train/pretrain.py", *train, *length, "--report-every", 0, *CHANGES.get(cell, ()))
        row = {"bench": bench.name, "cell": cell, "seed": seed}
        for probe in ("knn", "linear"):
            script(f"eval/{probe}.py", out, "--data", bench.data, *init)
            result = json.loads(max(Path(out, "eval").glob(f"{probe}-*.json"), key=os.path.getmtime).read_text())
            row |= {f"{probe}_{role}": result[role]["top1"] for role in ("val", "test")}
            row |= {f"{probe}_choice": result["choice"], "commit": result["commit"]}
    except subprocess.CalledProcessError as error:
        print(f"{cell}, seed {seed} failed: {' '.join(map(str, error.cmd))}\n{error.stderr[-2000:]}", flush=True)
        return
    summary = {} if init else json.loads((out / "summary.json").read_text())
    row |= {key: summary.get(key) for key in ("train_seconds", "steps")}
    row |= {"precision": precision(), "flags": CHANGES.get(cell, ()), "torch": torch.__version__}
    with RUNS.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)
    shutil.rmtree(out)


def script(name: str, *arguments: object) -> None:
    """Run a script of the repository on one thread. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def table(name: str, rows: list[dict]) -> list[str]:
    """Mean and standard deviation over seeds as Markdown."""
    lines = [f"| {name} | seeds | {' | '.join(MEASURES)} | seconds |", "|---" * (len(MEASURES) + 3) + "|"]
    for cell in (cell for cell in CELLS if any(row["cell"] == cell for row in rows)):
        of_cell = [row for row in rows if row["cell"] == cell]
        entries = [cell, str(len(of_cell))]
        for measure in MEASURES:
            values = [row[measure] for row in of_cell]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            entries.append(f"{statistics.mean(values):.1f}{spread}")
        seconds = [row["train_seconds"] for row in of_cell if row["train_seconds"]]
        entries.append(f"{statistics.median(seconds):.0f}" if seconds else "")
        lines.append(f"| {' | '.join(entries)} |")
    return lines


def draw(name: str, rows: list[dict]) -> None:
    """One dot per seed, test accuracy of both probes by cell."""
    cells = [cell for cell in CELLS if any(row["cell"] == cell for row in rows)]
    figure = Figure(figsize=(7, 0.3 * len(cells) + 1.2), layout="constrained")
    axes = figure.subplots()
    for measure, colour, shift in (("knn_test", "tab:orange", -0.15), ("linear_test", "tab:blue", 0.15)):
        for height, cell in enumerate(cells):
            values = [row[measure] for row in rows if row["cell"] == cell]
            axes.plot(values, [height + shift] * len(values), "o", color=colour, alpha=0.6, markersize=4)
            axes.plot(statistics.mean(values), height + shift, "|", color=colour, markersize=12)
        axes.plot([], [], "o", color=colour, label={"knn_test": "k-NN", "linear_test": "linear"}[measure])
    axes.set_yticks(range(len(cells)), cells, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="test top-1, %", title=f"{name}: data, epochs, batch size")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(FIGURES / f"evidence-{name}.png", dpi=110)


if __name__ == "__main__":
    main()
