"""Pretrain an encoder with SCOTT and MIM-JEPA. Read from top to bottom.

    accelerate launch train/pretrain.py                                     # the demo
    accelerate launch train/pretrain.py --data PHOTOS --image-size 64       # your own folder
    accelerate launch train/pretrain.py flowers102 --batch-size 128         # the paper's recipe and data

A run that was killed goes on with the same command, to the same weights bit for bit (see saving.py).
The run folder (`--out`, default runs/RECIPE) ends with `encoder.safetensors` (the target), `context.safetensors`,
`encoder.json`, `metrics.jsonl` (one line per optimizer step), `recipe.json`, `tokens.png`, `summary.json` and, if
images were left out, `unreadable.txt`.
"""

import contextlib
import ctypes
import dataclasses
import os
import platform
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, set_seed
from filelock import FileLock
from rich.console import Console

from scott_sparse import MIMJEPA, save_encoder
from scott_sparse.cli import exit_on_user_error, exit_with_error
from scott_sparse.data.batches import Batch, Batches, default_workers, load
from scott_sparse.data.dataset import Data, open_data, short_side_for, unreadable_lines
from scott_sparse.data.views import make_views
from scott_sparse.distributed import full_state_dict, full_tensor, main_then_broadcast
from scott_sparse.evaluation.report import draw_tokens, knn_report, knn_table
from scott_sparse.files import write_json
from scott_sparse.model.jepa import make_target, target_features, update_target
from scott_sparse.model.losses import draw_projections
from scott_sparse.model.tokenizer import TOKENIZERS
from scott_sparse.model.vit import Encoder
from scott_sparse.model.weights import CONFIG, WEIGHTS
from scott_sparse.randomness import batch_indices, generator_at
from scott_sparse.shapes import Tensor
from scott_sparse.training.accumulation import cache_pooled, seed_dropout
from scott_sparse.training.log import METRICS, Log, NonFinite
from scott_sparse.training.monitor import Collapse, OnlineReport
from scott_sparse.training.optim import adamw, set_schedules
from scott_sparse.training.recipe import Recipe, as_json, parse
from scott_sparse.training.resume import (
    FOLDER,
    RESUME_ME,
    Interrupted,
    SaveFailed,
    Saver,
    belongs,
    find_checkpoint,
    goes_on,
    lock,
)

# A CPU's step allocates hundreds of large buffers. Huge pages for them (torch reads this later), and freed ones stay
# with the process: glibc would give each back to the kernel, which clears it page by page before the next use.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)

RESULTS = (*WEIGHTS.values(), CONFIG, "tokens.png", "summary.json")  # of a run that came to its end
RUN_FILES = ("recipe.json", METRICS, "reports.jsonl", "unreadable.txt", "nonfinite.txt", *RESULTS)


@dataclasses.dataclass(frozen=True)
class Run:
    """All that `train` needs; `lock` is held as long as this lives."""

    name: str
    recipe: Recipe
    out: Path
    accelerator: Accelerator
    data: Data
    model: MIMJEPA
    engine: str
    console: Console
    checkpoint: Path | None
    lock: FileLock | None


