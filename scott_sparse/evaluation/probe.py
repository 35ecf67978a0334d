"""What all probes have in common: what is asked, of which features, which setting is chosen, and what is written down.

A probe is fitted on the `train` images for every setting, the setting is chosen on `val`, and `test` is answered
once, with that setting alone (see `scott_sparse.data.dataset` for the two protocols).
"""

import dataclasses
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn

from scott_sparse import Encoder, load_encoder
from scott_sparse.cli import exit_on_user_error, parse_flags
from scott_sparse.data.batches import default_workers
from scott_sparse.data.dataset import Data, DataConfig, Images, open_data, short_side_for
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.encoders import FrozenEncoder, Pixels, TimmModel, fingerprint
from scott_sparse.evaluation.features import FORM, Features, extract, kept
from scott_sparse.evaluation.metrics import Scores, score
from scott_sparse.files import read_json, write_json
from scott_sparse.model.weights import CONFIG, read_config
from scott_sparse.shapes import Int, Tensor

WORST = 10


@dataclasses.dataclass(frozen=True)
class Question:
    """Flags of every script in eval/."""

    run: tyro.conf.Positional[str | None] = None
    """Run folder, or a Hub repository owner/name; not needed with --timm."""
    init: Literal["pixels", "random"] | None = None
    """Baselines: raw pixels, or the run's encoder before training."""
    timm: str | None = None
    """A model of timm by name, in place of a run."""
    weights: Literal["target", "context"] = "target"
    """Which of the run's two encoders."""
    image_size: int | tuple[int, int] | None = None
    """Side, or height and width, in pixels. Default: what the run was trained with, or what timm says."""
    source: DataConfig = DataConfig()
    out: Path | None = None
    """Folder of the results. Default: RUN/eval."""


class Subject(NamedTuple):
    """What is asked about."""

    name: str
    model: nn.Module
    size: tuple[int, int]
    out: Path
    pretraining: dict | None
    """The `data` of the run's summary, if there is one."""


class Frozen(NamedTuple):
    """Features of the three roles on the main process, None on the others."""

    subject: Subject
    data: Data
    train: Features | None
    val: Features | None
    test: Features | None
    train_labels: Int[Tensor, " n"]
    weights: str
    """A hash of them."""


def ask(question_type: type, about: Callable):
    """Read the flags, and let `about(question)` answer; mistakes end in one line."""
    with exit_on_user_error():
        question = parse_flags(question_type)
        about(question)


def open_subject(question: Question) -> Subject:
    """Raises ValueError for a run without weights, and where it cannot be told what is meant."""
    size = None if question.image_size is None else _sides(question.image_size)
    if question.timm:
        if question.run or question.init:
            raise ValueError("--timm stands in place of a run and of --init; ask about one at a time.")
        model = TimmModel(question.timm)
        out = question.out or Path("runs", f"timm-{question.timm.replace('/', '-')}", "eval")
        return Subject(question.timm, model, size or model.size, out, None)
    if question.run is None:
        raise ValueError("nothing to evaluate: name a run folder (as in eval/knn.py runs/demo), or --timm MODEL.")
    encoder = load_encoder(question.run, weights=question.weights)  # even for a baseline: a run without one is no run
    folder = Path(question.run)
    recipe, summary = (_json(folder / name) for name in ("recipe.json", "summary.json"))
    if size is None and recipe is None:
        raise ValueError(f"{question.run} does not say at which size it was trained; give --image-size.")
    size = size or _sides(recipe["image_size"])
    name = question.init or {"target": "pretrained", "context": "context"}[question.weights]
    if question.init == "random":
        if recipe is None:
            raise ValueError(f"{question.run} has no recipe.json, which says the seed of its first weights.")
        torch.manual_seed(recipe["seed"])  # as in train/pretrain.py, where the encoder is made first
        encoder = Encoder(read_config(folder / CONFIG))
    model = Pixels(encoder.config.patch_size) if question.init == "pixels" else FrozenEncoder(encoder)
    pretraining = None if question.init else (summary or {}).get("data")
    out = question.out or (folder / "eval" if folder.is_dir() else Path("runs", folder.name, "eval"))
    return Subject(name, model, size, out, pretraining)


