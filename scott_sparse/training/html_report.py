"""report.html of a run, and a page on several: one file each, made from run folders alone, without images or weights.

Charts are SVG by matplotlib, in the colours of the page: they are drawn in colours that nothing else has, which are
then replaced by CSS variables. What names come from users (folders, classes, files) is escaped by Jinja2.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import torch
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from rich.filesize import decimal

from scott_sparse.data.sources import printable
from scott_sparse.data.splits import load_digests
from scott_sparse.distributed import cpu_count
from scott_sparse.evaluation.probe import commit, versions
from scott_sparse.evaluation.report import collect_results, columns_of
from scott_sparse.files import read_json, write_atomically, write_json
from scott_sparse.model.jepa import TERMS
from scott_sparse.training.pictures import draw_views
from scott_sparse.training.recipe import RECIPES
from scott_sparse.training.resume import METRICS, PICTURES, RECIPE, REPORT, REPORTS, SUMMARY, flatten
from scott_sparse.training.run import Run
from scott_sparse.training.verdict import advice

ABOUT = "about"  # a file among those of the pictures
POINTS = 200  # of a curve: means over as many stretches of the run
COLOURS = 8  # that curves have in the page
# title; where it is logged; solid, dashed and dotted curve; errors of the first
CHARTS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("Loss", "metrics", {"loss": "loss"}, ""),
    *((f"Loss term {name}", "metrics", {term: name}, "") for term, name in TERMS.items()),
    (
        "k-NN on val, %",
        "reports",
        {"knn": "encoder", "knn_untrained": "untrained", "knn_pixels": "raw pixels"},
        "knn_error",
    ),
    ("Ranks of the features", "reports", {"rankme": "RankMe", "lidar": "LiDAR"}, ""),
    ("Spread", "reports", {"std": "standard deviation of features", "token_similarity": "similarity of tokens"}, ""),
    ("Learning rate", "metrics", {"lr": "learning rate"}, ""),
    ("EMA momentum", "metrics", {"momentum": "EMA momentum"}, ""),
    ("Gradient norm", "metrics", {"gradient_norm": "gradient norm"}, ""),
    ("Images per second", "metrics", {"images_per_second": "mean since the start"}, ""),
)
DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run folder says of its run, at this moment."""

    name: str
    """The folder, as it was given."""
    folder: Path
    recipe: dict[str, Any]
    metrics: list[dict[str, Any]]
    reports: list[dict[str, Any]]
    summary: dict[str, Any]
    """{} of a run that has not come to its end."""
    about: dict[str, Any]
    """Command and environment; {} if the run did not record them."""
    sections: dict[str, dict[str, Any]]
    """Pictures, see `pictures`."""
    images: int | None
    """That are trained on."""

    @classmethod
    def of(cls, folder: Path) -> "Record":
        """Raises ValueError for a folder that is none of a run."""
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is not a run: expected a folder of train/pretrain.py, with {RECIPE} in it.")
        files = {path.stem: read_json(path) for path in (folder / PICTURES).glob("*.json")}
        digests = load_digests(folder)
        return cls(
            str(folder),
            folder,
            recipe=read_json(folder / RECIPE),
            metrics=_lines(folder / METRICS),
            reports=_lines(folder / REPORTS),
            summary=_json_in(folder / SUMMARY),
            about=files.get(ABOUT, {}),
            sections={name: content for name, content in files.items() if content.get("strips")},
            images=None if digests is None else len(digests),
        )

    @cached_property
    def steps_per_epoch(self) -> int:
        return max((self.images or 0) // self.recipe["batch_size"], 1)

    @property
    def epochs(self) -> float:
        """That are done."""
        return len(self.metrics) / self.steps_per_epoch

    @property
    def verdict(self) -> str:
        return self.summary.get("verdict") or (self.reports[-1]["verdict"] if self.reports else "")

    @property
    def state(self) -> str:
        """Finished or not, and how far."""
        if self.summary:
            return f"finished: {self.summary['steps']:,} steps in {_minutes(self.summary['seconds'])}"
        if not self.metrics:
            return "no step logged yet"
        return f"epoch {self.epochs:.1f} of {self.recipe['epochs']:g} when this page was written"

    @property
    def data(self) -> str:
        source = self.recipe["source"]
        return f"{source['data']}, {source['protocol']} protocol"

    @property
    def settings(self) -> dict[str, Any]:
        return {name: value for name, value in flatten(self.recipe).items() if name not in ("out", "overwrite", "plan")}

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Settings that differ from those of the recipe of that name, and what they are there."""
        settings, known = self.settings, RECIPES.get(self.recipe["recipe"])
        defaults = flatten(known[1].to_json()) if known else {}
        return {name: (settings[name], x) for name, x in defaults.items() if settings.get(name, x) != x}

    @property
    def tiles(self) -> dict[str, str]:
        """The numbers that are looked at first."""
        tiles = {}
        now = self.reports[-1] if self.reports else {}
        if now.get("knn") is not None:
            baselines = {"untrained": now.get("knn_untrained"), "pixels": now.get("knn_pixels")}
            tiles["k-NN on val"] = f"{now['knn']:.1f} %"
            for name, accuracy in baselines.items():
                if accuracy is not None:
                    tiles[f"k-NN, {name}"] = f"{accuracy:.1f} %"
        if now:
            tiles["RankMe"] = f"{now['rankme']:.0f}"
        if self.metrics:
            last = self.metrics[-1]
            tiles["loss"] = "not finite" if last["loss"] is None else f"{last['loss']:.3f}"
            tiles["images per second"] = f"{last['images_per_second']:,.0f}"
        return tiles

    @property
    def environment(self) -> dict[str, str]:
        rows = dict(self.about.get("environment", {}))
        if summary := self.summary:
            rows |= {"time": _minutes(summary["seconds"]), "peak memory": decimal(summary["peak_memory_mib"] * 2**20)}
            rows |= {"waited for input": f"{100 * summary['input_share']:.0f} % of the training"}
            rows |= {"online reports": f"{100 * summary['report_share']:.0f} % of the training"}
            rows |= {"skipped steps": str(summary["skipped"])}
        return rows

    @property
    def commands(self) -> dict[str, str]:
        """What to do with the run, and the command that does it."""
        run, data = shlex.quote(str(self.folder)), shlex.quote(str(self.recipe["source"]["data"]))
        resume: dict[str, str] = {}
        if command := self.about.get("command"):
            if self.summary:
                resume = {f"Train longer than {self.recipe['epochs']:g} epochs": f"{command} --epochs MORE"}
            else:
                resume = {"Resume, if it was stopped": command}
        load = f"from scott_sparse import load_encoder\n\nencoder = load_encoder({str(self.folder)!r})\n"
        return {
            **resume,
            "Evaluate": f"accelerate launch eval/knn.py {run} --data {data}\naccelerate launch eval/linear.py {run} "
            f"--data {data} --crops 8\npython eval/table.py {run}",
            "Look closer": f"python eval/visualize.py {run} --data {data}",
            "Make this page again": f"python eval/report.py {run}",
            "Load in Python": f"{load}features = encoder(encoder.preprocess(image)[None])  # (1, N, D)",
        }

    @property
    def tables(self) -> list[dict[str, Any]]:
        return tables_of([self])


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
    launcher = "accelerate launch"
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        launcher = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', accelerator.num_processes)}"
    elif accelerator.num_processes > 1:
        launcher = f"accelerate launch --num_processes {accelerator.num_processes}"
    words = [word for word in sys.argv if word != "--overwrite"]  # which would delete the run
    about = {"command": f"{launcher} {shlex.join(words)}", "data": run.data.describe(), "environment": environment}
    write_json(run.out / PICTURES / f"{ABOUT}.json", about)


def write_report(folder: Path) -> Path:
    """Write RUN/report.html; returns its path. Raises ValueError for no run, OSError if the disk is full."""
    record = Record.of(folder)
    page = _render("report.html", run=record, charts=draw_charts([record]), advice=advice(record.verdict))
    write_atomically(folder / REPORT, page)
    return folder / REPORT


@contextlib.contextmanager
def full_disk_is_told(run: Run) -> Iterator[None]:
    """A disk that is full while the report is written does not end the run."""
    try:
        yield
    except OSError as error:
        run.console.print(f"{run.out / REPORT} cannot be written ({error.strerror or error})")


def start_report(run: Run) -> None:
    """Write the page of a run that starts, on the main process: views and masks, settings, commands."""
    if run.accelerator.is_main_process:
        with full_disk_is_told(run):
            write_about(run)
            draw_views(run.out, run.recipe, run.data)
            write_report(run.out)


def refresh_report(run: Run) -> None:
    """Write the page of a run that trains or has ended; to be called on the main process."""
    with full_disk_is_told(run):
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
        advices=[advice(record.verdict) for record in records],
        settings={name: values for name, values in rows.items() if any(value != values[0] for value in values)},
        same=sum(all(value == values[0] for value in values) for values in rows.values()),
        data_differs=_how_data_differs(records),
        tiles=dict.fromkeys(name for record in records for name in record.tiles),
        tables=tables_of(records),
        tokens=_side_by_side(records),
    )
    write_atomically(path, page)


def tables_of(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Test results of probes, a table for each data set."""
    evaluated = [record.folder for record in records if any((record.folder / "eval").glob("*.json"))]
    tables = collect_results(evaluated) if evaluated else {}
    return [{"title": title, "columns": columns_of(rows), "rows": rows} for title, rows in tables.items()]


def draw_charts(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Title, legend and SVG of each chart that there is something to draw in.

    One run has a colour for each curve, several have one for each run, and a dash for each curve.
    """
    charts, several = [], len(records) > 1
    in_epochs = all(record.images for record in records)
    for title, source, curves, error in CHARTS:
        if title.startswith("Loss term") and not any(len(_terms(record)) > 1 for record in records):
            continue
        figure = Figure(figsize=(3.6, 2.1))
        axes = figure.add_axes((0.14, 0.19, 0.84, 0.76))  # a layout engine would take most of the time
        legend: list[tuple[str, int | None, int]] = []  # name, colour, dash
        for number, record in enumerate(records):
            rows = getattr(record, source)
            for style, (key, name) in enumerate(curves.items()):
                values = np.array([row.get(key) for row in rows], dtype=float)
                if np.isnan(values).all():
                    continue
                at = [row["epoch"] for row in rows]
                if source == "metrics":
                    at = [(row["step"] + 1) / (record.steps_per_epoch if in_epochs else 1) for row in rows]
                x, y = _means(np.array(at, dtype=float)), _means(values)
                colour = (number if several else style) % COLOURS
                marker = "o" if source == "reports" and not style else None
                axes.plot(x, y, color=f"#a0000{colour}", lw=1.5, ls=DASHES[style], marker=marker, ms=2.5)
                if error and not style:
                    spread = _means(np.array([row.get(error) for row in rows], dtype=float))
                    axes.fill_between(x, y - spread, y + spread, color=f"#a0000{colour}", alpha=0.15, lw=0)
                if not several:
                    legend.append((name, colour, style))
        if not axes.lines:
            continue
        if several:
            legend = [(name, None, style) for style, name in enumerate(curves.values()) if len(curves) > 1]
        axes.set_xlabel("epoch" if in_epochs or source == "reports" else "step")
        charts.append({"title": title, "legend": legend, "svg": _svg(figure)})
    return charts


def _terms(record: Record) -> list[str]:
    return [term for term in TERMS if record.metrics and term in record.metrics[-1]]


def _means(values: np.ndarray) -> np.ndarray:
    """At most `POINTS` values: means over stretches of equal length, of what is finite in them."""
    if len(values) <= POINTS:
        return values
    parts = np.array_split(values, POINTS)
    return np.array([np.nanmean(part) if not np.isnan(part).all() else math.nan for part in parts])


def _svg(figure: Figure) -> Markup:
    """The figure for the page: in its colours and its font, without a size of its own, names and foreign addresses."""
    text, grid = "#b00001", "#b00002"
    axes = figure.axes[0]
    axes.grid(True, color=grid, lw=0.6)
    axes.set_axisbelow(True)
    figure.patch.set_visible(False)
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[:].set_color(text)
    axes.tick_params(colors=text, labelsize=8, length=2)
    axes.xaxis.label.set(color=text, size=8)
    axes.yaxis.get_offset_text().set(color=text, size=8)
    buffer: Any = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'^<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg)
    svg = re.sub(r' id="[\w.]+_\d+"|font-family: [^;]*; |<style.*?</style>', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), svg)  # tenths of a point
    svg = re.sub(r"#a0000(\d)", r"var(--c\1)", svg).replace(text, "currentColor").replace(grid, "var(--line)")
    return Markup(svg)


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


def _lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON lines file, [] without it; a line that is being written is left out."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
    except ValueError as error:
        raise ValueError(f"{path} is not JSON lines ({error}); was it edited?") from None


def _json_in(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


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
