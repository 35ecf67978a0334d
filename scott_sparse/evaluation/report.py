"""Tables and figures: of one probe, of all results of some runs, and of pretraining."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from scott_sparse.data.images import Images
from scott_sparse.data.sources import printable
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.knn import knn_accuracy
from scott_sparse.files import read_json
from scott_sparse.model.vit import Encoder
from scott_sparse.model.weights import TRAINED

WORST_CLASSES = 10  # that are listed
FIRST_COLUMNS = ("knn", "linear", "attentive", "finetune")
# Of these, those that are installed are tried in turn for each character of a class name. Matplotlib brings the first.
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Zen Hei", "Noto Sans Arabic"]
FONTS += ["Noto Sans Hebrew", "Noto Sans Devanagari", "Noto Sans Thai", "Noto Emoji", "Symbola", "Arial Unicode MS"]
FONTS += ["PingFang SC", "Hiragino Sans GB", "Microsoft YaHei", "Malgun Gothic", "Segoe UI Emoji"]
OURS = ("pixels", "random", "start", *TRAINED)  # encoders that belong to a run


def make_table(
    title: str, columns: Iterable[str], rows: Iterable[Sequence[str]], *, justify: Literal["left", "right"] = "right"
) -> Table:
    """A table for the terminal; its texts, such as names of classes, are shown as they are: brackets are no markup."""
    table = Table(title=_text(title))
    for column in columns:
        table.add_column(_text(column), justify=justify)
    for row in rows:
        table.add_row(*map(_text, row))
    return table


def _text(text: str) -> Text:
    return Text(printable(text))


def print_scores(result: dict) -> None:
    """Print the scores of a probe, as `write_result` returns them, and its recall by class."""
    settings = ", ".join(f"{key} {value}" for key, value in result["choice"].items())
    title = f"{result['probe']} on {result['subject']} features; {settings} chosen on {result['chosen_on']}"
    rows = []
    for role in ("val", "test"):
        scores = result[role]
        low, high = scores["top1_interval"]
        top5 = "-" if scores["top5"] is None else f"{scores['top5']:.1f}"
        rates = f"{scores['top1']:.1f}", f"{low:.1f} - {high:.1f}", top5, f"{scores['mean_per_class']:.1f}"
        rows.append([role, f"{scores['n']:,}", *rates])
    console = Console()
    console.print(make_table(title, ("", "images", "top-1", "95 % interval", "top-5", "mean per class"), rows))

    classes, test = result["classes"], result["test"]
    recalls = sorted((recall, label) for label, recall in enumerate(test["per_class"]) if recall is not None)
    rows = []
    for recall, label in recalls[:WORST_CLASSES]:
        predictions = list(test["confusion"][label])
        count, predictions[label] = sum(predictions), 0
        most = max(predictions)
        confused_with = f"{classes[predictions.index(most)]} ({most})" if most else "-"
        rows.append([str(classes[label]), str(count), f"{recall:.1f}", confused_with])
    title = "test, the classes of lowest recall" if len(recalls) > WORST_CLASSES else "test, by class"
    columns = ("class", "images", "recall, %", "most often predicted instead")
    console.print(make_table(title, columns, rows, justify="left"))


def draw_confusion(path: Path, confusion: list[list[int]], classes: Sequence[str]) -> None:
    """Write a confusion matrix as PNG; rows are labels, in per cent of their images."""
    counts = torch.tensor(confusion).float()
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(len(classes) * 0.22, 3.0), 14.0)
    figure = Figure(figsize=(side + 2.2, side + 1.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="magma", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="prediction", ylabel="label")
    if len(classes) <= 60:
        names = [printable(str(name)) for name in classes]
        names = [name if len(name) < 28 else f"{name[:27]}…" for name in names]
        fonts = [font for font in FONTS if font in get_font_names()]
        how: dict[str, Any] = {"fontsize": 7, "parse_math": False, "family": fonts}
        axes.set_xticks(range(len(classes)), names, rotation=90, **how)
        axes.set_yticks(range(len(classes)), names, **how)
    figure.colorbar(image, ax=axes, label="% of the label's images", shrink=0.8)
    with warnings.catch_warnings():  # a character that no font here has is drawn as a box
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from")
        warnings.filterwarnings("ignore", "Matplotlib currently does not support")  # joined letters, say of Arabic
        figure.savefig(path, dpi=110)


def collect_results(runs: Iterable[Path]) -> dict[str, dict[str, dict[str, str]]]:
    """{data set and protocol: {encoder: {probe: test top-1, or as named}}} of all results of some runs.

    Raises ValueError for a run without results.
    """
    results = []
    for run in runs:
        files = sorted((run / "eval").glob("*.json"))
        if not files:
            raise ValueError(f"{run}/eval holds no results; expected those of eval/knn.py and its neighbours.")
        results += [read_json(file) for file in files]
    tables: dict[str, dict[str, dict[str, str]]] = {}
    for result in results:
        height, width = result["image_size"]
        size = f"{height} px" if height == width else f"{height} x {width} px"
        encoder = f"{result['run']} {result['subject']}" if result["subject"] in OURS else result["run"]
        table = tables.setdefault(f"{Path(result['data'])}, {result['protocol']} protocol", {})
        cells = table.setdefault(f"{encoder}, {size}", {})
        if "cells" in result:  # which say themselves what they are
            values = result["cells"]
        elif result["probe"].startswith("fewshot"):
            settings = result["probe"].removeprefix("fewshot")
            shots = {f"{n} shot{'s' * (n != '1')}{settings}": row["top1"] for n, row in result["shots"].items()}
            values = {column: f"{top1['mean']:.1f} ± {top1['spread']:.1f}" for column, top1 in shots.items()}
        else:
            low, high = result["test"]["top1_interval"]
            values = {result["probe"]: f"{result['test']['top1']:.1f} ± {(high - low) / 2:.1f}"}
        for column, value in values.items():  # several in one cell: images or weights have changed in between
            cells[column] = f"{cells[column]}; {value}" if column in cells else value
    return tables


def columns_of(rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The probes of one table of `collect_results`, in the order in which they are shown."""
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    rank = {name: number for number, name in enumerate(FIRST_COLUMNS)}  # knn, knn-crops8, linear, ...
    return sorted(columns, key=lambda column: (rank.get(column.split("-")[0], len(rank)), len(column)))


