"""Every random number of a run is a pure function of (seed, what for, when).

So a run has no generator state to save, and any number of processes draws the same global batch.
"""

import hashlib

import torch

from scott_sparse.shapes import Int, Tensor


def generator_at(*key: int | str) -> torch.Generator:
    """A CPU generator for a key such as (seed, "views", step); different keys give unrelated streams."""
    return torch.Generator().manual_seed(seed_at(*key))


def seed_at(*key: int | str) -> int:
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1


def batch_indices(step: int, *, images: int, batch: int, seed: int) -> Int[Tensor, " batch"]:
    """Images of the global batch of optimizer step `step` (from 0); an epoch drops what does not fill a batch."""
    epoch, position = divmod(step, images // batch)
    order = torch.randperm(images, generator=generator_at(seed, "order", epoch))
    return order[position * batch : (position + 1) * batch]
