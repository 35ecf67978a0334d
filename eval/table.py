"""All results of some runs in one table for each data set, for the terminal and as Markdown.

python eval/table.py runs/demo runs/timm-resnet18
"""

import dataclasses
from pathlib import Path

import checkout  # noqa: F401 - first
import tyro

from scott_sparse.evaluation.report import print_results
from scott_sparse.evaluation.subject import run_script


@dataclasses.dataclass(frozen=True)
class TableConfig:
    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders whose eval/ holds results."""


def main(config: TableConfig) -> None:
    if not config.runs:
        raise ValueError("name at least one run folder (as in eval/table.py runs/demo).")
    print_results(config.runs)


if __name__ == "__main__":
    run_script(TableConfig, main)
