"""Frozen features: extracted once, by all processes, from fixed crops or random crops, and cached on disk.

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
from scott_sparse.model.crops import fixed_crops
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
    tokens: Float[Tensor, "m N D"] | None
    """Tokens of the last block in half precision, if they were asked for.
    Where `pooled` is averaged over V crops, m = V * n: those of each crop, the crops of an image together."""

    @property
    def mean(self) -> Float[Tensor, "n C"]:
        """The pooled features of the last block."""
        return self.pooled[:, -1]


def eval_images(
    images: Images,
    indices: Int[Tensor, " B"],
    *,
    size: tuple[int, int],
    statistics: dict[str, tuple[float, ...]] | None = None,
) -> Float[Tensor, "B C h w"]:
    """Evaluation views: the largest centred box of the aspect ratio of `size`, resized to `size`, normalised by
    `statistics`, `mean` and `std` of each channel (default: ImageNet's)."""
    crops, extents, flip = (part[:, 0] for part in _Crops.fixed(images, size).read(indices))
    return resize(crops, extents, flip, size=size, **(statistics or {}))


@dataclass(frozen=True)
class _Crops(Dataset):
    """V crops of each image, in batches of `BATCH`: item j holds, for batch j, the arguments of `resize` by crop."""

    images: Images
    boxes: Int[Tensor, "n V 4"]
    flip: Bool[Tensor, "n V"]

    @classmethod
    def fixed(cls, images: Images, size: tuple[int, int], crops: int = 1) -> "_Crops":
        boxes, mirrored = fixed_crops(images.sizes, size=size, crops=crops)
        return cls(images, boxes, mirrored.expand(len(images), -1))

    @classmethod
    def random(cls, images: Images, number: int) -> "_Crops":
        """Random resized crops and flips, a function of `number` alone."""
        views = draw_views(images.sizes, CROPS, generator=generator_at("crops of a probe", number))
        return cls(images, views.boxes, views.flip)

    def read(self, indices: Int[Tensor, " B"]) -> tuple[UInt8[Tensor, "B V H W C"], Tensor, Tensor]:
        boxes = self.boxes[indices]
        return self.images.crop(indices, boxes), boxes[..., 2:], self.flip[indices]

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
    crops: int = 1,
    copies: int = 0,
    tokens: bool = False,
    workers: int = 0,
) -> Features | None:
    """Features of the centre crop and of `copies` random crops of each image; None on all but the main process.

    With `crops` = 8, which excludes copies, pooled features are means over `fixed_crops`. `size` is (height, width) in
    pixels; `workers` processes read images ahead.
    """
    assert crops == 1 or not copies
    state = process_state()
    processes, device = state.num_processes, state.device or torch.device("cpu")
    encoder = encoder.to(device).eval()

    def outputs(views: _Crops) -> Iterator[tuple[Tensor, ...]]:
        """Pooled features, and tokens if asked for, of this process's batches together with those of the others."""
        batches = range(state.process_index, -(-len(views) // processes) * processes, processes)
        for batch in load(views, batches, workers=workers, pin=device.type == "cuda"):
            by_crop = zip(*(part.unbind(1) for part in batch))
            of_crops = []
            for x, extents, flip in by_crop:
                crops_on_device = x.to(device, non_blocking=True)
                of_crops.append(encoder(resize(crops_on_device, extents, flip, size=size, **encoder.statistics)))
            pooled, all_tokens = (torch.stack(tensors, 1) for tensors in zip(*of_crops))
            mean = pooled.float().mean(1)
            gathered = gather((mean, all_tokens.half()) if tokens else (mean,))
            if state.is_main_process:
                yield tuple(x.cpu() for x in gathered if isinstance(x, Tensor))

    parts = []
    for views in (_Crops.fixed(images, size, crops), *(_Crops.random(images, number) for number in range(copies))):
        parts.append([torch.cat(batches)[: len(images)] for batches in zip(*outputs(views))])
    if not state.is_main_process:
        return None
    pooled, *all_tokens = (torch.cat(of_crops) for of_crops in zip(*parts))
    return Features(pooled, all_tokens[0].flatten(0, 1) if tokens else None)


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
    path: Path, encoder: ImageEncoder, parts: Sequence[Images], *, size: tuple[int, int], crops: int = 1, **how
) -> None:
    """Write the features of some images, extracted with `how`, for other programs (see eval/extract.py).

    Raises ValueError for the tokens of several crops.
    """
    if crops > 1 and how.get("tokens"):
        raise ValueError(
            f"--patches writes the tokens of one view, which --crops {crops} averages over; give only one."
        )
    extracted = (extract(encoder, part, size=size, crops=crops, **how) for part in parts)
    features = [part for part in extracted if part is not None]
    if not features:  # not the main process
        return
    blocks = torch.cat([part.pooled for part in features])
    tensors = {"embeddings": blocks[:, -1].contiguous(), "blocks": blocks}
    if features[0].tokens is not None:
        tensors["patches"] = torch.cat([part.tokens for part in features if part.tokens is not None])
    names = [name for part in parts for name in part.names]
    about = {"names": names, "image_size": size, "crops": crops}
    write_atomically(path, save(tensors, metadata={key: json.dumps(value) for key, value in about.items()}))
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    print(printable(f"{path}: {shapes}"))
