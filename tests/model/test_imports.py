"""What the model needs to be imported: torch, einops and safetensors, and nothing that only training needs."""

import subprocess
import sys

WITHOUT = """
import importlib.abc, sys, time
forbidden = {"accelerate", "cv2", "matplotlib", "torchvision", "rich", "tyro", "filelock", "PIL", "spconv"}
forbidden |= {"huggingface_hub", "jaxtyping", "beartype"}
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in forbidden:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
started = time.perf_counter()
import scott_sparse.model
print(f"{time.perf_counter() - started:.2f} s")
from scott_sparse import MIMJEPA, EncoderConfig, ObjectiveConfig, draw_visible
model = MIMJEPA(EncoderConfig(dim=32, depth=1, heads=4), ObjectiveConfig(predictor_depth=1))
visible = draw_visible(2, (2, 2), hide_ratio=0.5)
model(torch.zeros(2, 1, 3, 32, 32), visible[:, None], torch.zeros(2, 4, 32))["loss"].backward()
assert not forbidden & {name.split(".")[0] for name in sys.modules}
"""


def test_the_model_needs_little(clean_environment):
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=clean_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(f"import scott_sparse.model, after torch: {done.stdout}")
