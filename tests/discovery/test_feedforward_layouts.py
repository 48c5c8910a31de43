"""Layers written by hand, in every layout and with every activation, are read back exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exact import exact_layer
from feedforward_layers import D_FF, Block, D, StandIn, Zoo, conv, down, fused, replace_all, up
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import relative_error
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from peerify.conversion.feedforward import read_feedforward, replace
from peerify.discovery.sites import find_feedforwards


def gate_up(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate) * value)


def up_gate(m: Any, x: Tensor) -> Tensor:
    value, gate = m.fc(x).split([D_FF, D_FF], dim=-1)
    return m.out(value * F.gelu(gate))


def interleaved(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(h[..., ::2] * torch.sigmoid(h[..., 1::2]))


def stacked(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x).view(*x.shape[:-1], 2, D_FF)
    return m.out(F.relu(h[..., 0, :]) * h[..., 1, :])


def paired(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).unflatten(-1, (D_FF, 2)).unbind(-1)
    return m.out(gate * value)


def functional(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x)
    return m.out(0.5 * h * (1.0 + torch.erf(h / 2.0**0.5)))


def in_place(m: Any, x: Tensor) -> Tensor:
    return m.out(m.fc(x).clamp_(min=0).pow(2))


def flattened(m: Any, x: Tensor) -> Tensor:
    return m.out(F.mish(m.fc(x.reshape(-1, D)))).reshape(x.shape)


CONVERTIBLE = {
    "fused, gate first": (gate_up, fused, "silu", (0, 1), (D_FF, 1)),
    "fused, up first": (up_gate, fused, "gelu", (D_FF, 1), (0, 1)),
    "interleaved": (interleaved, fused, "sigmoid", (1, 2), (0, 2)),
    "stacked": (stacked, fused, "relu", (0, 1), (D_FF, 1)),
    "bilinear pairs": (paired, fused, "linear", (0, 2), (1, 2)),
    "functional": (functional, up, "gelu", None, (0, 1)),
    "in place": (in_place, up, "relu2", None, (0, 1)),
    "flattened tokens": (flattened, up, "mish", None, (0, 1)),
    "Conv1D": (up_gate, lambda: conv(2 * D_FF, D), "gelu", (D_FF, 1), (0, 1)),
}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_zoo_is_converted(name: str) -> None:
    formula, first, activation, gate, value = CONVERTIBLE[name]
    layer = Zoo(formula, fc=first(), out=conv(D, D_FF) if name == "Conv1D" else down())
    model, x = nn.Sequential(Block(layer)).eval(), torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.path, site.identities, site.activation) == ("0.layer", (), activation)
    assert site.convertible
    assert (site.up.start, site.up.step) == value
    assert (site.gate and (site.gate.start, site.gate.step)) == gate
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6


def clamped(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate.clamp(max=0.3)) * value.clamp(-0.5, 0.5))


def clamped_after(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate).clamp(max=0.2) * value.clamp(min=-0.4, max=0.4))


def clamped_and_shifted(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    gate, value = gate.clamp(max=0.6), value.clamp(-0.7, 0.7)
    return m.out((value + 1.0) * (gate * torch.sigmoid(1.702 * gate)))


def multiplied(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(value * F.silu(gate * 0.35)) * 0.8


@pytest.mark.parametrize(
    ("formula", "clamp", "scales"),
    [
        (clamped, {"gate": 0.3, "up": 0.5}, (1.0, 1.0)),
        (clamped_after, {"act": 0.2, "up": 0.4}, (1.0, 1.0)),
        (clamped_and_shifted, {"gate": 0.6, "up": 0.7, "shift": 1.0}, (1.0, 1.0)),
        (multiplied, None, (0.35, 0.8)),
    ],
)
def test_clamps_shifts_and_constant_factors_belong_to_the_layer(
    formula: Callable[[Any, Tensor], Tensor], clamp: dict[str, float] | None, scales: tuple[float, float]
) -> None:
    model = nn.Sequential(Block(Zoo(formula, fc=fused(), out=down()))).eval()
    x = 3 * torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert site.convertible, site.reason
    assert site.clamp == clamp
    assert (site.inner_scale, site.outer_scale) == scales
    expected = model(x)
    layer, plan = exact_layer(read_feedforward(model, site), site)
    assert plan.get("clamp") == clamp
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6
    replace(model, site, layer)
    assert relative_error(model(x), expected) < 1e-6


@pytest.mark.parametrize("name", ["relu", "gelu", "silu", "relu2", "gelu_pytorch_tanh"])
def test_two_neurons_and_one_token_are_enough_to_tell_the_activation(name: str) -> None:
    layer = Zoo(lambda m, x: m.out(ACT2FN[name](m.fc(x))), fc=nn.Linear(D, 2), out=nn.Linear(2, D))
    (site,) = find_feedforwards(nn.Sequential(Block(layer)).eval(), {"input": torch.randn(1, D)})
    assert site.activation == name


def test_a_learned_activation_goes_with_the_layer() -> None:
    act = ACT2FN["xielu"].float()
    with torch.no_grad():
        for number in (*act.parameters(), *act.buffers()):
            number.add_(0.3)
    model = nn.Sequential(Block(Zoo(lambda m, x: m.out(m.act(m.fc(x))), fc=up(), act=act, out=down()))).eval()
    x = torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.activation, site.learned, site.path, site.convertible) == ("xielu", "0.layer.act", "0.layer", True)
    expected = model(x)
    layer, _ = exact_layer(read_feedforward(model, site), site)
    replace(model, site, layer)
    assert relative_error(model(x), expected) < 1e-6


def test_a_module_that_holds_up_and_activation_is_what_is_replaced() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = up()

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.fc(x))

    model = nn.Sequential(Zoo(lambda m, x: x + m.out(m.inner(x)), inner=Inner(), out=down())).eval()
    x = torch.randn(2, 5, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert (site.path, site.identities, site.convertible) == ("0.inner", ("0.out",), True)
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-6


def test_a_module_under_two_names_is_replaced_under_both() -> None:
    layer = Zoo(functional, fc=up(), out=down())
    model = nn.Sequential(Block(layer), Block(layer)).eval()
    x = torch.randn(2, 5, D)
    expected = model(x)
    (site,) = find_feedforwards(model, {"input": x})
    replace_all(model, [site])
    assert isinstance(model[0].layer, StandIn)
    assert model[0].layer is model[1].layer
    assert relative_error(model(x), expected) < 1e-6


NAMED = sorted(set(ACT2FN) - {"prelu", "xielu", "linear"})


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from(NAMED), gated=st.booleans(), swapped=st.booleans(), width=st.integers(1, 9))
def test_any_activation_and_layout_reads_back_exactly(name: str, gated: bool, swapped: bool, width: int) -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        if not gated:
            return m.out(ACT2FN[name](m.fc(x)))
        a, b = m.fc(x).chunk(2, dim=-1)
        return m.out(a * ACT2FN[name](b) if swapped else ACT2FN[name](a) * b)

    first = nn.Linear(D, 2 * width if gated else width)
    model = nn.Sequential(Block(Zoo(formula, fc=first, out=nn.Linear(width, D)))).eval()
    x = torch.randn(3, 40, D)
    (site,) = find_feedforwards(model, {"input": x})
    assert site.convertible, site.reason
    expected = model(x)
    replace_all(model, [site])
    assert relative_error(model(x), expected) < 1e-5