def frozen_features(question: Question, *, tokens: bool = False, copies: int = 0) -> Frozen:
    """Features of all roles, extracted by all processes or found in the cache."""
    state = process_state()
    subject = open_subject(question)
    source = question.source
    seen = subject.pretraining or {}
    if source.protocol == "clean" and seen.get("protocol") == "paper" and _same(seen["source"], source.data):
        raise ValueError("this run was pretrained under the paper protocol, on the test images too: --protocol paper.")
    data = open_data(source, short_side=short_side_for(subject.size))
    if data.classes is None:
        raise ValueError(f"--data {source.data} has no labels; a probe needs class folders (see README).")
    for role in ("val", "test"):
        if getattr(data, role) is None:
            raise ValueError(f"--data {source.data} has too few labelled images to set some aside for {role}.")
    known = set(data.train.labels.tolist())
    missing = [str(name) for label, name in enumerate(data.classes) if label not in known]
    if missing:
        some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"--data {source.data} has no training image of {len(missing)} classes ({some}); add some.")
    model = subject.model.to(state.device).eval().requires_grad_(False)
    weights = fingerprint(model)
    workers = default_workers(streamed=source.cache == "none", on_gpu=state.device.type == "cuda")

    def of(role: str, images: Images, copies: int = 0) -> Features | None:
        height, width = subject.size
        name = f"{FORM}-{weights}-{data.fingerprint}-{role}-{height}x{width}-{copies}{'-tokens' * tokens}.safetensors"

        def make() -> Features | None:
            return extract(model, images, size=subject.size, copies=copies, tokens=tokens, workers=workers)

        return kept(source.cache_dir / "features" / name, make)

    train, val = of("train", data.train, copies), of("val", data.val)
    test = of("test", data.test)
    state.wait_for_everyone()
    state.destroy_process_group()  # what follows is the main process's, however long it takes
    return Frozen(subject, data, train, val, test, data.train.labels.repeat(1 + copies), weights)


def answer(question: Question, probe_name: str, fit: Callable, *, tokens: bool = False, copies: int = 0) -> None:
    """Fit, choose, report, write; `fit(features, labels, classes=, device=)` makes the probe: settings and answers."""
    started = time.perf_counter()
    frozen = frozen_features(question, tokens=tokens, copies=copies)
    state = process_state()
    if not state.is_main_process:
        return
    data, classes = frozen.data, len(frozen.data.classes)
    probe = fit(frozen.train, frozen.train_labels, classes=classes, device=state.device)
    choice, val, tried = choose(probe, frozen.val, data.val.labels)
    (logits,) = probe.answers(frozen.test, [choice])
    test = score(logits, data.test.labels)
    probe_name += f"-copies{copies}" * bool(copies)
    result = {
        "choice": probe.settings[choice],
        "val": val.to_json(),
        "test": test.to_json(),
        "settings_tried": tried,
    }
    write(question, probe_name, frozen, result, seconds=time.perf_counter() - started)
    show(probe_name, frozen, probe.settings[choice], {"val": val, "test": test})


def choose(probe, features: Features, labels: Int[Tensor, " n"]) -> tuple[int, Scores, list[dict]]:
    """The setting with the best top-1 (of equal ones the first), its scores, and the top-1 of all."""
    every = range(len(probe.settings))
    scores = [score(logits, labels) for logits in probe.answers(features, every)]
    best = max(every, key=lambda i: scores[i].top1)
    return best, scores[best], [{**s, "top1": round(x.top1, 2)} for s, x in zip(probe.settings, scores)]


def chosen_on(data: Data) -> str:
    """Under the paper protocol choices are made on test where no val was published."""
    return "test" if torch.equal(data.val.rows, data.test.rows) else "val"


