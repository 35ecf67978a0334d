"""Images per second of the whole training step, against the plain way to write it and against the machine's own limit.

    python benchmarks/step.py                                  # the cases of what is here, a CPU or a GPU
    python benchmarks/step.py --only "paper 224, 16" --json step.json
    python benchmarks/step.py --only "paper 224, 256" --forms bf16 "bf16 compile" --engine halo
    python benchmarks/step.py --only SCALE                     # by image side, patch size and width

The step is that of train/pretrain.py: views of decoded images, masks, both encoders, predictor, loss, backward,
clipping, AdamW, EMA. The plain way: fp32, attention by einsum with its weights materialised, dense masked convolutions,
mask tokens in the context encoder, optimizer and EMA one tensor after the other, masks drawn in a Python loop. The
limit: the rate of a large matrix product in the same precision, and of a copy. FLOPs are those of the step on the dense
engine, forward and backward, counted by PyTorch: what the sparse engine leaves out counts as done. Forms take turns, so
that a noisy machine is noisy for all. On a GPU the crops are there before a step begins.
"""

import contextlib
import dataclasses
import json
import math
import platform
import re
import resource
import statistics
import sys
import time
import types
from collections import defaultdict
from pathlib import Path

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from oracles import attention_by_einsum, visible_by_loop

from scott_sparse.data.batches import Batch, Batches
from scott_sparse.data.dataset import Images
from scott_sparse.data.views import make_views
from scott_sparse.model.jepa import make_target, target_features, update_target
from scott_sparse.model.masks import draw_visible, visible_count
from scott_sparse.model.vit import Attention
from scott_sparse.training import recipe as recipes
from scott_sparse.training.optim import adamw, set_schedules
from scott_sparse.training.run import projections_at

CASES = {
    "demo 48, 64": ("cpu", ["demo", "--batch-size", "64"]),
    "small-data 64, 64": ("cpu", ["small-data", "--colour", "1", "--batch-size", "64"]),
    "paper 224, 16": ("cpu", ["flowers102", "--batch-size", "16"]),
    "paper 224, 16, context visible": ("cpu", ["flowers102", "--batch-size", "16", "--context", "visible"]),
    "demo 48, 1024": ("cuda", ["demo", "--batch-size", "1024"]),
    "paper 224, 64": ("cuda", ["flowers102", "--batch-size", "64"]),
    "paper 224, 256": ("cuda", ["flowers102", "--batch-size", "256"]),
    "paper 224, 256, context visible": ("cuda", ["flowers102", "--batch-size", "256", "--context", "visible"]),
    "paper 224, 512": ("cuda", ["flowers102", "--batch-size", "512"]),
}
# How the cost grows, by name only: --only SCALE runs them all.
SCALE = {
    f"{size} {side} P{patch}, {batch}": ("any", ["flowers102", *flags, "--batch-size", str(batch)])
    for size, side, patch, batch in (
        *(("paper", 64, 16, 64), ("paper", 112, 16, 32), ("paper", 224, 16, 8), ("paper", 448, 16, 2)),
        *(("paper", 64, 8, 32), ("paper", 64, 4, 8), ("tiny", 224, 16, 8), ("base", 224, 16, 4)),
    )
    for flags in [["--size", size, "--image-size", str(side), "--patch-size", str(patch)]]
}
CASES |= SCALE
# With one thread on a CPU its own time, which other jobs of the machine do not change; else the wall's.
one_thread = torch.get_num_threads() == 1 and not torch.cuda.is_available()
clock = time.process_time if one_thread else time.perf_counter
PARTS = ("masks", "input", "target", "tokenizer", "encoder", "predictor", "loss", "backward", "optimizer", "EMA")


@dataclasses.dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = ()
    """Cases by name, or SCALE; default those of the device that is here."""
    rounds: int = 5
    """Measurements of each form, in turns; the table shows median and range."""
    steps: int = 3
    """Optimizer steps of each measurement."""
    batch: int | None = None
    """Images per step. Default: that of the case."""
    forms: tuple[str, ...] = ("plain", "fp32", "bf16")
    """plain, or the precision of our step: fp32, bf16, "fp32 compile", "bf16 compile"."""
    engine: str = "auto"
    """Engine of the tokenizer in all forms but plain: auto, dense, halo or spconv."""
    json: Path | None = None
    """File for the results."""