def main() -> None:
    started = time.perf_counter()
    with exit_on_user_error():
        run = prepare(sys.argv[1:])
    recipe, out, data, accelerator, console = run.recipe, run.out, run.data, run.accelerator, run.console
    target = make_target(run.model.encoder)
    initial = make_target(run.model.encoder)
    parameters = sum(p.numel() for p in run.model.encoder.parameters())
    console.print(
        f"{run.name}: {len(data.pretrain):,} images ({recipe.source.protocol} protocol) at {recipe.sides[0]} x "
        f"{recipe.sides[1]} px, encoder {recipe.size} "
        f"({parameters / 1e6:.1f} M parameters), engine {run.engine}, {accelerator.num_processes} x "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}; "
        f"loss terms: {', '.join(recipe.objective.terms)}"
    )
    console.print(data.describe(), markup=False, highlight=False)
    if data.unreadable:
        console.print(f"{len(data.unreadable):,} images cannot be read and are left out: see {out / 'unreadable.txt'}")
    if data.test_duplicates:
        console.print(
            f"{data.test_duplicates:,} of the {len(data.test):,} test images are also in the training set, pixel for pixel"
        )
    try:
        with exit_on_user_error(each_process=True):
            training = train(run, target)
    except Interrupted as end:
        console.print(str(end))
        sys.exit(RESUME_ME)
    except NonFinite as found:
        exit_with_error(describe_nonfinite(run, found))
    except (Collapse, SaveFailed) as end:
        exit_with_error(str(end))

    context = make_target(target)
    context.load_state_dict(full_state_dict(run.model.encoder))
    device = accelerator.device
    knn = knn_report(data, initial.to(device), target, size=recipe.sides)
    if accelerator.is_main_process:
        with exit_on_user_error():
            save_encoder(target, out)
            save_encoder(context, out, weights="context")
            draw_tokens(out / "tokens.png", data, initial, target, recipe=recipe, device=device)
        summary = {
            "recipe": run.name,
            "knn": knn,
            "seconds": round(time.perf_counter() - started, 1),
            **training,
            "cpu_seconds": round(time.process_time(), 1),  # of this process, since it was started
            "peak_memory_mib": peak_memory_mib(device),
            "engine": run.engine,
            "terms": recipe.objective.terms,
            "data": {
                "source": recipe.source.data,
                "protocol": recipe.source.protocol,
                "fingerprint": data.fingerprint,
                **data.about,
                "unreadable": len(data.unreadable),
                "test_images_also_in_training": data.test_duplicates,
            },
            "encoder_parameters": parameters,
            "processes": accelerator.num_processes,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
            "mixed_precision": accelerator.mixed_precision,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
        }
        with exit_on_user_error():
            write_json(out / "summary.json", summary)
        table = knn_table(data, knn, recipe.objective.terms)
        if table is not None:
            console.print(table)
        console.print(
            f"{summary['seconds']:.0f} s in all, {100 * summary['input_share']:.0f} % of training waited for input; "
            f"results in {out}: summary.json, tokens.png, encoder.safetensors"
        )
    accelerator.end_training()


def prepare(arguments: list[str]) -> Run:
    """Everything that can be wrong with what was asked for is found here; nothing is written before it is right."""
    name, recipe = parse(arguments)
    out = recipe.out or Path("runs") / name
    if (out / "summary.json").exists() and not recipe.overwrite and not goes_on(recipe, out):
        raise ValueError(
            f"{out} holds a finished run; choose another --out, pass --overwrite to replace it, or give more --epochs "
            "to go on."
        )
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several CPU processes would not find each other
        gradient_accumulation_steps=recipe.accumulate,
        log_with=recipe.tracker,
        project_dir=out if recipe.tracker else None,
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("parameters are sharded by FSDP2 only; use accelerate launch --use_fsdp --fsdp_version 2.")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        # Parameters stay fp32: autocast does the rest, as it does on one process.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    console = Console(quiet=not accelerator.is_main_process)
    slices = accelerator.num_processes * recipe.accumulate
    if recipe.batch_size % slices:
        raise ValueError(
            f"batch_size {recipe.batch_size} does not divide into {accelerator.num_processes} processes x "
            f"{recipe.accumulate} accumulation steps; nearest: {max(round(recipe.batch_size / slices), 1) * slices}."
        )
    engine = describe_engine(recipe, accelerator.device)
    data = open_data(recipe.source, short_side=short_side_for(recipe.sides))
    if recipe.batch_size > len(data.pretrain):
        raise ValueError(
            f"batch_size {recipe.batch_size} is larger than the data set ({len(data.pretrain)} images to train on); "
            f"use --batch-size {len(data.pretrain) // slices * slices or slices} or less."
        )
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix is multiplied
        torch.use_deterministic_algorithms(True)
    set_seed(recipe.seed)
    model = MIMJEPA(recipe.encoder, recipe.objective, engine=recipe.engine)
    precision = accelerator.mixed_precision
    checkpoint = main_then_broadcast(lambda: find_checkpoint(recipe, out, data.fingerprint, precision, console))
    held = None
    if accelerator.is_main_process:
        held = open_folder(name, recipe, out, data, checkpoint)
    accelerator.wait_for_everyone()
    return Run(name, recipe, out, accelerator, data, model, engine, console, checkpoint, held)