def write(question: Question, probe_name: str, frozen: Frozen, result: dict, *, seconds: float) -> None:
    """Write the JSON of an answer, and beside it the picture of its confusions."""
    data, source = frozen.data, question.source
    pretraining = frozen.subject.pretraining or {}
    answer = {
        "probe": probe_name,
        "subject": frozen.subject.name,
        "run": question.run or f"timm:{question.timm}",
        "image_size": list(frozen.subject.size),
        "weights_hash": frozen.weights,
        "data": source.data,
        "data_fingerprint": data.fingerprint,
        "protocol": source.protocol,
        "chosen_on": chosen_on(data),
        "pretraining": frozen.subject.pretraining,
        "pretrained_on_this_data": _same(pretraining.get("source"), source.data),
        "images": {"train": len(data.train), "val": len(data.val), "test": len(data.test)},
        "test_images_also_in_training": data.test_duplicates,
        "classes": list(data.classes),
        **result,
        "seconds": round(seconds, 1),
        "commit": commit(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "scott-sparse")}},
        "command": " ".join(sys.argv),
    }
    out = frozen.subject.out
    parts = [probe_name, re.sub(r"[^\w.-]+", "_", source.data.rstrip("/").rsplit("/", 1)[-1])]
    parts += [] if source.protocol == "clean" else [source.protocol]
    parts += [] if frozen.subject.name == "pretrained" or question.timm else [frozen.subject.name]
    path = out / f"{'-'.join(parts)}.json"
    write_json(path, answer)
    draw_confusion(path.with_suffix(".png"), result["test"]["confusion"], data.classes)
    print(f"{path}, {path.with_suffix('.png').name}")


def show(probe_name: str, frozen: Frozen, choice: dict, scores: dict[str, Scores]) -> None:
    """Print the scores, and how well each class is told."""
    chosen = ", ".join(f"{key} {value}" for key, value in choice.items())
    title = f"{probe_name} on {frozen.subject.name} features; {chosen} chosen on {chosen_on(frozen.data)}"
    table = Table(title=title)
    for column in ("", "images", "top-1", "95 % interval", "top-5", "mean per class"):
        table.add_column(column, justify="right")
    for name, s in scores.items():
        low, high = s.top1_interval
        top5 = "-" if s.top5 is None else f"{s.top5:.1f}"
        row = (name, f"{s.n:,}", f"{s.top1:.1f}", f"{low:.1f} - {high:.1f}", top5, f"{s.mean_per_class:.1f}")
        table.add_row(*row)
    console = Console()
    console.print(table)
    test = scores["test"]
    rates = [(rate, label) for label, rate in enumerate(test.per_class) if rate is not None]
    by_class = Table(title="test, the classes told worst" if len(rates) > WORST else "test, by class")
    for column in ("class", "images", "right, %", "most often taken for"):
        by_class.add_column(column)
    for rate, label in sorted(rates)[:WORST]:
        row = list(test.confusion[label])
        count, row[label] = sum(row), 0
        other = max(range(len(row)), key=row.__getitem__)
        taken = f"{frozen.data.classes[other]} ({row[other]})" if row[other] else "-"
        by_class.add_row(str(frozen.data.classes[label]), str(count), f"{rate:.1f}", taken)
    console.print(by_class)


def draw_confusion(path: Path, confusion: list[list[int]], classes: tuple[str, ...]) -> None:
    """Rows are labels, in per cent of their images."""
    counts = torch.tensor(confusion).float()
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(max(len(classes) * 0.22, 3.0), 14.0)
    figure = Figure(figsize=(side + 2.2, side + 1.4), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares.numpy(), cmap="magma", vmin=0, vmax=100, interpolation="nearest")
    axes.set(xlabel="answer", ylabel="label")
    if len(classes) <= 60:
        names = [str(name) if len(str(name)) < 28 else f"{str(name)[:27]}…" for name in classes]
        axes.set_xticks(range(len(classes)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(classes)), names, fontsize=7)
    figure.colorbar(picture, ax=axes, label="% of the label's images", shrink=0.8)
    figure.savefig(path, dpi=110)


def _json(path: Path) -> dict | None:
    return read_json(path) if path.is_file() else None


def _sides(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _same(a: str | None, b: str | None) -> bool:
    """Whether two words for --data mean the same images, so far as can be told."""
    return a == b or (a is not None and b is not None and Path(a).resolve() == Path(b).resolve())


def commit() -> str | None:
    """Of the code, where it lies in a repository."""
    told = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    return told.stdout.strip() or None
