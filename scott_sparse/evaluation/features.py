"""Frozen features: extracted once, by all processes, from centre crops or random crops, and cached on disk.

Batches are the same for any number of processes and are dealt out in turn, so that the features are the same too.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch.utils.data import Dataset

from scott_sparse.data.batches import load
from scott_sparse.data.images import Images
from scott_sparse.data.sources import printable
from scott_sparse.data.views import ViewConfig, draw_views, resize
from scott_sparse.distributed import process_state
from scott_sparse.evaluation.encoders import ImageEncoder
from scott_sparse.files import write_atomically
from scott_sparse.model.preprocess import center_crop_boxes
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Bool, Float, Int, Tensor, UInt8

CROPS = ViewConfig(crop_scale=(0.35, 1.0), colour=0.0)
BATCH = 64
FORMAT = 1  # part of the cache key; raise it when the same weights and images give other features


@dataclass(frozen=True)
class Features:
    """Features of n images; with random crops: n centre crops, then the first crop of each image, then the second."""

    pooled: Float[Tensor, "n L C"]
    """One vector for each of the last L blocks."""
    tokens: Float[Tensor, "n N D"] | None
    """Tokens of the last block in half precision, if they were asked for."""

    @property
    def mean(self) -> Float[Tensor, "n C"]:
        """The pooled features of the last block."""
        return self.pooled[:, -1]


def eval_images(images: Images, indices: Int[Tensor, " B"], *, size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """Evaluation views: the largest centred box of the aspect ratio of `size`, resized to `size`, normalised."""
    return resize(*_Crops.centred(images, size).read(indices), size=size)


@dataclass(frozen=True)
class _Crops(Dataset):
    """One crop of each image, in batches of `BATCH`: item j holds the arguments of `resize` for batch j."""

    images: Images
    boxes: Int[Tensor, "n 4"]
    flip: Bool[Tensor, " n"]

    @classmethod
    def centred(cls, images: Images, size: tuple[int, int]) -> "_Crops":
        return cls(images, center_crop_boxes(images.sizes, size=size), torch.zeros(len(images), dtype=torch.bool))

    @classmethod
    def random(cls, images: Images, number: int) -> "_Crops":
        """Random resized crops and flips, a function of `number` alone."""
        views = draw_views(images.sizes, CROPS, generator=generator_at("crops of a probe", number))
        return cls(images, views.boxes[:, 0], views.flip[:, 0])

    def read(self, indices: Int[Tensor, " B"]) -> tuple[UInt8[Tensor, "B H W 3"], Tensor, Tensor]:
        boxes = self.boxes[indices]
        return self.images.crop(indices, boxes[:, None])[:, 0], boxes[:, 2:], self.flip[indices]

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def __getitem__(self, j: int):
        # All batches have one size, as rounding depends on it: the last image is repeated, and dropped in the end.
        return self.read((torch.arange(BATCH) + j * BATCH).clamp(max=len(self.images) - 1))


@torch.inference_mode()
def extract(
    encoder: ImageEncoder,
    images: Images,
    *,
    size: tuple[int, int],
    copies: int = 0,
    tokens: bool = False,
    workers: int = 0,
) -> Features | None:
    """Features of the centre crop and of `copies` random crops of each image; None on all but the main process.

    `size` is (height, width) in pixels; `workers` processes read images ahead.
    """
    state = process_state()
    processes, device = state.num_processes, state.device or torch.device("cpu")
    encoder = encoder.to(device).eval()

    def outputs(crops: _Crops) -> Iterator[tuple[Tensor, ...]]:
        """Pooled features, and tokens if asked for, of this process's batches together with those of the others."""
        batches = range(state.process_index, -(-len(crops) // processes) * processes, processes)
        for pixels, extents, flip in load(crops, batches, workers=workers, pin=device.type == "cuda"):
            pooled, all_tokens = encoder(resize(pixels.to(device, non_blocking=True), extents, flip, size=size))
            gathered = gather((pooled.float(), all_tokens.half()) if tokens else (pooled.float(),))
            if state.is_main_process:
                yield tuple(x.cpu() for x in gathered if isinstance(x, Tensor))

    parts = []
    for crops in (_Crops.centred(images, size), *(_Crops.random(images, number) for number in range(copies))):
        parts.append([torch.cat(batches)[: len(images)] for batches in zip(*outputs(crops))])
    if not state.is_main_process:
        return None
    pooled, *all_tokens = (torch.cat(of_crops) for of_crops in zip(*parts))
    return Features(pooled, all_tokens[0] if tokens else None)


def cached_features(path: Path, make: Callable[[], Features | None]) -> Features | None:
    """The features in the file `path`, or else those that `make` returns, written there; None as from `extract`.

    A file that is damaged is replaced. Features that cannot be written, say for lack of space, are returned all the
    same, after a warning.
    """
    state = process_state()
    features = _read_features(path) if state.is_main_process else None
    (is_cached,) = broadcast_object_list([features is not None])
    if is_cached:
        return features
    features = make()
    if features is not None:
        tensors = {"pooled": features.pooled, "tokens": features.tokens}
        try:
            write_atomically(path, save({name: tensor for name, tensor in tensors.items() if tensor is not None}))
        except OSError as error:
            reason = error.strerror or error
            print(f"warning: features are not cached, {path.parent} cannot be written: {reason}.", file=sys.stderr)
    return features


def _read_features(path: Path) -> Features | None:
    try:
        tensors = load_file(path)
        return Features(tensors["pooled"], tensors.get("tokens"))
    except (OSError, SafetensorError, KeyError):  # none there, or a damaged one
        return None


def export_features(
    path: Path, encoder: ImageEncoder, parts: Sequence[Images], *, size: tuple[int, int], **how
) -> None:
    """Write the features of some images, extracted with `how`, for other programs (see eval/extract.py)."""
    extracted = (extract(encoder, part, size=size, **how) for part in parts)
    features = [part for part in extracted if part is not None]
    if not features:  # not the main process
        return
    blocks = torch.cat([part.pooled for part in features])
    tensors = {"embeddings": blocks[:, -1].contiguous(), "blocks": blocks}
    if features[0].tokens is not None:
        tensors["patches"] = torch.cat([part.tokens for part in features if part.tokens is not None])
    names = [name for part in parts for name in part.names]
    write_atomically(path, save(tensors, metadata={"names": json.dumps(names), "image_size": json.dumps(size)}))
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    print(printable(f"{path}: {shapes}"))
