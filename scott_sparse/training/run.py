"""A pretraining run: what is checked before it starts, its parts, its batches and its summary."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, is_tensorboard_available, set_seed
from filelock import FileLock
from rich.console import Console

from scott_sparse.data.batches import Batch, Batches, default_workers, load
from scott_sparse.data.colour import choose_colours
from scott_sparse.data.dataset import Data, open_data, short_side_for
from scott_sparse.data.images import Images, channel_statistics
from scott_sparse.distributed import full_state_dict, main_then_broadcast, on_all_processes, process_state
from scott_sparse.evaluation.finetune import Classifier
from scott_sparse.files import write_json
from scott_sparse.model.jepa import MIMJEPA, make_target
from scott_sparse.model.losses import draw_projections
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.model.pretrained import open_start
from scott_sparse.model.tokenizer import TOKENIZERS
from scott_sparse.model.vit import Encoder
from scott_sparse.model.weights import save_encoder, save_predictor
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Float, Tensor
from scott_sparse.training.optim import Schedules
from scott_sparse.training.recipe import Recipe
from scott_sparse.training.resume import SUMMARY, UNREADABLE, open_folder


class RunFailed(RuntimeError):
    """The run cannot go on; the message says why, and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the training loop needs."""

    name: str  # of the recipe
    recipe: Recipe
    out: Path  # run folder
    accelerator: Accelerator
    data: Data
    model: MIMJEPA | Classifier
    engine: str  # of the context encoder's tokenizer
    console: Console  # prints on the main process only
    checkpoint: Path | None  # from which the run resumes
    lock: FileLock  # of the run folder, held by the main process as long as this object lives
    started: float = dataclasses.field(default_factory=time.perf_counter)
    colours: str = ""  # why --colour auto became what it is

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; an epoch leaves out the images that do not fill a batch."""
        return len(self.data.pretrain) // self.recipe.batch_size

    @property
    def schedules(self) -> Schedules:
        return self.recipe.schedules(self.steps_per_epoch)

    @property
    def val(self) -> Images | None:
        """Val images, by which runs may be compared: None without labels, and where they are also test images.

        The paper protocol may have no val of its own. Whoever tunes by reports and table must not tune on test.
        """
        val, test = self.data.val, self.data.test
        is_test = val is not None and test is not None and torch.isin(val.rows, test.rows).any()
        return None if self.data.classes is None or is_test else val

    @property
    def encoder_parameters(self) -> int:
        return sum(p.numel() for p in self.model.encoder.parameters())

    @property
    def device_name(self) -> str:
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"

    @property
    def workers(self) -> int:
        """Processes that prepare batches for this one."""
        if self.recipe.workers is not None:
            return self.recipe.workers
        on_gpu = self.accelerator.device.type == "cuda"
        return default_workers(streamed=self.recipe.source.cache == "none", on_gpu=on_gpu)

    def describe(self) -> None:
        """Print what is trained, and on what."""
        recipe, data, accelerator = self.recipe, self.data, self.accelerator
        self.console.print(
            f"{self.name}: {len(data.pretrain):,} images ({recipe.source.protocol} protocol) at {recipe.sides[0]} x "
            f"{recipe.sides[1]} px, encoder {recipe.size} ({self.encoder_parameters / 1e6:.1f} M parameters), engine "
            f"{self.engine}, {accelerator.num_processes} x {accelerator.device.type}, precision "
            f"{accelerator.mixed_precision}; loss terms: {', '.join(recipe.objective.terms)}"
        )
        self.console.print(data.describe(), markup=False, highlight=False)
        if self.colours:
            self.console.print(self.colours, highlight=False)
        if data.unreadable:
            self.console.print(f"{len(data.unreadable):,} images cannot be read and are left out: see {UNREADABLE}")
        if data.test and data.test_duplicates:
            count = f"{data.test_duplicates:,} of the {len(data.test):,} test images"
            self.console.print(f"{count} are also in the training set, pixel for pixel")

    def batches(self, steps: range) -> Generator[list[Batch]]:
        """This process's share of the batches of some steps: for each step one micro-batch per accumulation step."""
        accelerator = self.accelerator
        share = {"process": accelerator.process_index, "processes": accelerator.num_processes}
        batches = batches_of(self.recipe, self.data.pretrain, accumulate=self.recipe.accumulate, **share)
        return load(batches, steps, workers=self.workers, pin=accelerator.device.type == "cuda")

    def save_weights(self, target: Encoder, trained: MIMJEPA) -> None:
        """Write the target and the context encoder and the predictor; all processes take part. Raises RunFailed."""
        recipe, context = self.recipe, make_target(target)
        context.load_state_dict(full_state_dict(trained.encoder))
        predictor = full_state_dict(trained.predictor) if trained.predictor is not None else None

        def save() -> None:
            save_encoder(target, self.out)
            save_encoder(context, self.out, weights="context")
            if predictor is not None:
                save_predictor(
                    predictor,
                    self.out,
                    objective=recipe.objective,
                    hide_ratio=recipe.hide_ratio,
                    mask_shape=recipe.mask_shape,
                )

        try:
            main_then_broadcast(save)
        except ValueError as error:
            remedy = "make room, and the same command writes them"
            raise RunFailed(f"the weights cannot be written ({error}); {remedy}.") from None

    def write_summary(self, training: dict[str, Any], knn: dict[str, float | None]) -> dict[str, Any]:
        """Write and return what the run was and gave; `training` is what the loop returned."""
        recipe, data, device = self.recipe, self.data, self.accelerator.device
        summary = {
            "recipe": self.name,
            "knn": knn,
            "seconds": round(time.perf_counter() - self.started, 1),
            **training,
            "cpu_seconds": round(time.process_time(), 1),  # of this process, since it was started
            "peak_memory_mib": peak_memory_mib(device),
            "engine": self.engine,
            "terms": recipe.objective.terms,
            "data": {
                "source": recipe.source.data,
                "protocol": recipe.source.protocol,
                "fingerprint": data.fingerprint,
                **data.about,
                "unreadable": len(data.unreadable),
                "test_images_also_in_training": data.test_duplicates,
            },
            "encoder_parameters": self.encoder_parameters,
            "processes": self.accelerator.num_processes,
            "device": self.device_name,
            "mixed_precision": self.accelerator.mixed_precision,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        write_json(self.out / SUMMARY, summary)
        return summary


def prepare_run(name: str, recipe: Recipe) -> Run:
    """A run with its settings and images checked; nothing is written but decoded images.

    Raises ValueError or OSError, on all processes, for mistakes.
    """
    started = time.perf_counter()
    out = recipe.out or Path("runs") / name
    accelerator = accelerator_of(recipe, out)
    console = Console(quiet=not accelerator.is_main_process, markup=False, emoji=False)  # names are printed as they are
    slices = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % slices:
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide into {accelerator.num_processes} processes x "
            f"{recipe.accumulate} accumulation steps; nearest: {max(round(recipe.batch_size / slices), 1) * slices}."
        )
    # Nodes have GPUs and disks of their own.
    engine = on_all_processes(lambda: _engine(recipe, accelerator.device))
    data = on_all_processes(lambda: open_data(recipe.source, short_side=short_side_for(recipe.sides)))
    # By all images, whatever share of them is taken, on one process: rounding may differ between nodes.
    views, why = main_then_broadcast(lambda: choose_colours(recipe.views, data.pretrain))
    recipe = dataclasses.replace(recipe, views=views)
    data = _share(recipe, data)
    if recipe.batch_size > len(data.pretrain):
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the data set ({len(data.pretrain)} images to train on); "
            f"use --batch-size {len(data.pretrain) // slices * slices or slices} or less."
        )
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True)
    start = on_all_processes(lambda: open_start(recipe.init) if recipe.init else None)
    set_seed(recipe.seed)
    model = recipe.model(start=start)
    model.encoder.preprocess = preprocess_of(recipe, data.pretrain)
    if start:
        console.print(start.load_into(model.encoder), highlight=False, soft_wrap=True)
    lock = FileLock(out / ".lock")
    return Run(name, recipe, out, accelerator, data, model, engine, console, None, lock, started, why)


