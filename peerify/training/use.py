"""How often experts are found while a model trains: how many, how unevenly, and which are dead.

Counted are the pools that product keys search for experts with soft gates, as in the PEER paper: those of memories, and
of layers with softmax or sigmoid gates. What a forward pass retrieves passes by the pool anyway, so that counting takes
an addition for each retrieved expert.

Suffixes: b windows, t tokens, n experts of a pool, k retrieved for a token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peerify.errors import CheckpointError
from peerify.modules import peer_layers
from peerify.reading import printable
from peerify.training.tables import memories
from peerify.usage import evenness

USE = "use"  # entry of a checkpoint's optimizer state: counts since the last report
TOKENS = "tokens"


class Use:
    """Counts of a window of tokens, from one report to the next.

    Attributes:
        tokens: in the window so far, of all processes.
        count_n: path of a pool -> how often this process found each of its experts, int64 (n,).
    """

    def __init__(self, model: nn.Module) -> None:
        soft = {f"{path}.pool": layer.pool for path, layer in peer_layers(model).items() if _has_soft_gates(layer)}
        owners = {path: memory for path, memory in memories(model).items() if memory.pool_of is None}
        self._pools: dict[str, Any] = soft | {f"{path}.pool": memory.pool for path, memory in owners.items()}
        self._real_t: Tensor | None = None
        self.tokens = 0
        self.count_n = {
            path: torch.zeros(len(pool.u), dtype=torch.int64, device=pool.u.device)
            for path, pool in self._pools.items()
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        """While open, the pools are watched."""
        with ExitStack() as hooks:
            for path, pool in self._pools.items():
                hooks.callback(pool.register_forward_pre_hook(partial(self._add, path)).remove)
            yield

    @contextmanager
    def counting(self, real_bt: Tensor) -> Iterator[None]:
        """While open, what is found for real tokens counts: a backward pass may compute activations once more."""
        self._real_t = real_bt.flatten()
        try:
            yield
        finally:
            self._real_t = None

    @torch.no_grad()
    def _add(self, path: str, _: Any, args: tuple[Tensor, Any]) -> None:
        found, real_t = args[1], self._real_t
        if real_t is None:
            return
        if isinstance(found, Tensor):  # gates of all experts
            self.count_n[path] += ((found != 0) & real_t[:, None]).sum(0)
        else:
            hit_tk = (found.weight_tk > 0) & real_t[:, None]
            self.count_n[path].index_add_(0, found.index_tk.flatten(), hit_tk.flatten().long())

    def total(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """`count_n` over all processes, float64. Every process must call it."""
        return {path: accelerator.reduce(count_n.double(), "sum") for path, count_n in self.count_n.items()}

    def report(self, accelerator: Accelerator) -> dict[str, dict[str, float]]:
        """What the window came to, which ends with it. Every process must call it.

        Returns:
            Path of a pool -> ``{"tokens", "experts", "used", "kl_uniform", "dead", "reachable"}``: the share of its
            experts that any token found; how unevenly, as the divergence of use from uniform in nats (2407.04153, table
            2); how many none found; and how many could have been found, which is at most as many as were retrieved.
        """
        found = {}
        for path, count_n in self.total(accelerator).items():
            own_n = count_n[self._pools[path].num_shared :].cpu()  # the first are always on
            even = evenness(own_n)
            found[path] = {
                "tokens": self.tokens,
                "experts": len(own_n),
                "used": even["usage"],
                "kl_uniform": even["kl_uniform"],
                "dead": int((own_n == 0).sum()),
                "reachable": min(len(own_n), int(own_n.sum())),
            }
            self.count_n[path].zero_()
        self.tokens = 0
        return found

    def state(self, accelerator: Accelerator) -> dict[str, Any]:
        """The window for a checkpoint. Every process must call it."""
        return {
            TOKENS: self.tokens,
            **{path: count_n.long().cpu() for path, count_n in self.total(accelerator).items()},
        }

    def put_state(self, saved: Any, where: str, *, main: bool) -> None:
        """The reverse of `state`; counts of all processes go to the main one.

        Raises:
            CheckpointError: it is not of these pools.
        """
        if saved is None:  # of a checkpoint from before there were counts
            return
        tokens = saved.get(TOKENS)
        for path, count_n in self.count_n.items():
            value = saved.get(path)
            counts = isinstance(value, Tensor) and value.dtype == torch.int64 and value.shape == count_n.shape
            if not (counts and bool((value >= 0).all()) and type(tokens) is int and tokens >= 0):
                fault = f"does not say how often experts of {printable(path)} were found"
                raise CheckpointError(f"{where} {fault}; remove it to go on from the checkpoint before")
            if main:
                count_n.copy_(value)
            self.tokens = tokens


def _has_soft_gates(layer: Any) -> bool:
    """Whether keys of the layer find experts whose gates are weights."""
    return hasattr(layer, "keys") and getattr(layer, "gates", "unit") != "unit" and layer.needs_routing
