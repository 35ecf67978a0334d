"""Encoders on disk, loaded strictly; and the paper's checkpoints.

encoder = load_encoder("runs/demo")        # or a Hugging Face Hub repository, "owner/name"

A run folder has the target encoder, the one to use, in `encoder.safetensors`, the context encoder that it follows in
`context.safetensors`, and what both are made of in `encoder.json`.
"""

import dataclasses
import re
from pathlib import Path

import torch
from safetensors.torch import save

from scott_sparse.files import load_strictly, read_json, write_atomically, write_json
from scott_sparse.model.vit import Encoder, EncoderConfig
from scott_sparse.shapes import Tensor

WEIGHTS = {"target": "encoder.safetensors", "context": "context.safetensors"}
CONFIG = "encoder.json"

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


def save_encoder(encoder: Encoder, folder: str | Path, *, weights: str = "target") -> None:
    """Write weights ("target" or "context") and config into `folder`, each beside its name first and then renamed."""
    folder = Path(folder)
    state = save({name: tensor.contiguous() for name, tensor in encoder.state_dict().items()})
    write_atomically(folder / WEIGHTS[weights], state)
    write_json(folder / CONFIG, dataclasses.asdict(encoder.config))


def load_encoder(source: str | Path, *, weights: str = "target", engine: str = "auto") -> Encoder:
    """The "target" or "context" encoder of a run folder, or of a Hub repository `owner/name`, in eval mode on the CPU.

    Raises ValueError where there is none, and where names, shapes or dtypes do not match the config: a load that does
    not fit stops, it never leaves random weights behind. Files may come from strangers (`scott_sparse.files`).
    """
    folder = Path(source)
    if not folder.is_dir() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)) and not folder.parent.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(source), allow_patterns=[WEIGHTS[weights], CONFIG]))
    for name in (WEIGHTS[weights], CONFIG):
        if not (folder / name).is_file():
            raise ValueError(f"no encoder in {source}: expected {WEIGHTS[weights]} and {CONFIG}; {name} is missing.")
    config = read_config(folder / CONFIG)
    with torch.device("meta"):  # nothing of a size that a config claims is allocated before the weights are there
        encoder = Encoder(config, engine=engine)
    load_strictly(encoder, folder / WEIGHTS[weights])
    return encoder.eval()


def read_config(path: Path) -> EncoderConfig:
    """What an encoder is made of. Raises ValueError for unknown fields and for values that make no encoder."""
    fields = read_json(path)
    known = {field.name: field for field in dataclasses.fields(EncoderConfig)}
    for name, value in fields.items():
        if name not in known:
            raise ValueError(f"{path}: unknown field {name[:40]!r}; expected some of {', '.join(known)}.")
        kind = known[name].type
        if kind is float and type(value) is int and abs(value) < 1000:
            fields[name] = value = float(value)  # JSON does not tell 4 from 4.0
        if type(value) is not kind:
            raise ValueError(f"{path}: {name} is {str(value)[:40]!r}, expected {kind.__name__}.")
    missing = [name for name in ("dim", "depth", "heads") if name not in fields]
    if missing:
        raise ValueError(f"{path}: {', '.join(missing)} is missing.")
    return EncoderConfig(**fields)


def from_paper_checkpoint(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of the paper's code (context encoder, target encoder or predictor) to ours.

    Positions are computed here, not stored. The predictor's unused `msk_embed` is dropped. Raises ValueError for any
    name that is none of the paper's.
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
