"""report.html of a run, and a page on several: one file each, made from run folders alone, without images or weights.

Names that come from users (folders, classes, files) are escaped by Jinja2. The templates are beside this file.
"""

import contextlib
import itertools
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import torch
from accelerate.utils import DistributedType

from scott_sparse.data.sources import printable
from scott_sparse.data.splits import load_digests
from scott_sparse.distributed import cpu_count
from scott_sparse.evaluation.probe import commit, versions
from scott_sparse.files import write_atomically, write_json
from scott_sparse.training.charts import draw_charts
from scott_sparse.training.pictures import draw_views
from scott_sparse.training.record import ABOUT, Record, tables_of
from scott_sparse.training.resume import PICTURES, REPORT
from scott_sparse.training.run import Run


def write_report(folder: Path) -> Path:
    """Write RUN/report.html; returns its path. Raises ValueError for no run, OSError if the disk is full."""
    record = Record.of(folder)
    page = _render("report.html", run=record, charts=draw_charts([record]))
    write_atomically(folder / REPORT, page)
    return folder / REPORT


@contextlib.contextmanager
def report_failures(run: Run) -> Iterator[None]:
    """Prints why the page cannot be written, such as a full disk or a damaged file; the run goes on."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        run.console.print(f"{run.out / REPORT} cannot be written ({reason})", soft_wrap=True)


def start_report(run: Run) -> None:
    """Write the page of a run that starts, on the main process: views and masks, settings, commands."""
    if run.accelerator.is_main_process:
        with report_failures(run):
            write_about(run)
            draw_views(run.out, run.recipe, run.data)
            write_report(run.out)


def refresh_report(run: Run) -> None:
    """Write the page of a run that trains or has ended; to be called on the main process."""
    with report_failures(run):
        write_report(run.out)


def write_comparison(path: Path, folders: Iterable[Path]) -> None:
    """Write a page on several runs. Raises ValueError for fewer than two and for a folder that is none of a run."""
    records = [Record.of(folder) for folder in dict.fromkeys(folders)]
    if len(records) < 2:
        raise ValueError(f"got {len(records)} run folders, expected two or more (as in eval/compare.py runs/a runs/b).")
    names = dict.fromkeys(name for record in records for name in record.settings)
    rows = {name: [record.settings.get(name) for record in records] for name in names}
    page = _render(
        "compare.html",
        runs=records,
        charts=draw_charts(records),
        settings={name: values for name, values in rows.items() if any(value != values[0] for value in values)},
        same=sum(all(value == values[0] for value in values) for values in rows.values()),
        data_differs=_how_data_differs(records),
        tiles=dict.fromkeys(name for record in records for name in record.tiles),
        tables=tables_of(record.folder for record in records),
        tokens=_side_by_side(records),
    )
    write_atomically(path, page)


def write_about(run: Run) -> None:
    """Record how a run was started, and where. Raises OSError if the disk is full."""
    accelerator = run.accelerator
    environment = {
        "device": run.device_name,
        "processes": str(accelerator.num_processes),
        "cores": str(cpu_count()),
        "precision": accelerator.mixed_precision,
        "engine": run.engine,
        "encoder": f"{run.recipe.size}, {run.encoder_parameters / 1e6:.1f} M parameters",
        "platform": platform.platform(),
        **{name: str(version) for name, version in versions().items() if version},
        **({"commit": revision} if (revision := commit()) else {}),
    }
    precision, processes = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), accelerator.num_processes
    launcher = "accelerate launch"
    if processes > 1 and accelerator.device.type == "cpu":
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', processes)}"
        launcher = f"ACCELERATE_MIXED_PRECISION={precision} {launcher}" if precision != "no" else launcher
    else:
        sharded = accelerator.distributed_type == DistributedType.FSDP
        kind = "--use_fsdp --fsdp_version 2" if sharded else "--multi_gpu"
        launcher += f" {kind} --num_processes {processes}" if processes > 1 else ""
        launcher += f" --mixed_precision {precision}" if precision != "no" else ""
    words = [word for word in sys.argv if word != "--overwrite"]  # which would delete the run
    data = "; ".join(filter(None, [run.data.describe(), run.colours]))
    about = {"command": f"{launcher} {shlex.join(words)}", "data": data, "environment": environment}
    write_json(run.out / PICTURES / f"{ABOUT}.json", about)


def _side_by_side(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Tokens of the runs, a strip for each image; an image that several show is shown once."""
    strips = []
    for parts in itertools.zip_longest(*(record.sections.get("tokens", {}).get("strips", []) for record in records)):
        cells: dict[str, str] = {}  # label by picture
        for record, part in zip(records, parts):
            for label, picture in part["cells"] if part else []:
                if label == "image":
                    cells.setdefault(picture, "image")
                elif label.startswith("pretrained"):
                    cells.setdefault(picture, label.replace("pretrained", record.name))
        titles = dict.fromkeys(part["title"] for part in parts if part)
        strips.append({"title": " / ".join(titles), "cells": [(label, picture) for picture, label in cells.items()]})
    return strips


def _how_data_differs(records: Sequence[Record]) -> list[str]:
    """In words; [] if all runs were trained on the same images."""
    ways = {
        "data": [record.data for record in records],
        "number of images": [f"{record.images:,}" if record.images else "?" for record in records],
    }
    different = [f"{way}: {' / '.join(values)}" for way, values in ways.items() if len(set(values)) > 1]
    sizes = {json.dumps(record.recipe["image_size"]) for record in records}
    if not different and len(sizes) == 1:  # digests are of images as they were decoded, for that size
        digests = [load_digests(record.folder) for record in records]
        if any(a is not None and b is not None and not torch.equal(a, b) for a, b in itertools.pairwise(digests)):
            different.append("the pixels of some images, or their order")
    return different


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Names may hold bytes that are not text.
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    return environment.get_template(template).render(written=f"{datetime.now():%Y-%m-%d %H:%M}", **values)
