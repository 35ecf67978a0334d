"""Pretrain an encoder with SCOTT and MIM-JEPA (arXiv 2502.18056). Read from top to bottom.

    accelerate launch train/pretrain.py                                     # the recipe demo, on drawn flowers
    accelerate launch train/pretrain.py --data PHOTOS                       # your own folder, the recipe by the device
    accelerate launch train/pretrain.py --data PHOTOS --plan                # what that will cost; trains nothing
    accelerate launch train/pretrain.py flowers102 --batch-size 128         # the paper's recipe and data set
    accelerate launch train/pretrain.py --data PHOTOS --init runs/general   # from weights that exist

The same command resumes a run that was interrupted, to the same weights bit for bit (scott_sparse/training/saver.py).

The run folder (--out, default runs/RECIPE) holds in the end: `encoder.safetensors` (the target encoder, to be used),
`context.safetensors`, `encoder.json`, with MIM-JEPA `predictor.safetensors` and `predictor.json`, `metrics.jsonl` (one
line per optimizer step), `reports.jsonl`, `recipe.json`, `pretrain_images.safetensors` (hashes of the images),
`tokens.png`, `summary.json`, `checkpoints/`, `report.html` (all of it on a page, refreshed with the online reports; its
pictures are in `report/`) and, if images were left out, `unreadable.txt`.
"""

import contextlib
import sys

import checkout  # noqa: F401 - first
import torch

from scott_sparse.cli import exit_on_user_error, exit_with_error
from scott_sparse.data.batches import Batch
from scott_sparse.data.views import make_views
from scott_sparse.distributed import full_tensor
from scott_sparse.evaluation.encoders import FrozenEncoder
from scott_sparse.evaluation.features import extract
from scott_sparse.evaluation.report import knn_report, knn_table
from scott_sparse.model.jepa import make_target, target_features, update_target
from scott_sparse.model.vit import Encoder
from scott_sparse.shapes import Tensor
from scott_sparse.training.accumulation import cache_pooled, seed_dropout
from scott_sparse.training.choice import choose_run
from scott_sparse.training.html_report import refresh_report, report_failures, start_report
from scott_sparse.training.log import Log
from scott_sparse.training.monitor import OnlineReport
from scott_sparse.training.optim import adamw, nonfinite_flag, poison_if_nonfinite, set_schedules
from scott_sparse.training.pictures import bank_of, draw_learned
from scott_sparse.training.plan import FirstSteps
from scott_sparse.training.run import Run, RunFailed, open_run, projections_at, tune_allocator
from scott_sparse.training.saver import EXIT_RESUME, Interrupted, Saver
from scott_sparse.training.verdict import final_verdict, what_to_try


def main() -> None:
    tune_allocator()
    with exit_on_user_error():
        run = open_run(choose_run(sys.argv[1:], train))
    run.describe()
    start_report(run)
    initial, target = make_target(run.model.encoder), make_target(run.model.encoder)
    try:
        with exit_on_user_error(each_process=True):
            training = train(run, target, FirstSteps(run))
    except Interrupted as interruption:
        run.console.print(str(interruption))
        sys.exit(EXIT_RESUME)
    except RunFailed as failure:
        exit_with_error(str(failure))
    with exit_on_user_error(each_process=True):
        compare(run, initial, target, training)
    run.accelerator.end_training()


