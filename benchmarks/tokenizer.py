"""SCOTT's stem on both engines: forward, and forward + backward, at several shares of visible patches.

    python benchmarks/tokenizer.py

Repeats are interleaved, so that a noisy machine is noisy for both; medians in milliseconds and their quartiles.
"""

import argparse
import itertools
import platform
import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from scott_sparse import SparseTokenizer, draw_visible
from scott_sparse.sparse import spconv_failure

SETTINGS = {"paper stem, 224 px": (224, 16, 64, 384, 4), "demo stem, 48 px": (48, 8, 32, 96, 64)}
SHARES = (0.1, 0.25, 0.4, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    console = Console()
    engines = ["dense"] + (["spconv"] if spconv_failure(arguments.device) is None else [])
    console.print(
        f"{arguments.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    )
    for name, (side, patch, stem, dim, batch) in SETTINGS.items():
        table = Table(title=f"{name}, {batch} images: median ms (quartiles)")
        for column in ("visible", *(f"{e} {w}" for w, e in itertools.product(("forward", "+ backward"), engines))):
            table.add_column(column, justify="right")
        for share in SHARES:
            times = measure(engines, side, patch, stem, dim, batch, share, arguments)
            table.add_row(f"{share:.0%}", *(show(times[key]) for key in itertools.product((False, True), engines)))
        console.print(table)


def measure(engines, side, patch, stem, dim, batch, share, arguments):
    grid = (side // patch, side // patch)
    images = torch.randn(batch, 3, side, side, device=arguments.device)
    visible = draw_visible(batch, grid, hide_ratio=1 - share).to(arguments.device)
    tokenizers = {e: SparseTokenizer(dim, patch_size=patch, stem_width=stem, engine=e) for e in engines}
    times = {key: [] for key in itertools.product((False, True), engines)}
    for repeat in range(arguments.repeats + 2):
        for backward, engine in times:
            tokenizer = tokenizers[engine].to(arguments.device)
            elapsed = once(tokenizer, images, visible, backward)
            if repeat > 1:
                times[backward, engine].append(1e3 * elapsed)
    return times


def once(tokenizer, images, visible, backward) -> float:
    synchronize = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    synchronize()
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        tokens = tokenizer(images, visible)
        if backward:
            tokens.sum().backward()
    synchronize()
    return time.perf_counter() - start


def show(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.1f} ({low:.1f}-{high:.1f})"


if __name__ == "__main__":
    main()
