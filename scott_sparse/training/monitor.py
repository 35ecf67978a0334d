"""The online report: every few epochs, how the target encoder does on a fixed sample without test images.

On a set of a few thousand images the whole train split is the bank of k-NN and all of val are its queries; of larger
sets a sample is taken, which depends on the images alone. So the numbers can be compared within a run, between runs on
the same images and, where nothing is sampled, with the table at the end of the run.
"""

import dataclasses
import json
import math
import time
from typing import Any

import torch
from accelerate.utils import broadcast_object_list

from scott_sparse.data.images import Images
from scott_sparse.distributed import all_mean_with_grad
from scott_sparse.evaluation.encoders import FrozenEncoder, ImageEncoder, Pixels
from scott_sparse.evaluation.features import Features, extract
from scott_sparse.evaluation.knn import knn_accuracy
from scott_sparse.files import write_atomically
from scott_sparse.model.vit import Encoder
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Tensor
from scott_sparse.training.health import Health, ema_distance, feature_std, lidar, rankme, token_similarity
from scott_sparse.training.html_report import refresh_report
from scott_sparse.training.resume import REPORTS
from scott_sparse.training.run import Run, RunFailed
from scott_sparse.training.verdict import standard_error, verdict, what_to_try

MAX_BANK_IMAGES, MAX_QUERY_IMAGES = 4096, 1024
LIDAR_IMAGES, LIDAR_VIEWS = 128, 4
MIN_EPOCHS = 2  # between reports; on a small set a report costs up to 8 % of an epoch of six crops


