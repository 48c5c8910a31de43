"""Copies of experts in a few bits: how they are rounded, and that they are always those of the experts as they are."""

from __future__ import annotations

import copy
import pickle
from unittest.mock import patch

import pytest
import torch
from elastic_reference import at, fresh, make, middling
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import normals
from torch.nn import functional as F

from peerify.modeling import peer_copies, peer_evaluation
from peerify.modeling.peer_copies import in_few_bits
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_evaluation import COARSE, FINE, FULL


@settings(max_examples=80, deadline=None)
@given(st.integers(2, 8), st.integers(1, 12), st.integers(1, 20), st.booleans(), st.integers(0, 2**31))
def test_rounding_is_the_best_of_its_clips(bits: int, group: int, columns: int, scaled: bool, seed: int) -> None:
    """Groups by themselves, the last one filled up with zeros; half a step of the largest number is the worst."""
    w_nd = normals(3, columns, seed=seed, dtype=torch.float32) * 3
    scale_d = normals(columns, seed=seed + 1, dtype=torch.float32).abs() + 0.1 if scaled else torch.ones(columns)
    got, half = in_few_bits(w_nd, bits, group, scale_d if scaled else None), 2 ** (bits - 1)
    for row, found in zip(w_nd * scale_d, got * scale_d, strict=True):
        for part, rounded in zip(row.split(group), found.split(group), strict=True):
            whole = F.pad(part, (0, group - len(part)))
            tries = []
            for clip in (1.0, 0.9, 0.8, 0.7, 0.6):
                step = float((whole.abs().max() * (clip / half)).bfloat16())
                levels = (torch.arange(-half, half) + 0.5) * step
                tries.append(levels[(whole[:, None] - levels).abs().argmin(1)])
            errors = [float((each - whole).square().sum()) for each in tries]
            error = float((rounded - part).square().sum())
            assert error <= min(errors) * 1.001 + 1e-12
            assert len(rounded.div(tries[0].abs().max()).double().round(decimals=5).unique()) <= 2**bits
            assert error <= len(whole) * (part.abs().max() / half * (0.5 + half / 256)) ** 2


def test_more_bits_and_finer_groups_are_no_worse() -> None:
    w_nd = torch.randn(50, 64)
    errors = [(in_few_bits(w_nd, bits, 16) - w_nd).square().mean().item() for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    errors = [(in_few_bits(w_nd, 4, group) - w_nd).square().mean().item() for group in (8, 16, 32, 64)]
    assert errors == sorted(errors)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_and_rows_are_rounded_a_few_at_a_time(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w_nd = torch.randn(23, 10).to(dtype)
    w_nd[[4, 17]] = 0
    scale_d = torch.rand(10) + 0.1
    together = in_few_bits(w_nd, 4, 4, scale_d)
    assert together.dtype == dtype
    assert together[[4, 17]].abs().max().item() < 1e-20
    for rows in (1, 3, 100):
        monkeypatch.setattr(peer_copies, "ROWS", rows * 10)
        assert torch.equal(in_few_bits(w_nd, 4, 4, scale_d), together)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.3, foreach=False),
    "foreach": lambda p: torch.optim.AdamW(p, lr=0.3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.3, fused=True),  # raises no version of what it writes
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("training", [True, False])
def test_copies_follow_an_optimizer(name: str, training: bool, seed: int) -> None:
    layer = make(seed, dtype=torch.float32)
    x_td = torch.randn(20, 10)
    at(layer, middling(layer, x_td) * 3)
    optimizer = OPTIMIZERS[name]([p for p in layer.parameters() if p.requires_grad])
    for _ in range(3):
        before = layer.eval().pool.u.detach().clone()
        with torch.no_grad():
            torch.testing.assert_close(layer(x_td), fresh(layer)(x_td))
        optimizer.zero_grad()
        layer.train(training)(x_td).square().sum().backward()
        optimizer.step()
        assert not torch.equal(layer.pool.u, before)


@torch.no_grad()
def test_copies_follow_what_is_loaded_and_go_nowhere(seed: int) -> None:
    layer, other, x_td = make(seed, dtype=torch.float32), make(seed + 1, dtype=torch.float32), torch.randn(20, 10)
    at(layer, middling(layer, x_td) * 3)
    at(other, layer.budget.price)
    first, second = layer(x_td), other(x_td)
    assert set(layer.state_dict()) == {"pool.u", "pool.v", "pool.gate", "pool.input_rms"}
    same = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    assert all(each.pool._copies.value is None for each in same)
    assert len(pickle.dumps(layer)) < len(pickle.dumps(ElasticPEER(10, 14, gated=True))) + 500
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x_td), second)
    assert all(torch.equal(each(x_td), first) for each in same)
    layer.double()
    torch.testing.assert_close(layer(x_td.double()), fresh(layer)(x_td.double()))
    assert layer.pool.copies().coarse.u_nd.dtype == torch.float64
    kept = layer.pool.copies()
    assert layer.pool.copies() is kept, "they are made once"


@pytest.mark.parametrize("inputs", [1.0, 0.5])
@pytest.mark.parametrize("gated", [True, False])
def test_gradients_pass_to_the_experts_as_if_nothing_were_rounded(gated: bool, inputs: float, seed: int) -> None:
    layer = make(
        seed, d_model=32, num_experts=150, bits=3, gated=gated, expert_bias=True, gate_bias=gated, output_bias=True
    ).train()  # fmt: skip
    x_td = normals(40, 32, seed=seed + 1).requires_grad_()
    for price in (middling(layer, x_td) * 1.5**e for e in range(-20, 12)):
        choice = layer.pool(x_td, at(layer, price, inputs).budget, choice=True)
        if choice.tier_tn.flatten().bincount(minlength=4).min() > 20:
            break
    else:
        raise AssertionError("no price has all kinds")
    slope = torch.randn_like(x_td)
    with patch.object(peer_evaluation, "AT_ONCE", 7):
        layer(x_td).backward(slope)
    fine = layer.pool.copies().fine
    gate_tn = F.linear(x_td, fine.gate_nd, layer.pool.gate_bias) if gated else None
    by_tier = {
        COARSE: choice.a_tn,
        FINE: layer.pool.activate(F.linear(x_td, fine.u_nd, layer.pool.u_bias), gate_tn),
        FULL: layer.pool.products(x_td)[2],
    }
    a_tn = sum((choice.tier_tn == tier) * activations for tier, activations in by_tier.items())
    torch.testing.assert_close(layer.pool.v.grad, a_tn.T @ slope, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.bias.grad, slope.sum(0))
    used_n = layer.active_experts(x_td).any(0)
    for name, parameter in layer.pool.named_parameters():
        if name == "input_rms":
            assert parameter.grad is None
            continue
        assert parameter.grad.isfinite().all(), name
        assert (parameter.grad[used_n].reshape(int(used_n.sum()), -1).abs().sum(1) > 0).all(), name
        assert (parameter.grad[~used_n] == 0).all(), name
    assert x_td.grad is not None
    assert (x_td.grad != 0).any(1).all()
