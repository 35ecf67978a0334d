"""Frozen features, extracted once: by all processes, from whole images or from random crops of them, and kept on disk.

Batches are the same whatever the number of processes, and dealt out in turn, so that the features are the same too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather
from safetensors.torch import load_file, save
from torch import nn
from torch.utils.data import Dataset

from scott_sparse.data.batches import load
from scott_sparse.data.dataset import Images
from scott_sparse.data.views import ViewConfig, center_crop_boxes, draw_views, resize
from scott_sparse.distributed import process_state
from scott_sparse.files import write_atomically
from scott_sparse.randomness import generator_at
from scott_sparse.shapes import Bool, Float, Int, Tensor

CROPS = ViewConfig(crop_scale=(0.35, 1.0), colour=0.0)
BATCH = 64
FORM = 1  # of the features: to be raised when others are extracted from the same weights and images


@dataclass(frozen=True)
class Features:
    """Of n images; with copies, the whole images come first, then the first crop of each, then the second."""

    pooled: Float[Tensor, "n L C"]
    tokens: Float[Tensor, "n N D"] | None
    """In half precision."""

    @property
    def mean(self) -> Float[Tensor, "n C"]:
        """Of the last block."""
        return self.pooled[:, -1]


def eval_images(images: Images, indices: Int[Tensor, " B"], *, size: tuple[int, int]) -> Float[Tensor, "B 3 h w"]:
    """The evaluation view: the largest centred box of the aspect ratio of `size`, resized and normalised."""
    return resize(*_Cuts.whole(images, size).cut(indices), size=size)


@dataclass(frozen=True)
class _Cuts(Dataset):
    """Batch j of the images, each cut along its box, and what `resize` needs besides."""

    images: Images
    boxes: Int[Tensor, "n 4"]
    flip: Bool[Tensor, " n"]

    @classmethod
    def whole(cls, images: Images, size: tuple[int, int]) -> "_Cuts":
        return cls(images, center_crop_boxes(images.sizes, size=size), torch.zeros(len(images), dtype=torch.bool))

    @classmethod
    def cropped(cls, images: Images, copy: int) -> "_Cuts":
        """Torchvision's random resized crops and flips, the same in every run."""
        views = draw_views(images.sizes, CROPS, generator=generator_at("crops of a probe", copy))
        return cls(images, views.boxes[:, 0], views.flip[:, 0])

    def cut(self, indices: Int[Tensor, " B"]):
        boxes = self.boxes[indices]
        return self.images.crop(indices, boxes[:, None])[:, 0], boxes[:, 2:], self.flip[indices]

    def __len__(self) -> int:
        return -(-len(self.images) // BATCH)

    def __getitem__(self, j: int):
        # All batches have one size, else the rounding of the last would depend on it; what is too much is dropped.
        return self.cut((torch.arange(BATCH) + j * BATCH).clamp(max=len(self.images) - 1))


@torch.inference_mode()
def extract(
    model: nn.Module,
    images: Images,
    *,
    size: tuple[int, int],
    copies: int = 0,
    tokens: bool = False,
    workers: int = 0,
) -> Features | None:
    """Features of the whole images, then of `copies` random crops of each; on the main process, None on the others.

    `model` is one of `scott_sparse.evaluation.encoders`, on this process's device. `size`: (height, width) in pixels.
    """
    state = process_state()
    rounds = [_Cuts.whole(images, size), *(_Cuts.cropped(images, copy) for copy in range(copies))]
    pooled, all_tokens = [], []
    for cuts in rounds:
        mine = range(
            state.process_index, -(-len(cuts) // state.num_processes) * state.num_processes, state.num_processes
        )
        found = []
        for cut, extents, flip in load(cuts, mine, workers=workers, pin=state.device.type == "cuda"):
            out, words = model(resize(cut.to(state.device, non_blocking=True), extents, flip, size=size))
            kept = (out.float(), words.half()) if tokens else (out.float(),)
            kept = [gather(x) for x in kept]
            if state.is_main_process:
                found.append([x.cpu() for x in kept])
        if state.is_main_process:
            pooled.append(torch.cat([x[0] for x in found])[: len(images)])
            all_tokens += [torch.cat([x[1] for x in found])[: len(images)]] if tokens else []
    if not state.is_main_process:
        return None
    return Features(torch.cat(pooled), torch.cat(all_tokens) if tokens else None)


def kept(path: Path, make: Callable[[], Features | None]) -> Features | None:
    """The features in the file `path`, or those that `make` makes, written there; None on all but the main process."""
    state = process_state()
    (there,) = broadcast_object_list([path.is_file()])
    if not there:
        features = make()
        if features is not None:
            tensors = {"pooled": features.pooled}
            tensors |= {} if features.tokens is None else {"tokens": features.tokens}
            write_atomically(path, save(tensors))
        return features
    if not state.is_main_process:
        return None
    tensors = load_file(path)
    return Features(tensors["pooled"], tensors.get("tokens"))
