"""Files: written whole or not at all; read without trusting them.

Writing: beside the name, flushed to the disk, then renamed, so that a name always holds a whole file. Reading: nothing
is unpickled, JSON is read up to a size and a depth, and the names, shapes and dtypes of a safetensors file are compared
with what is expected *before* its tensors are allocated. A file from a stranger, or one that a crash has torn, is
refused with one line.
"""

import contextlib
import ctypes
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from scott_sparse.shapes import Tensor

MAX_JSON_BYTES = 16 * 2**20
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64}


@contextlib.contextmanager
def open_atomically(path: Path, *, locked: bool = False) -> Iterator[IO[bytes]]:
    """A binary file, to write and read, that replaces `path` where the block ends without an error.

    `locked`: no other process writes `path`, so that one temporary name serves, and what a killed process left under it
    is overwritten.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.partial" if locked else f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("w+b") as file:
            yield file
            sync(file)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes | str) -> None:
    """Replace `path`; it is whole or unchanged. Raises OSError where the disk is full or fails."""
    with open_atomically(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def sync(file: IO[bytes]) -> None:
    """Wait until what was written is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def write_synced(path: Path, data: bytes) -> None:
    """Write a file under its own name, for a folder that is renamed as a whole."""
    with path.open("wb") as file:
        file.write(data)
        sync(file)


def sync_folder(path: Path) -> None:
    """A rename is on the disk once its folder is; Windows cannot open folders, nor wait for them."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict:
    """The JSON object in a file. Raises ValueError for one that is large, deep or malformed, and for no object."""
    if path.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB; that is no JSON of ours.")
    try:
        value = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is no JSON of ours: it is nested too deeply.") from None
    except ValueError as error:  # of JSON, of UTF-8, and of integers with thousands of digits
        raise ValueError(f"{path} is no JSON: {' '.join(str(error).split())[:200]}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object but {type(value).__name__}.")
    return value


def tensors_to_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file, to the byte that of `safetensors.torch.save`, which needs numpy; of tensors of DTYPES."""
    names, header, chunks, end = {dtype: name for name, dtype in DTYPES.items()}, {}, [], 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0])):
        values = tensor.detach().cpu().contiguous()
        chunks.append(ctypes.string_at(values.data_ptr(), values.nbytes))
        begin, end = end, end + values.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    encoded += b" " * (-len(encoded) % 8)
    return b"".join([len(encoded).to_bytes(8, "little"), encoded, *chunks])


def read_tensors(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a safetensors file, which must have the names, shapes and dtypes of `like`, on whatever device.

    Raises ValueError where they differ, naming the first few, and for a file that is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(2, "No such file", str(path))
    try:
        with safe_open(path, "pt") as file:  # checks that the header fits the file's size
            names = set(file.keys())
            missing, unknown = sorted(like.keys() - names), sorted(names - like.keys())
            if missing or unknown:
                words = [f"{what} {_some(few)}" for what, few in (("missing", missing), ("unknown", unknown)) if few]
                raise ValueError(f"{path} does not have the tensors that its config asks for: {'; '.join(words)}.")
            for name, expected in like.items():
                entry = file.get_slice(name)
                if entry.get_shape() != list(expected.shape):
                    shape = str(entry.get_shape())[:100]
                    raise ValueError(f"{path}: {name} has shape {shape}, expected {list(expected.shape)}.")
                if DTYPES.get(entry.get_dtype()) != expected.dtype:
                    raise ValueError(f"{path}: {name} has dtype {entry.get_dtype()}, expected {expected.dtype}.")
            return {name: file.get_tensor(name) for name in like}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {' '.join(str(error).split())[:200]}.") from None


def load_strictly(module: nn.Module, path: Path) -> None:
    """A module, which may be on "meta", takes the tensors of a file as its own. Raises as `read_tensors`."""
    module.load_state_dict(read_tensors(path, module.state_dict()), assign=True)


def _some(names: list[str]) -> str:
    shown = ", ".join(repr(name)[:80] for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")
