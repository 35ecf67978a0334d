"""report.html of a run, made again: also while it trains, after it was stopped, and when eval/ holds new results.

python eval/report.py runs/demo

Curves, settings and tables are read from the run folder. Pictures that are missing are drawn from the images and the
encoder, or the newest checkpoint; without the images the page comes without these pictures.
"""

import dataclasses
import sys
from pathlib import Path

import checkout  # noqa: F401 - first
import tyro

from scott_sparse.data.sources import printable
from scott_sparse.evaluation.subject import run_script
from scott_sparse.training.html_report import write_report
from scott_sparse.training.pictures import draw_again
from scott_sparse.training.record import Record


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    run: tyro.conf.Positional[Path]
    """Run folder of train/pretrain.py."""
    data: str | None = None
    """Where the images of the run are now. Default: where they were when it started."""
    redraw: bool = False
    """Draw all pictures again, not only those that are missing."""


def main(config: ReportConfig) -> None:
    Record.of(config.run)  # raises if it is no run
    try:
        draw_again(config.run, data=config.data, every=config.redraw)
    except (ValueError, OSError) as error:
        print(f"note: pictures that are missing cannot be drawn: {error}", file=sys.stderr)
    print(printable(str(write_report(config.run))))


if __name__ == "__main__":
    run_script(ReportConfig, main)