def open_images(recipe: Recipe) -> Data:
    """The images of a recipe, of those to pretrain on the share that it takes. Raises ValueError as `open_data`."""
    return _share(recipe, open_data(recipe.source, short_side=short_side_for(recipe.sides)))


def _share(recipe: Recipe, data: Data) -> Data:
    if recipe.share == 1:
        return data
    order = torch.randperm(len(data.pretrain), generator=generator_at(recipe.seed, "share"))
    kept = order[: round(recipe.share * len(order))].sort().values
    return dataclasses.replace(data, pretrain=data.pretrain[kept])


def batches_of(recipe: Recipe, images: Images, **share: int) -> Batches:
    """The batches of a run on some images; `share`: `accumulate`, `process` and `processes` of `Batches`."""
    grid, hide_ratio, mask_shape = recipe.grid, recipe.hide_ratio, recipe.mask_shape
    return Batches(images, recipe.views, grid, hide_ratio, mask_shape, recipe.batch_size, recipe.seed, **share)


def preprocess_of(recipe: Recipe, images: Images) -> Preprocess:
    """Image size and normalisation: as the flags say, or ImageNet's for RGB, else that of the images."""
    if recipe.mean:
        return Preprocess(recipe.sides, recipe.mean, recipe.std)
    return Preprocess(recipe.sides, **({} if images.channels == 3 else channel_statistics(images)))


