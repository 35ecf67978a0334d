"""Images per second of the whole training step, against the plain way to write it and against the machine's own limit.

    python benchmarks/step.py                                  # the cases of what is here, a CPU or a GPU
    python benchmarks/step.py --only "paper 224, 16" --json step.json
    python benchmarks/step.py --only SCALE                     # by image side, patch size and width

The step is that of train/pretrain.py: views of decoded images, masks, both encoders, predictor, loss, backward,
clipping, AdamW, EMA. The plain way: fp32, attention by einsum with its weights materialised, dense masked convolutions,
mask tokens in the context encoder, optimizer and EMA one tensor after the other, masks drawn in a Python loop. The
limit: the rate of a large matrix product in the same precision, and of a copy. FLOPs are those of the step on the dense
engine, forward and backward, counted by PyTorch: what the sparse engine leaves out counts as done. Forms take turns, so
that a noisy machine is noisy for all.
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
    "small-data 64, 64": ("cpu", ["small-data", "--batch-size", "64"]),
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
PARTS = ("masks", "input", "target", "tokenizer", "encoder", "predictor", "loss", "backward", "optimizer", "EMA")


@dataclasses.dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = ()
    """Cases by name, or SCALE; default those of the device that is here."""
    rounds: int = 5
    steps: int = 3
    """Of each form in a round."""
    precision: tuple[str, ...] = ("fp32", "bf16")
    """Of our step; the plain one is fp32."""
    engine: str = "auto"
    json: Path | None = None


class Step:
    """Our step, or the plain one."""

    def __init__(self, recipe: recipes.Recipe, precision: str, device: torch.device, *, plain: bool, engine: str):
        if plain:
            recipe = dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, context="all"))
        self.recipe, self.device, self.plain, self.precision = recipe, device, plain, precision
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
        pixels = torch.randint(0, 256, (2 * recipe.batch_size, 256, 256, 3), dtype=torch.uint8)
        of = (recipe.grid, recipe.hide_ratio, recipe.mask_shape, recipe.batch_size, recipe.seed)
        self.batches = Batches(Images.of(pixels), recipe.views, *of)
        self.schedules = recipe.schedules(100)
        self.number = 0

    def __call__(self, mark=lambda part: None) -> None:
        """One optimizer step; `mark(part)` is called after each part."""
        part = self.batches[self.number][0]
        if self.plain:
            part = self._masks_by_loop(part)
        context, target_images = make_views(part.crops.to(self.device), part.views, size=self.recipe.sides)
        visible = part.visible.to(self.device, non_blocking=True)
        mark("input")
        set_schedules(self.optimizer, self.schedules, self.number % 100)
        projections = projections_at(self.recipe, self.number, self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else contextlib.nullcontext():
            targets = target_features(self.target, target_images)
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
        started = time.perf_counter()
        for _ in range(steps):
            self()
        self.synchronize()
        return (time.perf_counter() - started) / steps

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
                last = time.perf_counter()

                def mark(part, times=times):
                    nonlocal last
                    self.synchronize()
                    now = time.perf_counter()
                    times[part] += now - last
                    last = now

                self(mark)
            times["loss"] -= sum(times[name] for name in inner)
            started = time.perf_counter()
            if self.plain:
                self._masks_by_loop(self.batches[0][0])
            else:
                draw_visible(math.prod(self._views), self.recipe.grid, hide_ratio=self.recipe.hide_ratio)
            times["masks"] = time.perf_counter() - started
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
            started = time.perf_counter()
            result = real(*arguments, **options)
            self.synchronize()
            times[name] += time.perf_counter() - started
            return result

        setattr(module, method, timed)
        yield
        delattr(module, method)


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
            started = time.perf_counter()
            act()
            torch.cuda.synchronize() if device.type == "cuda" else None
            times.append(time.perf_counter() - started)
        return min(times)

    return {"flops": 2 * side**3 / best(lambda: a @ b), "bytes": 2 * source.nbytes / best(lambda: into.copy_(source))}


def masks_per_second(batch: int = 256) -> float:
    """Drawn by one core, 60 % of 14 x 14 hidden; best of some."""
    threads, best = torch.get_num_threads(), math.inf
    torch.set_num_threads(1)
    for _ in range(10):
        started = time.perf_counter()
        draw_visible(batch, (14, 14), hide_ratio=0.6)
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(threads)
    return batch / best


def flops(recipe: recipes.Recipe, device: torch.device) -> int:
    """Of a step on the dense engine, without views, masks, optimizer and EMA."""
    step = Step(recipe, "fp32", device, plain=False, engine="dense")
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def main() -> None:
    settings = tyro.cli(Settings)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, answers, masks = Console(width=150), [], masks_per_second()
    console.print(f"masks of 14 x 14: {masks:,.0f} per second, on one core")
    here = [name for name, (kind, _) in CASES.items() if kind == device.type]
    for name in SCALE if settings.only == ("SCALE",) else settings.only or here:
        if name not in CASES:
            sys.exit(f"error: unknown case {name!r}; expected some of {', '.join(CASES)}.")
        _, recipe = recipes.parse(CASES[name][1])
        answers.append({"case": name, **measure(recipe, settings, device)})
        show(answers[-1], console)
    machine = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    about = {"machine": machine, "torch": torch.__version__, "threads": torch.get_num_threads()}
    about |= {"masks_per_second": masks, "cases": answers}
    if settings.json:
        settings.json.write_text(json.dumps(about, indent=1) + "\n")


def measure(recipe: recipes.Recipe, settings: Settings, device: torch.device) -> dict:
    work = flops(recipe, device)
    forms = {"plain": Step(recipe, "fp32", device, plain=True, engine="dense")}
    for precision in settings.precision:
        forms[precision] = Step(recipe, precision, device, plain=False, engine=settings.engine)
    memory, times = {}, {name: [] for name in forms}
    for name, step in forms.items():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step.seconds(2)  # warm-up
        memory[name] = torch.cuda.max_memory_allocated() >> 20 if device.type == "cuda" else resource_mib()
    for _ in range(settings.rounds):
        for name, step in forms.items():
            times[name].append(step.seconds(settings.steps))
    answer = {"batch": recipe.batch_size, "gflops_per_image": work / recipe.batch_size / 1e9, "forms": {}}
    for name, step in forms.items():
        limit = limits(device, "fp32" if name == "plain" else name)
        parts, seconds = step.parts(settings.steps), statistics.median(times[name])
        answer["forms"][name] = {
            "images_per_second": recipe.batch_size / seconds,
            "spread": [recipe.batch_size / max(times[name]), recipe.batch_size / min(times[name])],
            "against_plain": [p / t for p, t in zip(times["plain"], times[name])],
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
        ratio = statistics.median(form["against_plain"])
        cells = (f"{form['images_per_second']:.1f}", f"{low:.1f} - {high:.1f}", f"{ratio:.2f}")
        cells += (f"{form['utilisation']:.0%}", f"{form['limit_tflops']:.2f}", f"{form['peak_memory_mib']:,}")
        table.add_row(name, *cells, f"{form['sum_of_parts']:.0%}")
    console.print(table)
    parts = Table(title="ms of each part")
    for column in ("", *PARTS):
        parts.add_column(column, justify="right")
    for name, form in answer["forms"].items():
        parts.add_row(name, *(f"{form['parts_ms'][part]:.1f}" for part in PARTS))
    console.print(parts)


if __name__ == "__main__":
    main()