def open_folder(name: str, recipe: Recipe, out: Path, data: Data, checkpoint: Path | None) -> FileLock:
    """Take a run folder, and clear it of what the new run, or more of the old one, makes untrue."""
    out.mkdir(parents=True, exist_ok=True)
    held = lock(out)
    fresh = checkpoint is None or not belongs(checkpoint, out)
    for file in RUN_FILES if fresh else RESULTS:
        (out / file).unlink(missing_ok=True)
    if fresh:
        shutil.rmtree(out / FOLDER, ignore_errors=True)
        if checkpoint:  # of another run, whose first steps this one shares
            shutil.copy(checkpoint.parent.parent / METRICS, out / METRICS)
    shutil.rmtree(out / "eval", ignore_errors=True)  # says something of weights that are no more
    write_json(out / "recipe.json", {"recipe": name, **as_json(recipe)})
    if data.unreadable:
        (out / "unreadable.txt").write_text("\n".join([*unreadable_lines(data.unreadable), ""]))
    return held


def train(run: Run, target: Encoder) -> dict:
    """The loop. Returns what the summary says of it."""
    recipe, out, accelerator, data, model = run.recipe, run.out, run.accelerator, run.data, run.model
    steps_per_epoch = len(data.pretrain) // recipe.batch_size
    schedules = recipe.schedules(steps_per_epoch)
    total_steps = schedules.total_steps
    optimizer = adamw(model)
    target.to(accelerator.device)
    if recipe.compile:
        model.compile()
        target.compile()
    model, optimizer = accelerator.prepare(model, optimizer)
    trained = accelerator.unwrap_model(model, keep_torch_compile=False)
    log = Log(recipe, out, accelerator, run.console, total_steps, steps_per_epoch)
    report = OnlineReport(recipe, out, accelerator, data, target, trained.encoder, run.console)
    state = {"model": trained, "target": target, "optimizer": optimizer.optimizer}
    saver = Saver(recipe, out, accelerator, data.fingerprint, total_steps, run.console, **state)
    start = saver.resume(run.checkpoint, log, report) if run.checkpoint else 0
    if recipe.tracker:
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start}})

    def inputs(part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch on the device: context images, target images, and what is visible."""
        with log.input_time():
            cuts = part.crops.to(accelerator.device, non_blocking=True)
            context, target_images = make_views(cuts, part.views, size=recipe.sides)
            return context, target_images, part.visible.to(accelerator.device, non_blocking=True)

    model.train()
    batches = load_batches(recipe, accelerator, data, range(start, total_steps))
    wrong = torch.zeros((), device=accelerator.device)
    with log, saver.signals:
        if start == 0:
            report.after(0, None)
        for step in range(start, total_steps):
            with log.input_time():
                parts = next(batches)
            set_schedules(optimizer, schedules, step)
            projections = projections_at(recipe, step, accelerator.device)
            losses, cached = [], None
            if recipe.accumulate > 1 and recipe.objective.cross_crop_weight:
                seen = ((context, visible) for context, _, visible in map(inputs, parts))
                cached = cache_pooled(model, seen, accelerator, seed=recipe.seed, step=step)
            for number, part in enumerate(parts):
                context, target_images, visible = inputs(part)
                seed_dropout(recipe.seed, step, accelerator.process_index, number)
                # 1. The target encoder looks at the whole of each image's first crop.
                targets = None
                if recipe.objective.mim_weight:
                    with accelerator.autocast():
                        targets = target_features(target, target_images)
                # 2. The context encoder sees what is visible, the predictor answers for what is hidden.
                last = number == recipe.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with accelerator.autocast():  # Accelerate wraps the model in it, but not one that is sharded
                        terms = model(context, visible, targets, projections, cached=cached, number=number)
                    accelerator.backward(spoilt_if_nonfinite(terms["loss"]))
                losses.append({key: value.detach() for key, value in terms.items()})
            # 3. Update, and let the target follow.
            norm = full_tensor(accelerator.clip_grad_norm_(model.parameters(), recipe.clip or float("inf")))
            terms = {key: torch.stack([part[key] for part in losses]).mean() for key in losses[0]}
            found = nonfinite(accelerator, terms["loss"], norm)
            # Whoever wants to stop is told at the next line of the log; until then nothing more changes.
            wrong = torch.maximum(wrong, found) if recipe.on_nonfinite == "stop" else found
            if accelerator.scaler is None:  # else it leaves out what overflows by itself
                optimizer.optimizer.found_inf = wrong  # the fused kernel then changes nothing, and nobody waits for it
            optimizer.step()
            if not optimizer.step_was_skipped:
                update_target(target, trained.encoder, schedules.momentum_at(step))
            optimizer.zero_grad()
            rates = {"lr": schedules.lr_at(step), "weight_decay": schedules.weight_decay_at(step)}
            rates["momentum"] = schedules.momentum_at(step)
            log.add(step, {**terms, "gradient_norm": norm}, rates, nonfinite=wrong)
            report.after(step + 1, terms["loss"].where(wrong == 0, torch.nan))
            saver.after(step + 1, log, report)
    return {**log.summary(), "report_share": round(report.seconds / log.seconds, 4), "verdict": report.verdict}


def spoilt_if_nonfinite(loss: Tensor) -> Tensor:
    """The loss, with a gradient of nan where it is nan or inf, as it need not have: all processes learn of it with the
    gradient, without asking each other."""
    return loss * torch.where(loss.isfinite(), 1.0, torch.nan)


def nonfinite(accelerator: Accelerator, loss: Tensor, norm: Tensor) -> Tensor:
    """1.0 where the gradient, which is that of all processes, has a nan or inf, else 0.0; the device is not waited for.

    Under a scaler it may, and such steps are left out by itself: there the loss of this process is what counts.
    """
    return (~torch.isfinite(norm if accelerator.scaler is None else loss)).float()


def describe_nonfinite(run: Run, found: NonFinite) -> str:
    """What is known about a step that was not to be; the batch's images are listed in nonfinite.txt."""
    recipe, images = run.recipe, run.data.pretrain
    rows = batch_indices(found.step, images=len(images), batch=recipe.batch_size, seed=recipe.seed).tolist()
    if run.accelerator.is_main_process:
        (run.out / "nonfinite.txt").write_text("\n".join([*(images.names[i] for i in rows), ""]))
    return (
        f"loss is {found.loss}, gradient norm {found.norm} at step {found.step} (last finite loss {found.last_loss}); "
        f"nothing was updated since. The batch's images are in {run.out / 'nonfinite.txt'}; --on-nonfinite skip leaves "
        "such steps out."
    )


def projections_at(recipe: Recipe, step: int, device: torch.device) -> Tensor | None:
    """SIGReg's random projections of a step, the same for all processes and crops."""
    objective = recipe.objective
    if "sigreg" not in objective.weights:
        return None
    generator = generator_at(recipe.seed, "directions", step)
    return draw_projections(objective.projector[1], objective.sigreg_projections, generator=generator).to(device)


def load_batches(recipe: Recipe, accelerator: Accelerator, data: Data, steps: range):
    """This process's batches of some steps, prepared by as many workers as serve."""
    batches = Batches(
        data.pretrain,
        recipe.views,
        recipe.grid,
        recipe.hide_ratio,
        recipe.mask,
        recipe.batch_size,
        recipe.seed,
        accumulate=recipe.accumulate,
        process=accelerator.process_index,
        processes=accelerator.num_processes,
    )
    on_gpu = accelerator.device.type == "cuda"
    streamed = recipe.source.cache == "none"
    workers = default_workers(streamed=streamed, on_gpu=on_gpu) if recipe.workers is None else recipe.workers
    return load(batches, steps, workers=workers, pin=on_gpu)


def describe_engine(recipe: Recipe, device: torch.device) -> str:
    """What computes the context encoder's tokens. Raises ValueError where it cannot work."""
    tokenizer, share = TOKENIZERS[recipe.tokenizer], 1 - recipe.hide_ratio
    return tokenizer.engine_name(recipe.engine, device, visible_share=share, dim=recipe.encoder.dim)


def peak_memory_mib(device: torch.device) -> int:
    """Peak resident memory of this process, or peak allocated memory of its GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    main()
