"""The public names and their signatures are those of api.txt. Where a change is meant: python tests/test_api.py"""

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType, MethodType, ModuleType

import pytest
from torch import nn

import scott_sparse

FROZEN = Path(__file__).with_name("api.txt")


def members(owner: type | ModuleType) -> Iterator[tuple[str, object]]:
    """What is public in a module (its `__all__`), or in a class and its bases in this package, by name."""
    if isinstance(owner, ModuleType):
        yield from ((name, getattr(owner, name)) for name in owner.__all__)
        return
    bases = [base for base in owner.__mro__ if base.__module__.startswith("scott_sparse")]
    for name in sorted({name for base in bases for name in vars(base) if not name.startswith("_")}):
        yield name, getattr(owner, name)


def described(name: str, value: object) -> Iterator[tuple[str, object]]:
    """A line for each public name, with names, kinds and defaults of parameters; types are left to the type checker."""
    if isinstance(value, ModuleType):
        for member, inner in members(value):
            yield from described(f"{name}.{member}", inner)
        return
    if isinstance(value, type | FunctionType | MethodType):
        parameters = inspect.signature(value).parameters.values()
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
        yield f"{name}{inspect.Signature(bare)}", value
    else:
        yield name, value
    if isinstance(value, type):
        fields = {field.name for field in dataclasses.fields(value)} if dataclasses.is_dataclass(value) else set()
        for member, inner in members(value):
            if member not in fields:
                yield from described(f"{name}.{member}", inner)


LINES = dict(line for name, value in members(scott_sparse) for line in described(name, value))


def test_names_and_signatures_are_frozen():
    assert "\n".join(LINES) + "\n" == FROZEN.read_text(), "the API changed; if it is meant: python tests/test_api.py"


@pytest.mark.parametrize("line", LINES)
def test_every_public_function_and_class_says_what_it_does(line):
    value = LINES[line]
    if isinstance(value, type | FunctionType | MethodType | property):
        text = inspect.getdoc(value)
        assert text and text != inspect.getdoc(nn.Module.forward), line


if __name__ == "__main__":
    FROZEN.write_text("\n".join(LINES) + "\n")
