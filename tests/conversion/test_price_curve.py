"""What prices buy in a layer, as its curve tells and as the layer does; and what is guessed before there are data."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from elastic_reference import at, make
from peer_reference import normals
from torch.nn import functional as F

from peerify.conversion.elastic import EVERYTHING, INPUTS, price_curve, typical_cost
from peerify.modeling.peer_evaluation import COARSE, FINE, NONE


@torch.no_grad()
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_a_curve_tells_what_the_layer_spends_and_loses(gated: bool, bits: int, seed: int) -> None:
    """The curve finds each expert's limits; the layer compares losses at one price."""
    layer = make(seed, d_model=32, num_experts=60, gated=gated, bits=bits, group=16)
    pool, x_td = layer.pool, normals(50, 32, seed=seed + 1)
    y_td = layer(x_td)
    curve = price_curve(layer, SimpleNamespace(x_td=x_td, y_td=y_td))
    assert curve[-1] == EVERYTHING
    assert {point.inputs for point in curve} == {*INPUTS}
    copies, exact_tn = pool.copies(), pool.products(x_td)[2]
    power_t = y_td.square().sum(1)
    power_t = power_t + 1e-3 * power_t.mean()
    fine = copies.fine
    gate_tn = None if fine.gate_nd is None else F.linear(x_td, fine.gate_nd, pool.gate_bias)
    finely_tn = pool.activate(F.linear(x_td, fine.u_nd, pool.u_bias), gate_tn)
    for point in curve[:-1]:
        a_tn, tier_tn = pool(x_td, at(layer, point.price, point.inputs).budget, choice=True)
        assert layer.usage(x_td)[1:] == pytest.approx((point.bytes, point.macs), rel=1e-4)
        lost_t = torch.zeros(len(x_td), dtype=x_td.dtype)
        for tier, copied_tn, v_error_n in (
            (NONE, torch.zeros_like(exact_tn), 0.0),
            (COARSE, a_tn, copies.coarse.v_error_n),
            (FINE, finely_tn, copies.fine.v_error_n),
        ):
            error_tn = (exact_tn - copied_tn).square() * copies.energy_n + copied_tn.square() * v_error_n
            lost_t += error_tn.masked_fill(tier_tn != tier, 0.0).sum(1)
        assert point.error == pytest.approx(float((lost_t / power_t).mean()), rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("gated", [True, False])
def test_a_guess_spends_the_budget(gated: bool, bits: int) -> None:
    layer = make(0, d_model=64, num_experts=80, gated=gated, bits=bits)
    assert typical_cost(layer, 1.0) == (1.0, 1.0)
    for active in (0.5, 0.7, 0.9):
        read, done = typical_cost(layer, active)
        assert read == pytest.approx(max(active, layer.cost(INPUTS[-1], (0, 0, 0))[0]))
        assert 0 < done < 3
