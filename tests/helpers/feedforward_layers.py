"""Feed-forward layers written by hand, and what puts a stand-in in the place of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peerify.conversion.feedforward import FeedForward, read_feedforward, replace
from peerify.discovery.sites import Site

D, D_FF = 8, 12


class StandIn(nn.Module):
    """What a converted layer is to the model: a module that computes the feed-forward by itself."""

    def __init__(self, layer: FeedForward) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def replace_all(model: nn.Module, sites: list[Site]) -> None:
    for site in sites:
        replace(model, site, StandIn(read_feedforward(model, site)))


class Zoo(nn.Module):
    """One layer, written by `formula(self, x)` with the modules given."""

    def __init__(self, formula: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.formula = formula
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


class Block(nn.Module):
    """A residual block around a Zoo layer, so that nothing but the layer is a module of its own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(self.norm(x))


def fused() -> nn.Linear:
    return nn.Linear(D, 2 * D_FF)


def up() -> nn.Linear:
    return nn.Linear(D, D_FF)


def down() -> nn.Linear:
    return nn.Linear(D_FF, D)


def conv(n_out: int, n_in: int) -> Conv1D:
    module = Conv1D(n_out, n_in)
    nn.init.normal_(module.bias)
    return module
