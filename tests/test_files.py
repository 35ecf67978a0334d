"""Weights, configs and checkpoints from strangers: anything that is not right is refused with one line."""

import json
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from scott_sparse import Encoder, EncoderConfig, load_encoder, save_encoder
from scott_sparse.files import DTYPES, MAX_JSON_BYTES, read_json, tensors_to_bytes
from scott_sparse.model.weights import CONFIG, WEIGHTS
from scott_sparse.training.checkpoint import PARTS, check, newest_valid, save_checkpoint

TINY = EncoderConfig(dim=8, depth=1, heads=2, patch_size=4, stem_width=4, ffn="mlp")  # small files to fuzz
FUZZ = settings(
    deadline=None, database=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_encoder(Encoder(TINY), folder)
    return folder


def test_tensors_to_bytes_is_what_safetensors_writes():
    tensors = {f"猫 {name}": torch.randn(4, 3).to(dtype) for name, dtype in DTYPES.items()}
    tensors |= {"empty": torch.zeros(0, 4), "scalar": torch.tensor(7)}
    assert tensors_to_bytes(tensors) == save(tensors)
    turned = {"turned": torch.randn(3, 4).T}
    assert torch.equal(load(tensors_to_bytes(turned))["turned"], turned["turned"])


@pytest.fixture
def original(folder):
    """The two files as they should be, put back after the test."""
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS["target"], CONFIG)}
    yield files
    for name, data in files.items():
        (folder / name).write_bytes(data)


def refused(folder) -> str | None:
    """The one line with which a load is refused; None where it is not. Anything else than a ValueError is an error."""
    try:
        encoder = load_encoder(folder)
    except ValueError as error:
        line = " ".join(str(error).split())
        assert 0 < len(line) < 1000
        return line
    assert not any(p.is_meta for p in encoder.parameters())
    return None


def mutate(data: bytes, kind: str, where: float, value: int, length: int) -> bytes:
    at = int(where * len(data))
    if kind == "flip":
        return data[:at] + bytes([data[at] ^ (value or 1)]) + data[at + 1 :] if at < len(data) else data
    if kind == "cut":
        return data[:at]
    if kind == "insert":
        return data[:at] + bytes([value]) * length + data[at:]
    if kind == "remove":
        return data[:at] + data[at + length :]
    return data[:at] + data[at : at + length] * 2 + data[at + length :]  # repeat


MUTATIONS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "remove", "repeat"]),
        st.floats(0, 1, exclude_max=True),
        st.integers(0, 255),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)


@settings(FUZZ, max_examples=1000)
@given(mutations=MUTATIONS, in_header=st.booleans())
def test_fuzzed_weights(mutations, in_header, folder, original):
    data = original[WEIGHTS["target"]]
    header = 8 + struct.unpack("<Q", data[:8])[0]
    head, tail = (data[:header], data[header:]) if in_header else (data, b"")
    for mutation in mutations:
        head = mutate(head, *mutation)
    (folder / WEIGHTS["target"]).write_bytes(head + tail)
    refused(folder)


@settings(FUZZ, max_examples=700)
@given(mutations=MUTATIONS)
def test_fuzzed_config(mutations, folder, original):
    data = original[CONFIG]
    for mutation in mutations:
        data = mutate(data, *mutation)
    (folder / CONFIG).write_bytes(data)
    refused(folder)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(FUZZ, max_examples=700)
@given(name=st.sampled_from([*json.loads(json.dumps(vars(TINY)))]), value=JSON)
def test_fuzzed_fields_of_the_config(name, value, folder, original):
    (folder / CONFIG).write_text(json.dumps({**json.loads(original[CONFIG]), name: value}))
    refused(folder)


@settings(FUZZ, max_examples=300)
@given(mutations=MUTATIONS, part=st.sampled_from([*(f"{part}.safetensors" for part in PARTS), "state.json"]))
def test_fuzzed_checkpoints_are_found_damaged(mutations, part, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    tensors = {name: {"x": torch.arange(4.0)} for name in PARTS}
    save_checkpoint(folder, 3, tensors, {"log": {}})
    save_checkpoint(folder, 7, tensors, {"log": {}})
    path = folder / "step-00000007" / part
    before = data = path.read_bytes()
    for mutation in mutations:
        data = mutate(data, *mutation)
    path.write_bytes(data)
    found, damaged = newest_valid(folder)
    if data == before:
        assert found.name == "step-00000007"
    elif part == "state.json" and found.name == "step-00000007":  # white space, or the same text said twice
        assert read_json(path)["content"] == json.loads(before)["content"]
    else:
        assert found.name == "step-00000003" and list(damaged) == [path.parent]
        check(found)


WRONG = {
    "a huge header": lambda data: struct.pack("<Q", 2**62) + data[8:],
    "a header of null bytes": lambda data: struct.pack("<Q", 64) + b"\0" * 64,
    "no object": lambda data: struct.pack("<Q", 2) + b"[]",
    "half precision": lambda data: save({name: x.half() for name, x in Encoder(TINY).state_dict().items()}),
    "another name": lambda data: save({**Encoder(TINY).state_dict(), "../../etc/passwd": torch.zeros(1)}),
    "nothing": lambda data: b"",
    "a pickle": lambda data: b"cos\nsystem\n(S'touch pwned'\ntR." + data,
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_weights(wrong, folder, original):
    (folder / WEIGHTS["target"]).write_bytes(WRONG[wrong](original[WEIGHTS["target"]]))
    assert refused(folder) is not None


CONFIGS = {
    "deep": ("[" * 100_000, "nested too deeply"),
    "a list": ("[1]", "no JSON object but list"),
    "not JSON": ("{'dim': 8}", "is no JSON"),
    "digits": ('{"dim": ' + "9" * 10_000 + "}", "is no JSON"),
    "unknown": ('{"dim": 8, "depth": 1, "heads": 2, "__class__": "x"}', "unknown field '__class__'"),
    "enormous": ('{"dim": 1000000000, "depth": 1, "heads": 2}', "dim 1000000000 is outside 1 to 16384"),
    "endless": ('{"dim": 8, "depth": 1000000000, "heads": 2}', "depth 1000000000 is outside"),
    "text": ('{"dim": "8", "depth": 1, "heads": 2}', "dim is '8', expected int"),
    "missing": ('{"dim": 8}', "depth, heads is missing"),
}


@pytest.mark.parametrize("wrong", CONFIGS)
def test_wrong_configs(wrong, folder, original):
    text, said = CONFIGS[wrong]
    (folder / CONFIG).write_text(text)
    assert said in refused(folder)


def test_large_json_is_not_read(tmp_path):
    path = tmp_path / "big.json"
    with path.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ValueError, match="is larger than 16 MiB"):
        read_json(path)


def test_memory_is_bounded_by_the_file(tmp_path):
    """A config of 25 billion parameters beside a small file: refused without allocating them."""
    save_encoder(Encoder(TINY), tmp_path)
    (tmp_path / CONFIG).write_text('{"dim": 16384, "depth": 8, "heads": 2}')
    code = (
        "import resource, sys; from scott_sparse import load_encoder\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: load_encoder(sys.argv[1])\n"
        "except ValueError as error: print(error)\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    *said, grown = done.stdout.splitlines()
    assert "does not have the tensors" in said[0] and int(grown) < 200
