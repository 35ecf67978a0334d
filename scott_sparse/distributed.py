"""Several processes as one: rank and world, collectives with a gradient, parameters sharded by FSDP2 seen whole.

The gathers with gradient of `torch.distributed.nn.functional` are deprecated since torch 2.15, so that one autograd
function stays here. Where there is one process, or nothing is sharded, everything in this file costs nothing.
"""

import os
import platform
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeGuard, TypeVar, cast

import torch
import torch.distributed
from torch import nn

from scott_sparse.cli import UserErrors
from scott_sparse.shapes import Float, Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def process_state():
    """Accelerate's `PartialState`: this process among those that were launched, on its device."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.accelerator.is_available())


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main_then_broadcast(act: Callable[[], T]) -> T:
    """What `act` returns on the main process, on all processes; its ValueError or OSError is raised on all of them."""
    outcome: list = [None, None]
    if rank() == 0:
        try:
            outcome[0] = act()
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    if world_size() > 1:
        torch.distributed.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    return outcome[0]


def on_all_processes(act: Callable[[], T]) -> T:
    """What `act` returns on this process. A ValueError or OSError of any process ends in an error on all of them.

    So the main process can print a mistake that only another node has, and no process waits for one that has ended.
    """
    try:
        result, mistake = act(), None
    except (ValueError, OSError) as error:
        result, mistake = None, error
    messages: list = [None] * world_size()
    if world_size() > 1:
        message = None if mistake is None else f"process {rank()} on {platform.node()}: {mistake}"
        torch.distributed.all_gather_object(messages, message)
    if mistake is not None:
        raise mistake
    if any(messages):
        raise UserErrors(next(message for message in messages if message))
    return cast(T, result)


def all_gather_with_grad(values: Float[Tensor, "*n"]) -> Float[Tensor, "P ..."]:
    """A tensor as each of the P processes has it, with its gradient: every process's loss depends on those of all."""
    if world_size() == 1:
        return values[None]
    own = torch.arange(world_size(), device=values.device) == rank()
    return _AllReduce.apply(torch.where(own[(..., *[None] * values.ndim)], values, 0))


def all_mean_with_grad(values: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """From averages over equal shares to that over the global batch, with its gradient, in a message of their size."""
    return _AllReduce.apply(values) / world_size() if world_size() > 1 else values


class _AllReduce(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of what the processes ask for."""

    @staticmethod
    def forward(ctx, values):
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient):  # pyright: ignore[reportIncompatibleMethodOverride]
        total = gradient.contiguous().clone()
        torch.distributed.all_reduce(total)
        return total


def is_sharded(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Whether a tensor is a DTensor, found without importing its module, which takes half a second."""
    return hasattr(tensor, "full_tensor")


def full_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes take part where it is sharded."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with full tensors; all processes take part."""
    return {name: full_tensor(tensor) for name, tensor in module.state_dict().items()}


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, as `model` is sharded."""
    if is_sharded(model):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
    return tensor
