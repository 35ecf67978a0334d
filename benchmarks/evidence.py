"""Which recipe gains, on which kind of images? Eight sets, three frozen probes, each against the untrained encoder.

    python benchmarks/evidence.py --sets DIR                                   # the first cells, on all sets
    python benchmarks/evidence.py --sets DIR --only "without MIM-JEPA" --on grocery160 fashion12k --seeds 0 1 2
    python benchmarks/evidence.py --sets DIR --only "published objective" --on grocery160 --images 880000 --points 10
    python benchmarks/evidence.py --tables                                     # of what has been run already

DIR holds the folders grocery160, imagenette160, cifar12k, fashion12k and pets_sample; outlines.py makes two more of
them, and petals are drawn. A cell trains with train/pretrain.py (supervised: eval/finetune.py --from-scratch, whose
epoch is chosen on val) and is judged by eval/knn.py, eval/linear.py and eval/attentive.py, each in a process of its own
with one thread. All cells of a bench see the same number of images, counted with repetition. A finished cell is one
line of benchmarks/runs/evidence.jsonl and is not run again; a cell that was killed continues from its checkpoint. Clean
protocol: every setting is chosen on val, test is read once by the choice.
"""

import concurrent.futures
import dataclasses
import itertools
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

from scott_sparse.data.dataset import open_data, short_side_for
from scott_sparse.training.recipe import parse

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "benchmarks" / "runs" / "evidence.jsonl"
FIGURES = ROOT / "benchmarks" / "figures"

SETS = {  # name: what tells its classes apart, and the flags that open it
    "grocery160": ("colour", ("--data", "{sets}/grocery160")),
    "imagenette160": ("objects", ("--data", "{sets}/imagenette160")),
    "cifar12k": ("objects", ("--data", "{sets}/cifar12k")),
    "fashion12k": ("outline, grey", ("--data", "{sets}/fashion12k")),
    "petals": ("geometry", ("--data", "petals", "--image-size", "48")),
    "pets_sample": ("few, fine-grained", ("--data", "pets37", "--data-root", "{sets}/pets_sample")),
    "outlines": ("outline, test under other conditions", ("--data", "{sets}/outlines")),
    "outlines-tinted": ("colour, test under other conditions", ("--data", "{sets}/outlines-tinted")),
}
BASELINES = ("pixels", "untrained", "supervised")
ONE_GROUP = ("--plain-share", "0", "--crop-scale", ".2", "1")
# The published recipe at the size of the others; epochs are set by --images.
PUBLISHED = ("--image-size", "64", "--patch-size", "8", "--size", "demo", "--stem-width", "32")
RECIPES = {  # name of a cell: a recipe of train/pretrain.py, and flags
    "small-data": ("small-data",),
    "half of the crops coloured": ("small-data", "--colour", "1"),
    "plain crops only": ("small-data", "--colour", "0", *ONE_GROUP),
    "coloured crops only": ("small-data", "--colour", "1", *ONE_GROUP),
    "without MIM-JEPA": ("small-data", "--mim-weight", "0"),
    "SIGReg for NT-Xent": ("small-data", "--cross-crop-loss", "sigreg", "--cross-crop-weight", "1"),
    "patch embedding": ("small-data", "--tokenizer", "patch"),
    "colour-invariant": ("colour-invariant",),
    "mim-jepa": ("mim-jepa",),
    "mim-jepa, last block": ("mim-jepa", "--mim-target", "last"),
    "published objective": ("flowers102", *PUBLISHED),
}
CELLS = (*BASELINES, *RECIPES)
CURVES = {"published objective": "tab:blue", "mim-jepa": "tab:orange", "small-data": "tab:green"}  # drawn in the figure
PROBES = {"knn": (), "linear": (), "attentive": ("--epochs", "30")}


