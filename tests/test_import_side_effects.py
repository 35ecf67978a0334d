"""Importing the library changes nothing in the process: threads, warning filters and environment stay as they are."""

import subprocess
import sys

CODE = """
import importlib, os, pkgutil, warnings
# What the library imports may change the process; that is not ours to prevent.
import accelerate, cv2, filelock, matplotlib.figure, rich.progress, safetensors.torch, torch, torchvision
import scipy.cluster.vq, scipy.optimize, sklearn.base, tyro
from PIL import Image, TiffImagePlugin

cv2.setNumThreads(3)
torch.set_num_threads(2)

def state():
    filters = [tuple(map(str, entry)) for entry in warnings.filters]
    return cv2.getNumThreads(), torch.get_num_threads(), filters, dict(os.environ), sorted(Image.OPEN)

before = state()
import scott_sparse

names = [module.name for module in pkgutil.walk_packages(scott_sparse.__path__, "scott_sparse.")]
assert "scott_sparse.data.decode" in names and "scott_sparse.evaluation.features" in names
for name in names:
    importlib.import_module(name)
    for was, now in zip(before, state()):
        assert now == was, f"{name} changes {was} to {now}"
"""


def test_importing_every_module_changes_nothing():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
