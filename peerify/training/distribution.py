"""One process or many: DDP through Accelerate, FSDP2 with torch's own `fully_shard`, on GPUs and on the CPU alike.

Accelerate starts the processes and says in the environment whether to shard; on the CPU it leaves it at that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from peerify.modules import blocks_around, peer_layers


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether this run was launched with FSDP."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def distribute(model: nn.Module, accelerator: Accelerator) -> Any:
    """The model on its device, ready for this run's processes. Under FSDP its parameters become DTensors, in place."""
    model = model.to(accelerator.device)
    if not is_sharded(accelerator):
        prepared = accelerator.prepare_model(model, device_placement=False)
        # Autocast is opened around every call instead, which leaves the logits as they are.
        prepared.forward = getattr(prepared, "_original_forward", prepared.forward)
        return prepared
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for path in blocks_around(model, peer_layers(model)):
        fully_shard(model.get_submodule(path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@contextmanager
def without_sync(model: Any, accelerator: Accelerator) -> Iterator[None]:
    """Gradients stay in their process: for all micro-batches of a step but the last."""
    if not is_sharded(accelerator):
        with accelerator.no_sync(model):
            yield
        return
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)


def reshard(model: nn.Module) -> None:
    """After a forward pass without backward: the root would keep whole parameters, whose memory is not its own."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
