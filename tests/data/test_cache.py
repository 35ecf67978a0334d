"""Cache files hold what was decoded; stale and torn ones are replaced; errors are reported for what failed."""

import dataclasses
import errno
import multiprocessing
import os
import pickle
import resource
import subprocess
import sys

import pytest
import torch
from conftest import write_photo

from scott_sparse.data import cache
from scott_sparse.data.cache import TRAILER, decode_once
from scott_sparse.data.decode import decode
from scott_sparse.data.sources import folder_source


def decode_folder(root, kept, **changes):
    settings = {"title": "photos", "short_side": 32, "keep_pixels": True, "read_ahead_bytes": 2**20, "folder": kept}
    images, unreadable, _ = decode_once(folder_source(root), **{**settings, **changes})
    assert not unreadable
    return images


@pytest.fixture
def counted(monkeypatch):
    """The pictures decoded so far."""
    seen = []
    monkeypatch.setattr(cache, "decode", lambda *args, **options: seen.append(args[0]) or decode(*args, **options))
    return seen


def test_a_current_file_needs_no_lock(photos, tmp_path, counted, monkeypatch):
    """It may lie in a folder that is read-only, or another user's."""
    root = photos({"a": 2})
    decode_folder(root, tmp_path / "kept")

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache, "FileLock", refuse)
    assert len(decode_folder(root, tmp_path / "kept")) == 2 and len(counted) == 2
    with pytest.raises(ValueError, match=r"cannot be kept in .*Permission denied"):
        decode_folder(root, tmp_path / "other")


def test_what_is_kept_is_what_was_decoded(photos, tmp_path, counted):
    root = photos({"a": 3, "b": 2})
    first = decode_folder(root, tmp_path / "kept")
    assert len(counted) == 5
    again = decode_folder(root, tmp_path / "kept")
    assert len(counted) == 5
    for i, path in enumerate(folder_source(root).files):
        expected = decode(path, 32)
        assert torch.equal(torch.tensor(again.read(i)), expected)
        assert again.sizes[i].tolist() == list(expected.shape[:2])
    assert torch.equal(first.digests, again.digests) and len(set(first.digests.tolist())) == 5


def test_without_pixels_only_the_index_is_kept(photos, tmp_path, counted):
    root = photos({"a": 3, "b": 2})
    kept = decode_folder(root, tmp_path / "kept")
    streamed = decode_folder(root, tmp_path / "kept", keep_pixels=False)
    assert len(counted) == 10
    streamed = decode_folder(root, tmp_path / "kept", keep_pixels=False)
    assert len(counted) == 10
    assert torch.equal(streamed.sizes, kept.sizes) and torch.equal(streamed.digests, kept.digests)
    assert all((streamed.read(i) == kept.read(i)).all() for i in range(5)) and len(counted) == 15
    small, large = sorted(path.stat().st_size for path in (tmp_path / "kept").glob("*.images"))
    assert large - small == pytest.approx(3 * int(kept.sizes.prod(1).sum()), abs=16)


CHANGES = {
    "another time": lambda path: os.utime(path, (1, 1)),
    "another size": lambda path: write_photo(path, 90, 20),
    "deleted": lambda path: path.unlink(),
    "renamed": lambda path: path.rename(path.with_name("z.png")),
    "one more": lambda path: write_photo(path.with_name("more.png"), 40, 40),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_stale_file_is_made_anew(change, photos, tmp_path, counted):
    root = photos({"a": 3, "b": 2})
    decode_folder(root, tmp_path / "kept")
    CHANGES[change](root / "a" / "0.png")
    counted.clear()
    decoded = decode_folder(root, tmp_path / "kept")
    assert len(counted) == len(decoded.sizes) == len(folder_source(root).names)
    assert len(list((tmp_path / "kept").glob("*.images"))) == 1  # in the place of the stale one


def test_settings_and_sets_have_files_of_their_own(photos, tmp_path):
    root = photos({"a": 3, "b": 2})
    for changes in ({}, {"short_side": 16}, {"title": "other"}, {"title": "../../etc/passwd\n"}):
        decode_folder(root, tmp_path / "kept", **changes)
    assert len(list((tmp_path / "kept").glob("*.images"))) == 4


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "first byte gone": lambda path: path.write_bytes(path.read_bytes()[1:]),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "a pixel": lambda path: flip(path, 0),
    "the index": lambda path: flip(path, -TRAILER.size - 5),
    "the trailer": lambda path: flip(path, -30),
    "the magic": lambda path: flip(path, -1),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size - 200) + path.read_bytes()[-200:]),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("keep_pixels", [True, False])
