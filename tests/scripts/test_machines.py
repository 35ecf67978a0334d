"""Machines as they are: a checkout that is not installed, Windows' Python, fp16, a device without float64."""

import json
import subprocess
import sys

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from conftest import ROOT, TINY, TINY_RUN, run_pretraining
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from scott_sparse import MIMJEPA, Encoder, ObjectiveConfig, draw_visible, save_encoder
from scott_sparse.data import views_gpu
from scott_sparse.data.views import ViewConfig, draw_views
from scott_sparse.model.jepa import make_target, target_features, update_target
from scott_sparse.model.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocess

NOT_INSTALLED = """
import importlib.abc, importlib.machinery, importlib.metadata, runpy, sys
# The package and its metadata are found nowhere but through what the script itself does.
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "scott_sparse":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find_spec, real = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *a: None if name == "scott_sparse" else find_spec(name, *a)
sys.meta_path.insert(0, Hide())
def version(name):
    if name == "scott-sparse":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

WITHOUT = """
import importlib.abc, importlib.util, runpy, sys
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "{package}":
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("{package}") else find_spec(name, *a)
sys.meta_path.insert(0, Hide())
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

WINDOWS = """
import os, runpy, signal, sys
import psutil  # which on Linux needs what is taken away here
sys.modules["resource"] = None
del signal.SIGUSR1, os.sched_getaffinity, os.posix_fadvise
real = os.open
def without_folders(path, *a, **k):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return real(path, *a, **k)
os.open = without_folders
from scott_sparse import files
class Windows:
    name = "nt"
    def __getattr__(self, name):
        return getattr(os, name)
files.os = Windows()
sys.argv = sys.argv[1:]
sys.path[0] = sys.argv[0].rpartition("/")[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run(code, environment, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_checkout_that_is_not_installed(photos, tmp_path, clean_environment):
    environment = {key: value for key, value in clean_environment.items() if key != "PYTHONPATH"}
    save_encoder(Encoder(TINY), tmp_path / "run", preprocess=Preprocess((32, 32)))
    data = ("--data", photos({"a": 20, "b": 20}), "--cache-dir", tmp_path)
    done = run(NOT_INSTALLED, environment, ROOT / "eval/knn.py", tmp_path / "run", *data)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "run" / "eval").glob("*.json")
    assert json.loads(path.read_text())["versions"]["scott-sparse"] is None
    done = run(NOT_INSTALLED, environment, ROOT / "train/pretrain.py", "--size", "huge")
    assert done.returncode == 1 and "unknown size 'huge'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("torch", ["train/pretrain.py"]),
        ("rich", ["eval/visualize.py", "--help"]),
        ("scipy", ["eval/segment.py", "--help"]),
        ("tensorboard", ["train/pretrain.py", "--tracker", "tensorboard", "--data", "petals"]),
    ],
)
def test_a_missing_package_ends_a_script_in_one_line(package, command, clean_environment):
    done = run(WITHOUT.format(package=package), clean_environment, ROOT / command[0], *command[1:])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert f"package {package}: pip install " in done.stderr
    assert package == "tensorboard" or done.stderr.strip().endswith(str(ROOT / "requirements.txt"))


def test_sklearn_is_asked_for_in_one_line(clean_environment):
    code = WITHOUT.format(package="sklearn").partition("sys.argv")[0] + "import scott_sparse.evaluation.sklearn"
    done = run(code, clean_environment)
    message = "ImportError: scott_sparse.evaluation.sklearn needs scikit-learn 1.6: pip install 'scikit-learn>=1.6'."
    assert done.stderr.splitlines()[-1] == message and "During handling" not in done.stderr


def test_what_windows_lacks_is_not_needed(photos, tmp_path, clean_environment):
    out, places = tmp_path / "run", ("--data", photos({"a": 8, "b": 8}), "--cache-dir", tmp_path)
    flags = (*TINY_RUN, "--epochs", 1, "--save-every", 1)
    done = run(WINDOWS, clean_environment, ROOT / "train/pretrain.py", *flags, *places, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "summary.json").read_text())["peak_memory_mib"] > 0


def test_fp16_on_a_cpu_ends_in_one_line(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(True)
    message, _ = run_pretraining(*TINY_RUN, "--data", photos({"a": 8, "b": 8}), "--out", tmp_path / "run")
    AcceleratorState._reset_state(True)
    assert message.startswith("error: fp16 needs a GPU") and "\n" not in message
    assert not (tmp_path / "run").exists()


def test_a_step_that_overflows_in_fp16_leaves_the_target_alone(photos, tmp_path, monkeypatch):
    """The scaler leaves the update out, and says so as the optimizer of Accelerate passes it on."""
    monkeypatch.setattr(AcceleratedOptimizer, "step", lambda self, closure=None: None)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: True))
    monkeypatch.setattr("pretrain.update_target", lambda *_, **__: pytest.fail("the target was updated"))
    out = tmp_path / "run"
    message, _ = run_pretraining(*TINY_RUN, "--data", photos({"a": 8, "b": 8}), "--out", out)
    assert message is None
    weights = [load_file(out / f"{name}.safetensors") for name in ("encoder", "context")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


class NoFloat64(TorchDispatchMode):
    """Stands in for a device such as MPS, which cannot hold a float64 tensor."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            assert not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.float64, function
        return result


def test_nothing_on_the_device_is_float64():
    """What train/pretrain.py does on the device: views, target, loss, gradient, update."""
    objective = ObjectiveConfig(predictor_depth=1, cross_crop_weight=0.5)
    model, size, crops = MIMJEPA(TINY, objective, engine="dense"), (32, 32), 2
    target = make_target(model.encoder)
    boxes = torch.tensor([[40, 50]] * 4)
    views = draw_views(boxes, ViewConfig(crops=crops, colour=1.0), generator=torch.Generator())
    visible = draw_visible(4 * crops, (2, 2), hide_ratio=0.5).unflatten(0, (4, crops))
    pixels = torch.randint(0, 256, (4 * crops, 40, 50, 3), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters())
    target(torch.zeros(1, 3, *size))  # positions are computed on the CPU, once
    model.encoder(torch.zeros(1, 3, *size))
    with NoFloat64():
        images = views_gpu.resize(pixels, views.boxes[..., 2:].flatten(0, 1), views.flip.flatten(), size=size)
        ops, amounts = (x[:, :, 0].flatten(0, 1) for x in (views.ops, views.amounts))
        images = views_gpu.normalise(views_gpu.colour(images, ops=ops, amounts=amounts), IMAGENET_MEAN, IMAGENET_STD)
        images = images.unflatten(0, (4, crops))
        targets = target_features(target, images[:, 0])
        model(images, visible, targets)["loss"].backward()
        optimizer.step()
        update_target(target, model.encoder, 0.9)