def open_run(run: Run) -> Run:
    """The run with its folder opened: locked, cleared of what is no longer true, a checkpoint to resume from found.

    Raises ValueError, on all processes, where `open_folder` does.
    """
    where = (run.name, run.recipe, run.out, run.data, run.accelerator.mixed_precision, run.console, run.lock)
    return dataclasses.replace(run, checkpoint=main_then_broadcast(lambda: open_folder(*where)))


def accelerator_of(recipe: Recipe, out: Path) -> Accelerator:
    """Accelerate, for the processes that were launched, in the launcher's precision or else that of the recipe."""
    if recipe.tracker and not is_tensorboard_available():  # which Accelerate would pass over
        raise ValueError("--tracker tensorboard needs the package tensorboard: pip install tensorboard.")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # "no" also where the launcher was not told any
    if precision == "no" and has_bf16(process_state().device):
        precision = recipe.precision
    AcceleratorState._reset_state()  # which another recipe in this process may have set to another precision
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several CPU processes would not find each other
        mixed_precision=precision,
        gradient_accumulation_steps=recipe.accumulate,
        log_with=recipe.tracker,
        project_dir=out if recipe.tracker else None,
    )
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("fp16 needs a GPU: on a CPU Accelerate would use fp32; pass --mixed_precision bf16 or no.")
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("parameters are sharded by FSDP2 only; use accelerate launch --use_fsdp --fsdp_version 2.")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Parameters stay fp32: autocast does the rest, as it does on one process.
        assert accelerator.state.fsdp_plugin is not None
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    return accelerator


def _engine(recipe: Recipe, device: torch.device) -> str:
    """What computes the context encoder's tokens. Raises ValueError if it cannot work on `device`."""
    tokenizer, share = TOKENIZERS[recipe.tokenizer], 1 - recipe.hide_ratio
    return tokenizer.engine_name(recipe.engine, device, visible_share=share, dim=recipe.encoder.dim)


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bf16 itself."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("amx_bf16", "avx512_bf16"))


def projections_at(recipe: Recipe, step: int, device: torch.device) -> Float[Tensor, "E M"] | None:
    """SIGReg's random projections of a step, the same for all processes and crops; None if SIGReg is off."""
    objective = recipe.objective
    if "sigreg" not in objective.weights:
        return None
    generator = generator_at(recipe.seed, "directions", step)
    return draw_projections(objective.projector[1], objective.sigreg_projections, generator=generator).to(device)


def peak_memory_mib(device: torch.device) -> int:
    """Peak allocated memory of a GPU, or peak resident memory of this process, in MiB; on Windows that of now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().rss // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


def tune_allocator() -> None:
    """Let glibc keep freed memory and torch use huge pages, in this process; to be called before the first tensor.

    A step on a CPU allocates hundreds of large buffers. By default glibc gives each back to the kernel, which clears it
    page by page before the next use.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
