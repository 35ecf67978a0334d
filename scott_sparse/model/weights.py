"""Encoders on disk, and the state dicts of the paper's code.

encoder = load_encoder("runs/demo")        # or a Hugging Face Hub repository, "owner/name"
features = encoder(encoder.preprocess(image)[None])

A run folder has the target encoder, the one to use, in `encoder.safetensors`, the context encoder that the target
follows in `context.safetensors`, and their config and preprocessing in `encoder.json`. With MIM-JEPA it also has the
predictor, in `predictor.safetensors` and `predictor.json` (`load_predictor`).
"""

import dataclasses
import re
from pathlib import Path
from typing import get_type_hints

import torch

from scott_sparse.files import load_strictly, read_json, tensors_to_bytes, write_atomically, write_json
from scott_sparse.model.jepa import MIMJEPA, ObjectiveConfig
from scott_sparse.model.preprocess import Preprocess
from scott_sparse.model.vit import Encoder, EncoderConfig
from scott_sparse.shapes import Tensor

WEIGHTS = {"target": "encoder.safetensors", "context": "context.safetensors"}
CONFIG = "encoder.json"
PREDICTOR, PREDICTOR_CONFIG = "predictor.safetensors", "predictor.json"

_FROM_PAPER = (  # (pattern in the paper's state dict, our name)
    (r"tokenizer\.tokenizer\.0\.weight", "tokenizer.kernels.0"),
    (r"tokenizer\.tokenizer\.3\.weight", "tokenizer.kernels.1"),
    (r"tokenizer\.proj\.(weight|bias)", r"tokenizer.proj.\1"),
    (r"transformer\.msk_embed", "mask_token"),
    (r"transformer\.reg_embed", "transformer.registers"),
    (r"transformer\.blocks\.(\d+)\.self_attn\.(qkv|proj)\.weight", r"transformer.blocks.\1.attention.\2.weight"),
    (r"transformer\.blocks\.(\d+)\.ffn_layer\.(?:w12|linear1)\.weight", r"transformer.blocks.\1.ffn.fused.weight"),
    (r"transformer\.blocks\.(\d+)\.ffn_layer\.last_linear\.weight", r"transformer.blocks.\1.ffn.out.weight"),
    (r"head\.([12])\.(weight|bias)", r"head.\1.\2"),
)


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


def load_encoder(source: str | Path, *, weights: str = "target", engine: str = "auto") -> Encoder:
    """The "target" or "context" encoder of a run folder, or of a Hub repository `owner/name`, in eval mode on the CPU.

    Raises ValueError where there is none, and where names, shapes or dtypes do not match the config: no parameter keeps
    a random value. The files need not be trusted, nothing in them is executed (`scott_sparse.files`).
    """
    folder = Path(source)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS[weights], CONFIG]))
    for name in (WEIGHTS[weights], CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"no encoder in {source}: expected {WEIGHTS[weights]} and {CONFIG}; {name} is missing.")
    config = read_config(folder / CONFIG)
    with torch.device("meta"):  # a config may claim any size; memory is allocated for weights that are there
        encoder = Encoder(config, engine=engine)
    load_strictly(encoder, folder / WEIGHTS[weights])
    if (entry := read_json(folder / CONFIG).get("preprocess")) is not None:
        try:
            encoder.preprocess = Preprocess.from_json(entry)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from None
        if len(encoder.preprocess.mean) != config.in_channels:
            given = f"mean and std of {len(encoder.preprocess.mean)} channels"
            raise ValueError(f"{folder / CONFIG}: preprocess has {given}, expected in_channels {config.in_channels}.")
    return encoder.eval()


def save_predictor(
    state: dict[str, Tensor], folder: str | Path, *, objective: ObjectiveConfig, hide_ratio: float, mask_shape: str
) -> None:
    """Write the state of a predictor and how it was trained, beside its context encoder."""
    folder = Path(folder)
    write_atomically(folder / PREDICTOR, tensors_to_bytes(state))
    trained = {"depth": objective.predictor_depth, "context": objective.context}
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
    encoder, entry = load_encoder(folder, weights="context"), read_json(folder / PREDICTOR_CONFIG)
    kinds = {"depth": int, "context": str, "hide_ratio": float, "mask_shape": str}
    if {name: type(value) for name, value in entry.items()} != kinds or not 1 <= entry["depth"] <= 256:
        raise ValueError(f"{folder / PREDICTOR_CONFIG} is damaged: expected {', '.join(kinds)}.")
    objective = ObjectiveConfig(predictor_depth=entry["depth"], context=entry["context"])
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


def from_paper_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the paper's code (context encoder, target encoder or predictor) under the names of this package.

    Dropped: positions, which are computed here, and the predictor's unused `msk_embed`. Raises ValueError for a name
    that the paper's code does not have.
    """
    is_predictor = any(name.startswith("head.") for name in state)
    renamed = {}
    for name, tensor in state.items():
        if name == "transformer.pos_embed" or (is_predictor and name == "transformer.msk_embed"):
            continue
        for pattern, ours in _FROM_PAPER:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, ours, name)] = tensor
                break
        else:
            raise ValueError(f"{name!r} is no tensor of the paper's checkpoints (SCOTT or ViT with MIM-JEPA).")
    return renamed
