"""Several runs on one page: verdicts, curves, probes, tokens, and the settings that differ.

python eval/compare.py runs/demo runs/photos --out compare.html

Each run as it is at this moment, finished or not. Runs on different data are compared too; the page then says so.
"""

import dataclasses
from pathlib import Path

import checkout  # noqa: F401 - first
import tyro

from scott_sparse.data.sources import printable
from scott_sparse.evaluation.subject import run_script
from scott_sparse.training.html_report import write_comparison


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders of train/pretrain.py, two or more."""
    out: Path = Path("compare.html")
    """Page to write."""


def main(config: CompareConfig) -> None:
    write_comparison(config.out, config.runs)
    print(printable(str(config.out)))


if __name__ == "__main__":
    run_script(CompareConfig, main)
