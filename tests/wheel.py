"""Builds the wheel, installs it in an empty virtual environment, and runs README's Python snippets there.

    python tests/wheel.py [arguments for pip install, such as --index-url]

Prints what was installed, which must be the four dependencies and what these need, and how long the import takes. The
first installation downloads torch, on Linux with the CUDA libraries: gigabytes. So it is no part of `make test`.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
SAVE = """
from scott_sparse import Encoder, EncoderConfig, save_encoder
from scott_sparse.model.preprocess import Preprocess
save_encoder(Encoder(EncoderConfig.named("demo", patch_size=8)), "RUN", preprocess=Preprocess((64, 96)))
"""
IMPORT = """
import importlib.util, sys, time
extras = ("accelerate", "cv2", "matplotlib", "spconv", "torchvision", "tyro", "rich")
assert not any(map(importlib.util.find_spec, extras)), "an extra is installed"
started = time.perf_counter()
import torch
torch_s = time.perf_counter() - started
import scott_sparse
print(f"import scott_sparse: {time.perf_counter() - started:.2f} s, of which torch {torch_s:.2f} s")
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "source"  # a copy, as the build leaves files that a later one would put into its wheel
        shutil.copytree(ROOT / "scott_sparse", source / "scott_sparse")
        for file in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / file, source)
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source, cwd=folder)
        (wheel,) = folder.glob("*.whl")
        contents = run(sys.executable, "-m", "zipfile", "--list", wheel, cwd=folder)
        assert "scott_sparse/py.typed" in contents, contents
        print(f"{wheel.name}: {wheel.stat().st_size // 1024} KiB")
        venv.create(folder / "env", with_pip=True)
        python = folder / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
        run(python, "-m", "pip", "install", "--quiet", *sys.argv[1:], wheel, cwd=folder)
        print(run(python, "-m", "pip", "list", "--format", "freeze", cwd=folder))
        for _ in range(2):  # the first import compiles and reads files that are not in memory
            print(run(python, "-c", IMPORT, cwd=folder))
        run(python, "-c", SAVE, cwd=folder)
        for snippet in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL):
            # A line that names spconv needs the extra of that name.
            lines = "".join(line for line in snippet.splitlines(keepends=True) if "spconv" not in line)
            run(python, "-W", "error::SyntaxWarning", "-c", lines, cwd=folder)
            print(f"README's snippet ran: {snippet.splitlines()[1]}")


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:200]} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip()


if __name__ == "__main__":
    main()
