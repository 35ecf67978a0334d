"""Parameters that are sharded over processes (FSDP2), seen whole.

Accelerate shards what is trained: each process keeps a part of every parameter, of its gradient and of its moments.
What looks at parameters between steps needs them whole: the target's average, checkpoints, the weights that are
written. Where nothing is sharded a tensor is its own whole, and this costs nothing.
"""

from torch import nn

from scott_sparse.shapes import Tensor


def sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, asked without importing its module, which takes half a second."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; all processes take part where it is sharded."""
    return tensor.full_tensor() if sharded(tensor) else tensor


def whole_state(module: nn.Module) -> dict[str, Tensor]:
    """`module.state_dict()` with whole tensors."""
    return {name: whole(tensor) for name, tensor in module.state_dict().items()}


def shard_like(tensor: Tensor, model: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, as `model` is sharded."""
    if not sharded(model):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, model.device_mesh, model.placements, src_data_rank=None)
