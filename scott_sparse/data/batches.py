"""The batch of optimizer step s (images, crops, colours and masks), as a pure function of (seed, s).

Batches are drawn for all processes and then sliced: the number of processes, of accumulation steps and of workers does
not change a run, and a run resumes at any step without the state of a generator.
"""

import os
import pickle
import shutil
import signal
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace

import torch
from torch.utils.data import DataLoader, Dataset

from scott_sparse.data.images import Images
from scott_sparse.data.views import ViewConfig, Views, draw_views
from scott_sparse.distributed import cpu_count, rank
from scott_sparse.model.masks import draw_visible
from scott_sparse.randomness import batch_indices, generator_at
from scott_sparse.shapes import Bool, Tensor, UInt8

SHARED_MEMORY = "/dev/shm"  # through which workers hand over tensors, on Linux
PREFETCH = 2  # items that each worker prepares ahead, and PyTorch's default
MARGIN = 1.5  # items differ in size, as crops do
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


@dataclass(frozen=True)
class Batch:
    """One process's images of one forward pass."""

    crops: UInt8[Tensor, "B V H W C"]
    """Crops as they are in the images, padded below and right."""
    views: Views
    visible: Bool[Tensor, "B V N"]
    """The mask of each crop."""

    def pin_memory(self) -> "Batch":
        """For DataLoader, so that copies to a GPU do not block."""
        return replace(self, crops=self.crops.pin_memory(), visible=self.visible.pin_memory())


@dataclass(frozen=True)
class Batches(Dataset):
    """Item s: this process's parts of the batch of step s, one for each accumulation step."""

    images: Images
    views: ViewConfig
    grid: tuple[int, int]
    """Height and width in patches."""
    hide_ratio: float
    mask_shape: str
    batch_size: int
    """Images of a step, over all processes and accumulation steps."""
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
            shape=self.mask_shape,
            generator=generator_at(self.seed, "masks", step),
        ).unflatten(0, (self.batch_size, self.views.crops))
        size = self.batch_size // (self.processes * self.accumulate)
        parts = []
        for part in range(self.accumulate):
            start = (part * self.processes + self.process) * size
            rows = slice(start, start + size)
            parts.append(Batch(self.images.crop(indices[rows], views.boxes[rows]), views[rows], visible[rows]))
        return parts


def load(batches: Dataset, steps: range, *, workers: int, pin: bool) -> Generator:
    """The items of some steps in order, prepared ahead by `workers` processes, or on demand by this one if 0.

    Fewer workers where shared memory is short. To be closed: workers end when the iterator does, not on a signal.
    """
    workers = workers_that_fit(batches, steps, workers)
    yield from DataLoader(
        batches,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        pin_memory=pin,
        worker_init_fn=_ignore_stop_signals,
        generator=torch.Generator(),  # else the workers' seed, unused here, is drawn from the global generator
    )


def workers_that_fit(batches: Dataset, steps: range, workers: int) -> int:
    """As many of the workers as have shared memory for the items that they prepare ahead; a line says if not all do.

    Without it they would wait for ever, or die of SIGBUS: a container's default is 64 MiB.
    """
    free = free_shared_bytes()
    if not workers or not steps or free is None:
        return workers
    need = MARGIN * PREFETCH * len(pickle.dumps(batches[steps[0]]))
    fitting = min(workers, int(free / int(os.environ.get("LOCAL_WORLD_SIZE", 1)) / need))
    if fitting < workers and rank() == 0:
        print(
            f"note: {fitting} instead of {workers} workers prepare batches: each needs {need / 2**20:.0f} MiB of "
            f"{SHARED_MEMORY}, which has {free / 2**20:.0f} MiB free; docker run --shm-size 8g gives more.",
            file=sys.stderr,
        )
    return fitting


def free_shared_bytes() -> int | None:
    """Free shared memory of this machine; None where it has no limit of its own."""
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None


def _ignore_stop_signals(_: int) -> None:
    """Schedulers signal the whole process group; a run needs its workers for the step after which it saves and ends."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def default_workers(*, streamed: bool, on_gpu: bool) -> int:
    """Workers of this process: its share of the cores if images are decoded in every epoch, up to four if a GPU trains.

    Otherwise none: on a CPU, workers would take the cores that train.
    """
    share = max(cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 1)
    return share if streamed else min(share, 4) if on_gpu else 0
