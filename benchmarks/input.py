"""Images per second of the input: this project's, cached and not, against torchvision's PIL transforms in a DataLoader.

    python benchmarks/input.py                     # draws 13,000 JPEGs of 500 x 375 pixels first
    python benchmarks/input.py --data PHOTOS

All three make the paper's two views of each image (one crop and flip, two colourings, normalised) on the same cores: on
a CPU in as many processes as there are cores, as training does.
Rounds are interleaved; the table has medians and, in brackets, the lowest and highest round. On a GPU this project's
views are made there, while torchvision's stay on the CPU, as they do in use.
"""

import dataclasses
import multiprocessing
import re
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from scott_sparse.data.batches import Batches, load
from scott_sparse.data.dataset import DataConfig, open_data, short_side_for
from scott_sparse.data.sources import image_files
from scott_sparse.data.views import IMAGENET_MEAN, IMAGENET_STD, ViewConfig, make_views
from scott_sparse.distributed import cpu_count


@dataclasses.dataclass(frozen=True)
class Settings:
    data: Path | None = None
    """Folder of photos; drawn ones if not given."""
    images: int = 13_000
    """How many photos to draw."""
    image_size: int = 224
    """Side of the views in pixels."""
    batch_size: int = 64
    """Images per batch."""
    rounds: int = 5
    """Measurements of each input path, in turns; the table shows median and range."""
    seconds: float = 8.0
    """Duration of each measurement."""


