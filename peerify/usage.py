"""What the tokens of an evaluation use of each PEER layer.

Shape suffixes: t tokens, n experts, k ways of reading one, s steps of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from peerify.modeling.peer_evaluation import COARSE, FINE, FULL, NONE
from peerify.modules import peer_layers

STEP, STEPS = 0.001, 10_000  # of the dense layer's bytes: what tokens read is told apart so finely, and so far
PERCENTILES = 5, 50, 95


class Used:
    """What the tokens seen so far used of a layer; it takes no more memory for more tokens."""

    def __init__(self, layer: Any) -> None:
        self.count_n = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.tokens_s = torch.zeros(STEPS + 1, dtype=torch.int64)  # tokens that read 0, 1, 2, ... steps
        self.tokens, self.bytes, self.macs = 0, 0.0, 0.0
        self.of_tokens: list[torch.Tensor] | None = None  # bytes of tokens one by one, kept where this is a list
        self.memory_n: torch.Tensor | None = None  # of the new experts, if the layer has any: how often each was found

    def add(self, mask_tn: torch.Tensor, read_t: torch.Tensor, done_t: torch.Tensor) -> None:
        """Add tokens: which experts each used, and its bytes and multiply-adds over the dense layer's."""
        self.count_n += mask_tn.sum(dim=0).cpu()
        self.tokens_s += torch.bincount((read_t / STEP).round().long().clamp_max(STEPS), minlength=STEPS + 1)
        self.tokens += len(mask_tn)
        if self.of_tokens is not None:
            self.of_tokens.append(read_t.cpu())
        self.bytes, self.macs = self.bytes + read_t.sum().item(), self.macs + done_t.sum().item()

    def percentile(self, percent: int) -> float:
        """What that many in a hundred tokens read at most, over the dense layer's bytes, to the nearest step."""
        rank = math.ceil(percent * self.tokens / 100)
        return round(int(torch.searchsorted(self.tokens_s.cumsum(0), rank)) * STEP, 3)


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Used]]:
    """While open, every forward adds to {path: what was used of the layer}."""
    used: dict[str, Used] = {}
    hooks, watched = [], []
    for path, layer in peer_layers(model).items():
        used[path] = Used(layer)
        if getattr(layer, "memory", None) is not None:
            used[path].memory_n = torch.zeros(layer.memory.num_experts, dtype=torch.float64)
            hooks.append(layer.memory.register_forward_pre_hook(partial(_add_retrieved, used[path])))
        if getattr(layer, "budget", None) is not None and layer.budget.price > 0:  # says itself what it chooses, once
            layer.pool.observer = partial(_add_tiers, used[path], layer)
            watched.append(layer)
        else:
            hooks.append(layer.register_forward_pre_hook(partial(_add_inputs, used[path])))
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()
        for layer in watched:
            layer.pool.observer = None


def _add_tiers(used: Used, layer: Any, tier_tn: torch.Tensor) -> None:
    """Add tokens of a layer that says how it reads each expert for each of them."""
    count_kt = torch.stack([(tier_tn == tier).sum(dim=1) for tier in (COARSE, FINE, FULL)]).double().cpu()
    used.add(tier_tn != NONE, *layer.cost(layer.budget.inputs, count_kt))  # linear, so that it takes rows of counts


def _add_inputs(used: Used, layer: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Add tokens of a layer that spends the same on each of them."""
    mask_tn, read, done = layer.usage(args[0].flatten(0, -2))
    used.add(mask_tn, *(torch.full((len(mask_tn),), spent, dtype=torch.float64) for spent in (read, done)))


def _add_retrieved(used: Used, memory: Any, args: tuple[torch.Tensor, ...]) -> None:
    """Add what a memory finds for its tokens."""
    assert used.memory_n is not None
    index_tk = memory.retrieve(args[0]).index_tk
    used.memory_n += torch.bincount(index_tk.flatten(), minlength=memory.num_experts).cpu()


def evenness(count_n: torch.Tensor) -> dict[str, float]:
    """How evenly experts were used, from how often each was: {"usage", "kl_uniform", "effective_experts"}."""
    share_n = count_n / count_n.sum().clamp_min(1)
    entropy = torch.special.entr(share_n).sum().item()
    return {
        "usage": (count_n > 0).double().mean().item(),
        "kl_uniform": max(0.0, math.log(len(share_n)) - entropy),
        "effective_experts": math.exp(entropy) if count_n.any() else 0.0,
    }


def summary(path: str, layer: Any, used: Used) -> dict[str, Any]:
    """An entry of "layers" in what `peerify.evaluate` returns."""
    memory_n = used.memory_n
    memory = {} if memory_n is None else {"memory": {"num_experts": len(memory_n), **evenness(memory_n)}}
    return {
        "path": path,
        "num_experts": int(layer.num_experts),
        "bytes_fraction": used.bytes / max(1, used.tokens),
        "macs_fraction": used.macs / max(1, used.tokens),
        **evenness(used.count_n),
        "bytes_per_token": {f"p{percent}": used.percentile(percent) for percent in PERCENTILES},
        **memory,
    }
