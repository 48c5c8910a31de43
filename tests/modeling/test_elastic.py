"""Layers with budgets: against a loop written from the docstrings, and the laws that hold whatever the budget."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from checkpoints import tiny_model
from elastic_reference import at, fresh, make, middling, reference, spent, vectors_of
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import normals
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from peerify.config.peer import PeerConfig
from peerify.conversion.model import convert
from peerify.modeling import peer_evaluation
from peerify.modeling.peer_cpu import FEW
from peerify.modeling.peer_elastic import Budget, ElasticPEER
from peerify.modeling.peer_products import LACKS_BFLOAT16

CLAMP = {"gate": 0.7, "act": 0.4, "up": 0.8, "shift": 0.3}


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_each_expert_is_taken_as_its_error_is_worth(data: st.DataObject, seed: int) -> None:
    """Output, usage, cost and what `watch` tells are the loop's, for few tokens, for many, and in parts."""
    gated, biased = data.draw(st.booleans(), "gated"), data.draw(st.booleans(), "biased")
    clamp = CLAMP if gated and data.draw(st.booleans(), "clamp") else None
    inputs = data.draw(st.sampled_from([1.0, 0.6, 0.3, 0.05]), "inputs")
    layer = make(
        seed, gated=gated, clamp=clamp, expert_bias=biased, gate_bias=biased and gated, output_bias=biased,
        activation=data.draw(st.sampled_from(["silu", "gelu", "relu"]), "activation"), d_ff=17,
        bits=data.draw(st.integers(2, 8), "bits"), group=data.draw(st.sampled_from([1, 4, 10, 64]), "group"),
    )  # fmt: skip
    x_td = normals(FEW + 3, 10, seed=seed + 1)
    price = middling(layer, x_td) * 10 ** data.draw(st.floats(-3, 2), "price")
    at(layer, price, inputs)
    found = [reference(layer, x_d, price, inputs) for x_d in x_td]
    y_td, tiers = torch.stack([y_d for y_d, _ in found]), [tier for _, tier in found]
    told: list[tuple[Tensor, float, float]] = []
    layer.watch(lambda *used: told.append(used))
    torch.testing.assert_close(layer(x_td), y_td, rtol=1e-6, atol=1e-6)
    layer.watch(None)
    torch.testing.assert_close(torch.cat([layer(part) for part in x_td.split(FEW)]), y_td, rtol=1e-6, atol=1e-6)
    with patch.object(peer_evaluation, "AT_ONCE", 4):
        torch.testing.assert_close(layer(x_td), y_td, rtol=1e-6, atol=1e-6)
    mask_tn, read, done = layer.usage(x_td)
    assert mask_tn.tolist() == layer.active_experts(x_td).tolist() == [[t != "none" for t in row] for row in tiers]
    assert (read, done) == pytest.approx(spent(layer, tiers, inputs))
    ((mask, *cost),) = told
    assert torch.equal(mask, mask_tn)
    assert cost == pytest.approx([read, done])


