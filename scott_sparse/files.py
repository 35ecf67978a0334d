"""Files from strangers, and files that a crash may have torn: refused in one line, never executed, in bounded memory.

Nothing is unpickled. JSON is read up to a size and a depth. The header of a safetensors file is compared with what is
expected *before* anything of the size it claims is allocated, so that memory is bounded by the size of the file.
"""

import json
import math
import os
import struct
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from scott_sparse.shapes import Tensor

MOST_JSON = 16 * 2**20  # bytes
MOST_HEADER = 16 * 2**20
DTYPES = {"F32": torch.float32}


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError for one that is large, deep or malformed, and for no object."""
    if path.stat().st_size > MOST_JSON:
        raise ValueError(f"{path} is larger than {MOST_JSON >> 20} MiB; that is no JSON of ours.")
    try:
        found = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is no JSON of ours: it is nested too deeply.") from None
    except ValueError as error:  # of JSON, of UTF-8, and of integers with thousands of digits
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object but {type(found).__name__}.")
    return found


def read_tensors(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names, shapes and dtypes of `like`, on whatever device.

    Raises ValueError where they differ, naming the first few, and for a file that is damaged.
    """
    header = _header(path)
    missing, unknown = sorted(like.keys() - header.keys()), sorted(header.keys() - like.keys())
    if missing or unknown:
        words = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise ValueError(f"{path} does not have the tensors that its config asks for: {'; '.join(words)}.")
    for name, expected in like.items():
        found = header[name]
        if not isinstance(found, dict) or found.get("shape") != list(expected.shape):
            shape = found.get("shape") if isinstance(found, dict) else found
            raise ValueError(f"{path}: {name} has shape {str(shape)[:100]}, expected {list(expected.shape)}.")
        if DTYPES.get(str(found.get("dtype"))) != expected.dtype:
            raise ValueError(f"{path}: {name} has dtype {str(found.get('dtype'))[:20]}, expected {expected.dtype}.")
    claimed = 4 * sum(math.prod(expected.shape) for expected in like.values())
    if claimed > path.stat().st_size:
        raise ValueError(f"{path} is cut off: its tensors take {claimed:,} bytes.")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {' '.join(str(error).split())[:200]}.") from None


def load_strictly(module: nn.Module, path: Path) -> None:
    """A module, which may be on "meta", takes the tensors of a file as its own. Raises as `read_tensors`."""
    module.load_state_dict(read_tensors(path, module.state_dict()), assign=True)


def _header(path: Path) -> dict:
    """What a safetensors file says of its tensors, by name."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, MOST_HEADER):
            raise ValueError(f"{path} is no safetensors file: it is cut off, or its header is too large.")
        text = file.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no safetensors file: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(header, dict):
        raise ValueError(f"{path} is no safetensors file: its header is no object.")
    header.pop("__metadata__", None)
    return header


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
