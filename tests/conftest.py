import contextlib
import io
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parent.parent
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache")  # read on import; drawn petals stay there, photos of tests do not

import pytest  # noqa: E402 - after the environment, which is read on import
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from scott_sparse import EncoderConfig  # noqa: E402
from scott_sparse.model.engines import ENGINES  # noqa: E402
from scott_sparse.model.engines.spconv import spconv_failure  # noqa: E402

for folder in ("train", "eval", "benchmarks"):  # scripts import their neighbours, as they do when run
    sys.path.insert(0, str(ROOT / folder))

DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


def engines_on(device: str) -> list[str]:
    """The engines that work on a device; spconv may not be installed."""
    return [name for name in ENGINES if name != "spconv" or spconv_failure(device) is None]


def pytest_runtest_setup(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    asked = any(isinstance(value, str) and value == "spconv" for value in parameters.values())
    if asked and "spconv" not in engines_on(parameters.get("device", "cpu")):
        pytest.skip("no package for the engine spconv on this device")


# A run of a second, by the recipe small-data unless told otherwise. Flags that a test gives after these win.
TINY_RUN = ["--size", "demo", "--stem-width", 8, "--image-size", 32, "--batch-size", 8]
TINY_RUN += ["--crops", 2, "--plain-share", 0, "--colour", 0.6]
TINY_RUN += ["--epochs", 2, "--report-every", 0, "--precision", "no"]
TINY = EncoderConfig(dim=32, depth=2, heads=4, patch_size=16, stem_width=8, registers=2)
torch.backends.cudnn.allow_tf32 = False  # parity is asked for to more digits than TF32 has


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # one of several test processes: others still use the files
        return
    for file in (ROOT / ".cache").rglob("*.images*"):
        if not file.name.startswith("petals-"):
            file.unlink()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def write_photo(path: Path, height: int, width: int, *, seed: int = 0, channel: int = 0) -> None:
    """Noise, with one of the three channels full."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 255, (height, width, 3), generator=generator).byte()
    pixels[..., channel] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.numpy()).save(path)


def run_pretraining(*arguments: object) -> tuple[str | int | None, str]:
    """Run train/pretrain.py in this process: how it ended (None, a message or an exit code), and what it printed.

    What is printed is in one line. Images of --data are decoded into a folder beside them.
    """
    import pretrain

    flags = list(map(str, arguments))
    if "--data" in flags:
        flags += ["--cache-dir", str(Path(flags[flags.index("--data") + 1]).parent / "cache")]
    printed, code = io.StringIO(), None
    with mock.patch.object(sys, "argv", ["pretrain.py", *flags]), contextlib.redirect_stdout(printed):
        try:
            pretrain.main()
        except SystemExit as end:
            code = end.code
    return code, " ".join(printed.getvalue().split())


@pytest.fixture
def photos(tmp_path):
    """A function that writes images: photos({"train/a": 3, "test/a": 2}) -> folder. Each class has its own colour."""

    def write(counts: dict[str, int], name: str = "photos") -> Path:
        generator = torch.Generator().manual_seed(0)
        root = tmp_path / name
        for number, (folder, count) in enumerate(sorted(counts.items())):
            for index in range(count):
                sides = torch.randint(40, 70, (2,), generator=generator).tolist()
                seed = 1000 * number + index
                write_photo(root / folder / f"{index}.png", *sides, seed=seed, channel=number % 3)
        root.mkdir(exist_ok=True)
        return root

    return write


@pytest.fixture
def clean_environment():
    """The environment of a user's shell: no variables of a launcher, or of a run in this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "THP_MEM_ALLOC_ENABLE")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("ACCELERATE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