@dataclasses.dataclass(frozen=True)
class Bench:
    sets: Path | None = None
    """Folder that holds the sets of photos; not needed with --tables."""
    only: tuple[str, ...] = (*BASELINES, "small-data", "plain crops only")
    """Cells by name."""
    on: tuple[str, ...] = tuple(SETS)
    """Sets by name."""
    images: int = 70_000
    """Images that every cell sees, counted with repetition; 70,000 are about ten CPU minutes of small-data."""
    points: int = 1
    """Probe the encoder at so many equally spaced checkpoints of the run, the last of which is its end."""
    seeds: tuple[int, ...] = (0,)
    """Each cell runs once per seed; the first seed of all cells comes before the second of any."""
    jobs: int = 2
    """Cells that run side by side, each on one thread."""
    tables: bool = False
    """Print tables and draw figures of all finished cells, and run none."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One training run and its probes."""

    name: str
    set: str
    seed: int
    images: int
    points: int

    @property
    def key(self) -> dict:
        """What its rows have in common; a baseline that is not trained has no length."""
        return {
            "set": self.set,
            "cell": self.name,
            "seed": self.seed,
            "images": self.images if self.is_trained else 0,
        }

    @property
    def is_trained(self) -> bool:
        return self.name not in ("pixels", "untrained")


def main() -> None:
    bench = tyro.cli(Bench, description=__doc__)
    for given, known in ((bench.only, CELLS), (bench.on, tuple(SETS))):
        if unknown := set(given) - set(known):
            sys.exit(f"error: unknown {sorted(unknown)}; expected some of: {', '.join(known)}.")
    if bench.sets is None and not bench.tables:
        sys.exit("error: name the folder of the sets (--sets DIR), or pass --tables.")
    if not bench.tables:
        cells = [
            Cell(name, on, seed, bench.images, bench.points)
            for seed in bench.seeds
            for on in bench.on
            for name in bench.only
            if name != "pixels" or seed == bench.seeds[0]
        ]
        done = [{key: row[key] for key in ("set", "cell", "seed", "images")} for row in finished()]
        with concurrent.futures.ThreadPoolExecutor(bench.jobs) as pool:
            list(pool.map(lambda cell: run_cell(bench, cell), (cell for cell in cells if cell.key not in done)))
    print("\n".join(tables(finished())))
    draw_curves(finished())


