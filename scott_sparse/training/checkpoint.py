"""Checkpoints: the state of a run on disk, from which an interrupted run resumes bit for bit.

A checkpoint is a folder such as `step-00001240` with safetensors files for the model, the target and the optimizer, and
`state.json` with their checksums, the counters of the loop, and a checksum of itself. It is written under a temporary
name, flushed to the disk and then renamed, so that under its name it is complete. Damage that the disk does later is
detected by the checksums, and the newest undamaged checkpoint is used. There is no state of random generators in it:
every random number is a function of (seed, step).
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from scott_sparse.distributed import full_state_dict, full_tensor, shard_like
from scott_sparse.files import read_json, read_tensors, sync_folder, write_synced
from scott_sparse.shapes import Tensor

STATE = "state.json"
PARTS = ("model", "target", "optimizer")
FORMAT = 1
MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of a parameter


def save_checkpoint(folder: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict) -> None:
    """Write the tensors of `PARTS` and a JSON-able state after `step` optimizer steps into `folder`.

    Raises OSError if the disk is full or fails; an existing checkpoint is then unchanged.
    """
    assert set(parts) == set(PARTS)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    temporary = folder / f".{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)  # left by a run that was killed while it saved
    try:
        temporary.mkdir()
        files = {}
        for name, tensors in parts.items():
            data = save({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
            files[f"{name}.safetensors"] = _digest(data)
            write_synced(temporary / f"{name}.safetensors", data)
        content = {"format": FORMAT, "step": step, "files": files, "run": state}
        write_synced(temporary / STATE, json.dumps({"digest": _digest(content), "content": content}).encode())
        sync_folder(temporary)
        if path.exists():  # a damaged one
            shutil.rmtree(path)
        temporary.rename(path)
        sync_folder(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, newest first."""
    paths = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(paths, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    """Optimizer steps done at a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def newest_valid(folder: Path) -> tuple[Path | None, dict[Path, str]]:
    """The newest undamaged checkpoint, if there is one, and the newer ones that are damaged, with the reason."""
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
    """Raises ValueError or OSError if a file of a checkpoint is missing or differs from its checksum."""
    content = _content(path)
    for name in (f"{part}.safetensors" for part in PARTS):
        if _digest((path / name).read_bytes()) != content["files"].get(name):
            raise ValueError(f"{path / name} is damaged: its checksum differs.")


def read_state(path: Path, form: dict) -> dict:
    """The state that was saved with a checkpoint. `form` has the names and types that it must have, nested like it.

    Raises ValueError if it is damaged or has another form.
    """
    state = _content(path)["run"]
    _check_form(state, form, f"{path / STATE}")
    return state


def load_checkpoint(path: Path, *, model: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load a checkpoint's tensors into a model, its target and its AdamW. Raises ValueError where they do not fit."""
    for name, module in (("model", model), ("target", target)):
        own = module.state_dict()
        tensors = read_tensors(path / f"{name}.safetensors", own)
        module.load_state_dict({key: shard_like(tensor, own[key]) for key, tensor in tensors.items()})
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    step = torch.empty(())
    like = {f"{name}.{moment}": step if moment == "step" else p for name, p in parameters for moment in MOMENTS}
    tensors = read_tensors(path / "optimizer.safetensors", like)
    for name, p in parameters:
        moments = {moment: tensors[f"{name}.{moment}"].to(p.device) for moment in MOMENTS}
        optimizer.state[p] = {key: x if key == "step" else shard_like(x, p) for key, x in moments.items()}


def checkpoint_tensors(
    *, model: nn.Module, target: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """The tensors that `save_checkpoint` writes, unsharded; all processes take part.

    The moments of a parameter that was not updated yet are zeros. (`torch.distributed.checkpoint.state_dict` would make
    an update with gradients of zero for them, and the run would no longer be the one that was not saved.)
    """
    moments: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            state = optimizer.state.get(p) or {key: torch.zeros(() if key == "step" else p.shape) for key in MOMENTS}
            moments |= {f"{name}.{key}": full_tensor(state[key]) for key in MOMENTS}
    return {"model": full_state_dict(model), "target": target.state_dict(), "optimizer": moments}


def prune(folder: Path, step: int, *, last: int, every: int | None) -> None:
    """Keep the newest `last` checkpoints up to `step`, and those at multiples of `every`; remove the others."""
    kept = [path for path in checkpoints(folder) if step_of(path) <= step]
    kept = kept[:last] + [path for path in kept if every and step_of(path) % every == 0]
    for path in set(checkpoints(folder)) - set(kept):
        shutil.rmtree(path)


def _content(path: Path) -> dict[str, Any]:
    signed = read_json(path / STATE)
    content = signed.get("content")
    if not isinstance(content, dict) or signed.get("digest") != _digest(content):
        raise ValueError(f"{path / STATE} is damaged: its checksum differs.")
    _check_form(content, {"format": int, "step": int, "files": dict, "run": dict}, str(path / STATE))
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has format {content['format']}, expected {FORMAT}: it is of another version.")
    if path.resolve().name != f"step-{content['step']:08d}":
        raise ValueError(f"{path} holds step {content['step']}: it was renamed.")
    return content


def _check_form(value: Any, form: Any, where: str) -> None:
    """A checksum says that a state is as it was written, not that this program wrote it."""
    if isinstance(form, dict):
        if not isinstance(value, dict) or not form.keys() <= value.keys():
            raise ValueError(f"{where} is no state of a run: expected {', '.join(form)}.")
        for name, inner in form.items():
            _check_form(value[name], inner, f"{where}: {name}")
    elif not isinstance(value, form):
        raise ValueError(f"{where} is {type(value).__name__}, which is no state of a run.")


def _digest(content: bytes | dict) -> str:
    data = content if isinstance(content, bytes) else json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=16).hexdigest()
