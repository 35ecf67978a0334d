"""What a run folder says of its run, at this moment: settings, curves, verdict, results, and what to do with it."""

import dataclasses
import json
import shlex
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from scott_sparse.data.splits import load_digests
from scott_sparse.evaluation.report import collect_results, columns_of
from scott_sparse.files import read_json
from scott_sparse.training.recipe import RECIPES, Recipe
from scott_sparse.training.resume import METRICS, PICTURES, RECIPE, REPORTS, SUMMARY, flatten
from scott_sparse.training.verdict import advice

ABOUT = "about"  # how the run was started, a file among those of the pictures


@dataclasses.dataclass(frozen=True)
class Record:
    """A run folder, read."""

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
        """Raises ValueError for a folder that is none of a run of train/pretrain.py."""
        if not (folder / RECIPE).is_file():
            raise ValueError(f"{folder} is not a run: expected a folder of train/pretrain.py, with {RECIPE} in it.")
        recipe = read_json(folder / RECIPE)
        if recipe.get("recipe") == "finetune":
            raise ValueError(
                f"{folder} is of eval/finetune.py, whose results are on the page of the run it started from."
            )
        files = {path.stem: read_json(path) for path in (folder / PICTURES).glob("*.json")}
        digests = load_digests(folder)
        return cls(
            str(folder),
            folder,
            recipe=recipe,
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
    def advice(self) -> str:
        return advice(self.verdict)

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
            baselines = {"before the first step": now.get("knn_untrained"), "pixels": now.get("knn_pixels")}
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
    def data_flags(self) -> str:
        """As of a command line: --data, and what else of the images is not as by default."""
        words, defaults = [], Recipe().to_json()["source"]
        for name, value in self.recipe["source"].items():
            if value not in (None, False, defaults.get(name)):
                values = [] if value is True else value if isinstance(value, list) else [value]
                words += [f"--{name.replace('_', '-')}", *map(str, values)]
        return shlex.join(words)

    @property
    def commands(self) -> dict[str, str]:
        """What to do with the run, and the command that does it."""
        run, data = shlex.quote(str(self.folder)), self.data_flags
        resume: dict[str, str] = {}
        if command := self.about.get("command"):
            if self.summary:
                resume = {f"Train longer than {self.recipe['epochs']:g} epochs": f"{command} --epochs MORE"}
            else:
                resume = {"Resume, if it was stopped": command}
        load = f"from scott_sparse import load_encoder\n\nencoder = load_encoder({str(self.folder)!r})\n"
        return {
            **resume,
            "Evaluate": f"accelerate launch eval/knn.py {run} {data}\naccelerate launch eval/linear.py {run} "
            f"{data} --crops 8\npython eval/table.py {run}",
            "Look closer": f"python eval/visualize.py {run} {data}",
            "Make this page again": f"python eval/report.py {run}",
            "Load in Python": f"{load}features = encoder(encoder.preprocess(image)[None])  # (1, N, D)",
        }

    @property
    def tables(self) -> list[dict[str, Any]]:
        return tables_of([self.folder])


def tables_of(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """Test results of probes in some run folders, a table for each data set."""
    evaluated = [folder for folder in folders if any((folder / "eval").glob("*.json"))]
    tables = collect_results(evaluated) if evaluated else {}
    return [{"title": title, "columns": columns_of(rows), "rows": rows} for title, rows in tables.items()]


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
