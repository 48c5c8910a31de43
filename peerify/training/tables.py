"""Training of large tables: gradients of the rows that a step retrieved, and an optimizer that touches these alone.

AdamW keeps two numbers for each one of a table, and each of its steps reads and writes all of them. Here a step takes
time and memory by the rows that it retrieved, and the state is at most one number for each row: row-wise Adagrad, which
adds up the mean square of a row's gradients (FBGEMM's EXACT_ROWWISE_ADAGRAD), or plain SGD. Both leave a row as it is,
to the bit, that has no gradient. Tables are those of memories; their gradients are sparse, as of
torch.nn.Embedding(sparse=True).

Suffixes: n rows of a table, d d_model, s rows that a step retrieved, in ascending order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peerify.config.train import OptimizerConfig
from peerify.errors import UsageError
from peerify.modules import peer_layers

TABLES = "tables"  # name of their group of parameters
SUM = "sum"  # the state of row-wise Adagrad: float32 (n,)
EPS = 1e-8
AT_ONCE = 256  # rows, so that the changes of one lot stay in a core's cache


def memories(model: nn.Module) -> dict[str, Any]:
    """Path -> memory, of the layers that have one."""
    layers = peer_layers(model)
    return {f"{path}.memory": layer.memory for path, layer in layers.items() if getattr(layer, "memory", None)}


def with_pools(model: nn.Module) -> dict[str, list[Any]]:
    """Path of a pool -> the memories that retrieve from it."""
    found = memories(model)
    owners = {id(m.pool): path for path, m in found.items() if m.pool_of is None}
    return {f"{path}.pool": [m for m in found.values() if id(m.pool) == pool] for pool, path in owners.items()}


def tables_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> table of the memories' pools, each once."""
    inside = tuple(f"{path}.pool." for path in memories(model))
    return {name: table for name, table in model.named_parameters() if inside and name.startswith(inside)}


def require_memory(model: nn.Module, number: int, optimizer: OptimizerConfig) -> None:
    """UsageError where stage `number` asks for an optimizer of tables that the model has not."""
    if optimizer.by_rows and not memories(model):
        raise UsageError(
            f"train.stages.{number}.optimizer.tables {optimizer.tables} is for the tables of memories, and this model "
            "has none: grow it first (peerify grow), or leave tables out"
        )


class RowOptimizer(torch.optim.Optimizer):
    """Row-wise Adagrad or SGD for the group `TABLES`, and another optimizer for all other groups, as one.

    One, so that a gradient scaler steps both or neither, and that checkpoints hold one state.

    Args:
        rest: of all other groups; None: there are none.
        tables: the group of tables, whose gradients are sparse.
        adagrad: with the state `SUM`, row <- row - lr gradient / sqrt(SUM); without it row <- row - lr gradient.
    """

    def __init__(self, rest: torch.optim.Optimizer | None, tables: dict[str, Any], *, adagrad: bool) -> None:
        super().__init__([*(rest.param_groups if rest is not None else []), tables], {})
        self.rest, self.adagrad = rest, adagrad

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        if self.rest is not None:
            # Loading a state makes new groups.
            self.rest.param_groups = [group for group in self.param_groups if group["name"] != TABLES]
            self.rest.state = self.state
            self.rest.step()
        for group in self.param_groups:
            for table in group["params"] if group["name"] == TABLES else ():
                if table.grad is not None:
                    self._update(table, group["lr"])

    def _update(self, table_nd: Tensor, lr: float) -> None:
        in_order(table_nd)
        assert table_nd.grad is not None
        gradient, sum_n = table_nd.grad, None
        if self.adagrad:
            state = self.state[table_nd]
            if SUM not in state:
                state[SUM] = torch.zeros(len(table_nd), device=table_nd.device)
            sum_n = state[SUM]
        for row_s, part_sd in zip(gradient.indices()[0].split(AT_ONCE), gradient.values().split(AT_ONCE), strict=True):
            change_sd = part_sd.float() * -lr
            if sum_n is not None:
                sum_n.index_add_(0, row_s, part_sd.float().square().mean(1))
                change_sd /= sum_n[row_s].sqrt_().add_(EPS)[:, None]
            table_nd.index_add_(0, row_s, change_sd.to(table_nd.dtype))


def in_order(*tables: Tensor) -> None:
    """Coalesce sparse gradients, in place: each row once, in ascending order.

    Autograd forgets that those of one backward pass are so; to sort them again takes ten times as long as to look.
    """
    for table in tables:
        if table.grad is not None and table.grad.is_sparse and not table.grad.is_coalesced():
            row_s = table.grad._indices()[0]
            ascending = bool((row_s[1:] > row_s[:-1]).all())
            table.grad = table.grad._coalesced_(True) if ascending else table.grad.coalesce()


def add_up(tables: Iterable[Tensor], accelerator: Accelerator) -> None:
    """Give every process the mean over processes of their gradients, as data parallelism does for all others."""
    for table in tables:
        in_order(table)
        gradient = table.grad
        assert gradient is not None
        row_s, value_sd = gradient.indices()[0].contiguous(), gradient.values()
        row_s = accelerator.gather(accelerator.pad_across_processes(row_s, pad_index=-1))
        value_sd = accelerator.gather(accelerator.pad_across_processes(value_sd))
        real_s = row_s >= 0
        row_s, value_sd = row_s[real_s], value_sd[real_s] / accelerator.num_processes
        table.grad = torch.sparse_coo_tensor(row_s[None], value_sd, gradient.shape, check_invariants=False).coalesce()


def clip(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """torch.nn.utils.clip_grad_norm_, with sparse gradients among them: returns the norm of all before."""
    holders = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            in_order(parameter)
            values = parameter.grad.values().detach()  # the same memory
            parameter = values.view_as(values)
            parameter.grad = values
        holders.append(parameter)
    return nn.utils.clip_grad_norm_(holders, largest)
