"""Imported first by each script: in a checkout that is not installed, the package is the folder beside the scripts'.

A Python package that is not installed ends a script with one line that says how to install it.
"""

import importlib.util
import sys
from pathlib import Path
from types import TracebackType


def exit_without_package(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """In place of a traceback, where a whole package is missing, not a part of one."""
    name = getattr(error, "name", None) or "."
    if not isinstance(error, ModuleNotFoundError) or "." in name or name == "scott_sparse":
        return sys.__excepthook__(kind, error, trace)
    requirements = Path(__file__).resolve().parent.parent / "requirements.txt"
    print(f"error: no Python package {name}: pip install -r {requirements}", file=sys.stderr)


sys.excepthook = exit_without_package

if importlib.util.find_spec("scott_sparse") is None:
    init = Path(__file__).resolve().parent.parent / "scott_sparse" / "__init__.py"
    spec = importlib.util.spec_from_file_location("scott_sparse", init)
    assert spec is not None and spec.loader is not None
    sys.modules["scott_sparse"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["scott_sparse"])
