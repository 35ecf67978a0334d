"""Encoders on disk, and the state dicts of the paper's code.

encoder = load_encoder("runs/demo")        # or a Hugging Face Hub repository, "owner/name"
features = encoder(encoder.preprocess(image)[None])

A run folder has the target encoder, the one to use, in `encoder.safetensors`, the context encoder that the target
follows in `context.safetensors`, and their config and preprocessing in `encoder.json`. With MIM-JEPA it also has the
predictor, in `predictor.safetensors` and `predictor.json` (`load_predictor`).
"""

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_type_hints

import torch

from scott_sparse.files import load_strictly, read_json, tensors_to_bytes, write_atomically, write_json
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.model.vit import Encoder, EncoderConfig, Predictor, SwiGLU, positions
from scott_sparse.shapes import Tensor

WEIGHTS = {"target": "encoder.safetensors", "context": "context.safetensors"}
CONFIG = "encoder.json"
PREDICTOR, PREDICTOR_CONFIG = "predictor.safetensors", "predictor.json"
TRAINED = {  # how an encoder was trained, by its name among the results of evaluation
    "pretrained": "pretrained without labels",
    "context": "pretrained without labels",
    "fine-tuned": "fine-tuned with labels",
    "trained from scratch": "trained from scratch with labels",
}

# Names of the paper's code and of this package; # stands for the number of a block.
_PAPER_NAMES = {
    "tokenizer.tokenizer.0.weight": "tokenizer.kernels.0",
    "tokenizer.tokenizer.3.weight": "tokenizer.kernels.1",
    "tokenizer.proj.weight": "tokenizer.proj.weight",
    "tokenizer.proj.bias": "tokenizer.proj.bias",
    "transformer.msk_embed": "mask_token",
    "transformer.reg_embed": "transformer.registers",
    "transformer.blocks.#.self_attn.qkv.weight": "transformer.blocks.#.attention.qkv.weight",
    "transformer.blocks.#.self_attn.proj.weight": "transformer.blocks.#.attention.proj.weight",
    "transformer.blocks.#.ffn_layer.w12.weight": "transformer.blocks.#.ffn.fused.weight",  # SwiGLU
    "transformer.blocks.#.ffn_layer.linear1.weight": "transformer.blocks.#.ffn.fused.weight",  # MLP
    "transformer.blocks.#.ffn_layer.last_linear.weight": "transformer.blocks.#.ffn.out.weight",
    **{f"head.{layer}.{kind}": f"head.{layer}.{kind}" for layer in (1, 2) for kind in ("weight", "bias")},
}


def save_encoder(
    encoder: Encoder, folder: str | Path, *, weights: str = "target", preprocess: Preprocess | None = None
) -> None:
    """Write config and weights into `folder`, as its "target" or "context" encoder; each file is written atomically.

    `preprocess`: what the encoder was trained with; default: that of `encoder`.
    """
    preprocess = preprocess or encoder.preprocess
    folder = Path(folder)
    write_atomically(folder / WEIGHTS[weights], tensors_to_bytes(encoder.state_dict()))
    entry = {"preprocess": preprocess.to_json()} if preprocess else {}
    write_json(folder / CONFIG, {**dataclasses.asdict(encoder.config), **entry})


def load_encoder(source: str | Path, *, weights: str = "target", engine: str = "auto", **hub_options: Any) -> Encoder:
    """The "target" or "context" encoder of a run folder, or of a Hub repository `owner/name`, in eval mode on the CPU.

    `hub_options` are those of `huggingface_hub.snapshot_download`, such as `revision`, `token` and `cache_dir`.
    Raises ValueError where there is none, and where names, shapes or dtypes do not match the config: no parameter keeps
    a random value. The files need not be trusted, nothing in them is executed (`scott_sparse.files`).
    """
    folder = Path(source)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS[weights], CONFIG], **hub_options))
    for name in (WEIGHTS[weights], CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"no encoder in {source}: expected {WEIGHTS[weights]} and {CONFIG}; {name} is missing.")
    config = read_config(folder / CONFIG)
    with torch.device("meta"):  # a config may claim any size; memory is allocated for weights that are there
        encoder = Encoder(config, engine=engine)
    load_strictly(encoder, folder / WEIGHTS[weights])
    encoder.run = folder
    if (entry := read_json(folder / CONFIG).get("preprocess")) is not None:
        try:
            encoder.preprocess = Preprocess.from_json(entry)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        if len(encoder.preprocess.mean) != config.in_channels:
            given = f"mean and std of {len(encoder.preprocess.mean)} channels"
            raise ValueError(f"{folder / CONFIG}: preprocess has {given}, expected in_channels {config.in_channels}.")
    return encoder.eval()