def print_results(runs: Iterable[Path]) -> None:
    """Print `collect_results` as Markdown tables that are aligned for the terminal."""
    for title, rows in collect_results(runs).items():
        columns = columns_of(rows)
        lines = [["encoder", *columns]]
        lines += [[encoder, *(cells.get(column, "") for column in columns)] for encoder, cells in rows.items()]
        lines = [[printable(cell).replace("|", r"\|") for cell in line] for line in lines]
        widths = [max(map(cell_len, column)) for column in zip(*lines)]
        lines.insert(1, ["-" * width for width in widths])
        print(f"\n{printable(title)}: test top-1, % (± half of the 95 % interval; shots: deviation over draws)\n")
        for line in lines:
            print(f"| {' | '.join(cell + ' ' * (width - cell_len(cell)) for cell, width in zip(line, widths))} |")


def knn_report(
    train: Images, val: Images | None, initial: Encoder, pretrained: Encoder, *, size: tuple[int, int]
) -> dict[str, float | None]:
    """k-NN accuracy on `val` in per cent, of raw pixels and of both encoders; None without labelled val images.

    All processes take part; the numbers are the main process's, others get {}.
    """
    encoders = {
        "pixels": Pixels(initial.config.patch_size, initial.preprocess),
        "init": FrozenEncoder(initial),
        "pretrained": FrozenEncoder(pretrained),
    }
    if val is None or train.labels is None or val.labels is None:
        return dict.fromkeys(encoders)
    accuracies: dict[str, float | None] = {}
    for name, encoder in encoders.items():
        bank, queries = (extract(encoder, images, size=size) for images in (train, val))
        if bank is not None and queries is not None:
            accuracies[name] = round(knn_accuracy(bank.mean, train.labels, queries.mean, val.labels), 2)
    return accuracies


def knn_table(
    accuracies: dict[str, float | None], *, images: int, classes: int, terms: Sequence[str], init: str | None = None
) -> Table:
    """The numbers of `knn_report` for the terminal; `images` of `classes` classes are those of val.

    `init` names the weights that the run started from, if they were not new.
    """
    names = {
        "pixels": "raw pixels",
        "init": f"the start, {init}" if init else "encoder at initialisation",
        "pretrained": f"pretrained with {' + '.join(terms)}",
    }
    rows = [(names[name], "-" if accuracy is None else f"{accuracy:.1f} %") for name, accuracy in accuracies.items()]
    title = f"k-NN on {images:,} val images, {classes} classes (chance {100 / classes:.1f} %)"
    return make_table(title, ("features", "accuracy"), rows)
