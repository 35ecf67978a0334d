"""Decode once: every picture of a source as uint8 in one memory-mapped file, shared by all processes of a machine.

A file in the cache folder is the pixels of the readable pictures one behind the other (each h x w x 3), then the
index (safetensors), then a trailer with the index's length and digest. It is written beside and renamed, under a lock
that dies with its owner. A file is used only if trailer, index, sampled pixels and fingerprint fit, else it is made
anew; the fingerprint covers the settings and the name, size and time of every file.

The pages of a mapped file are the page cache's: a set that fits in memory is in memory, once for all processes.
"""

import hashlib
import json
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch
from filelock import FileLock
from rich.console import Console
from rich.progress import track
from safetensors.torch import load, save

from scott_sparse.data.decode import Unreadable, decode
from scott_sparse.data.sources import Source
from scott_sparse.distributed import cpu_count
from scott_sparse.files import open_atomically
from scott_sparse.shapes import Int, Tensor

FORMAT = 1  # part of every fingerprint; raise it whenever a decoded pixel or the layout of the file changes
TRAILER = struct.Struct("<Q16s8s")  # length and digest of the index, then MAGIC
MAGIC = b"scottpix"


@dataclass(frozen=True)
class Decoded:
    """The pictures of a source as uint8 RGB."""

    read: Callable[[int], np.ndarray]
    """Picture i, (h, w, 3)."""
    sizes: Int[Tensor, "n 2"]
    """Height and width; 0, 0 where a picture cannot be read."""
    digests: Int[Tensor, " n"]
    """64 bits of a hash of each picture's pixels."""
    unreadable: dict[int, str]
    """Pictures that cannot be read, and why."""


def decode_once(
    source: Source, *, title: str, short_side: int, keep_pixels: bool, folder: Path, read_ahead: int
) -> Decoded:
    """Decode a source, or find it decoded in `folder`; shorter sides above `short_side` pixels are shrunk to it.

    Without `keep_pixels` only the index is kept (which pictures can be read, and their sizes), and `read` decodes.
    Pixels of up to `read_ahead` bytes are read into memory at once, more are read when they are used.

    Raises:
        ValueError: if the folder cannot be written or is full.
    """
    fingerprint = _fingerprint(source, short_side, keep_pixels)
    settings = _digest(repr((title, short_side, keep_pixels)).encode()).hex()[:8]
    path = folder / f"{re.sub(r'[^A-Za-z0-9]+', '-', title)[-40:].strip('-')}-{short_side}-{settings}.images"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):  # of several processes one decodes, the others find its file
            index = _open(path, fingerprint)
            if index is None:
                _write(path, source, title, short_side, keep_pixels, fingerprint)
                index = _open(path, fingerprint)
                assert index is not None
    except OSError as error:
        raise ValueError(
            f"decoded images cannot be kept in {folder}: {error.strerror or error}; make room, name another "
            "--cache-dir, or decode anew in every epoch with --cache none."
        ) from None
    about = json.loads(bytes(index["about"].tolist()))
    sizes, length = index["sizes"], about["bytes"]
    if keep_pixels and length <= read_ahead and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, length, os.POSIX_FADV_WILLNEED)
    read = Mapped(path, sizes) if keep_pixels else Streamed(source, short_side)
    return Decoded(read, sizes, index["digests"], {int(i): reason for i, reason in about["unreadable"].items()})


class Mapped:
    """Reads pictures out of a cache file."""

    def __init__(self, path: Path, sizes: Int[Tensor, "n 2"]):
        self.path, self.sizes = path, sizes
        lengths = 3 * sizes.prod(1)
        self.shapes, self.starts = sizes.tolist(), (lengths.cumsum(0) - lengths).tolist()
        self.pixels = np.memmap(path, np.uint8, "r", shape=(int(lengths.sum()),))

    def __call__(self, i: int) -> np.ndarray:
        (h, w), start = self.shapes[i], self.starts[i]
        return self.pixels[start : start + 3 * h * w].reshape(h, w, 3)

    def __reduce__(self):
        return Mapped, (self.path, self.sizes)  # another process maps the file anew


