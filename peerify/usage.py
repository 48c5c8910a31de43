"""What the tokens of an evaluation use of each PEER layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peerify.modules import peer_layers


class Used:
    """What the tokens seen so far used of a layer."""

    def __init__(self, layer: Any) -> None:
        self.count_n = torch.zeros(layer.num_experts, dtype=torch.float64)
        self.tokens, self.bytes, self.macs = 0, 0.0, 0.0

    def add(self, mask_tn: torch.Tensor, read: float, done: float) -> None:
        tokens = len(mask_tn)
        self.count_n += mask_tn.sum(dim=0).cpu()
        self.tokens += tokens
        self.bytes, self.macs = self.bytes + read * tokens, self.macs + done * tokens


@contextmanager
def counting(model: nn.Module) -> Iterator[dict[str, Used]]:
    """While open, every forward adds to {path: what was used of the layer}."""
    used: dict[str, Used] = {}
    hooks, watched = [], []
    for path, layer in peer_layers(model).items():
        used[path] = Used(layer)
        if getattr(layer, "budget", None) is not None and layer.budget.price > 0:  # says itself what it chooses, once
            layer.watch(used[path].add)
            watched.append(layer)
            continue

        def count(module: Any, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            used[path].add(*module.usage(args[0].flatten(0, -2)))

        hooks.append(layer.register_forward_pre_hook(count))
    try:
        yield used
    finally:
        for hook in hooks:
            hook.remove()
        for layer in watched:
            layer.watch(None)


def summary(path: str, layer: Any, used: Used) -> dict[str, Any]:
    """An entry of "layers" in what `peerify.evaluate` returns."""
    share_n = used.count_n / used.count_n.sum().clamp_min(1)
    entropy = torch.special.entr(share_n).sum().item()
    return {
        "path": path,
        "num_experts": int(layer.num_experts),
        "bytes_fraction": used.bytes / max(1, used.tokens),
        "macs_fraction": used.macs / max(1, used.tokens),
        "usage": (used.count_n > 0).double().mean().item(),
        "kl_uniform": max(0.0, math.log(len(share_n)) - entropy),
    }