# --- Laws ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gated", [True, False])
def test_with_everything_on_it_is_the_dense_layer_to_the_bit(gated: bool, dtype: torch.dtype, seed: int) -> None:
    layer = make(seed, gated=gated, dtype=dtype, expert_bias=True, gate_bias=gated, output_bias=True)
    pool, x_td = layer.pool, normals(12, 10, seed=seed + 1).to(dtype)
    up = F.linear(x_td, pool.u, pool.u_bias)
    a_tn = pool.act(F.linear(x_td, pool.gate, pool.gate_bias)) * up if gated else pool.act(up)
    dense = a_tn @ pool.v + layer.bias
    at(layer, 1.0)
    layer.set_active(1)
    y_td = layer(x_td)
    assert layer.usage(x_td)[1:] == (1.0, 1.0)
    assert torch.equal(at(layer, 0.0)(x_td), y_td)
    # Products that the CPU lacks are taken in float32: not the same bits, but no further from the truth.
    if dtype == torch.float16 or (dtype == torch.bfloat16 and LACKS_BFLOAT16):
        exact = copy.deepcopy(layer).double()(x_td.double())
        far, dense_far = ((y.double() - exact).norm() / exact.norm() for y in (y_td, dense))
        assert far <= 1.5 * dense_far + torch.finfo(dtype).eps / 2
    else:
        assert torch.equal(y_td, dense)


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.5])
@pytest.mark.parametrize("gated", [True, False])
def test_what_prices_buy(gated: bool, inputs: float, seed: int) -> None:
    """Nearly nothing gives the dense output, no higher price reads more, and at a huge one the bias is left."""
    layer = make(seed, gated=gated, output_bias=True, num_experts=40)
    x_td = normals(30, 10, seed=seed + 1)
    layer.set_active(1)
    dense, middle = layer(x_td), middling(layer, x_td)
    torch.testing.assert_close(at(layer, middle * 1e-20, inputs)(x_td), dense, rtol=1e-6, atol=1e-6)
    costs = [at(layer, middle * 10**e, inputs).usage(x_td)[1:] for e in torch.linspace(-6, 4, 41).tolist()]
    read, done = zip(*costs, strict=True)
    assert sorted(read, reverse=True) == [*read]
    if inputs == 1:  # else a fine copy multiplies more numbers than the expert itself
        assert sorted(done, reverse=True) == pytest.approx(done)
    assert len(set(costs)) > 10
    assert torch.equal(at(layer, 1e30, inputs)(x_td), layer.bias.expand(30, -1))
    assert not layer.active_experts(x_td).any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_half_precision_and_extremes(dtype: torch.dtype, inputs: float, seed: int) -> None:
    layer = make(seed, d_model=32, num_experts=64, output_bias=True)
    for table in vectors_of(layer.pool):
        table.mul_(0.3)[3:5] = 0
    x_td = normals(20, 32, seed=seed + 1)
    x_td[0] = 0
    price = middling(layer, x_td)
    wanted = at(layer, price, inputs)(x_td)
    layer.to(dtype)
    got = at(layer, price, inputs)(x_td.to(dtype))
    assert got.dtype == dtype
    # Where a choice falls the other way, both are about as good.
    assert (got.double() - wanted).norm() < 0.1 * wanted.norm()
    for size in (0.0, 1e-6, 10.0):
        assert at(layer, price, inputs)((size * x_td).to(dtype)).isfinite().all()
    layer.pool.v.zero_()
    assert layer(x_td.to(dtype)).isfinite().all()


# --- Budgets ------------------------------------------------------------------------------------------------------

ROWS = [[0.2, 0.5, 0.4, 0.2, 0.5], [0.4, 1.0, 0.09, 0.4, 0.7], [0.8, 1.0, 0.01, 0.8, 0.9]]


def test_budgets_between_two_are_interpolated() -> None:
    layer = ElasticPEER(8, 12, budgets=ROWS)
    assert (layer.bytes_fraction, layer.macs_fraction) == (1, 1)
    layer.set_active(0.6)
    assert layer.budget == pytest.approx((0.6, 1.0, 0.03, 0.6, 0.8))
    assert (layer.bytes_fraction, layer.macs_fraction) == pytest.approx((0.6, 0.8))
    for active, row in [(0.2, 0), (0.4, 1), (0.8, 2), (0.3, 0), (0.95, 2)]:  # 0.3: other inputs are read above
        layer.set_active(active)
        assert layer.budget == Budget(*ROWS[row])
    for active in (0.19, 0.0, -1.0, 1.01, math.nan):
        with pytest.raises(ValueError, match=rf"^active must be 0\.2 to 1, not {active:g}$"):
            layer.set_active(active)
        assert layer.budget == Budget(*ROWS[2])
    layer.set_active(1)
    assert layer.budget is None
    with pytest.raises(ValueError, match=r"^active must be 1 to 1, not 0\.5$"):
        ElasticPEER(8, 12).set_active(0.5)


@torch.no_grad()
def test_all_is_read_in_full_where_less_takes_as_long(seed: int) -> None:
    """The kernel does not fit this layer."""
    layer = make(seed, budgets=ROWS, dtype=torch.float32)
    x = torch.randn(3, FEW + 1, 10)
    layer.set_active(1)
    dense = layer(x)
    layer.set_active(0.2)
    at_budget = layer(x)
    assert not torch.equal(at_budget, dense)
    layer.prefill_all = True
    assert torch.equal(layer(x), dense)
    torch.testing.assert_close(layer(x[0, :1]), dense[0, :1])
    torch.testing.assert_close(layer.train()(x), at_budget)


