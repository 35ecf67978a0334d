"""All results of some runs in one table, for the eye and as Markdown.

python eval/table.py runs/demo runs/timm-resnet18
"""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scott_sparse.command import plain_errors

COLUMNS = ("knn", "linear", "attentive", "1 shot", "5 shots", "10 shots")


def main(runs: list[str]) -> None:
    with plain_errors():
        rows = collect(runs)
    header = ["features", "data", "protocol", *COLUMNS]
    table = Table(title="test top-1, % (half of the 95 % interval; few-shot: deviation over draws)")
    for name in header:
        table.add_column(name)
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for key, cells in rows.items():
        row = [*key, *(cells.get(column, "") for column in COLUMNS)]
        table.add_row(*row)
        lines.append(f"| {' | '.join(row)} |")
    Console().print(table)
    print("\n".join(lines))


def collect(runs: list[str]) -> dict[tuple[str, str, str], dict[str, str]]:
    """(features, data, protocol): {column: cell}. Raises ValueError for a run without results."""
    rows = {}
    for run in runs:
        files = sorted(Path(run, "eval").glob("*.json"))
        if not files:
            raise ValueError(f"{run}/eval holds no results; expected those of eval/knn.py and its neighbours.")
        for file in files:
            answer = json.loads(file.read_text())
            name = f"{Path(answer['run']).name} {answer['subject']}" if ":" not in answer["run"] else answer["run"]
            cells = rows.setdefault((name, Path(answer["data"]).name, answer["protocol"]), {})
            if answer["probe"] == "fewshot":
                for shots, row in answer["shots"].items():
                    spread = row["top1"]
                    cells[f"{shots} shot{'s' * (shots != '1')}"] = f"{spread['mean']:.1f} ± {spread['spread']:.1f}"
            else:
                low, high = answer["test"]["top1_interval"]
                cells[answer["probe"]] = f"{answer['test']['top1']:.1f} ± {(high - low) / 2:.1f}"
    return rows


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("error: name at least one run folder (as in eval/table.py runs/demo).")
    main(sys.argv[1:])