class PilViews(Dataset):
    """What a user of torchvision writes: decode, crop, colour and normalise one image at a time, with PIL."""

    def __init__(self, files: list[Path], config: ViewConfig, size: int):
        self.files = files
        self.crop = v2.Compose(
            [
                v2.RandomResizedCrop(size, config.crop_scale, config.crop_ratio, v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(config.flip),
            ]
        )
        jitter = v2.RandomApply([v2.ColorJitter(*config.jitter)], config.jitter_p)
        blur = v2.RandomApply([v2.GaussianBlur(9, config.blur_sigma)], config.blur)
        self.colour = v2.Compose(
            [
                v2.RandomApply([v2.RandomOrder([jitter, v2.RandomGrayscale(config.grey), blur])], config.colour),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        with Image.open(self.files[i]) as image:
            crop = self.crop(image.convert("RGB"))
        return self.colour(crop), self.colour(crop)


def draw_photos(folder: Path, count: int) -> None:
    """JPEGs that cost what photos cost: smooth shapes and noise, about 60 kB each at 500 x 375."""
    generator = torch.Generator().manual_seed(0)
    for i in track(range(count), description="drawing photos", transient=True):
        if i < 64:  # as many different ones as a cache of the processor cannot hold; the rest are copies
            coarse = torch.rand(1, 3, 12, 16, generator=generator)
            picture = torch.nn.functional.interpolate(coarse, (375, 500), mode="bicubic")[0]
            picture = picture + 0.08 * torch.randn(3, 375, 500, generator=generator)
            pixels = (picture.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i:05d}.jpg", quality=90)
        else:
            shutil.copyfile(folder / f"{i % 64:05d}.jpg", folder / f"{i:05d}.jpg")


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        folder = settings.data or Path(scratch, "photos")
        if settings.data is None:
            folder.mkdir()
            draw_photos(folder, settings.images)
        measure(settings, folder, Path(scratch, "cache"))


def measure(settings: Settings, folder: Path, cache_dir: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(cpu_count())
    config, size = ViewConfig(), (settings.image_size, settings.image_size)

    def first_batch(cache: str) -> tuple[float, Batches]:
        started = time.perf_counter()
        source = DataConfig(data=str(folder), cache=cache, cache_dir=cache_dir)
        images = open_data(source, short_side=short_side_for(size)).pretrain
        batches = Batches(images, config, (14, 14), 0.6, "block", settings.batch_size, seed=0)
        (part,) = batches[0]
        make_views(part.crops.to(device), part.views, size=size)
        return time.perf_counter() - started, batches

    fresh, cached = first_batch("disk")
    again, cached = first_batch("disk")
    scanned, streamed = first_batch("none")
    files = image_files(folder)

    pil = PilViews(files, config, settings.image_size)
    paths = {
        "cached": lambda: ours(cached, settings, device),
        "uncached (--cache none)": lambda: ours(streamed, settings, device),
        "torchvision, PIL, DataLoader": lambda: rate(torchvision(pil, settings), settings, device),
    }
    rates = {name: [] for name in paths}
    for _ in range(settings.rounds):
        for name, path in paths.items():
            rates[name].append(path())
    show(settings, files, rates, device)
    print(f"first batch of {len(files):,} files: {fresh:.1f} s, cached {again:.2f} s, --cache none {scanned:.1f} s")
    used = ", ".join(f"{mib:,}" for mib in memory(cached, size))
    print(f"memory of a process without the page cache, after each of 5 x 40 cached batches: {used} MiB")


def ours(batches: Batches, settings: Settings, device: torch.device) -> float:
    if device.type == "cuda":
        return rate(training_process(batches, settings, device), settings, device)
    with multiprocessing.get_context("fork").Pool(cpu_count()) as pool:  # as many as train on a CPU, each for itself
        shares = [dataclasses.replace(batches, process=i, processes=cpu_count()) for i in range(cpu_count())]
        rates = pool.starmap(in_one_process, [(share, settings) for share in shares], chunksize=1)
    return sum(rates) / cpu_count()  # each makes its share of the batches that it counts


def in_one_process(batches: Batches, settings: Settings) -> float:
    torch.set_num_threads(1)
    device = torch.device("cpu")
    return rate(training_process(batches, settings, device), settings, device)


def training_process(batches: Batches, settings: Settings, device: torch.device):
    size = (settings.image_size, settings.image_size)
    workers = min(cpu_count(), 8) if device.type == "cuda" else 0
    for (part,) in load(batches, range(10**6), workers=workers, pin=device.type == "cuda"):
        yield make_views(part.crops.to(device, non_blocking=True), part.views, size=size)


def torchvision(views: PilViews, settings: Settings):
    while True:
        yield from DataLoader(views, settings.batch_size, shuffle=True, num_workers=cpu_count(), drop_last=True)


def rate(views, settings: Settings, device: torch.device) -> float:
    """Images per second, after two batches for workers to start."""
    for _ in range(2):
        next(views)
    wait(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < settings.seconds:
        next(views)
        wait(device)
        count += settings.batch_size
    return count / (time.perf_counter() - started)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def memory(batches: Batches, size: tuple[int, int], times: int = 5, steps: int = 40) -> list[int]:
    """Anonymous memory in MiB (Linux) after each of some times that many steps."""
    used = []
    for turn in range(times):
        for step in range(turn * steps, (turn + 1) * steps):
            (part,) = batches[step]
            make_views(part.crops, part.views, size=size)
        status = Path("/proc/self/status").read_text()
        used.append(int(re.search(r"RssAnon:\s+(\d+)", status).group(1)) // 2**10)
    return used


def spread(numbers: list[float], digits: int) -> str:
    return f"{statistics.median(numbers):,.{digits}f} ({min(numbers):,.{digits}f} - {max(numbers):,.{digits}f})"


def show(settings: Settings, files: list[Path], rates: dict[str, list[float]], device: torch.device) -> None:
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    table = Table(title=f"two {settings.image_size} px views, {len(files):,} files, {cpu_count()} cores, {name}")
    for column in ("path", "images/s", "against PIL"):
        table.add_column(column, justify="left" if column == "path" else "right")
    *_, baseline = rates.values()
    for path, measured in rates.items():
        ratios = [one / other for one, other in zip(measured, baseline)]
        table.add_row(path, spread(measured, 0), spread(ratios, 2))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