class Step:
    """Our step, or the plain one."""

    def __init__(self, recipe: recipes.Recipe, form: str, device: torch.device, *, engine: str):
        plain = form == "plain"
        if plain:
            recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, context="all"))
        self.recipe, self.device, self.plain, self.precision = recipe, device, plain, precision_of(form)
        torch.manual_seed(0)
        self.model = recipe.model(engine="dense" if plain else engine).to(device).train()
        self.target = make_target(self.model.encoder)
        self.optimizer = adamw(self.model)
        if plain:
            groups = self.optimizer.param_groups
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.999), foreach=False, fused=False)
            for module in [*self.model.modules(), *self.target.modules()]:
                if isinstance(module, Attention):
                    module.forward = types.MethodType(attention_by_einsum, module)
        if form.endswith("compile"):
            self.model.compile()
        self.targets_of = torch.compile(target_features) if form.endswith("compile") else target_features
        pixels = torch.randint(0, 256, (2 * recipe.batch_size, 256, 256, 3), dtype=torch.uint8)
        of = (recipe.grid, recipe.hide_ratio, recipe.mask_shape, recipe.batch_size, recipe.seed)
        self.batches = Batches(Images.of(pixels), recipe.views, *of)
        self.schedules = recipe.schedules(100)
        self.number = 0
        self.on_device = self.ready(0) if device.type == "cuda" else None

    def ready(self, step: int) -> tuple[Batch, torch.Tensor]:
        """The batch of a step, its crops on the device."""
        part = self.batches[step][0]
        return part, part.crops.to(self.device)

    def __call__(self, mark=lambda part: None) -> None:
        """One optimizer step; `mark(part)` is called after each part."""
        part, crops = self.on_device or self.ready(self.number)
        if self.plain:
            part = self._masks_by_loop(part)
        context, target_images = make_views(crops, part.views, size=self.recipe.sides)
        visible = part.visible.to(self.device, non_blocking=True)
        mark("input")
        set_schedules(self.optimizer, self.schedules, self.number % 100)
        projections = projections_at(self.recipe, self.number, self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext():
            targets = self.targets_of(self.target, target_images, of=self.recipe.objective.mim_target)
            mark("target")
            loss = self.model(context, visible, targets, projections)["loss"]
        mark("loss")
        loss.backward()
        mark("backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip_grad or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        mark("optimizer")
        momentum = self.schedules.momentum_at(self.number % 100)
        if self.plain:
            with torch.no_grad():
                for p, q in zip(self.target.parameters(), self.model.encoder.parameters()):
                    p.mul_(momentum).add_(q, alpha=1 - momentum)
        else:
            update_target(self.target, self.model.encoder, momentum)
        mark("EMA")
        self.number += 1

    def attention_kernels(self) -> list[str]:
        """Which of PyTorch's attention kernels a step runs; math is the slow one."""
        with torch.profiler.profile() as profile:
            self()
        names = {re.sub(r"_backward|aten::|_?scaled_dot_product_|_for_cpu", "", e.key) for e in profile.key_averages()}
        known = r"attention_math|\w*(flash|efficient|cudnn)_attention"
        own = "einsum" if self.plain else "two products"
        return sorted(name for name in names if re.fullmatch(known, name)) or [own]

    def _masks_by_loop(self, part: Batch) -> Batch:
        count = visible_count(math.prod(self.recipe.grid), self.recipe.hide_ratio)
        masks = [visible_by_loop(*self.recipe.grid, count) for _ in part.visible.flatten(0, 1)]
        return dataclasses.replace(part, visible=torch.stack(masks).view(part.visible.shape))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, steps: int) -> float:
        """Of one step, in the mean over some."""
        self.synchronize()
        started = clock()
        for _ in range(steps):
            self()
        self.synchronize()
        return (clock() - started) / steps

    def parts(self, steps: int) -> dict[str, float]:
        """Seconds of each part, waiting for the device after every one; median over some steps."""
        encoder, found = self.model.encoder, []
        inner = {"tokenizer": (encoder.tokenizer, "_packed"), "encoder": (encoder.transformer, "forward")}
        if self.model.predictor is not None:
            inner["predictor"] = (self.model.predictor, "forward")
        for _ in range(steps):
            times = defaultdict(float)
            with contextlib.ExitStack() as stack:
                for name, (module, method) in inner.items():
                    stack.enter_context(self._timed(module, method, name, times))
                self.synchronize()
                last = clock()

                def mark(part, times=times):
                    nonlocal last
                    self.synchronize()
                    now = clock()
                    times[part] += now - last
                    last = now

                self(mark)
            times["loss"] -= sum(times[name] for name in inner)
            started = clock()
            if self.plain:
                self._masks_by_loop(self.batches[0][0])
            else:
                draw_visible(math.prod(self._views), self.recipe.grid, hide_ratio=self.recipe.hide_ratio)
            times["masks"] = clock() - started
            if self.on_device is None:
                times["input"] -= times["masks"]
            found.append(times)
        return {name: statistics.median(times[name] for times in found) for name in PARTS}

    @property
    def _views(self) -> tuple[int, int]:
        return self.recipe.batch_size, self.recipe.views.crops

    @contextlib.contextmanager
    def _timed(self, module, method: str, name: str, times: dict):
        real = getattr(module, method)

        def timed(*arguments, **options):
            self.synchronize()
            started = clock()
            result = real(*arguments, **options)
            self.synchronize()
            times[name] += clock() - started
            return result

        setattr(module, method, timed)
        yield
        delattr(module, method)


def precision_of(form: str) -> str:
    return "bf16" if form.startswith("bf16") else "fp32"


def limits(device: torch.device, precision: str) -> dict[str, float]:
    """Rate of a large matrix product in FLOP/s, of a copy in bytes/s (read and written); best of some."""
    dtype, side = (torch.bfloat16 if precision == "bf16" else torch.float32), 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.randn(2**26, device=device)
    into = torch.empty_like(source)

    def best(act, repeats=8) -> float:
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize() if device.type == "cuda" else None
            started = clock()
            act()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times.append(clock() - started)
        return min(times)

    return {"flops": 2 * side**3 / best(lambda: a @ b), "bytes": 2 * source.nbytes / best(lambda: into.copy_(source))}


def masks_per_second(batch: int = 256) -> float:
    """Drawn by one core, 60 % of 14 x 14 hidden; best of some."""
    threads, best = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    for _ in range(10):
        started = clock()
        draw_visible(batch, (14, 14), hide_ratio=0.6)
        best = min(best, clock() - started)
    torch.set_num_threads(threads)
    return batch / best


def flops(recipe: recipes.Recipe, device: torch.device) -> int:
    """Of a step on the dense engine, without views, masks, optimizer and EMA."""
    step = Step(recipe, "fp32", device, engine="dense")
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, answers, masks = Console(width=150), [], masks_per_second()
    console.print(f"masks of 14 x 14: {masks:,.0f} per second, on one core")
    here = [name for name, (kind, _) in CASES.items() if kind == device.type]
    for name in SCALE if settings.only == ("SCALE",) else settings.only or here:
        if name not in CASES:
            sys.exit(f"error: unknown case {name!r}; expected some of {', '.join(CASES)}.")
        _, recipe = recipes.parse(CASES[name][1])
        if settings.batch:
            recipe = dataclasses.replace(recipe, batch_size=settings.batch)
        answers.append({"case": name, **measure(recipe, settings, device)})
        show(answers[-1], console)
        machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
        about = {"machine": machine, "torch": torch.__version__, "threads": torch.get_num_threads()}
        about |= {"engine": settings.engine, "masks_per_second": masks, "cases": answers}
        if settings.json:  # after each case: the next may not end
            settings.json.write_text(json.dumps(about, indent=1) + "\n")


def measure(recipe: recipes.Recipe, settings: Settings, device: torch.device) -> dict:
    work = flops(recipe, device)
    forms = {form: Step(recipe, form, device, engine=settings.engine) for form in settings.forms}
    memory, first, times = {}, {}, {name: [] for name in forms}
    for name, step in forms.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first[name] = step.seconds(1)
        step.seconds(2)  # warm-up
        memory[name] = torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else resource_mib()
    for _ in range(settings.rounds):
        for name, step in forms.items():
            times[name].append(step.seconds(settings.steps))
    answer = {"batch": recipe.batch_size, "gflops_per_image": work / recipe.batch_size / 1e9, "forms": {}}
    for name, step in forms.items():
        limit = limits(device, precision_of(name))
        compiled = name.endswith("compile")  # timing its parts would compile each of them
        parts, seconds = {} if compiled else step.parts(settings.steps), statistics.median(times[name])
        answer["forms"][name] = {
            "images_per_second": recipe.batch_size / seconds,
            "spread": [recipe.batch_size / max(times[name]), recipe.batch_size / min(times[name])],
            "against_plain": [p / t for p, t in zip(times["plain"], times[name])] if "plain" in times else None,
            "first_step_seconds": first[name],
            "utilisation": work / seconds / limit["flops"],
            "limit_tflops": limit["flops"] / 1e12,
            "limit_gbytes": limit["bytes"] / 1e9,
            "peak_memory_mib": memory[name],
            "attention": step.attention_kernels(),
            "parts_ms": {part: 1e3 * value for part, value in parts.items()},
            "sum_of_parts": sum(parts.values()) / seconds,
        }
    return answer


def resource_mib() -> int:
    """Peak memory of this process so far, in MiB; on a CPU it cannot be told apart by form."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def show(answer: dict, console: Console) -> None:
    table = Table(title=f"{answer['case']}: {answer['gflops_per_image']:.2f} GFLOP an image")
    columns = ("images/s", "lowest - highest", "x plain", "utilisation", "limit TFLOP/s", "peak MiB", "sum of parts")
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, form in answer["forms"].items():
        low, high = form["spread"]
        ratio = f"{statistics.median(form['against_plain']):.2f}" if form["against_plain"] else ""
        cells = (f"{form['images_per_second']:.1f}", f"{low:.1f} - {high:.1f}", ratio)
        cells += (f"{form['utilisation']:.0%}", f"{form['limit_tflops']:.2f}", f"{form['peak_memory_mib']:,}")
        table.add_row(name, *cells, f"{form['sum_of_parts']:.0%}" if form["parts_ms"] else "")
    console.print(table)
    parts = Table(title="ms of each part")
    for column in ("", *PARTS):
        parts.add_column(column, justify="right")
    for name, form in answer["forms"].items():
        if form["parts_ms"]:
            parts.add_row(name, *(f"{form['parts_ms'][part]:.1f}" for part in PARTS))
    console.print(parts)


if __name__ == "__main__":
    main()
