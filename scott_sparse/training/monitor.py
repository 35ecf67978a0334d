"""The online report: every few epochs, how the target encoder does on images that are not test images.

It looks at a fixed sample, a tenth of the images that were trained on since the last report and at most 4,096,
forward only, so that it takes about 2 % of the time.
"""

import dataclasses
import json
import math
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from scott_sparse.data.dataset import Data, Images
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.knn import knn_accuracy
from scott_sparse.files import write_atomically
from scott_sparse.model.vit import Encoder
from scott_sparse.randomness import generator_at
from scott_sparse.training.health import Health, ema_distance, feature_std, lidar, rankme, token_similarity, verdict

SHARE, MOST, LEAST = 0.1, 4096, 64
VIEWS = 4  # of each image, for LiDAR


class OnlineReport:
    """Call `after(step, losses)` after every optimizer step."""

    def __init__(
        self, recipe, out: Path, accelerator: Accelerator, data: Data, target: Encoder, encoder: Encoder, console
    ):
        self.accelerator, self.target, self.encoder, self.console = accelerator, target, encoder, console
        self.size, self.stop_on_collapse = recipe.sides, recipe.stop_on_collapse
        self.steps_per_epoch = len(data.pretrain) // recipe.batch_size
        epochs = recipe.epochs / 10 if recipe.report_every is None else recipe.report_every
        self.every = max(round(epochs * self.steps_per_epoch), 1) if epochs else 0
        budget = min(max(int(SHARE * self.every * recipe.batch_size), LEAST), MOST)
        # Under the paper protocol choices may be made on test: this is not a choice, and stays away from it.
        labelled = data.classes is not None and data.val is not None
        self.labelled = labelled and not torch.isin(data.val.rows, data.test.rows).any()
        self.bank = sample(data.train if self.labelled else data.pretrain, budget // 2)
        self.queries = sample(data.val, budget // 4) if self.labelled else None
        self.viewed = sample(data.pretrain, max(budget // (4 * VIEWS), 8))
        self.path = out / "reports.jsonl"
        self.reports: list[Health] = []
        self.losses: list[torch.Tensor] = []
        self.seconds, self.verdict = 0.0, None

    def state(self) -> dict:
        """What a checkpoint keeps; all processes take part."""
        losses = self.accelerator.reduce(torch.stack(self.losses), "mean").tolist() if self.losses else []
        losses = [loss for loss in losses if math.isfinite(loss)]
        return {"reports": [dataclasses.asdict(report) for report in self.reports], "losses": losses}

    def resume(self, state: dict) -> None:
        """Go on from there: what a lost run reported later is taken out of the file."""
        try:
            self.reports = [Health(**report) for report in state["reports"]]
        except TypeError as error:
            raise ValueError(f"the checkpoint's reports are not ours: {error}") from None
        self.losses = list(torch.tensor(state["losses"], device=self.accelerator.device))
        if self.reports and self.accelerator.is_main_process:
            self.write()

    def after(self, step: int, loss: torch.Tensor | None) -> None:
        """`step` counts from 1; 0 is before the first; a loss of nan does not count.

        Raises Collapse where that is asked for.
        """
        if not self.every:
            return
        if loss is not None:
            self.losses.append(loss)
        if step % self.every:
            return
        started = time.perf_counter()
        health = self.examine(step / self.steps_per_epoch)
        self.losses.clear()
        if health is not None:
            self.reports.append(health)
            self.write()
            self.console.print(line(health, self.verdict), highlight=False)
        (said,) = broadcast_object_list([self.verdict])
        self.seconds += time.perf_counter() - started
        if self.stop_on_collapse and said.startswith("collapsing"):
            raise Collapse(f"{said} at epoch {step / self.steps_per_epoch:g}; stopped (--stop-on-collapse).")

    def write(self) -> None:
        """The verdict, and all reports anew; a full disk does not end the run, the next report tries again."""
        said = [verdict(self.reports[: i + 1]) for i in range(len(self.reports))]
        self.verdict = said[-1]
        lines = [
            json.dumps({**dataclasses.asdict(report), "verdict": word}) for report, word in zip(self.reports, said)
        ]
        try:
            write_atomically(self.path, "\n".join([*lines, ""]))
        except OSError as error:
            self.console.print(f"{self.path} cannot be written ({error.strerror})")

    def examine(self, epoch: float) -> Health | None:
        """All processes extract features; the main process has the report."""
        model = FrozenEncoder(self.target)
        bank = extract(model, self.bank, size=self.size, tokens=True)
        queries = extract(model, self.queries, size=self.size) if self.labelled else None
        viewed = extract(model, self.viewed, size=self.size, copies=VIEWS - 1)
        loss = None
        if self.losses:
            loss = self.accelerator.reduce(torch.stack(self.losses).nanmean(), "mean").item()
            loss = loss if math.isfinite(loss) else None
        distance = ema_distance(self.target, self.encoder)
        if bank is None:
            return None
        knn = error = None
        if self.labelled:
            knn = knn_accuracy(bank.mean, self.bank.labels, queries.mean, self.queries.labels)
            share = (knn / 100 * len(self.queries) + 1) / (len(self.queries) + 2)  # never 0 or 1
            error = 100 * (share * (1 - share) / len(self.queries)) ** 0.5
        views = viewed.mean.unflatten(0, (VIEWS, len(self.viewed))).transpose(0, 1)
        numbers = {
            "rankme": rankme(bank.mean),
            "lidar": lidar(views),
            "std": feature_std(bank.mean),
            "token_similarity": token_similarity(bank.tokens),
            "ema_distance": distance,
        }
        numbers = {name: float(f"{number:.4g}") for name, number in numbers.items()}
        return Health(round(epoch, 3), loss, **numbers, knn=knn, knn_error=error)


class Collapse(RuntimeError):
    """Training was stopped as the features collapsed."""


def sample(images: Images, count: int) -> Images:
    """The same ones in every run."""
    order = torch.randperm(len(images), generator=generator_at("sample of the online report"))
    return images[order[:count]]


def line(health: Health, said: str) -> str:
    knn = "" if health.knn is None else f"k-NN on val {health.knn:.1f} ± {health.knn_error:.1f} %, "
    return (
        f"epoch {health.epoch:g}: {knn}RankMe {health.rankme:.0f}, LiDAR {health.lidar:.0f}, std {health.std:.2f}, "
        f"token similarity {health.token_similarity:.2f}, EMA distance {health.ema_distance:.3f}: {said}"
    )
