"""SCOTT's stem in every form that gives the same numbers: forward, and forward + backward, by share of visible patches.

    python benchmarks/tokenizer.py
    python benchmarks/tokenizer.py --only "paper, 224 px" --repeats 15 --json tokenizer.json
    python benchmarks/tokenizer.py --only "paper, 224 px" --batch 256 --shares 0.4 --forms dense spconv_triton

Forms: the engines in fp32, and in bf16 where they have it (spconv has not); `unmasked`, the dense stem with everything
visible, as a ViT with a plain convolutional stem has it; `spconv_triton`, the engine spconv with that package; `spconv
5x5`, the other way to give spconv a stride, a SubMConv2d of 5x5 blocks of 2x2 pixels. Forms take turns, so that a noisy
machine is noisy for all; medians in milliseconds. `*` marks what `--engine auto` takes; "kept" is what the forward pass
leaves in memory for the backward pass.
"""

import contextlib
import functools
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from scott_sparse import SparseTokenizer, draw_visible
from scott_sparse.model.engines import ENGINES, choose_engine
from scott_sparse.model.engines.spconv import PACKAGES, SpConv, import_package, package_failure

STEMS = {  # side, patch size, stem width, D, images
    "paper, 224 px": (224, 16, 64, 384, 8),
    "paper, 448 px": (448, 16, 64, 384, 2),
    "small-data, 64 px": (64, 8, 32, 96, 64),
    "demo, 48 px": (48, 8, 32, 96, 64),
}
SHARES = (0.1, 0.25, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Settings:
    only: tuple[str, ...] = ()
    """Stems by name; default all."""
    repeats: int = 7
    """Measurements of each form, in turns; the table shows the median."""
    shares: tuple[float, ...] = SHARES
    """Shares of visible patches to measure."""
    batch: int | None = None
    """Images per batch. Default: that of the stem in STEMS."""
    forms: tuple[str, ...] = ("dense", "halo", *PACKAGES, "spconv 5x5")
    """Engines to compare; those whose package is not installed, or does not work on this device, are left out."""
    tile_sizes: int | None = None
    """Of how many tile sizes spconv-triton chooses when a kernel is first used; default all of its 37, for minutes."""
    json: Path | None = None
    """File for the results."""


class OfPackage(SpConv):
    """The engine with one package, whether or not another one works."""

    def __init__(self, active):
        super().__init__(active, import_package(self.package))


class OfSpconv(OfPackage):
    package = "spconv"


class OfTriton(OfPackage):
    package = "spconv_triton"


class BlocksOf5(OfSpconv):
    """Pixel-unshuffle by 2 and spconv's own SubMConv2d: the 7x7 kernel is 4x4 blocks, padded with zeros to 5x5."""

    def conv_blocks(self, blocks, kernel, side, first):
        weight = F.pad(kernel, (0, 0, 0, 1, 0, 1)).contiguous()
        x = self.tensor(blocks.unflatten(0, (-1, side, side)))
        return torch.func.functional_call(layer_of_5(weight.shape[-1], len(weight)), {"weight": weight}, (x,)).features


@functools.cache
def layer_of_5(inputs: int, outputs: int) -> torch.nn.Module:
    spconv = import_package("spconv")
    return spconv.SubMConv2d(inputs, outputs, 5, bias=False, algo=spconv.ConvAlgo.Native)


ENGINES |= {"spconv": OfSpconv, "spconv_triton": OfTriton, "spconv 5x5": BlocksOf5}


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console, rows = Console(width=170), []
    about = f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {platform.machine()}"
    console.print(about)
    limit_tuning(settings.tile_sizes)
    for name in settings.only or STEMS:
        if name not in STEMS:
            sys.exit(f"error: unknown stem {name!r}; expected some of {', '.join(STEMS)}.")
        for share in settings.shares:
            rows.append(measure(name, share, settings, device))
            if settings.json:  # after each row: the next may not end
                settings.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
        show(name, rows[-len(settings.shares) :], console)


def limit_tuning(count: int | None) -> None:
    """Let spconv-triton try only the first `count` of the tile sizes of its kernels."""
    with contextlib.suppress(ImportError):
        from spconv_triton.pytorch._impl import gemm

        for kernel in (gemm._gather_gemm_kernel, gemm._dweight_masked_kernel):
            kernel.configs = kernel.configs[:count]


@functools.cache
def absent(package: str, device: str) -> bool:
    failure = package_failure(package, device)
    if failure:
        print(f"without {package}: it {failure}")
    return failure is not None


def forms(dim: int, patch: int, stem: int, names: tuple[str, ...], device: torch.device) -> dict:
    """(tokenizer, precision) by name; one set of weights."""
    names = tuple(name for name in names if name.split()[0] not in PACKAGES or not absent(name.split()[0], str(device)))
    made = {name: SparseTokenizer(dim, patch_size=patch, stem_width=stem, engine=name) for name in names}
    for one in made.values():
        one.load_state_dict(made["dense"].state_dict())
    made["unmasked"] = made["dense"]
    found = {name: (one.to(device), "fp32") for name, one in made.items()}
    return found | {f"{name} bf16": (made[name], "bf16") for name in ("dense", "halo", "unmasked") if name in made}


def measure(name: str, share: float, settings: Settings, device: torch.device) -> dict:
    """Milliseconds and kept MiB of every form."""
    side, patch, stem, dim, batch = STEMS[name]
    batch = settings.batch or batch
    grid = (side // patch, side // patch)
    images = torch.randn(batch, 3, side, side, device=device)
    visible = torch.ones(batch, grid[0] * grid[1], dtype=torch.bool)
    if share < 1:
        visible = draw_visible(batch, grid, hide_ratio=1 - share)
    visible = visible.to(device)
    row = {
        "stem": name,
        "images": batch,
        "share": share,
        "auto": choose_engine("auto", device, visible_share=share, dim=dim),
    }
    tokenizers = forms(dim, patch, stem, settings.forms, device)
    times = {(form, backward): [] for form in tokenizers for backward in (False, True)}
    expected = tokenizers["dense"][0].packed(images, visible)[0]
    count = int(visible[0].sum())
    for repeat in range(settings.repeats + 2):
        for (form, backward), found in times.items():
            tokenizer, precision = tokenizers[form]
            shown, n = (
                (torch.ones_like(visible), grid[0] * grid[1]) if form.startswith("unmasked") else (visible, count)
            )
            milliseconds, tokens = once(tokenizer, images, shown, n, precision, backward)
            if not form.startswith("unmasked"):
                error = ((tokens - expected).norm() / expected.norm()).item()
                assert error < (1e-5 if precision == "fp32" and device.type == "cpu" else 2e-2), f"{form}: {error}"
            if repeat > 1:
                found.append(milliseconds)
    for (form, backward), found in times.items():
        row[f"{form}{' + backward' * backward}"] = statistics.median(found)
    for form, (tokenizer, precision) in tokenizers.items():
        shown = torch.ones_like(visible) if form.startswith("unmasked") else visible
        row[f"{form} kept"] = kept_mib(tokenizer, images, shown, precision)
    return row


def once(tokenizer, images, visible, count: int, precision: str, backward: bool):
    synchronize = torch.cuda.synchronize if images.is_cuda else (lambda: None)
    synchronize()
    started = time.perf_counter()
    with torch.set_grad_enabled(backward):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            tokens = tokenizer.packed(images, visible, count=count)[0]
        if backward:
            tokens.float().sum().backward()
    synchronize()
    return 1e3 * (time.perf_counter() - started), tokens.detach().float()


def kept_mib(tokenizer, images, visible, precision: str) -> float:
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    precise = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precise:
        _ = tokenizer.packed(images, visible)
    return sum(kept.values()) / 2**20


def show(name: str, rows: list[dict], console: Console) -> None:
    names = [key.removesuffix(" kept") for key in rows[0] if key.endswith(" kept")]
    table = Table(title=f"{name}, {rows[0]['images']} images: ms forward / with backward / MiB kept")
    for column in ("visible", *names):
        table.add_column(column, justify="right")
    for row in rows:
        cells = []
        for form in names:
            mark = "*" if form.removesuffix(" bf16") == row["auto"] else ""
            cells.append(f"{row[form]:.1f} / {row[form + ' + backward']:.1f} / {row[form + ' kept']:.0f}{mark}")
        table.add_row(f"{row['share']:.0%}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
