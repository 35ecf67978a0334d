"""Images per second of train/pretrain.py on one process and on several, and what that says of more.

    python benchmarks/processes.py                                             # the demo, on CPU threads or GPUs
    python benchmarks/processes.py --bandwidth 450 -- flowers102 --batch-size 256 --epochs 2

It is the same run whatever the processes: they share the batch. Runs take turns; each CPU process has one thread. What
the machine itself allows stands beside: as many runs at once, each with its share of the batch, that know nothing of
each other. With --bandwidth, GB/s between processes as the vendor says it, 8 and 64 of them are estimated, each with a
batch of its own: one process's step as measured, then the gradients' way round a ring, 2 (n - 1) / n times their bytes,
nothing hidden behind the way back.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table

from scott_sparse.training import recipe as recipes

ROOT = Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Settings:
    """What follows after -- are arguments of train/pretrain.py."""

    processes: tuple[int, ...] = (1, 2)
    """Numbers of processes to compare."""
    rounds: int = 3
    """Runs of each number, in turns; the table shows median and range."""
    bandwidth: float | None = None
    """Bandwidth between processes in GB/s, from which 8 and 64 of them are estimated."""
    json: Path | None = None
    """File for the results."""


def main() -> None:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    settings = tyro.cli(Settings, args=arguments[:split], description=__doc__)
    run = arguments[split + 1 :] or ["demo", "--epochs", "1"]
    _, recipe = recipes.parse(run)
    rates = {count: [] for count in settings.processes}
    apart = {count: [] for count in settings.processes if count > 1}
    for _ in range(settings.rounds):
        for count in rates:
            rates[count].append(images_per_second(run, count))
        for count in apart:
            apart[count].append(images_per_second_apart(run, recipe, count))
    sent = 4 * sum(p.numel() for p in recipe.model().parameters() if p.requires_grad)
    first = rates[settings.processes[0]]
    found = {
        "arguments": run,
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores",
        "bytes_per_step": sent,
        "images_per_second": rates,
        "apart": apart,
    }
    table = Table(title=f"{' '.join(run)}: gradients of {sent / 1e6:.1f} MB a step")
    for column in ("processes", "images/s", "lowest - highest", f"x {settings.processes[0]}"):
        table.add_column(column, justify="right")
    rows = {str(count): of_count for count, of_count in rates.items()}
    rows |= {f"{count} runs apart": of_count for count, of_count in apart.items()}
    for name, found_rates in rows.items():
        low, high = min(found_rates), max(found_rates)
        ratio = statistics.median(rate / one for one, rate in zip(first, found_rates))
        table.add_row(name, f"{statistics.median(found_rates):.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.2f}")
    if settings.bandwidth and 1 in rates:
        seconds = recipe.batch_size / statistics.median(rates[1])
        for count in (8, 64):
            step = seconds + 2 * (count - 1) / count * sent / (1e9 * settings.bandwidth)
            table.add_row(
                f"{count}, estimated", f"{count * recipe.batch_size / step:.0f}", "", f"{count * seconds / step:.1f}"
            )
    Console(width=100).print(table)
    if settings.json:
        settings.json.write_text(json.dumps(found, indent=1) + "\n")


def images_per_second_apart(run: list[str], recipe: recipes.Recipe, count: int) -> float:
    """Of as many runs at once, together."""
    share = [*run, "--batch-size", str(recipe.batch_size // count), "--epochs", str(recipe.epochs / count)]
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(lambda gpu: images_per_second(share, 1, gpu), range(count)))


def images_per_second(run: list[str], processes: int, gpu: int | None = None) -> float:
    """Of training without reports, its first steps included; start and final table not. `gpu`: the only one to use."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [*launch, str(ROOT / "train" / "pretrain.py"), *run, "--report-every", "0", "--out", f"{folder}/run"]
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        return json.loads(Path(folder, "run", "summary.json").read_text())["images_per_second"]


if __name__ == "__main__":
    main()
