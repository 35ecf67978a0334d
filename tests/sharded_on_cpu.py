"""train/pretrain.py under FSDP2 on CPU processes: `torchrun --nproc_per_node 2 tests/sharded_on_cpu.py FLAGS`.

Accelerate shards between accelerators only, and ignores the same request on CPU processes. Here it is told that these
are such as may shard; all that follows, `Accelerator.prepare` included, is what runs on GPUs.
"""

import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).parent.parent / "train"))

import pretrain

initialise, update_target = AcceleratorState.__init__, pretrain.update_target


def initialise_sharded(self, *arguments, fsdp_plugin=None, **others):
    initialise(self, *arguments, fsdp_plugin=fsdp_plugin, **others)
    if fsdp_plugin is not None:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def update_from_sharded(target, encoder, momentum, **options):
    parameters = list(encoder.parameters())
    assert all(isinstance(p, DTensor) for p in parameters)
    share = sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters)
    assert 0.4 < share < 0.6, f"two processes, and this one holds {share:.0%} of the encoder"
    update_target(target, encoder, momentum, **options)


AcceleratorState.__init__, pretrain.update_target = initialise_sharded, update_from_sharded
pretrain.main()
