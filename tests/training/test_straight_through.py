"""Training's routing computes what the layer does, and its gradients and balance move the selection."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from training_layers import peer

from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.training import straight_through as routing
from peerify.training.straight_through import StraightThrough

VARIANTS: list[dict[str, Any]] = [
    {},
    {"joint_topk": False},
    {"num_shared": 5},
    {"gated": False, "activation": "relu", "expert_bias": True, "output_bias": True},
    {"query_dim": 6},
]


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("options", VARIANTS)
def test_training_computes_what_the_layer_computes(
    options: dict[str, Any], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "AT_ONCE", 5)  # so that there are several parts, the last one shorter
    layer = (
        peer(**options)
        if "num_shared" not in options
        else PEER(12, 46, (4, 4), 3, 4, share_pool=False, share_keys=False, joint_topk=True, gates="unit", num_shared=5)
    )
    shared = PEER(12, 30, (5, 6), 3, 4, share_pool=True, share_keys=True, gates="unit", query_dim=8)
    for each in (layer, shared):
        model = nn.ModuleDict({"mlp": each})
        x = torch.randn(2, 9, 12)
        with torch.no_grad():
            wanted = each(x)
        with StraightThrough(model, temperature=0.3, every=every):
            torch.testing.assert_close(each(x), wanted, rtol=1e-4, atol=1e-5)
            assert each(x).requires_grad
        assert "forward" not in vars(each)


def test_gradients_move_the_selection_towards_what_is_wanted() -> None:
    """A score that was a little too low rises when the expert would help, and falls when it would harm."""
    layer = PEER(6, 2, (1, 2), 1, 1, share_pool=True, share_keys=True, gates="unit", query_dim=2, activation="relu")
    with torch.no_grad():
        layer.pool.u.fill_(1.0)
        layer.pool.v.zero_()
        layer.pool.v[0, 0] = layer.pool.v[1, 1] = 1.0
    x = torch.rand(1, 6) + 0.1
    chosen = int(layer.active_experts(x).float().argmax())
    keys = layer.keys.sub_keys
    for wanted in (0, 1):
        target = torch.zeros(1, 6)
        target[0, wanted] = x.sum()
        with StraightThrough(nn.ModuleDict({"mlp": layer}), temperature=1.0):
            loss = (layer(x) - target).pow(2).sum()
        (slope,) = torch.autograd.grad(loss, keys)
        query = layer.keys.query_proj(x)[0, 1]  # meets the column keys
        change = -(slope[0, 1:] @ query[None]) if slope.shape[-1] == 1 else None
        assert change is not None
        gap = change[wanted] - change[1 - wanted]
        assert gap > 0 if wanted != chosen else abs(gap) < 1e-3


def test_the_gradient_is_that_of_a_sigmoid_around_the_level() -> None:
    layer = peer()
    x = torch.randn(30, 12)
    with StraightThrough(nn.ModuleDict({"mlp": layer}), temperature=0.4):
        (got,) = torch.autograd.grad(layer(x).pow(2).sum(), layer.keys.sub_keys)
    row, column = layer.keys.sub_scores(x)
    score = (row[..., None] + column[..., None, :]).flatten(1)[:, :46]
    level = score.detach().topk(12, dim=1).values[:, -1:]
    step = torch.sigmoid((score - level) / (0.4 * score.detach().std(1, keepdim=True)))
    weight = (score >= level).float() + step - step.detach()
    pool = layer.pool
    assert pool.gate is not None
    y = (torch.nn.functional.silu(x @ pool.gate.T) * (x @ pool.u.T) * weight) @ pool.v
    (wanted,) = torch.autograd.grad(y.pow(2).sum(), layer.keys.sub_keys)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-3)


def test_some_tokens_teach_the_router_on_behalf_of_all() -> None:
    layer = peer(num_shared=2)
    x = torch.randn(31, 12)
    slope = torch.randn(31, 12)
    model = nn.ModuleDict({"mlp": layer})

    def gradient(every: int, of: torch.Tensor) -> torch.Tensor:
        with StraightThrough(model, temperature=0.4, every=every):
            y = layer(x)
        torch.testing.assert_close(y, layer(x))
        return torch.autograd.grad(y, layer.keys.sub_keys, of)[0]

    some = torch.zeros_like(slope)
    some[2::4] = slope[2::4]
    torch.testing.assert_close(gradient(4, slope), 4 * gradient(1, some), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(gradient(4, slope), gradient(1, slope), rtol=0.1)


@pytest.mark.parametrize("gates", ["unit", "softmax"])
def test_the_record_shows_use_balance_and_scores(gates: str) -> None:
    options = {} if gates == "unit" else {"gates": gates, "joint_topk": False}
    layer = peer(**options)
    model = nn.ModuleDict({"mlp": layer})
    x = torch.randn(40, 12)
    with StraightThrough(model, temperature=0.3) as router:
        router.recording = True
        layer(x)
        statistics = router.statistics()["mlp"]
        balance, z = router.losses()
        steps = router.load_steps()["mlp"]
    assert 0 < statistics["used"] <= 1
    assert statistics["kl_uniform"] >= 0
    assert statistics["gate"] == pytest.approx(1.0 if gates == "unit" else 0.25, rel=0.3)
    assert balance > 0
    assert z.requires_grad
    assert layer.keys.sub_key_bias is not None
    assert steps.shape == layer.keys.sub_key_bias.shape


@pytest.mark.parametrize("gates", ["unit", "softmax"])
def test_a_record_for_the_log_alone_keeps_no_graph(gates: str) -> None:
    """It held nine tensors of a number for each token and expert, in every layer."""
    layer = peer() if gates == "unit" else peer(gates=gates, joint_topk=False)
    model, x = nn.ModuleDict({"mlp": layer}), torch.randn(40, 12)
    found = []
    for with_losses in (True, False):
        with StraightThrough(model, temperature=None, with_losses=with_losses) as router:
            router.recording = True
            layer(x)
            assert router._seen["mlp"].row_tha.requires_grad is with_losses
            found.append(router.statistics())
    assert found[0] == found[1]


def test_the_record_of_a_layer_with_budgets_is_what_it_used() -> None:
    layer = ElasticPEER(12, 46, gated=True, activation="silu", budgets=[[0.3, 1.0, 0.02, 0.3, 0.5]])
    model, x = nn.ModuleDict({"mlp": layer}), torch.randn(2, 20, 12)
    layer.set_active(0.3)
    with StraightThrough(model, temperature=0.3) as router:
        layer(x)
        assert router.statistics() == {}, "it was not asked to record"
        router.recording = True
        layer(x)
        statistics = router.statistics()["mlp"]
        router.forget()
        assert router.statistics() == {}
    mask_tn, read, done = layer.usage(x.flatten(0, 1))
    share_n = mask_tn.sum(0).double() / mask_tn.sum()
    assert statistics["used"] == pytest.approx(mask_tn.any(0).double().mean().item())
    assert statistics["kl_uniform"] == pytest.approx(math.log(46) - torch.special.entr(share_n).sum().item())
    assert (statistics["bytes"], statistics["macs"]) == pytest.approx((read, done))
    assert layer.pool.observer is None


def test_balance_terms_even_out_retrieval() -> None:
    """Both the loss and the bias bring a lopsided router nearer to uniform."""
    x = torch.randn(200, 12)
    for method in ("loss", "bias"):
        layer = peer()
        bias = layer.keys.sub_key_bias
        assert bias is not None
        bias.data[..., 0] += 6.0
        model = nn.ModuleDict({"mlp": layer})
        optimizer = torch.optim.SGD([bias], lr=3.0)
        unevenness = []
        with StraightThrough(model, temperature=0.3) as router:
            router.recording = True
            for _ in range(60):
                layer(x)
                unevenness.append(router.statistics()["mlp"]["kl_uniform"])
                if method == "loss":
                    optimizer.zero_grad()
                    router.losses()[0].backward()
                    optimizer.step()
                else:
                    bias.data += 0.1 * router.load_steps()["mlp"]
        assert unevenness[-1] < 0.7 * unevenness[0], method
