"""Parts of a model, by their paths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

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
