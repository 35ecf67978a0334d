"""Imported first by each script of this folder; see train/checkout.py."""

import runpy
from pathlib import Path

runpy.run_path(str(Path(__file__).resolve().parent.parent / "train" / "checkout.py"))
