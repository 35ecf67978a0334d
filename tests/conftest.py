import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "train"))  # scripts import their neighbours, as they do when run
sys.path.insert(0, str(ROOT / "eval"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def photos(tmp_path):
    """A function that writes images: photos({"train/a": 3, "test/a": 2}) -> folder. Each class has its own colour."""

    def write(counts: dict[str, int], name: str = "photos") -> Path:
        generator = torch.Generator().manual_seed(0)
        root = tmp_path / name
        for number, (folder, count) in enumerate(sorted(counts.items())):
            (root / folder).mkdir(parents=True, exist_ok=True)
            for index in range(count):
                height, width = torch.randint(40, 70, (2,), generator=generator).tolist()
                pixels = torch.randint(0, 255, (height, width, 3), generator=generator).byte()
                pixels[..., number % 3] = 255
                Image.fromarray(pixels.numpy()).save(root / folder / f"{index}.png")
        root.mkdir(exist_ok=True)
        return root

    return write


@pytest.fixture
def clean_environment():
    """The environment of a user's shell: no launcher's variables from a surrounding run."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {k: v for k, v in os.environ.items() if k not in names and not k.startswith("ACCELERATE_")}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
