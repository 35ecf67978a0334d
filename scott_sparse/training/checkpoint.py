"""The state of a run on disk, so that what is killed goes on as if nothing had happened.

A checkpoint is a folder `step-00001240` with safetensors for the model, the target and the optimizer, and `state.json`
with their checksums, the numbers of the loop, and a checksum of itself. It is written beside its name, flushed to the
disk and then renamed, so that under its name it is whole; what a disk damages later is found by the checksums, and the
newest valid one is used. There is no state of random generators in it: every draw is a function of (seed, step).
"""

import hashlib
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save
from torch import nn

from scott_sparse.distributed import full_state_dict, full_tensor, shard_like
from scott_sparse.files import read_json, read_tensors, sync_folder, write_synced
from scott_sparse.shapes import Tensor

STATE = "state.json"
PARTS = ("model", "target", "optimizer")
FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, per parameter


def save_checkpoint(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write the tensors of `PARTS` and a JSON-able state after `step` optimizer steps into `folder`.

    Raises OSError where the disk is full or fails; what was there before is then untouched.
    """
    assert set(parts) == set(PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    beside = folder / f".{path.name}"
    shutil.rmtree(beside, ignore_errors=True)  # of a run that was killed while it saved
    try:
        beside.mkdir()
        files = {}
        for name, tensors in parts.items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            files[f"{name}.safetensors"] = _digest(data)
            write_synced(beside / f"{name}.safetensors", data)
        content = {"format": FORMAT, "step": step, "files": files, "run": state}
        write_synced(beside / STATE, json.dumps({"digest": _digest(_canonical(content)), "content": content}).encode())
        sync_folder(beside)
        if path.exists():  # a damaged one that was passed over, or one from before a resume from an older one
            shutil.rmtree(path)
        beside.rename(path)
        sync_folder(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose checksums fit, if there is one, and the newer ones that are damaged, and why."""
    damaged = {}
    for path in checkpoints(folder):
        try:
            check(path)
        except (ValueError, OSError) as error:
            damaged[path] = str(error)
        else:
            return path, damaged
    return None, damaged


def check(path: Path) -> None:
    """Raises ValueError or OSError where a file is missing or differs from its checksum."""
    content = _content(path)
    for name in (f"{part}.safetensors" for part in PARTS):
        with (path / name).open("rb") as file:
            found = hashlib.file_digest(file, _hasher).hexdigest()
        if found != content["files"].get(name):
            raise ValueError(f"{path / name} is damaged: its checksum differs.")


def read_state(path: Path, form: dict) -> dict:
    """The state that was saved with a checkpoint; `form` has the names and types that it must have, nested as it is.

    Raises ValueError where it is damaged or of another format.
    """
    state = _content(path)["run"]
    _check_form(state, form, f"{path / STATE}")
    return state


def load_checkpoint(path: Path, *, model: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors in place. Raises ValueError where they do not fit."""
    for name, module in (("model", model), ("target", target)):
        place = module.state_dict()
        tensors = read_tensors(path / f"{name}.safetensors", place)
        module.load_state_dict({key: shard_like(tensor, place[key]) for key, tensor in tensors.items()})
    named = dict(model.named_parameters())
    like = {
        f"{name}.{moment}": torch.empty(()) if moment == "step" else p
        for name, p in named.items()
        for moment in MOMENTS
    }
    tensors = read_tensors(path / "optimizer.safetensors", like)
    names = {id(p): name for name, p in named.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]

    def placed(name: str, moment: str) -> Tensor:
        tensor = tensors[f"{name}.{moment}"]
        return tensor if moment == "step" else shard_like(tensor, named[name])

    moments = {i: {moment: placed(name, moment) for moment in MOMENTS} for i, name in enumerate(order)}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})


def tensors_of(
    *, model: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """What `save_checkpoint` writes, whole tensors; the moments of a parameter that had no gradient yet are zeros.

    All processes take part.
    """
    moments = {}
    for name, p in model.named_parameters():
        of_parameter = optimizer.state.get(p)
        if of_parameter is None:
            of_parameter = {moment: torch.zeros(() if moment == "step" else p.shape) for moment in MOMENTS}
        moments |= {f"{name}.{moment}": full_tensor(of_parameter[moment]) for moment in MOMENTS}
    return {"model": full_state_dict(model), "target": target.state_dict(), "optimizer": moments}


def prune(folder: Path, *, last: int, every: int | None) -> None:
    """Remove all but the newest `last`, and those at multiples of `every` steps."""
    for path in checkpoints(folder)[last:]:
        if not every or step_of(path) % every:
            shutil.rmtree(path)


def _content(path: Path) -> dict:
    found = read_json(path / STATE)
    content = found.get("content")
    if not isinstance(content, dict) or found.get("digest") != _digest(_canonical(content)):
        raise ValueError(f"{path / STATE} is damaged: its checksum differs.")
    _check_form(content, {"format": int, "step": int, "files": dict, "run": dict}, str(path / STATE))
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has format {content['format']}, expected {FORMAT}: it is of another version.")
    if path.resolve().name != f"step-{content['step']:08d}":
        raise ValueError(f"{path} holds step {content['step']}: it was renamed.")
    return content


def _check_form(found, form, where: str) -> None:
    """A checksum says that a state is as it was written, not that we wrote it."""
    if isinstance(form, dict):
        if not isinstance(found, dict) or not form.keys() <= found.keys():
            raise ValueError(f"{where} is no state of a run: expected {', '.join(form)}.")
        for name, inner in form.items():
            _check_form(found[name], inner, f"{where}: {name}")
    elif not isinstance(found, form):
        raise ValueError(f"{where} is {type(found).__name__}, which is no state of a run.")


def _canonical(content: dict) -> bytes:
    return json.dumps(content, sort_keys=True).encode()


def _hasher(data: bytes = b""):
    return hashlib.blake2b(data, digest_size=16)


def _digest(data: bytes) -> str:
    return _hasher(data).hexdigest()