@pytest.mark.parametrize("trust", [True, False])
def test_a_model_is_set_saved_and_loaded_with_its_budget(tmp_path: Path, trust: bool) -> None:
    model = tiny_model()
    dense, ids = copy.deepcopy(model), torch.randint(3, 256, (2, FEW + 2))
    convert(model, PeerConfig(active=0.6), torch.randint(3, 256, (8, 32)))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense(ids).logits)
        model.set_active(0.4, prefill="budget")
        wanted = model(ids).logits
    assert not torch.equal(wanted, dense(ids).logits)
    for refused in (0.01, 2.0):
        with pytest.raises(ValueError, match=r"^active must be 0\.\d+ to 1, not "):
            model.set_active(refused)
    with pytest.raises(ValueError, match=r"^prefill must be all or budget, not 'none'$"):
        model.set_active(0.7, prefill="none")
    assert (model.config.peer_active, model.config.peer_prefill) == (0.4, "budget")
    model.set_active(0.6, prefill="all")
    model.save_pretrained(tmp_path / "a")
    kwargs: dict[str, Any] = {"peer_active": 0.4, "peer_prefill": "budget"} | (
        {"trust_remote_code": True} if trust else {}
    )
    for folder in ("a", "b"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / folder, **kwargs).eval()
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, wanted)
        loaded.save_pretrained(tmp_path / "b")
        kwargs.pop("peer_active", None), kwargs.pop("peer_prefill", None)
    with pytest.raises(ValueError, match="active must be"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "b", peer_active=0.01)


# --- Faults, and other people's compilers -------------------------------------------------------------------------

NOT_IN_RANGE = r"^a budget needs active in \(0, 1\), inputs in \(0, 1\] and a price of at least 0, not \["


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, r"^bits must be 2 to 8, not 1$"),
        ({"bits": 9}, r"^bits must be 2 to 8, not 9$"),
        ({"group": 0}, r"^group must be at least 1, not 0$"),
        (
            {"budgets": [[0.5, 1.0, math.nan, 0.5, 0.5]]},
            r"^a budget has a number that is not finite: \[0\.5, 1\.0, nan",
        ),
        (
            {"budgets": [[0.5, 1.0, math.inf, 0.5, 0.5]]},
            r"^a budget has a number that is not finite: \[0\.5, 1\.0, inf",
        ),
        ({"budgets": [[0.0, 1.0, 1.0, 0.5, 0.5]]}, NOT_IN_RANGE),
        ({"budgets": [[1.0, 1.0, 1.0, 0.5, 0.5]]}, NOT_IN_RANGE),
        ({"budgets": [[0.5, 0.0, 1.0, 0.5, 0.5]]}, NOT_IN_RANGE),
        ({"budgets": [[0.5, 1.1, 1.0, 0.5, 0.5]]}, NOT_IN_RANGE),
        ({"budgets": [[0.5, 1.0, -1.0, 0.5, 0.5]]}, NOT_IN_RANGE),
        ({"budgets": [ROWS[1], ROWS[0]]}, r"^budgets must rise, and 0\.2 follows 0\.4$"),
        ({"budgets": [ROWS[1], ROWS[1]]}, r"^budgets must rise, and 0\.4 follows 0\.4$"),
    ],
)
def test_faults_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ElasticPEER(8, 12, **options)


@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_compiles_to_one_graph(warm: bool, inputs: float, seed: int) -> None:
    """Whether copies are there already or not, with gradients or without."""
    torch._dynamo.reset()  # what other tests compiled counts towards a limit
    layer = make(seed, dtype=torch.float32)
    x_td = torch.randn(20, 10)
    at(layer, middling(layer, x_td) * 3, inputs)
    expected = fresh(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        if warm:
            layer(x_td)
        for tokens in (3, 20):
            torch.testing.assert_close(compiled(x_td[:tokens]), expected(x_td[:tokens]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-2)
    compiled.train()
    for _ in range(2):
        optimizer.zero_grad()
        compiled(x_td).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(compiled(x_td), fresh(layer)(x_td))