def test_a_torn_file_is_made_anew(damage, keep_pixels, photos, tmp_path, counted):
    root = photos({"a": 3, "b": 2})
    decode_folder(root, tmp_path / "kept", keep_pixels=keep_pixels)
    (file,) = (tmp_path / "kept").glob("*.images")
    whole = file.read_bytes()
    DAMAGE[damage](file)
    counted.clear()
    decoded = decode_folder(root, tmp_path / "kept", keep_pixels=keep_pixels)
    assert len(counted) == 5 and file.read_bytes() == whole
    assert decoded.read(4).shape[2] == 3


def test_a_killed_writer_leaves_nothing_that_is_used(photos, tmp_path, monkeypatch):
    root = photos({"a": 3, "b": 2})
    kept = tmp_path / "kept"
    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "replace", lambda *_: os._exit(9))  # the last moment before the file has its name
        process = multiprocessing.get_context("fork").Process(target=decode_folder, args=(root, kept))
        process.start()
        process.join(30)
    assert process.exitcode == 9 and not list(kept.glob("*.images")) and list(kept.glob("*.partial"))
    assert len(decode_folder(root, kept).sizes) == 5
    assert len(list(kept.glob("*.images"))) == 1 and not list(kept.glob("*.partial"))


def _count_decoded(root, kept, results):
    seen = []
    cache.decode = lambda *args, **options: seen.append(args[0]) or decode(*args, **options)
    pixels = decode_folder(root, kept).read(7)
    results.put((len(seen), int(pixels.sum())))


def test_of_several_processes_one_decodes(photos, tmp_path):
    root = photos({"a": 20, "b": 20})
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_count_decoded, args=(root, tmp_path / "kept", results)) for _ in range(4)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(count for count, _ in answers) == [0, 0, 0, 40]
    assert len({pixels for _, pixels in answers}) == 1


def test_a_folder_that_cannot_be_written_is_named(photos, tmp_path):
    root = photos({"a": 3})
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot be kept in .*file.*--cache-dir.*--cache none"):
        decode_folder(root, tmp_path / "file" / "kept")


def test_a_full_disk_is_named_and_left_clean(photos, tmp_path):
    root = photos({"a": 3})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as a full disk: the fifth kilobyte cannot be written
    try:
        with pytest.raises(ValueError, match=r"cannot be kept in .*make room"):
            decode_folder(root, tmp_path / "kept")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "kept").glob("*.images")) and not list((tmp_path / "kept").glob("*.partial"))


def test_an_error_of_the_source_is_not_blamed_on_the_cache(photos, tmp_path):
    source = folder_source(photos({"a": 3}))

    def picture(i):
        if i == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/mnt/shard-7.arrow")
        return source.picture(i)

    failing = dataclasses.replace(source, picture=picture)
    with pytest.raises(ValueError, match=r"a/1\.png cannot be read: .*Input/output error: '/mnt/shard-7\.arrow'"):
        decode_once(failing, title="x", short_side=32, keep_pixels=True, folder=tmp_path / "kept", read_ahead_bytes=0)
    assert not list((tmp_path / "kept").glob("*.images")) and not list((tmp_path / "kept").glob("*.partial"))


def test_another_process_maps_the_file_instead_of_copying_it(photos, tmp_path):
    decoded = decode_folder(photos({"a": 30, "b": 30}), tmp_path / "kept")
    assert int(decoded.sizes.prod(1).sum()) * 3 > 20_000
    sent = pickle.dumps(decoded.read)
    assert len(sent) < 5_000 and (pickle.loads(sent)(59) == decoded.read(59)).all()


def test_a_picture_that_has_gone_bad_is_named(photos, tmp_path):
    root = photos({"a": 3})
    streamed = decode_folder(root, tmp_path / "kept", keep_pixels=False)
    (root / "a" / "1.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"a/1\.png could be read when the run began"):
        streamed.read(1)


@pytest.mark.parametrize("home", ["a file", "none"])
def test_without_a_home_folder_the_cache_is_among_temporary_files(home, photos, tmp_path, clean_environment):
    """One line says where; the second run finds what the first one left. It is found on import."""
    (tmp_path / "file").write_text("")
    environment = {**clean_environment, "HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "tmp")}
    environment.pop("XDG_CACHE_HOME")
    (tmp_path / "tmp").mkdir()
    code = (
        "import sys; from scott_sparse.data import cache, dataset\n"
        f"if {home == 'none'}: cache.CACHE_DIR = cache.Path('~/.cache')  # what expanduser leaves\n"
        "config = dataset.DataConfig(data=sys.argv[1], cache_dir=cache.CACHE_DIR)\n"
        "for _ in range(2): print(len(dataset.open_data(config, short_side=16).pretrain))"
    )
    arguments = [sys.executable, "-c", code, photos({"a": 3, "b": 3})]
    done = subprocess.run(arguments, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    notes = [line for line in done.stderr.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and f"are kept in {tmp_path}/tmp/scott_sparse-" in notes[0] and "--cache-dir" in notes[0]
    assert len(list((tmp_path / "tmp").rglob("*.images"))) == 1 and not (tmp_path / "~").exists()
