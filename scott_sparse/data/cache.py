"""Decode a data set once, into one memory-mapped file of uint8 pixels that all processes of a machine share.

A cache file holds the pixels of the readable pictures one after the other (each h x w x channels), then the index
(safetensors), then a trailer with the length and digest of the index. It is written under another name and renamed,
under a file lock that ends with its process. A file is used only if trailer, index, sampled pixels and fingerprint are
as expected; otherwise it is replaced. The fingerprint covers the settings, the versions of the packages that read
pictures, and the name, size and time of every file, and with them the bit depth that is found in those files.

Mapped pages are in the page cache of the kernel: a data set that fits in memory is there once, for all processes.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from filelock import FileLock
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import track
from safetensors.torch import load, save

from scott_sparse.data.decode import decode, largest_value, pixel_digest, white_for
from scott_sparse.data.images import Images
from scott_sparse.data.readers import FIRST_PAGE, Picture, Selection, Unreadable, prepare_pillow, reader_versions
from scott_sparse.data.sources import Source, printable
from scott_sparse.distributed import cpu_count
from scott_sparse.files import open_atomically
from scott_sparse.shapes import Int, Tensor

CACHE_DIR = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "scott_sparse"
TEMPORARY_CACHE_DIR = Path(tempfile.gettempdir()) / f"scott_sparse-{getattr(os, 'getuid', lambda: 'cache')()}"
FORMAT = 3  # part of every fingerprint: raise it whenever a decoded pixel or the layout of the file changes
TRAILER = struct.Struct("<Q16s8s")  # length and digest of the index, then MAGIC
MAGIC = b"scottpix"


@functools.cache
def writable_cache(folder: Path) -> Path:
    """`folder`; if that is the default and cannot be written, one among the temporary files, and a line says so."""
    if folder != CACHE_DIR:
        return folder  # where it cannot be used, an error says so
    try:
        if str(folder).startswith("~"):
            raise OSError("there is no home folder")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return folder
    except OSError as error:
        reason = error.strerror or error
    print(
        f"note: decoded images and features are kept in {TEMPORARY_CACHE_DIR}, as {folder} cannot be written "
        f"({reason}); name a folder with --cache-dir to keep them between runs.",
        file=sys.stderr,
    )
    TEMPORARY_CACHE_DIR.mkdir(mode=0o700, exist_ok=True)
    return TEMPORARY_CACHE_DIR


def decode_once(
    source: Source,
    *,
    title: str,
    short_side: int,
    selection: Selection = FIRST_PAGE,
    keep_pixels: bool,
    folder: Path,
    read_ahead_bytes: int,
) -> tuple[Images, dict[int, str], tuple[str, ...]]:
    """Decode a source to a file in `folder`, or open that file; larger pictures are resized to `short_side` pixels.

    Without `keep_pixels` the file holds the index only (sizes, digests, unreadable pictures), and `read` decodes again.
    Up to `read_ahead_bytes` of pixels are read into memory at once; a larger file is read as its pixels are used.

    Returns:
        All pictures of the source; by number why some cannot be read: these have size (0, 0); and what a user should
        know about how pictures were read, such as the range of values of more than 8 bits.

    Raises:
        ValueError: if the cache file cannot be written, or the source cannot deliver a picture.
    """
    prepare_pillow()  # before the threads that decode
    settings = (title, short_side, keep_pixels, selection)
    fingerprint = _fingerprint(source, *settings)
    words, code = re.sub(r"[^A-Za-z0-9]+", "-", title)[-40:].strip("-"), _digest(repr(settings).encode()).hex()[:8]
    path = folder / f"{words}-{short_side}-{code}.images"
    try:  # an OSError of the source is not an OSError here: see `_picture`
        index = None
        with contextlib.suppress(NotADirectoryError, PermissionError):  # a folder that cannot be used: see below
            index = _read_index(path, fingerprint)  # without a lock, as a current file may be read-only
        if index is None and writable_cache(folder) != folder:
            path = writable_cache(folder) / path.name
            folder, index = path.parent, _read_index(path, fingerprint)
        if index is None:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):  # one process decodes, the others wait and then find its file
                if (index := _read_index(path, fingerprint)) is None:
                    _write(path, source, title, short_side, selection, keep_pixels, fingerprint)
                    index = _read_index(path, fingerprint)
            assert index is not None
    except OSError as error:
        raise ValueError(
            f"decoded images cannot be kept in {folder}: {error.strerror or error}; make room, name another "
            "--cache-dir, or decode anew in every epoch with --cache none."
        ) from None
    sizes, digests, about = index
    if keep_pixels and about["bytes"] <= read_ahead_bytes and hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, about["bytes"], os.POSIX_FADV_WILLNEED)
    again = functools.partial(_decode_again, source, short_side, selection, about["white"])
    read = MappedPixels(path, sizes, selection.channels) if keep_pixels else again
    labels = torch.tensor(source.labels) if source.labels else None
    images = Images(read, torch.arange(len(sizes)), sizes, digests, labels, source.names, selection.channels)
    notes = [f"bands {' '.join(map(str, selection.bands))} of pictures with several bands"] if selection.bands else []
    return images, {int(i): reason for i, reason in about["unreadable"].items()}, (*notes, *about["notes"])


def decode_some(
    source: Source, indices: Sequence[int], *, short_side: int, selection: Selection = FIRST_PAGE
) -> tuple[Images, dict[int, str]]:
    """Some pictures of a source, decoded into memory, no file is written; and by number why some cannot be read."""
    prepare_pillow()
    find_white, decoded, unreadable = FindWhite(source, selection), {}, {}
    for i in indices:
        try:
            decoded[i] = decode(_picture(source, i), short_side, selection, find_white=find_white)
        except Unreadable as reason:
            unreadable[i] = str(reason)
    labels = torch.tensor([source.labels[i] for i in decoded]) if source.labels else None
    return replace(Images.of(list(decoded.values()), labels), names=[source.names[i] for i in decoded]), unreadable


class MappedPixels:
    """Reads pictures from a cache file; when it is pickled, the receiving process maps the file again."""

    def __init__(self, path: Path, sizes: Int[Tensor, "n 2"], channels: int):
        self.path, self.sizes, self.channels = path, sizes, channels
        lengths = channels * sizes.prod(1)
        self.shapes, self.starts = sizes.tolist(), (lengths.cumsum(0) - lengths).tolist()
        self.pixels = np.memmap(path, np.uint8, "r", shape=(int(lengths.sum()),))

    def __call__(self, i: int) -> np.ndarray:
        (h, w), start = self.shapes[i], self.starts[i]
        return self.pixels[start : start + self.channels * h * w].reshape(h, w, self.channels)

    def __reduce__(self):
        return MappedPixels, (self.path, self.sizes, self.channels)


def _decode_again(
    source: Source, short_side: int, selection: Selection, white: int | float | None, i: int
) -> np.ndarray:
    try:
        return decode(source.picture(i), short_side, selection, find_white=lambda: white).numpy()
    except Unreadable as reason:
        raise ValueError(f"{source.names[i]} could be read when the run began, and now: {reason}.") from None


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _fingerprint(source: Source, *settings: object) -> str:
    digest = hashlib.blake2b(repr((FORMAT, reader_versions(), settings)).encode(), digest_size=16)
    for name in source.names:
        digest.update(os.fsencode(name) + b"\0")
    stamp: object
    for path in source.files:
        try:
            status = path.stat()
            stamp = status.st_size, status.st_mtime_ns
        except OSError as error:  # for example a dangling link: its picture is listed as unreadable
            stamp = error.errno
        digest.update(repr(stamp).encode())
    return digest.hexdigest()


def _read_index(path: Path, fingerprint: str) -> tuple[Tensor, Tensor, dict] | None:
    """Sizes, digests and further facts from a complete and current cache file; None for any other file."""
    with contextlib.suppress(FileNotFoundError, struct.error), path.open("rb") as file:
        end = file.seek(0, os.SEEK_END) - TRAILER.size
        file.seek(max(end, 0))
        length, digest, magic = TRAILER.unpack(file.read())
        pixels = end - length
        if magic != MAGIC or pixels < 0:
            return None
        file.seek(pixels)
        data = file.read(length)
        if _digest(data) != digest:
            return None
        index = load(data)
        about = json.loads(bytes(index["about"].tolist()))
        current = about["bytes"] == pixels and about["fingerprint"] == fingerprint
        if current and about["sample"] == _sample(file, pixels):
            return index["sizes"], index["digests"], about
    return None


def _sample(file: IO[bytes], length: int, blocks: int = 64, block_bytes: int = 4096) -> str:
    """Digest of evenly spaced blocks of the pixels: finds what a crash or a full disk tore without reading the file."""
    digest = hashlib.blake2b(digest_size=16)
    for i in range(blocks):
        file.seek(i * max(length - block_bytes, 0) // (blocks - 1))
        digest.update(file.read(min(block_bytes, length)))
    return digest.hexdigest()


def _write(
    path: Path,
    source: Source,
    title: str,
    short_side: int,
    selection: Selection,
    keep_pixels: bool,
    fingerprint: str,
) -> None:
    total = len(source.names)
    sizes, digests = torch.zeros(total, 2, dtype=torch.int64), torch.zeros(total, dtype=torch.int64)
    unreadable, notes = {}, Counter[str]()
    find_white = FindWhite(source, selection)
    with open_atomically(path, locked=True) as file:
        decoded = _decode_all(source, short_side, selection, find_white)
        console, description = Console(stderr=True), f"decoding {escape(printable(title))}"
        for i, picture in enumerate(track(decoded, description, total, console=console, transient=True)):
            if i == -(-total // 10):
                _check_room(folder=path.parent, needed=file.tell() * (total - i) // i)
            if isinstance(picture, str):
                unreadable[i] = picture
                continue
            pixels, digests[i], picture_notes = picture
            sizes[i] = torch.tensor(pixels.shape[:2])
            notes.update(picture_notes)
            if keep_pixels:
                file.write(pixels.data)
        length = file.tell()
        file.flush()
        lines = [f"{note} ({count:,} images)" for note, count in sorted(notes.items())]
        if isinstance(white := find_white.white, int):
            lines.append(f"values of more than 8 bits are taken as {white.bit_length()}-bit (0 to {white})")
        elif white:
            lines.append(f"floating-point values are taken as 0 to {white:g}")
        about = {"bytes": length, "fingerprint": fingerprint, "unreadable": unreadable, "sample": _sample(file, length)}
        about |= {"white": find_white.white, "notes": lines}
        encoded = torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8)
        index = save({"sizes": sizes, "digests": digests, "about": encoded})
        file.seek(length)
        file.write(index + TRAILER.pack(len(index), _digest(index), MAGIC))


def _check_room(*, folder: Path, needed: int) -> None:
    """Raises OSError if a disk will not hold what is still to be decoded, by the mean size of the first tenth."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"about {decimal(needed)} more are needed, {decimal(free)} are free")