class OnlineReport:
    """Call `after_step` after every optimizer step, and once before the first."""

    def __init__(self, run: Run, target: Encoder, encoder: Encoder):
        self.run, self.target, self.encoder = run, target, encoder
        epochs = run.recipe.report_every
        epochs = max(run.recipe.epochs / 10, MIN_EPOCHS) if epochs is None else epochs
        self.every_steps = max(round(epochs * run.steps_per_epoch), 1) if epochs else 0
        data, queries = run.data, run.val
        bank = data.pretrain if queries is None else data.train
        self.bank, self.viewed = sample(bank, MAX_BANK_IMAGES), sample(data.pretrain, LIDAR_IMAGES)
        self.queries = None if queries is None else sample(queries, MAX_QUERY_IMAGES)
        counts = {"bank": (len(self.bank), len(bank)), "queries": (len(self.queries or ()), len(queries or ()))}
        self.sampled = [f"{name}: {n:,} of {every:,} images" for name, (n, every) in counts.items() if n < every]
        self.path = run.out / REPORTS
        self.reports: list[Health] = []  # on the main process only
        self.is_first = True  # report, which is also that of raw pixels
        self.losses: list[Tensor] = []  # since the last report, on the device
        self.seconds, self.verdict = 0.0, ""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; all processes take part."""
        losses = all_mean_with_grad(torch.stack(self.losses)).tolist() if self.losses else []
        losses = [loss for loss in losses if math.isfinite(loss)]
        return {"reports": [dataclasses.asdict(report) for report in self.reports], "losses": losses}

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint; later reports, which were lost, are removed from the file."""
        try:
            self.reports = [Health(**report) for report in state["reports"]]
        except TypeError as error:
            raise ValueError(f"the checkpoint's reports are not those of a run: {error}") from None
        self.is_first = not self.reports
        self.losses = list(torch.tensor(state["losses"], device=self.run.accelerator.device))
        if self.reports and self.run.accelerator.is_main_process:
            self.write()

    def after_step(self, done: int, loss: Float[Tensor, ""] | None) -> None:
        """Report if it is time to. `done`: optimizer steps so far; a `loss` of nan is left out of the mean.

        Raises RunFailed if the features are collapsing and that is to end the run.
        """
        if not self.every_steps:
            return
        if loss is not None:
            self.losses.append(loss)
        if done % self.every_steps:
            return
        started, epoch = time.perf_counter(), done / self.run.steps_per_epoch
        health = self.examine(epoch)
        self.losses.clear()
        self.is_first = False
        if health is not None:
            self.reports.append(health)
            self.write()
            self.run.console.print(self.line(health), highlight=False)
        (self.verdict,) = broadcast_object_list([self.verdict])
        self.seconds += time.perf_counter() - started
        if self.run.recipe.stop_on_collapse and self.verdict.startswith("collapsing"):
            raise RunFailed(f"{self.verdict} at epoch {epoch:g}; stopped (--stop-on-collapse).")

    def write(self) -> None:
        """Find the verdict, write all reports and the page anew; if the disk is full, the next report tries again."""
        warmup = self.run.schedules.warmup_steps / self.run.steps_per_epoch
        remedy = what_to_try(self.run.recipe, len(self.run.data.pretrain))
        until = (self.reports[: i + 1] for i in range(len(self.reports)))
        start = self.run.recipe.start_name
        verdicts = [verdict(reports, warmup_epochs=warmup, remedy=remedy, start=start) for reports in until]
        self.verdict = verdicts[-1]
        rows = [{**dataclasses.asdict(report), "verdict": words} for report, words in zip(self.reports, verdicts)]
        try:
            write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in rows))
        except OSError as error:
            self.run.console.print(f"{self.path} cannot be written ({error.strerror})")
        refresh_report(self.run)

    def examine(self, epoch: float) -> Health | None:
        """All processes extract features; the main process gets the report."""
        model, size = FrozenEncoder(self.target), self.run.recipe.sides
        bank = extract(model, self.bank, size=size)
        knn, knn_pixels = self.knn(model, bank), None
        if self.is_first and self.queries is not None:
            pixels = Pixels(self.run.recipe.patch_size, self.target.preprocess)
            knn_pixels = self.knn(pixels, extract(pixels, self.bank, size=size))
        viewed = extract(model, self.viewed, size=size, copies=LIDAR_VIEWS - 1, tokens=True)
        loss = None
        if self.losses:
            loss = all_mean_with_grad(torch.stack(self.losses).nanmean()).item()
            loss = loss if math.isfinite(loss) else None
        distance = ema_distance(self.target, self.encoder)
        if bank is None or viewed is None or viewed.tokens is None:
            return None
        n = len(self.viewed)
        numbers = {
            "rankme": rankme(bank.mean),
            "lidar": lidar(viewed.mean.unflatten(0, (LIDAR_VIEWS, n)).transpose(0, 1)),
            "std": feature_std(bank.mean),
            "token_similarity": token_similarity(viewed.tokens[:n]),
            "ema_distance": distance,
        }
        numbers = {name: float(f"{number:.4g}") for name, number in numbers.items()}
        untrained = knn if epoch == 0 else None
        if self.reports:
            knn_pixels, untrained = self.reports[0].knn_pixels, self.reports[0].knn_untrained
        error = None if knn is None or self.queries is None else standard_error(knn, len(self.queries))
        return Health(
            round(epoch, 3), loss, **numbers, knn=knn, knn_error=error, knn_pixels=knn_pixels, knn_untrained=untrained
        )

    def knn(self, model: ImageEncoder, bank: Features | None) -> float | None:
        """k-NN accuracy on val by the features of the bank; None without labels, and on all but the main process."""
        if self.queries is None:
            return None
        queries = extract(model, self.queries, size=self.run.recipe.sides)
        if bank is None or queries is None:
            return None
        assert self.bank.labels is not None and self.queries.labels is not None
        return knn_accuracy(bank.mean, self.bank.labels, queries.mean, self.queries.labels)

    def line(self, health: Health) -> str:
        """A report as it is printed: k-NN beside its baselines, and where it looks at a sample of the images."""
        untrained = health.knn_untrained if health.epoch else None
        baselines = {"pixels": health.knn_pixels, self.run.recipe.start_name: untrained}
        notes = [f"{name} {accuracy:.1f}" for name, accuracy in baselines.items() if accuracy is not None]
        about = f" ({', '.join([*notes, *self.sampled])})" if notes or self.sampled else ""
        knn = f"k-NN on val {health.knn:.1f} ± {health.knn_error:.1f} %{about}, " if self.queries else ""
        return (
            f"epoch {health.epoch:g}: {knn}RankMe {health.rankme:.0f}, LiDAR {health.lidar:.0f}, std {health.std:.2f}, "
            f"token similarity {health.token_similarity:.2f}, EMA distance {health.ema_distance:.3f}: {self.verdict}"
        )


def sample(images: Images, count: int) -> Images:
    """At most `count` of the images, the same ones in every run."""
    order = torch.randperm(len(images), generator=generator_at("sample of the online report"))
    return images[order[:count]]