def finished() -> list[dict]:
    return [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []


def run_cell(bench: Bench, cell: Cell) -> None:
    """Train, probe, append one line a point to the file; a cell that fails is named and the others go on."""
    out = Path("runs/evidence", re.sub(r"[^\w.-]+", "-", "-".join(map(str, cell.key.values()))))
    data = [flag.format(sets=bench.sets) for flag in SETS[cell.set][1]]
    source = data[: data.index("--image-size")] if "--image-size" in data else data  # probes know the size
    try:
        rows = train_and_probe(cell, out, data, source)
    except subprocess.CalledProcessError as error:
        print(f"{out.name} failed: {error.cmd[1:3]}\n{error.stdout[-1000:]}\n{error.stderr[-2000:]}", flush=True)
        return
    with RUNS.open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    print(*map(json.dumps, rows), sep="\n", flush=True)
    shutil.rmtree(out)


def train_and_probe(cell: Cell, out: Path, data: list[str], source: list[str]) -> list[dict]:
    """The rows of a cell, one a point. Raises CalledProcessError where a script fails."""
    recipe = RECIPES.get(cell.name, RECIPES["small-data"])
    flags = [*recipe, *data, "--seed", cell.seed, "--out", out]
    summary = out / "summary.json"  # there where the probes of a cell were cut short
    supervised = cell.name == "supervised"
    if not summary.exists() and (supervised or not cell.is_trained):  # needs a run folder for size, model and seed only
        script("train/pretrain.py", *flags, "--epochs", 0.001, "--batch-size", 8, "--report-every", 0)
    elif not summary.exists():
        epochs, steps = length(cell, source)
        kept = max(steps // cell.points, 1)
        keep = ["--save-every", kept, "--keep-every", kept] if cell.points > 1 else []
        warmup = ["--warmup-epochs", 40 / 300 * epochs] if cell.name == "published objective" else []
        script("train/pretrain.py", *flags, "--epochs", epochs, "--report-every", 0, *keep, *warmup)
    if supervised:
        epochs, _ = length(cell, source, "train")
        script("eval/finetune.py", out, *source, "--from-scratch", "--seed", cell.seed, "--epochs", epochs)
        (out,) = out.glob("eval/finetune/*")  # a run folder too
        summary = out / "summary.json"
    init = {"pixels": ["--init", "pixels"], "untrained": ["--init", "random"]}.get(cell.name, [])
    about = json.loads(summary.read_text())
    rows = []
    for point, steps in points(out, cell):
        row = {**cell.key, "at": cell.key["images"] if steps is None else round(cell.images * steps / about["steps"])}
        for probe, settings in PROBES.items():
            script(f"eval/{probe}.py", point, *source, *init, *settings)
            result = json.loads(max(Path(point, "eval").glob(f"{probe}-*.json"), key=os.path.getmtime).read_text())
            row |= {f"{probe}_{role}": result[role]["top1"] for role in ("val", "test")}
            row |= {f"{probe}_choice": result["choice"], "commit": result["commit"]}
        row |= {"cpu_seconds": about["cpu_seconds"], "steps": about["steps"]} if cell.is_trained else {}
        rows.append({**row, "precision": precision(), "flags": recipe, "torch": torch.__version__})
    return rows


def length(cell: Cell, source: list[str], role: str = "pretrain") -> tuple[float, int]:
    """Epochs of the images in a role, and optimizer steps in batches of 64, that see `cell.images` images."""
    _, recipe = parse(["small-data", *source])
    count = len(getattr(open_data(recipe.source, short_side=short_side_for(recipe.sides)), role))
    steps = round(cell.images / recipe.batch_size)
    return steps / (count // recipe.batch_size), steps


def points(out: Path, cell: Cell) -> list[tuple[Path, int | None]]:
    """Run folders to probe and their optimizer steps: kept checkpoints of the target encoder, then the run itself."""
    found: list[tuple[Path, int | None]] = []
    several = cell.is_trained and cell.points > 1
    for checkpoint in sorted(out.glob("checkpoints/step-*"))[: cell.points - 1] if several else []:
        folder = out / f"at-{checkpoint.name}"
        folder.mkdir(exist_ok=True)
        for name in ("encoder.json", "recipe.json", "summary.json", "pretrain_images.safetensors"):
            shutil.copy(out / name, folder)
        shutil.copy(checkpoint / "target.safetensors", folder / "encoder.safetensors")
        found.append((folder, int(checkpoint.name.removeprefix("step-"))))
    return [*found, (out, None)]


def script(name: str, *arguments: object) -> None:
    """Run a script of the repository on one thread. Raises CalledProcessError where it fails."""
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, capture_output=True, text=True, check=True)


def precision() -> str:
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def tables(rows: list[dict]) -> list[str]:
    """Markdown, for each length: accuracy by set and cell, then gains over the untrained encoder of the same seed."""
    rows = [row for row in rows if row["at"] == row["images"]]
    lines = []
    for images in sorted({row["images"] for row in rows} - {0}):
        sets = {row["set"] for row in rows if row["images"] == images}
        here = [row for row in rows if row["images"] in (0, images) and row["set"] in sets]
        lines += ["", f"{images:,} images: test (val), top-1 in per cent", "", *accuracy_table(here)]
        lines += ["", *gain_table(here)]
    return lines


def accuracy_table(rows: list[dict]) -> list[str]:
    lines = [f"| set | cell | seeds | {' | '.join(PROBES)} | CPU minutes |", "|---" * (len(PROBES) + 4) + "|"]
    for on, cell in itertools.product(SETS, CELLS):
        own = [row for row in rows if (row["set"], row["cell"]) == (on, cell)]
        if own:
            entries = [f"{spread(own, f'{probe}_test')} ({spread(own, f'{probe}_val')})" for probe in PROBES]
            seconds = [row["cpu_seconds"] for row in own if "cpu_seconds" in row]
            minutes = f"{statistics.median(seconds) / 60:.1f}" if seconds else ""
            lines.append(f"| {on} | {cell} | {len(own)} | {' | '.join(entries)} | {minutes} |")
    return lines


def gain_table(rows: list[dict]) -> list[str]:
    """Over the untrained encoder of the same set and seed, by probe, on val and test."""
    untrained = {(row["set"], row["seed"]): row for row in rows if row["cell"] == "untrained"}
    lines = ["| cell | sets x seeds | mean gain, linear on test | mean gain | worst gain |", "|---" * 5 + "|"]
    for cell in (cell for cell in CELLS if cell not in ("pixels", "untrained")):
        own = [row for row in rows if row["cell"] == cell and (row["set"], row["seed"]) in untrained]
        gains = [
            (row[f"{probe}_{role}"] - untrained[row["set"], row["seed"]][f"{probe}_{role}"], probe, role, row["set"])
            for row in own
            for probe, role in itertools.product(PROBES, ("val", "test"))
        ]
        if gains:
            linear = statistics.mean(gain for gain, *what, _ in gains if what == ["linear", "test"])
            mean, (worst, probe, role, on) = statistics.mean(gain for gain, *_ in gains), min(gains)
            lines.append(
                f"| {cell} | {len(own)} | {linear:+.1f} | {mean:+.1f} | {worst:+.1f} ({probe} on {role} of {on}) |"
            )
    return lines


def spread(rows: list[dict], measure: str) -> str:
    """Mean over seeds, with the standard deviation where there are several."""
    values = [row[measure] for row in rows]
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def draw_curves(rows: list[dict]) -> None:
    """Test accuracy by CPU minutes, on sets where a run was probed at several points: a row a set, a column a probe.

    A line is a run of `CURVES`, solid where it is of seed 0, a single marker where it was probed at its end alone; the
    untrained encoder is a horizontal line. Minutes of a point are the run's, by its share of the images.
    """
    sets = [on for on in SETS if any(row["set"] == on and row["at"] < row["images"] for row in rows)]
    if not sets:
        return
    figure = Figure(figsize=(9, 2.6 * len(sets)), layout="constrained")
    panels = figure.subplots(len(sets), len(PROBES), sharex="row", sharey="row", squeeze=False)
    for (row_number, on), (column, probe) in itertools.product(enumerate(sets), enumerate(PROBES)):
        axes = panels[row_number, column]
        for row in rows:
            if (row["set"], row["cell"], row["seed"]) == (on, "untrained", 0):
                axes.axhline(row[f"{probe}_test"], color="grey", linestyle="--", linewidth=1, label="untrained")
        runs = {(row["cell"], row["seed"], row["images"]) for row in rows if row["set"] == on and row["cell"] in CURVES}
        for cell, seed, images in sorted(runs):
            of_run = [r for r in rows if (r["set"], r["cell"], r["seed"], r["images"]) == (on, cell, seed, images)]
            points = sorted((r["cpu_seconds"] / 60 * r["at"] / images, r[f"{probe}_test"]) for r in of_run)
            axes.plot(*zip(*points), "o:" if seed else "o-", markersize=3, color=CURVES[cell], label=cell)
        axes.set_xlim(left=0)
        axes.set_title(f"{on}, {probe}", fontsize=9)
        axes.grid(alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("CPU minutes, one thread")
    for axes in panels[:, 0]:
        axes.set_ylabel("test top-1, %")
    by_label = {line.get_label(): line for axes in panels[:, 0] for line in axes.lines}
    figure.legend(by_label.values(), by_label.keys(), loc="outside upper center", ncols=len(by_label), fontsize=8)
    FIGURES.mkdir(exist_ok=True)
    figure.savefig(FIGURES / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
