"""The weights of a dense feed-forward layer in one form, with one row per neuron; and something else in its place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peerify.discovery.formula import Projection
from peerify.discovery.replay import Clamp, activation_function
from peerify.discovery.sites import Site
from peerify.errors import ConversionError


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward:
    """The weights of a feed-forward layer: row i of each matrix is neuron i's input, gate or *output* vector.

    u_fd, gate_fd, v_fd: (d_ff, d_model); u_bias_f, gate_bias_f: (d_ff,); bias_d: (d_model,).
    """

    u_fd: Tensor
    gate_fd: Tensor | None
    v_fd: Tensor
    u_bias_f: Tensor | None
    gate_bias_f: Tensor | None
    bias_d: Tensor | None
    activation: str
    clamp: Clamp | None = None
    learned: nn.Module | None = None
    """The activation itself where it has parameters."""

    def to(self, device: torch.device, dtype: torch.dtype) -> FeedForward:
        """The same layer on another device and in another number type; unchanged tensors are not copied."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        if self.learned is not None:
            moved["learned"] = copy.deepcopy(self.learned).to(device, dtype)
        return FeedForward(**moved)

    def factors(self, x_td: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factors of a gated neuron's value, up and act(gate); or (act(up), None): (…, d_ff) each."""
        act = self.learned or activation_function(self.activation)
        up_tf = F.linear(x_td, self.u_fd, self.u_bias_f)
        if self.gate_fd is None:
            return act(up_tf), None
        gate_tf = F.linear(x_td, self.gate_fd, self.gate_bias_f)
        if self.clamp is None:
            return up_tf, act(gate_tf)
        infinite = float("inf")
        act_tf = act(gate_tf.clamp(max=self.clamp.get("gate", infinite))).clamp(max=self.clamp.get("act", infinite))
        limit = self.clamp.get("up", infinite)
        return up_tf.clamp(-limit, limit) + self.clamp.get("shift", 0.0), act_tf

    def hidden(self, x_td: Tensor) -> Tensor:
        """What enters the down projection, one number per neuron: (…, d_model) → (…, d_ff)."""
        up_tf, act_tf = self.factors(x_td)
        return up_tf if act_tf is None else up_tf * act_tf

    def __call__(self, x_td: Tensor) -> Tensor:
        """The dense layer itself: (…, d_model) → (…, d_model)."""
        return F.linear(self.hidden(x_td), self.v_fd.T, self.bias_d)


def read_feedforward(model: nn.Module, site: Site) -> FeedForward:
    """The weights of the layer at `site`, detached, without a copy where the model's layout allows it.

    Raises ConversionError if the site is not convertible or its weights are not floating-point numbers.
    """
    if not site.convertible:
        raise ConversionError(f"{site.path} cannot be converted: {site.reason}")
    u_fd, u_bias_f = _rows(model, site.up, site.d_ff)
    gate_fd, gate_bias_f = _rows(model, site.gate, site.d_ff) if site.gate else (None, None)
    down_df, bias_d = _rows(model, Projection(path=site.down), site.d_model)
    down_df, bias_d = _times(site.outer_scale, down_df, bias_d)
    if gate_fd is None:
        u_fd, u_bias_f = _times(site.inner_scale, u_fd, u_bias_f)
    else:
        gate_fd, gate_bias_f = _times(site.inner_scale, gate_fd, gate_bias_f)
    return FeedForward(
        u_fd=u_fd,
        gate_fd=gate_fd,
        v_fd=down_df.T,
        u_bias_f=u_bias_f,
        gate_bias_f=gate_bias_f,
        bias_d=bias_d,
        activation=site.activation,
        clamp=site.clamp,
        learned=model.get_submodule(site.learned) if site.learned else None,
    )


@torch.no_grad()
def write_feedforward(
    model: nn.Module,
    site: Site,
    u_fd: Tensor,
    gate_fd: Tensor | None,
    v_fd: Tensor,
    u_bias_f: Tensor | None,
    gate_bias_f: Tensor | None,
    bias_d: Tensor | None,
    *,
    learned: nn.Module | None,
) -> None:
    """The reverse of `read_feedforward`, in place, for weights of the same sizes."""
    inner, outer = 1 / site.inner_scale, 1 / site.outer_scale
    parts: list[tuple[Projection, int, float, Tensor, Tensor | None]] = [
        (site.up, site.d_ff, inner if gate_fd is None else 1.0, u_fd, u_bias_f),
        (Projection(path=site.down), site.d_model, outer, v_fd.T, bias_d),
    ]
    if gate_fd is not None:
        assert site.gate is not None
        parts.append((site.gate, site.d_ff, inner, gate_fd, gate_bias_f))
    for part, count, scale, weight, bias in parts:
        rows, bias_rows = _rows(model, part, count)
        rows.copy_(_times(scale, weight, None)[0])
        if bias_rows is not None and bias is not None:
            bias_rows.copy_(_times(scale, bias, None)[0])
    if learned is not None:
        model.get_submodule(site.learned).load_state_dict(learned.state_dict())


def replace(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Put `module` in place of the layer at `site`, under every name that the layer has in `model`."""
    _put(model, site, module)


@contextmanager
def replaced(model: nn.Module, site: Site, module: nn.Module) -> Iterator[None]:
    """`replace` for a while."""
    before = _put(model, site, module)
    try:
        yield
    finally:
        for parent, name, old in before:
            setattr(parent, name, old)


def _put(model: nn.Module, site: Site, module: nn.Module) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace; returns what was where: (parent, name, module)."""
    before = []
    for path, new in [(site.path, module), *((path, nn.Identity()) for path in site.identities)]:
        old = model.get_submodule(path)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child is old:
                    before.append((parent, name, old))
                    setattr(parent, name, new)
    return before


def _times(scale: float, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if scale == 1.0:
        return weight, bias
    return scale * weight, None if bias is None else scale * bias


def _rows(model: nn.Module, part: Projection, count: int) -> tuple[Tensor, Tensor | None]:
    """Weight rows, one per output feature, and biases of a part of a linear module."""
    module: Any = model.get_submodule(part.path)
    weight, bias = module.weight.detach(), module.bias
    if hasattr(module, "get_delta_weight"):  # LoRA: what the adapters in use add belongs to the layer
        if not weight.is_floating_point():
            raise ConversionError(f"{part.path}.weight is quantized ({weight.dtype}): load the model dequantized")
        extra = [] if module.merged or module.disable_adapters else module.active_adapters
        weight = sum((module.get_delta_weight(name).detach() for name in extra if name in module.lora_A), weight)
        module = module.base_layer
    if not weight.is_floating_point():
        raise ConversionError(f"{part.path}.weight is quantized ({weight.dtype}): load the model dequantized")
    if isinstance(module, Conv1D):
        weight = weight.T
    rows = slice(part.start, part.start + part.step * (count - 1) + 1, part.step)
    return weight[rows], None if bias is None else bias.detach()[rows]
