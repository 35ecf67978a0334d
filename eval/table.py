"""All results of some runs in one table, for the eye and as Markdown.

python eval/table.py runs/demo runs/timm-resnet18
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scott_sparse.cli import exit_on_user_error

OURS = ("pixels", "random", "context", "pretrained")
COLUMNS = ("knn", "linear", "attentive")


def main(runs: list[str]) -> None:
    with exit_on_user_error():
        tables = collect(runs)
    for title, rows in tables.items():
        columns = list(dict.fromkeys([*COLUMNS, *(column for cells in rows.values() for column in cells)]))
        columns = [column for column in columns if any(column in cells for cells in rows.values())]
        table = Table(title=title)
        lines = [f"{title}", "", f"| features | {' | '.join(columns)} |", "|" + "---|" * (1 + len(columns))]
        for name in ("features", *columns):
            table.add_column(name)
        for name, cells in rows.items():
            row = [name, *(cells.get(column, "") for column in columns)]
            table.add_row(*row)
            lines.append(f"| {' | '.join(row)} |")
        Console().print(table)
        print("\n".join(["", *lines, ""]))


def collect(runs: list[str]) -> dict[str, dict[str, dict[str, str]]]:
    """{title: {features: {column: cell}}}. Raises ValueError for a run without results."""
    tables = {}
    for run in runs:
        files = sorted(Path(run, "eval").glob("*.json"))
        if not files:
            raise ValueError(f"{run}/eval holds no results; expected those of eval/knn.py and its neighbours.")
        for file in files:
            answer = json.loads(file.read_text())
            title = (
                f"{Path(answer['data']).name}, {answer['protocol']} protocol: test top-1, % "
                "(± half of the 95 % interval; shots: deviation over draws)"
            )
            name = f"{Path(answer['run']).name} {answer['subject']}" if answer["subject"] in OURS else answer["run"]
            cells = tables.setdefault(title, {}).setdefault(name, {})
            if answer["probe"] == "fewshot":
                for shots, row in answer["shots"].items():
                    mean, spread = row["top1"]["mean"], row["top1"]["spread"]
                    cells[f"{shots} shot{'s' * (shots != '1')}"] = f"{mean:.1f} ± {spread:.1f}"
            else:
                low, high = answer["test"]["top1_interval"]
                cells[answer["probe"]] = f"{answer['test']['top1']:.1f} ± {(high - low) / 2:.1f}"
    return tables


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("error: name at least one run folder (as in eval/table.py runs/demo).")
    main(sys.argv[1:])