class FindWhite:
    """`white_for` a source's pictures of more than 8 bits, found when the first of them is decoded, in any thread.

    A file of 16 bits may hold values of 12: those of all pictures are compared, so that an image keeps its brightness
    relative to the others.
    """

    def __init__(self, source: Source, selection: Selection):
        self.source, self.selection = source, selection
        self.white: int | float | None = None
        self.lock = threading.Lock()

    def __call__(self) -> int | float:
        with self.lock:
            if self.white is None:
                with ThreadPoolExecutor(cpu_count()) as pool:
                    self.white = white_for(max(pool.map(self._largest_value, range(len(self.source.names)))))
            return self.white

    def _largest_value(self, i: int) -> int | float:
        with contextlib.suppress(Unreadable):
            return largest_value(_picture(self.source, i), self.selection)
        return 0


def _picture(source: Source, i: int) -> Picture:
    """Picture i; an OSError of the source becomes a ValueError that names it, so that the cache is not blamed."""
    try:
        return source.picture(i)
    except OSError as error:
        raise ValueError(f"{source.names[i]} cannot be read: {error}") from error


def _decode_all(
    source: Source, short_side: int, selection: Selection, find_white: Callable[[], int | float]
) -> Iterator[tuple[np.ndarray, int, list[str]] | str]:
    """Pixels, digest and notes of each picture, or why it cannot be read.

    By threads, as Pillow releases Python's lock.
    """

    def decode_one(i: int) -> tuple[np.ndarray, int, list[str]] | str:
        notes: list[str] = []
        try:
            picture = _picture(source, i)
            pixels = decode(picture, short_side, selection, find_white=find_white, note=notes.append).numpy()
        except Unreadable as reason:
            return str(reason)
        return pixels, pixel_digest(pixels), notes

    total, block = len(source.names), 32 * cpu_count()  # in blocks, as the writer may be slower than the decoders
    with ThreadPoolExecutor(cpu_count()) as pool:
        for start in range(0, total, block):
            yield from pool.map(decode_one, range(start, min(start + block, total)))
