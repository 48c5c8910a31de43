"""What cannot be converted is refused with its reason, and what is no feed-forward layer is not reported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from feedforward_layers import D_FF, Block, D, Zoo, down, fused, up
from tiny import FAMILIES
from torch import Tensor, nn
from torch.nn import functional as F

from peerify.conversion.feedforward import read_feedforward
from peerify.discovery.sites import find_feedforwards
from peerify.errors import ConversionError


def test_low_rank_adapters_beside_the_projection_are_the_reason() -> None:
    def adapted(m: Any, x: Tensor) -> Tensor:
        gate, value = (m.fc(x) + m.b(m.a(x))).chunk(2, dim=-1)
        return m.out(F.silu(gate) * value)

    low = {"a": nn.Linear(D, 3, bias=False), "b": nn.Linear(3, fused().out_features, bias=False)}
    model = nn.Sequential(Block(Zoo(adapted, fc=fused(), out=down(), **low))).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible
    assert "adapters" in site.reason


def normed(m: Any, x: Tensor) -> Tensor:
    return m.out(m.norm(F.silu(m.fc(x))))


def scaled(m: Any, x: Tensor) -> Tensor:
    return m.out(F.gelu(m.fc(x)) * m.norm.weight)


def batch_normed(m: Any, x: Tensor) -> Tensor:
    h = m.fc(x).flatten(0, 1)
    h = F.batch_norm(h, m.norm.weight.abs(), m.norm.weight.abs(), m.norm.weight, m.norm.bias)
    return m.out(F.relu(h)).view(x.shape)


def both_activated(m: Any, x: Tensor) -> Tensor:
    gate, value = m.fc(x).chunk(2, dim=-1)
    return m.out(F.silu(gate) * torch.tanh(value))


def odd_activation(m: Any, x: Tensor) -> Tensor:
    return m.out(torch.sin(m.fc(x)))


def read_twice(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.fc(x))
    return m.out(h) + h.mean(-1, keepdim=True)


def weights_twice(m: Any, x: Tensor) -> Tensor:
    return m.out(F.relu(m.fc(x))) + m.out(torch.tanh(x[..., :1]).expand(*x.shape[:-1], D_FF))


def extra_argument(m: Any, x: Tensor) -> Tensor:
    return x + m.out(F.relu(m.fc(x)))


NOT_CONVERTIBLE = {
    "norm": (normed, up, "a norm lies between"),
    "learned scale": (scaled, up, "learned parameters"),
    "batch norm": (batch_normed, up, "a norm lies between"),
    "both activated": (both_activated, fused, "not combined as act"),
    "odd activation": (odd_activation, up, "none of those that transformers knows"),
    "hidden read elsewhere": (read_twice, up, "hidden activation is also used"),
    "weights used elsewhere": (weights_twice, up, "weights are also used"),
    "residual inside, functional": (extra_argument, up, "neither the layer nor its activation"),
}


@pytest.mark.parametrize("name", NOT_CONVERTIBLE)
def test_zoo_is_refused_with_a_reason(name: str) -> None:
    formula, first, reason = NOT_CONVERTIBLE[name]
    model = nn.Sequential(Block(Zoo(formula, fc=first(), out=down(), norm=nn.LayerNorm(D_FF)))).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible
    assert reason in site.reason
    with pytest.raises(ConversionError, match=reason):
        read_feedforward(model, site)


def attention(m: Any, x: Tensor) -> Tensor:
    q = m.fc(x)
    return m.out(torch.softmax(q @ q.transpose(-1, -2), -1) @ q)


def low_rank(m: Any, x: Tensor) -> Tensor:
    return m.out(m.fc(x))


def low_rank_normed(m: Any, x: Tensor) -> Tensor:
    return m.out(m.norm(m.fc(x)))


def two_inputs(m: Any, x: Tensor) -> Tensor:
    return m.out(F.relu(m.fc(x)) * m.fc(x + 1))


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    h = F.relu(m.fc(x))
    h[..., :3].copy_(x[..., :3])
    return m.out(h)


def routed(m: Any, x: Tensor) -> Tensor:
    tokens = (x[..., 0] > 0).flatten().nonzero()[:, 0]
    flat = x.reshape(-1, D)
    return torch.zeros_like(flat).index_add(0, tokens, m.out(F.relu(m.fc(flat[tokens])))).view(x.shape)


@pytest.mark.parametrize("formula", [attention, low_rank, low_rank_normed, two_inputs, written_through_a_view, routed])
def test_zoo_of_other_layers_is_not_reported(formula: Callable[[Any, Tensor], Tensor]) -> None:
    model = nn.Sequential(Block(Zoo(formula, fc=up(), out=down(), norm=nn.LayerNorm(D_FF)))).eval()
    x = torch.randn(2, 5, D)
    x[0, 0, 0] = 9.0  # at least one token is routed
    assert find_feedforwards(model, {"input": x}) == []


def test_a_gated_layer_without_a_module_of_its_own_is_refused() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return x + m.out(m.act(m.gate(x)) * m.fc(x))

    model = nn.Sequential(Zoo(formula, gate=up(), fc=up(), act=nn.SiLU(), out=down())).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert (site.kind, site.convertible) == ("gated", False)
    assert "no module of its own" in site.reason


def test_a_layer_that_changes_the_width_is_refused() -> None:
    model = nn.Sequential(nn.Linear(D, D_FF), nn.ReLU(), nn.Linear(D_FF, D + 1)).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, D)})
    assert not site.convertible
    assert "output width 9 differs from its input width 8" in site.reason


def test_an_activation_module_shared_with_something_else_is_kept() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return m.act(x) + m.out(m.act(m.fc(x)))

    model = nn.Sequential(Zoo(formula, fc=up(), act=nn.ReLU(), out=down())).eval()
    (site,) = find_feedforwards(model, {"input": torch.randn(2, 5, D)})
    assert not site.convertible


def test_a_failing_forward_is_one_sentence() -> None:
    with pytest.raises(ConversionError, match="pass example inputs"):
        find_feedforwards(nn.Linear(D, D))
    with pytest.raises(ConversionError, match="trial forward pass of LlamaForCausalLM failed"):
        find_feedforwards(FAMILIES["llama"](), {"input_ids": torch.tensor([[10**6]])})


def test_a_model_that_branches_on_its_activations_needs_weights() -> None:
    def formula(m: Any, x: Tensor) -> Tensor:
        return m.out(F.relu(m.fc(x))) if m.fc(x).sum() > 0 else x

    model = nn.Sequential(Zoo(formula, fc=up(), out=down())).eval().to("meta")
    with pytest.raises(ConversionError, match="without its weights"):
        find_feedforwards(model, {"input": torch.randn(2, D)})