def trained_by(recipe: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """How the target encoder of a run folder was trained, a key of TRAINED, by its recipe.json and summary.json."""
    if recipe.get("recipe") != "finetune":  # of a folder of eval/finetune.py
        return "pretrained"
    return "trained from scratch" if summary.get("subject") == "random" else "fine-tuned"


def save_predictor(
    state: dict[str, Tensor], folder: str | Path, *, objective: ObjectiveConfig, hide_ratio: float, mask_shape: str
) -> None:
    """Write the state of a predictor and how it was trained, beside its context encoder."""
    folder = Path(folder)
    write_atomically(folder / PREDICTOR, tensors_to_bytes(state))
    trained = {"depth": objective.predictor_depth, "target": objective.mim_target, "context": objective.context}
    write_json(folder / PREDICTOR_CONFIG, {**trained, "hide_ratio": hide_ratio, "mask_shape": mask_shape})


def load_predictor(folder: str | Path) -> tuple[MIMJEPA, float, str]:
    """Context encoder and predictor of a run folder as a model in eval mode; the hide ratio and shape of its masks.

    Raises ValueError for a run without a predictor, and as `load_encoder`.
    """
    folder = Path(folder)
    if not all((folder / name).is_file() for name in (PREDICTOR, PREDICTOR_CONFIG)):
        raise ValueError(
            f"no predictor in {folder}: expected {PREDICTOR} and {PREDICTOR_CONFIG}, which train/pretrain.py writes at "
            "the end of a run with MIM-JEPA (--mim-weight above 0); pretrain again."
        )
    encoder = load_encoder(folder, weights="context")
    entry = {"target": "last", **read_json(folder / PREDICTOR_CONFIG)}  # earlier versions wrote no target
    kinds = {"depth": int, "target": str, "context": str, "hide_ratio": float, "mask_shape": str}
    if {name: type(value) for name, value in entry.items()} != kinds or not 1 <= entry["depth"] <= 256:
        raise ValueError(f"{folder / PREDICTOR_CONFIG} is damaged: expected {', '.join(kinds)}.")
    objective = ObjectiveConfig(predictor_depth=entry["depth"], mim_target=entry["target"], context=entry["context"])
    with torch.device("meta"):
        model = MIMJEPA(encoder.config, objective)
    model.encoder = encoder
    assert model.predictor is not None
    load_strictly(model.predictor, folder / PREDICTOR)
    return model.eval(), entry["hide_ratio"], entry["mask_shape"]


def read_config(path: Path) -> EncoderConfig:
    """The config in an encoder.json. Raises ValueError for unknown or missing fields, wrong types and wrong values."""
    fields, kinds = read_json(path), get_type_hints(EncoderConfig)
    fields.pop("preprocess", None)  # see `load_encoder`
    for name, value in fields.items():
        if name not in kinds:
            raise ValueError(f"{path}: unknown field {name[:40]!r}; expected some of {', '.join(kinds)}.")
        kind = kinds[name]
        if kind is float and type(value) is int and abs(value) < 1000:
            fields[name] = value = float(value)  # JSON does not tell 4 from 4.0
        if type(value) is not kind:
            raise ValueError(f"{path}: {name} is {str(value)[:40]!r}, expected {kind.__name__}.")
    missing = [name for name in ("dim", "depth", "heads") if name not in fields]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing.")
    return EncoderConfig(**fields)


def from_paper_checkpoint(state: Mapping[str, Tensor] | str | Path) -> dict[str, Tensor]:
    """A state dict of the paper's code (context encoder, target encoder or predictor) under the names of this package.

    `state` may be the path of its `.pth` file, which is read without executing what it may hold. Dropped: positions,
    which are computed here, and the predictor's unused `msk_embed`. Raises ValueError for a name that the paper's code
    does not have, and for a file that holds no state dict.
    """
    if isinstance(state, str | Path):
        path = state
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = " ".join(str(error).split())[:150]
            raise ValueError(f"{path} is no file of tensors that torch.load reads safely: {reason}.") from None
        if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
            names = ", ".join(map(repr, state))[:150] if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"{path} holds no state dict but {names}; give the part that is one.")
    is_predictor = any(name.startswith("head.") for name in state)
    renamed = {}
    for name, tensor in state.items():
        if name == "transformer.pos_embed" or (is_predictor and name == "transformer.msk_embed"):
            continue
        ours = _PAPER_NAMES.get(_BLOCK.sub(".#.", name))
        if ours is None:
            raise ValueError(f"{name!r} is no tensor of the paper's checkpoints (SCOTT or ViT with MIM-JEPA).")
        renamed[_with_number(ours, name)] = tensor
    return renamed


def to_paper_checkpoint(module: Encoder | Predictor, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The state dict of an encoder or predictor under the names of the paper's code, which `torch.save` writes.

    With it the positions of a patch grid (h, w), which that code keeps among its weights, and for a predictor its
    unused `msk_embed`, as zeros. Raises ValueError for what that code has no name for.
    """
    if isinstance(module, Encoder) and module.config.tokenizer == "scott" and module.config.patch_size != 16:
        raise ValueError(f"patch_size {module.config.patch_size} has no stem in the paper's code; expected 16.")
    state = module.state_dict()
    is_swiglu = any(isinstance(part, SwiGLU) for part in module.modules())
    names = {ours: paper for paper, ours in _PAPER_NAMES.items() if ("linear1" if is_swiglu else "w12") not in paper}
    renamed = {}
    for name, tensor in state.items():
        paper = names.get(_BLOCK.sub(".#.", name))
        if paper is None:
            raise ValueError(f"{name} has no counterpart in the paper's code (SCOTT or ViT with MIM-JEPA).")
        renamed[_with_number(paper, name)] = tensor
    width = state["transformer.blocks.0.attention.proj.weight"].shape[0]
    registers = state["transformer.registers"].shape[1] if "transformer.registers" in state else 0
    like = torch.empty(0, width)
    renamed["transformer.pos_embed"] = torch.cat([torch.zeros(registers, width), positions(grid, like)])
    renamed.setdefault("transformer.msk_embed", torch.zeros(1, 1, width))
    return renamed


_BLOCK = re.compile(r"\.\d+\.(?=self_attn|attention|ffn)")


def _with_number(name: str, other: str) -> str:
    """`name`, with # replaced by the number of the block that `other` is in."""
    number = _BLOCK.search(other)
    return name.replace(".#.", number[0]) if number else name
