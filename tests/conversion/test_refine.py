"""Refining a layer by gradient: the relaxation, and that the layer misses less of what matters and errs less."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerify.conversion.refine import SoftTopK, _Router, refine
from peerify.conversion.refit import relative_error
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_selection import threshold


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 40), share=st.floats(0.05, 0.95), seed=st.integers(0, 2**31))
def test_soft_choices_sum_to_k(count: int, share: float, seed: int) -> None:
    k = min(count - 1, max(1, round(share * count)))
    score_tn = torch.randn(3, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    m_tn = SoftTopK.apply(score_tn, k, threshold(score_tn, k))
    assert torch.allclose(m_tn.sum(1), torch.full((3,), float(k), dtype=torch.float64), atol=1e-3)
    assert torch.equal(m_tn.argsort(1), score_tn.argsort(1))


def test_gradient_passes_through_the_threshold() -> None:
    score_tn = normals(3, 9).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: SoftTopK.apply(s, 4, threshold(s, 4)), (score_tn,), eps=1e-6, atol=1e-4)


FORMS: list[dict[str, Any]] = [
    {"num_heads": 1, "grid": (8, 12), "query_dim": 6},
    {"num_heads": 4, "grid": (4, 6)},
    {"num_heads": 4, "grid": (5, 5), "query_dim": 6},
    {"num_heads": 4, "grid": (4, 6), "key_bias": False},
]


def layer_of(gated: bool = True, shared: int = 0, **options: Any) -> PEER:
    form = {"key_bias": True, "num_experts": 96 + shared, "num_shared": shared, "topk": 24 // options["num_heads"]}
    settings = {"share_pool": False, "share_keys": False, "joint_topk": True, "gates": "unit", "activation": "silu"}
    layer = PEER(8, gated=gated, **form | settings | options).double().eval()
    for parameter in layer.parameters():
        parameter.data.copy_(torch.randn_like(parameter))
    return layer


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("gated", [True, False])
def test_scores_are_the_layers_own(form: dict[str, Any], gated: bool) -> None:
    """Before and after: what is trained is what is stored, and what the layer then computes."""
    layer = layer_of(gated, shared=3, **form)
    x_td = normals(50, 8) * normals(8) + normals(8)

    def selected(score_tn: Tensor) -> Tensor:
        return score_tn >= score_tn.topk(layer.topk, dim=1).values[:, -1:]

    def layers_own() -> Tensor:
        row_tha, column_thb = layer.keys.sub_scores(x_td)
        return (row_tha[..., None] + column_thb[..., None, :]).flatten(1)[:, : layer.keys.num_keys]

    with torch.no_grad():
        router = _Router(layer, x_td)
        assert torch.equal(selected(router.scores(x_td)), selected(layers_own()))
        for tensor, _ in router.learned():
            tensor.add_(0.3 * torch.randn_like(tensor))
        router.store(layer)
        torch.testing.assert_close(router.scores(x_td), layers_own(), rtol=1e-8, atol=1e-8)


def everything(layer: PEER) -> PEER:
    """The layer with all of its experts retrieved."""
    whole = copy.deepcopy(layer)
    whole.topk = whole.keys.num_keys
    return whole


@torch.no_grad()
def missed(layer: PEER, x_td: Tensor) -> float:
    """Share of the experts' energy that is left out."""
    energy_tn = (everything(layer).activations(x_td) * layer.pool.v.norm(dim=1)).square()
    energy_tn = energy_tn / energy_tn.sum(1, keepdim=True)
    return float((energy_tn * ~layer.active_experts(x_td)).sum(1).mean())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_less_is_missed_afterwards(form: dict[str, Any]) -> None:
    """On tokens that it was not trained on, from keys that know nothing."""
    layer = layer_of(shared=2, **form)
    mixing = normals(8, 8)
    x_td, other_td = normals(4000, 8) @ mixing, normals(1000, 8) @ mixing
    target_td, other_target_td = everything(layer)(x_td).detach(), everything(layer)(other_td).detach()
    before, error = missed(layer, other_td), relative_error(layer(other_td).detach(), other_target_td)
    refine(layer, x_td, target_td, steps=60, seed=0)
    assert missed(layer, other_td) < 0.9 * before
    assert relative_error(layer(other_td).detach(), other_target_td) < 0.9 * error


@pytest.mark.parametrize("biased", [False, True])
def test_experts_learn_what_the_router_leaves_out(biased: bool) -> None:
    """Towards a target that the retrieved experts cannot say as they are; all of their tables take part."""
    layer = layer_of(**FORMS[0], expert_bias=biased, gate_bias=biased, output_bias=biased)
    x_td = normals(4000, 8)
    target_td = everything(layer)(x_td).detach() + normals(8)
    before = copy.deepcopy(layer.state_dict())
    refine(layer, x_td, target_td, steps=100, seed=0)
    after = layer.state_dict()
    assert all(not torch.equal(after[name], before[name]) for name in after)
    assert all(parameter.grad is None for parameter in layer.parameters())
    error = relative_error(layer(x_td).detach(), target_td)
    layer.load_state_dict({name: before[name] if name.startswith("pool.") else after[name] for name in after})
    assert error < relative_error(layer(x_td).detach(), target_td)


def test_same_seed_same_layer() -> None:
    layer = layer_of(**FORMS[0])
    twins = [copy.deepcopy(layer) for _ in range(2)]
    x_td = normals(1000, 8)
    for twin in twins:
        refine(twin, x_td, x_td, steps=5, seed=3)
    states = [twin.state_dict() for twin in twins]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["keys.sub_keys"], layer.keys.sub_keys)


@pytest.mark.parametrize(
    "options",
    [
        {"share_pool": True, "joint_topk": False, "num_heads": 2, "grid": (10, 10)},
        {"joint_topk": False, "num_heads": 4, "grid": (4, 6)},
        {"num_heads": 4, "grid": (4, 6), "query_dim": 4, "query_norm": True},
        {"num_heads": 1, "grid": (8, 12), "topk": 96},
    ],
    ids=str,
)
def test_other_forms_stay_as_they_are(options: dict[str, Any]) -> None:
    layer = layer_of(**options)
    before = copy.deepcopy(layer.state_dict())
    x_td = normals(600, 8)
    refine(layer, x_td, x_td, steps=3, seed=0)
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
