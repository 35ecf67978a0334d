"""Curves of one run or several, as SVG by matplotlib in the colours of the page that holds them.

They are drawn in colours that nothing else has, which are then replaced by CSS variables: light and dark as the page.
"""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from scott_sparse.model.jepa import TERMS
from scott_sparse.training.record import Record

POINTS = 200  # of a curve: means over as many stretches of the run
COLOURS = 8  # that curves have in the page
# title; where it is logged; solid, dashed and dotted curve; errors of the first
CHARTS: tuple[tuple[str, str, dict[str, str], str], ...] = (
    ("Loss", "metrics", {"loss": "loss"}, ""),
    *((f"Loss term {name}", "metrics", {term: name}, "") for term, name in TERMS.items()),
    (
        "k-NN on val, %",
        "reports",
        {"knn": "encoder", "knn_untrained": "before the first step", "knn_pixels": "raw pixels"},
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
    return np.array([np.nanmean(part) if not np.isnan(part).all() else np.nan for part in parts])


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
