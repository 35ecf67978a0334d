"""The rooms of the package are floors: an import goes down or stays, never up; scripts patch no path."""

import ast

import pytest
from conftest import ROOT

FLOORS = ("model", "data", "evaluation", "training")
PACKAGE = ROOT / "scott_sparse"


def floor(module: str) -> int:
    """0 for modules of the package itself such as scott_sparse.files, then as in FLOORS."""
    room = module.split(".")[1] if "." in module else ""
    return FLOORS.index(room) + 1 if room in FLOORS else 0


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"], ids=lambda p: p.stem)
def test_imports_never_go_up(path):
    own = floor(".".join(path.relative_to(ROOT).with_suffix("").parts))
    ours = [name for name in imported(path) if name.startswith("scott_sparse.")]
    assert [name for name in ours if floor(name) > own] == []


@pytest.mark.parametrize("path", [*ROOT.glob("train/*.py"), *ROOT.glob("eval/*.py")], ids=lambda p: p.stem)
def test_scripts_import_checkout_and_patch_no_path(path):
    assert "sys.path" not in path.read_text()
    assert path.stem == "checkout" or "checkout" in imported(path)
