"""Imported first by each script: in a checkout that is not installed, the package is the folder beside the scripts'."""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("scott_sparse") is None:
    init = Path(__file__).resolve().parent.parent / "scott_sparse" / "__init__.py"
    spec = importlib.util.spec_from_file_location("scott_sparse", init)
    assert spec is not None and spec.loader is not None
    sys.modules["scott_sparse"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["scott_sparse"])