class Streamed:
    """Decodes pictures when they are asked for."""

    def __init__(self, source: Source, short_side: int):
        self.source, self.short_side = source, short_side

    def __call__(self, i: int) -> np.ndarray:
        try:
            return decode(self.source.pictures[i], self.short_side).numpy()
        except Unreadable as reason:
            raise ValueError(f"{self.source.names[i]} could be read when the run began, and now: {reason}.") from None


def _digest(data: bytes | np.ndarray) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def pixel_digest(pixels: np.ndarray) -> int:
    """64 bits of a hash of an image's pixels, as a signed integer."""
    return int.from_bytes(_digest(np.ascontiguousarray(pixels))[:8], signed=True)


def _fingerprint(source: Source, *settings: object) -> str:
    digest = hashlib.blake2b(repr((FORMAT, PIL.__version__, settings)).encode(), digest_size=16)
    for name in source.names:
        digest.update(os.fsencode(name) + b"\0")
    for path in source.files:
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
        except OSError as error:  # a dangling link, say: its pictures are listed as unreadable
            stamp = error.errno
        digest.update(repr(stamp).encode())
    return digest.hexdigest()


def _open(path: Path, fingerprint: str) -> dict[str, Tensor] | None:
    """The index of a whole and current file, None of any other."""
    try:
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END) - TRAILER.size
            file.seek(max(end, 0))
            length, digest, magic = TRAILER.unpack(file.read())
            pixels = end - length
            if magic != MAGIC or pixels < 0:
                return None
            file.seek(pixels)
            index = file.read(length)
            if _digest(index) != digest:
                return None
            index = load(index)
            about = json.loads(bytes(index["about"].tolist()))
            fits = about["bytes"] == pixels and about["fingerprint"] == fingerprint
            return index if fits and about["sample"] == _sample(file, pixels) else None
    except (FileNotFoundError, struct.error):
        return None


def _sample(file, length: int, blocks: int = 64, block: int = 4096) -> str:
    """A digest of evenly spaced blocks: what a crash or a full disk tears is found without reading everything."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(blocks):
        file.seek(i * max(length - block, 0) // (blocks - 1))
        digest.update(file.read(min(block, length)))
    return digest.hexdigest()


def _write(path: Path, source: Source, title: str, short_side: int, keep_pixels: bool, fingerprint: str) -> None:
    """Decode all, on all cores, into a neighbour of `path`, then rename it."""
    total = len(source.pictures)
    sizes, digests = torch.zeros(total, 2, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
    unreadable = {}
    with open_atomically(path, locked=True) as file:
        pictures = track(
            _decode_all(source, short_side),
            description=f"decoding {title}",
            total=total,
            console=Console(stderr=True),
            transient=True,
        )
        for i, picture in enumerate(pictures):
            if isinstance(picture, str):
                unreadable[i] = picture
                continue
            pixels, digests[i] = picture
            sizes[i] = torch.tensor(pixels.shape[:2])
            if keep_pixels:
                file.write(pixels)
        length = file.tell()
        file.flush()
        about = {"bytes": length, "fingerprint": fingerprint, "unreadable": unreadable}
        about = json.dumps({**about, "sample": _sample(file, length)}).encode()
        about = torch.frombuffer(bytearray(about), dtype=torch.uint8)
        index = save({"sizes": sizes, "digests": digests, "about": about})
        file.seek(length)
        file.write(index + TRAILER.pack(len(index), _digest(index), MAGIC))


def _decode_all(source: Source, short_side: int) -> Iterator[tuple[np.ndarray, int] | str]:
    """Pixels and digest of each picture, or why it cannot be read. In threads: Pillow works outside Python's lock."""

    def read(i: int) -> tuple[np.ndarray, int] | str:
        try:
            pixels = decode(source.pictures[i], short_side).numpy()
        except Unreadable as reason:
            return str(reason)
        return pixels, pixel_digest(pixels)

    with ThreadPoolExecutor(cpu_count()) as pool:
        waiting = deque()
        for i in range(len(source.pictures)):  # a bounded window: the writer may be slower than the decoders
            waiting.append(pool.submit(read, i))
            if len(waiting) > 8 * cpu_count():
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
