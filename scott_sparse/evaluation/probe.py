"""Probes: what they have in common, and how one is run.

A probe is fitted on the `train` images for every setting of its sweep, the setting with the best top-1 on `val` is
chosen, and the result is that setting's score on `test`, computed once (see `scott_sparse.data.dataset` for the
protocols). A new probe is a class with `settings` and `logits`, a function that fits it, and a script of eval/.
"""

import hashlib
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from scott_sparse.data.cache import writable_cache
from scott_sparse.data.dataset import Data, Images, open_data, short_side_for
from scott_sparse.data.sources import printable
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.encoders import fingerprint
from scott_sparse.evaluation.features import FORMAT, Features, cached_features, extract
from scott_sparse.evaluation.labels import draw_labels
from scott_sparse.evaluation.metrics import Scores, check_finite, check_labels, score
from scott_sparse.evaluation.report import draw_confusion, print_scores
from scott_sparse.evaluation.subject import (
    EncoderUnderTest,
    LabelBudgetConfig,
    ProbeConfig,
    count_pretrained_test_images,
    open_encoder,
)
from scott_sparse.files import write_json
from scott_sparse.shapes import Float, Int, Tensor


@runtime_checkable
class Probe(Protocol):
    """A classifier of frozen features, fitted for each setting of a sweep."""

    @property
    def settings(self) -> Sequence[dict]: ...  # what distinguishes each, such as {"k": 20}

    def logits(self, features: Features, settings: Sequence[int]) -> Iterable[Float[Tensor, "m K"]]:
        """Scores of the K classes for m images, for each of some settings by index."""
        ...


@dataclass(frozen=True)
class LabelledData:
    """An encoder, and images with labels in the three roles on which it may be evaluated."""

    encoder: EncoderUnderTest
    data: Data
    test_images_pretrained_on: int | None
    """See `count_pretrained_test_images`."""
    classes: tuple[str, ...]
    train_labels: Int[Tensor, " n"]
    """With random crops of each image: in the order of their features."""
    val_labels: Int[Tensor, " m"]
    test_labels: Int[Tensor, " t"]


@dataclass(frozen=True)
class ProbeData(LabelledData):
    """And the features of the three roles."""

    train: Features
    val: Features
    test: Features


def open_labelled(config: ProbeConfig, encoder: EncoderUnderTest) -> LabelledData:
    """Open the images; of those of train as many as the label budget of `config` says, if it has one.

    Raises ValueError as `open_data`, `draw_labels` and `count_pretrained_test_images`, and for data that lack labels, a
    role or a class.
    """
    source = encoder.source(config.source)
    data = open_data(source, short_side=short_side_for(encoder.size))
    train, val, test = data.train, data.val, data.test
    if data.classes is None or train.labels is None:
        raise ValueError(f"--data {source.data} has no labels; a probe needs class folders (see README).")
    if val is None or test is None or val.labels is None or test.labels is None:
        role = "val" if val is None else "test"
        raise ValueError(f"--data {source.data} has too few labelled images to set some aside for {role}.")
    check_labels(train.labels, len(data.classes), "training labels")
    counts = torch.bincount(train.labels, minlength=len(data.classes)).tolist()
    missing = [str(name) for name, count in zip(data.classes, counts) if not count]
    if missing:
        names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"--data {source.data} has no training image of {len(missing)} classes ({names}); add some.")
    if isinstance(config, LabelBudgetConfig):
        train = train[draw_labels(train.labels, config.label_budget, data.classes, seed=config.label_seed)]
        data = replace(data, train=train)
    pretrained_on = count_pretrained_test_images(encoder, source, data)
    assert train.labels is not None and data.classes is not None
    return LabelledData(encoder, data, pretrained_on, data.classes, train.labels, val.labels, test.labels)


def load_probe_data(config: ProbeConfig, *, tokens: bool = False, copies: int = 0) -> ProbeData | None:
    """Extract the features of all roles, or read them from the cache; None on all but the main process.

    `copies`: random crops of each training image besides its centre crop; `tokens`: see `extract`. Process groups end
    here: what follows is the main process's work, however long it takes.

    Raises ValueError as `open_encoder` and `open_labelled`, for `copies` with several --crops, and for features that
    are not finite.
    """
    if copies and config.crops > 1:
        raise ValueError(f"--copies fits on single random crops, --crops {config.crops} on averages; give only one.")
    state = process_state()
    encoder, source = open_encoder(config), config.source
    labelled = open_labelled(config, encoder)
    data, (height, width) = labelled.data, encoder.size
    key = f"{FORMAT}-{fingerprint(encoder.model)}-{data.fingerprint}"

    def features_of(role: str, images: Images, copies: int = 0) -> Features | None:
        views = copies if config.crops == 1 else f"crops{config.crops}"
        name = f"{key}-{role}-{height}x{width}-{views}{'-tokens' * tokens}.safetensors"
        path = writable_cache(source.cache_dir) / "features" / name

        def make() -> Features | None:
            how = {"copies": copies, "workers": config.workers}
            return extract(encoder.model, images, size=encoder.size, crops=config.crops, tokens=tokens, **how)

        return cached_features(path, make)

    assert data.val is not None and data.test is not None
    used = hashlib.blake2b(data.train.rows.numpy().tobytes(), digest_size=4).hexdigest()  # the label budget may differ
    of_train = features_of(f"train-{used}", data.train, copies)
    of_val, of_test = features_of("val", data.val), features_of("test", data.test)
    state.wait_for_everyone()
    state.destroy_process_group()
    if of_train is None or of_val is None or of_test is None:  # not the main process
        return None
    for part in (of_train, of_val, of_test):
        check_finite(part.pooled)
    fields = {**vars(labelled), "train_labels": labelled.train_labels.repeat(1 + copies)}
    return ProbeData(**fields, train=of_train, val=of_val, test=of_test)


