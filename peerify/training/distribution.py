"""One process or many: DDP through Accelerate, FSDP2 with torch's own `fully_shard`, on GPUs and on the CPU alike.

Accelerate starts the processes and says in the environment whether to shard; on the CPU it leaves it at that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from peerify.modules import blocks_around, peer_layers


def launched() -> bool:
    """Whether `accelerate launch` (or torchrun) started this process."""
    return "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def accelerator_on(device: str, precision: str, **settings: Any) -> Accelerator:
    """What runs steps of training on `device`, or where the launcher says.

    Args:
        precision: "no", "bf16" or "fp16".
        settings: of Accelerate's own object.
    """
    on_cpu = device == "cpu" and not (launched() and torch.cuda.is_available())  # a launcher knows better
    wanted = torch.device(device)
    if wanted.index is not None and wanted.type == "cuda" and not launched():
        torch.cuda.set_device(wanted)
    return Accelerator(
        mixed_precision=precision,
        cpu=on_cpu,
        # Without gradients some parameters take no part: layerwise leaves out the head.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        **settings,
    )


def forget_processes() -> None:
    """Let the next `accelerator_on` of this process choose anew."""
    AcceleratorState._reset_state(reset_partial_state=not launched())


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether this run was launched with FSDP."""
    return accelerator.num_processes > 1 and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"


def distribute(model: nn.Module, accelerator: Accelerator, *, leave: Sequence[str] = ()) -> Any:
    """The model on its device, ready for this run's processes. Under FSDP its parameters become DTensors, in place.

    Args:
        leave: names of parameters whose gradients stay in their process; see `tables.add_up`.
    """
    model = model.to(accelerator.device)
    if not is_sharded(accelerator):
        if leave:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, leave)
        prepared = accelerator.prepare_model(model, device_placement=False)
        # Autocast is opened around every call instead, which leaves the logits as they are.
        prepared.forward = getattr(prepared, "_original_forward", prepared.forward)
        return prepared
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for memory in (layer.memory for layer in peer_layers(model).values()):
        if memory is not None and not isinstance(memory.pool, FSDPModule):  # blocks may share it: it is none's own
            fully_shard(memory.pool, mesh=mesh)
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
