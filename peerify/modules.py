"""Parts of a model, by their paths, and how its layers read prompts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def peer_layers(model: nn.Module) -> dict[str, Any]:
    """Path -> PEER layer. By what they can do, not by class: code that came with a checkpoint has its own class."""
    return {path: module for path, module in model.named_modules() if hasattr(module, "active_experts")}


def blocks_around(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths of the transformer blocks: all elements of the outermost ModuleLists in which one of `paths` is."""
    lists: dict[str, None] = {}
    for path in paths:
        parts = path.split(".")
        for i in range(1, len(parts)):
            if isinstance(model.get_submodule(".".join(parts[:i])), nn.ModuleList):
                lists[".".join(parts[:i])] = None
                break
    return [f"{path}.{name}" for path in lists for name, _ in model.get_submodule(path).named_children()]


@contextmanager
def prefill(model: nn.Module, *, everything: bool) -> Iterator[None]:
    """While open, layers with budgets evaluate everything of many tokens at once, or keep to their budget."""
    layers = [layer for layer in peer_layers(model).values() if hasattr(layer, "prefill_all")]
    before = [layer.prefill_all for layer in layers]
    for layer in layers:
        layer.prefill_all = everything
    try:
        yield
    finally:
        for layer, was in zip(layers, before, strict=True):
            layer.prefill_all = was


def device_of(model: Any) -> torch.device:
    """Where a model of transformers takes its tokens."""
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]