def run_probe(
    config: ProbeConfig, name: str, fit: Callable[..., Probe], *, tokens: bool = False, copies: int = 0
) -> None:
    """Fit a probe, choose its setting on val, score it on test, write and print the result.

    `fit(features, labels, classes=, device=)` is called with the training set.
    """
    started = time.perf_counter()
    data = load_probe_data(config, tokens=tokens, copies=copies)
    if data is None:
        return
    probe = fit(data.train, data.train_labels, classes=len(data.classes), device=process_state().device)
    choice, val, settings_tried = choose(probe, data.val, data.val_labels)
    (logits,) = probe.logits(data.test, [choice])
    result = {
        "choice": probe.settings[choice],
        "val": val.to_json(),
        "test": score(logits, data.test_labels).to_json(),
        "settings_tried": settings_tried,
    }
    print_scores(write_result(config, name, data, result, seconds=time.perf_counter() - started))


def choose(probe: Probe, features: Features, labels: Int[Tensor, " n"]) -> tuple[int, Scores, list[dict]]:
    """Index of the setting with the best top-1 (of equal ones the first), its scores, the top-1 of all settings."""
    every = range(len(probe.settings))
    scores = [score(logits, labels) for logits in probe.logits(features, every)]
    best = max(every, key=lambda i: scores[i].top1)
    return best, scores[best], [{**s, "top1": round(x.top1, 2)} for s, x in zip(probe.settings, scores)]


def write_result(config: ProbeConfig, name: str, data: LabelledData, result: dict, *, seconds: float) -> dict:
    """Write a result by `write_entry` and the confusion matrix as PNG beside it; returns the content of the JSON."""
    result = {**roles_of(data.data), "classes": list(data.classes), **result}
    found = data.test_images_pretrained_on
    entry, path = write_entry(config, name, data.encoder, data.data, result, pretrained_on=found, seconds=seconds)
    draw_confusion(path.with_suffix(".png"), result["test"]["confusion"], data.classes)
    print(printable(f"{path}, {path.with_suffix('.png').name}"))
    return entry


def roles_of(data: Data) -> dict:
    """How many images had which role, for a result."""
    assert data.val is not None and data.test is not None
    chosen_on_test = torch.equal(data.val.rows, data.test.rows)  # paper protocol without a published val
    images = {"train": len(data.train), "val": len(data.val), "test": len(data.test)}
    return {"chosen_on": "test" if chosen_on_test else "val", "images": images}


def write_entry(
    config: ProbeConfig,
    name: str,
    encoder: EncoderUnderTest,
    data: Data,
    result: dict,
    *,
    pretrained_on: int | None,
    seconds: float,
) -> tuple[dict, Path]:
    """Write RUN/eval/PROBE-DATA-HASH.json; returns its content and its path.

    Results of other images, sizes, weights or settings go to other files.
    """
    source, settings = config.source, config.own_settings
    assert source.data is not None
    words = (value if isinstance(value, str) else f"{key}{_short(value)}" for key, value in settings.items())
    name = "-".join([name, *words])
    result = {
        "probe": name,
        "subject": encoder.name,
        "run": encoder.run,
        "image_size": list(encoder.size),
        "weights_hash": fingerprint(encoder.model),
        "data": source.data,
        "data_fingerprint": data.fingerprint,
        "protocol": source.protocol,
        "pretraining": encoder.pretraining,
        "test_images_pretrained_on": pretrained_on,
        "test_images_also_in_training": data.test_duplicates,
        "settings": settings,
        **result,
        "seconds": round(seconds, 1),
        "commit": commit(),
        "versions": versions(),
        "command": " ".join(sys.argv),
    }
    distinguishing = ("weights_hash", "data_fingerprint", "protocol", "image_size", "settings")
    key = hashlib.blake2b(repr([result[field] for field in distinguishing]).encode(), digest_size=4).hexdigest()
    protocol = "paper" if source.protocol == "paper" else ""
    subject = encoder.name if encoder.name in ("pixels", "random", "start", "context") else ""
    path = encoder.out / f"{'-'.join(filter(None, (name, file_name(source.data), protocol, subject, key)))}.json"
    write_json(path, result)
    return result, path


def _short(value: object) -> str:
    """A setting as part of the name of a file and of a column."""
    if isinstance(value, tuple):
        return "_".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def file_name(data: str) -> str:
    """That of a data set, as it is part of the names of files."""
    folder = Path(data).expanduser()
    return re.sub(r"[^\w.-]+", "_", folder.resolve().name if folder.is_dir() else folder.name)[:40]


def versions() -> dict[str, str | None]:
    """That of this package is None in a checkout that is not installed."""
    try:
        own = version("scott-sparse")
    except PackageNotFoundError:
        own = None
    return {"python": platform.python_version(), "torch": torch.__version__, "scott-sparse": own}


def commit() -> str | None:
    """Git's name of the commit of this code; None outside a repository."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(describe, capture_output=True, text=True).stdout.strip() or None
    except FileNotFoundError:  # git is not installed
        return None