def train(run: Run, target: Encoder, first_steps: FirstSteps) -> dict:
    """Train the model and its target, and save both encoders. Returns what the summary says of the training.

    Raises Interrupted if the run was told to stop, and RunFailed if it cannot go on.
    """
    recipe, accelerator, device, schedules = run.recipe, run.accelerator, run.accelerator.device, run.schedules
    optimizer = adamw(run.model)
    target.to(device)
    assert target.preprocess is not None
    statistics = target.preprocess.statistics
    if recipe.compile:
        run.model.compile()
    targets_of = torch.compile(target_features) if recipe.compile else target_features
    model, optimizer = accelerator.prepare(run.model, optimizer)
    trained = accelerator.unwrap_model(model, keep_torch_compile=False)
    log = Log(run)
    report = OnlineReport(run, target, trained.encoder)
    saver = Saver(run, log, report, model=trained, target=target, optimizer=optimizer.optimizer)
    start = saver.resume()
    if recipe.tracker:
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": start}})

    def inputs(part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch on the device: context images, target images, and which patches are visible."""
        with log.input_time():
            crops = part.crops.to(device, non_blocking=True)
            context, target_images = make_views(crops, part.views, size=recipe.sides, **statistics)
            return context, target_images, part.visible.to(device, non_blocking=True)

    model.train()
    nonfinite = torch.zeros((), device=device)
    with log, saver.signals, contextlib.closing(run.batches(range(start, schedules.total_steps))) as batches:
        if start == 0:
            report.after_step(0, None)
        for step in range(start, schedules.total_steps):
            with log.input_time():
                parts = next(batches)
            set_schedules(optimizer, schedules, step)
            projections = projections_at(recipe, step, device)
            losses, cached = [], None
            if recipe.accumulate > 1 and recipe.objective.cross_crop_weight:  # compares images of all micro-batches
                seen = ((context, visible) for context, _, visible in map(inputs, parts))
                cached = cache_pooled(model, seen, accelerator, seed=recipe.seed, step=step)
            for number, part in enumerate(parts):
                context, target_images, visible = inputs(part)
                seed_dropout(recipe.seed, step, accelerator.process_index, number)

                # 1. Target: the target encoder sees the whole of each image's first crop.
                targets = None
                if recipe.objective.mim_weight:
                    with accelerator.autocast():
                        targets = targets_of(target, target_images, of=recipe.objective.mim_target)

                # 2. Predict: the context encoder sees the visible patches, the predictor predicts the hidden ones.
                last = number == recipe.accumulate - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    with accelerator.autocast():  # Accelerate wraps the model in it, but not one that is sharded
                        terms = model(context, visible, targets, projections, cached=cached, number=number)
                    accelerator.backward(poison_if_nonfinite(terms["loss"]))
                losses.append({key: value.detach() for key, value in terms.items()})

            # 3. Update the model, then the target by exponential moving average (EMA).
            norm = accelerator.clip_grad_norm_(model.parameters(), recipe.clip_grad or float("inf"))
            assert norm is not None
            norm = full_tensor(norm)
            terms = {key: torch.stack([part[key] for part in losses]).mean() for key in losses[0]}
            now = nonfinite_flag(terms["loss"], norm, scaled=accelerator.scaler is not None)
            # A run that is to stop does so when the log next reads the flag; until then nothing is updated.
            nonfinite = torch.maximum(nonfinite, now) if recipe.on_nonfinite == "stop" else now
            if accelerator.scaler is None:  # the scaler leaves out steps that overflow by itself
                optimizer.optimizer.found_inf = nonfinite  # where 1, the fused kernel changes nothing; no wait for it
            optimizer.step()
            if not optimizer.step_was_skipped:
                skip = nonfinite if recipe.on_nonfinite == "skip" else None  # else nothing is saved of this target
                update_target(target, trained.encoder, schedules.momentum_at(step), skip=skip)
            optimizer.zero_grad()
            log.add(step, {**terms, "gradient_norm": norm}, schedules.at(step), nonfinite)
            report.after_step(step + 1, terms["loss"].where(nonfinite == 0, torch.nan))
            first_steps.after_step(step + 1, report)
            saver.after_step(step + 1)

    run.save_weights(target, trained)  # before anything else, which may fail
    saver.check_last_save()
    return {**log.summary(), "report_share": round(report.seconds / log.seconds, 4), "verdict": report.verdict}


def compare(run: Run, initial: Encoder, target: Encoder, training: dict) -> None:
    """Hold the trained encoder against raw pixels and its own initialisation; write pictures and summary.json."""
    recipe, data, device = run.recipe, run.data, run.accelerator.device
    knn = knn_report(data.train, run.val, initial.to(device), target, size=recipe.sides)
    features = extract(FrozenEncoder(target), bank_of(data), size=recipe.sides)
    if features is None:  # not the main process
        return
    encoders = {recipe.start_name: initial, "pretrained": target}
    with report_failures(run):
        draw_learned(run.out, recipe, data, encoders, features)
    if run.val and data.classes:
        remedy = what_to_try(recipe, len(data.pretrain))
        about = {"n": len(run.val), "remedy": remedy, "start": recipe.start_name}
        training["verdict"] = final_verdict(training["verdict"], knn, **about)
        about = {"images": len(run.val), "classes": len(data.classes), "terms": recipe.objective.terms}
        run.console.print(knn_table(knn, **about, init=recipe.init))
    summary = run.write_summary(training, knn)
    refresh_report(run)
    if training["verdict"]:
        run.console.print(f"verdict: {training['verdict']}", highlight=False)
    run.console.print(
        f"{summary['seconds']:.0f} s in all, {100 * summary['input_share']:.0f} % of training waited for input; "
        f"results in {run.out}: report.html, summary.json, encoder.safetensors"
    )


if __name__ == "__main__":
    main()
