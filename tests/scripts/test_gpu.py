"""benchmarks/gpu.sh: its stages, and a rehearsal of all of them on the CPU."""

import json
import subprocess
import sys
import time

import gpu
import pytest
from conftest import ROOT

# As where the package is not installed: nothing may ask for what only an installation has.
NOT_INSTALLED = """
import importlib.metadata
real = importlib.metadata.distribution
def distribution(name):
    if name.replace("_", "-") == "scott-sparse":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
"""


@pytest.mark.parametrize(
    "name, code, seconds, status",
    [
        ("step", "write('{\"a\": 1}')", 60, "done"),
        ("step", "write('{\"a\": 1}'); sys.exit(3)", 60, "failed with exit code 3"),
        ("step", "write('{\"a\": 1}'); time.sleep(600)", 8, "cut off"),
        ("learning", "write('{\"a\": 1}'); sys.exit(75)", 60, "done"),
        ("step", "", 0, "no time was left"),
    ],
)
def test_a_stage_ends_in_time_and_keeps_what_it_found(name, code, seconds, status, tmp_path):
    result, written = tmp_path / "result.json", []
    code = f"import sys, time, pathlib; write = pathlib.Path({str(result)!r}).write_text; {code}"
    stage = gpu.Stage(name, seconds, [sys.executable, "-c", code], result)
    found = gpu.run(stage, tmp_path, time.monotonic() + 60, written.append)
    assert found["status"] == status and written[-1] == found
    assert found["result"] == ({"a": 1} if seconds else None)


@pytest.mark.slow
def test_rehearsal(tmp_path, photos, clean_environment):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NOT_INSTALLED)
    root = photos({"train/a": 8, "train/b": 8, "val/a": 4, "val/b": 4, "test/a": 2, "test/b": 2})
    given = {"GPU_REHEARSAL": "1", "GPU_MINUTES": "30", "PHOTOS": str(root), "PYTHON": sys.executable}
    environment = {**clean_environment, **given, "PYTHONPATH": str(tmp_path / "site")}
    command = ["bash", "benchmarks/gpu.sh", tmp_path / "gpu.json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    names = ["machine", "parity", "tokenizer", "step", "compiled step", "spconv-triton", "learning"]
    assert list(found) == names and {stage["status"] for stage in found.values()} == {"done"}
    assert found["parity"]["result"]["tests"] > 3 and not found["parity"]["result"]["failures"]
    assert list(found["step"]["result"]["cases"][0]["forms"]) == ["bf16", "fp32"]
    assert found["learning"]["result"][0]["knn"] is not None
    assert all(name in done.stdout for name in names) and "k-NN on val" in done.stdout
