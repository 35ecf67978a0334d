"""The model needs torch, einops, safetensors and, for the Hub alone, huggingface_hub; nothing that training needs."""

import subprocess
import sys
import tomllib

from conftest import ROOT

WITHOUT = """
import importlib.abc, sys, time
forbidden = {"accelerate", "cv2", "filelock", "matplotlib", "PIL", "rich", "spconv", "spconv_triton", "tifffile"}
forbidden |= {"timm", "torchvision", "transformers", "tyro", "huggingface_hub", "jaxtyping", "beartype"}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
sys.modules["numpy"] = None  # absent, for torch too
import torch
started = time.perf_counter()
import scott_sparse
seconds = time.perf_counter() - started
assert seconds < 2, seconds
from scott_sparse import MIMJEPA, EncoderConfig, ObjectiveConfig, draw_visible, load_encoder, save_encoder
model = MIMJEPA(EncoderConfig(dim=32, depth=1, heads=4), ObjectiveConfig(predictor_depth=1))
visible = draw_visible(2, (2, 2), hide_ratio=0.5)
model(torch.zeros(2, 1, 3, 32, 32), visible[:, None], torch.zeros(2, 4, 32))["loss"].backward()
save_encoder(model.encoder, sys.argv[1])
loaded = load_encoder(sys.argv[1]).state_dict()
assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.encoder.state_dict().items())
assert not forbidden & {name.split(".")[0] for name in sys.modules}
print(f"{seconds:.2f} s")
"""


def test_the_model_needs_little(clean_environment, tmp_path):
    command = [sys.executable, "-c", WITHOUT, str(tmp_path)]
    done = subprocess.run(command, env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"import scott_sparse, after torch: {done.stdout}")


def test_what_is_installed_with_it():
    """tests/wheel.py installs it for real."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = [requirement.split(">=")[0] for requirement in project["project"]["dependencies"]]
    assert needed == ["torch", "einops", "safetensors", "huggingface_hub"]
    assert project["tool"]["setuptools"]["package-data"] == {"scott_sparse": ["py.typed", "training/templates/*.html"]}
    assert (ROOT / "scott_sparse" / "py.typed").exists()
