"""The batch of step s: which images, crops, colours and masks, as a pure function of (seed, step).

Drawn for the global batch, then sliced: one process or eight, with or without workers, train the same run, and a run
goes on at any step without having kept a generator.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from scott_sparse.data.dataset import Images
from scott_sparse.data.views import ViewConfig, Views, draw_views
from scott_sparse.distributed import cpu_count
from scott_sparse.model.masks import draw_visible
from scott_sparse.randomness import batch_indices, generator_at
from scott_sparse.shapes import Bool, Tensor, UInt8


@dataclass(frozen=True)
class Batch:
    """One process's share of a forward pass."""

    cuts: UInt8[Tensor, "B V H W 3"]
    """Crops as they are in the images, padded below and right."""
    views: Views
    visible: Bool[Tensor, "B V N"]

    def pin_memory(self) -> "Batch":
        """Called by DataLoader, so that copies to a GPU do not wait."""
        return replace(self, cuts=self.cuts.pin_memory(), visible=self.visible.pin_memory())


@dataclass(frozen=True)
class Batches(Dataset):
    """Item s: this process's parts of the global batch of step s, one per accumulation step."""

    images: Images
    views: ViewConfig
    grid: tuple[int, int]
    hide_ratio: float
    mask: str
    batch_size: int
    """Images of the global batch: over all processes and accumulation steps."""
    seed: int
    accumulate: int = 1
    process: int = 0
    processes: int = 1

    def __getitem__(self, step: int) -> list[Batch]:
        indices = batch_indices(step, images=len(self.images), batch=self.batch_size, seed=self.seed)
        views = draw_views(self.images.sizes[indices], self.views, generator=generator_at(self.seed, "views", step))
        visible = draw_visible(
            self.batch_size * self.views.crops,
            self.grid,
            hide_ratio=self.hide_ratio,
            shape=self.mask,
            generator=generator_at(self.seed, "masks", step),
        ).unflatten(0, (self.batch_size, self.views.crops))
        size = self.batch_size // (self.processes * self.accumulate)
        parts = []
        for part in range(self.accumulate):
            start = (part * self.processes + self.process) * size
            rows = slice(start, start + size)
            cuts = self.images.cut(indices[rows], views.boxes[rows])
            parts.append(Batch(cuts, views[rows], visible[rows]))
        return parts


def load(batches: Dataset, steps: range, *, workers: int, pin: bool) -> Iterator:
    """The items of some steps in order; `workers` processes prepare them ahead, 0 means this one does when asked."""
    generator = torch.Generator()  # torch seeds workers from one; ours need no seed, and the global one is not touched
    return iter(
        DataLoader(batches, batch_size=None, sampler=steps, num_workers=workers, pin_memory=pin, generator=generator)
    )


def default_workers(*, streamed: bool, on_gpu: bool) -> int:
    """This process's share of the cores where images are decoded every time, up to four where a GPU computes.

    Else none: on a CPU they would take the cores that compute.
    """
    share = max(cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return share if streamed else min(share, 4) if on_gpu else 0
