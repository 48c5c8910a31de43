"""The kernels for many tokens: what the plain code computes, on whatever memory holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from elastic_reference import at, make, middling
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerify.modeling import peer_copies, peer_kernels, peer_many

pytestmark = pytest.mark.skipif(peer_kernels.obstacle() is not None, reason=str(peer_kernels.obstacle()))
NUMBER_TYPES = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def plainly(compute: Callable[[], Any]) -> Any:
    """What is computed without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peer_kernels, "enabled", False)
        return compute()


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30))


@torch.no_grad()
@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_tables_are_rounded_to_the_same_codes(data: st.DataObject, seed: int) -> None:
    torch.manual_seed(seed)
    rows, columns = data.draw(st.integers(1, 40), "rows"), data.draw(st.integers(1, 90), "columns")
    bits, group = data.draw(st.integers(2, 8), "bits"), data.draw(st.integers(1, 70), "group")
    dtype = data.draw(st.sampled_from(list(NUMBER_TYPES)), "dtype")
    w_nd = (torch.randn(rows, columns) * torch.randn(rows, columns).exp()).to(dtype)
    w_nd[torch.rand(rows) < 0.2] = 0
    scale_d, weight_d = torch.rand(columns) + 0.1, torch.rand(columns)
    got = peer_many.both_copies(w_nd, bits, group, scale_d, weight_d, numbers=True)
    coarse = peer_copies.rounded(w_nd, bits, group, scale_d)
    coarse_nd = peer_copies.numbers(coarse, bits, columns, scale_d)
    rest = peer_copies.rounded(w_nd.float() - coarse_nd, bits, group, scale_d)
    for i, wanted in enumerate((coarse, rest)):
        assert torch.equal(got.code[i].view(wanted.code_ngc.shape), wanted.code_ngc)
        assert torch.equal(got.step[i], wanted.step_ng)
    assert got.numbers is not None
    fine_nd = coarse_nd + peer_copies.numbers(rest, bits, columns, scale_d)
    for copy_nd, wanted_nd, error_n in zip(got.numbers, (coarse_nd, fine_nd), got.error, strict=True):
        assert torch.equal(copy_nd, wanted_nd)
        torch.testing.assert_close(error_n, ((wanted_nd - w_nd.float()) * weight_d).norm(dim=1), rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_a_number_that_is_none_is_not_hidden() -> None:
    w_nd = torch.randn(3, 20)
    w_nd[1, 7] = torch.nan
    found = peer_many.both_copies(w_nd, 4, 8, torch.ones(20), torch.ones(20), numbers=True)
    assert found.numbers is not None
    assert found.numbers[:, 1, :8].isnan().any()
    assert found.numbers[:, [0, 2]].isfinite().all()


FORMS = [
    {"activation": "silu"},
    {"activation": "gelu"},
    {"activation": "relu"},
    {"expert_bias": True, "gate_bias": True},
]


@torch.no_grad()
def decided(layer: Any, x_td: Tensor, price: float, inputs: float) -> Tensor:
    """For which tokens every choice is clear, and plain float32 makes it, too: bool (t,).

    Where GELU is less than one is from the next float32, PyTorch's is 0: such an expert is left out at any price.
    """
    wide = copy.deepcopy(layer).double()
    one, other, plain_tn = (
        at(each, price * by, inputs).pool.choose(x_td.to(each.pool.u), each.pool.copies(), each.budget).tier_tn
        for each, by in ((wide, 0.9998), (wide, 1.0002), (copy.deepcopy(layer).float(), 1.0))
    )
    return ((one == other) & (one == plain_tn)).all(1)


@pytest.mark.parametrize("dtype", NUMBER_TYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_it_computes_what_the_plain_code_does(
    dtype: torch.dtype, form: dict[str, Any], inputs: float, seed: int
) -> None:
    """Outputs, choices and gradients, at prices from nothing to everything, in both number types."""
    layer = make(seed, d_model=48, num_experts=150, dtype=dtype, **form)
    x_td = torch.randn(40, 48, dtype=dtype)
    slope = torch.randn(40, 48)
    assert peer_many.can_choose(layer.pool, x_td)
    usual = middling(copy.deepcopy(layer).float(), x_td.float())
    for factor in (1e-10, 0.03, 1.0, 10.0, 1e9):
        at(layer, usual * factor, inputs)
        clear_t = torch.ones(len(x_td), dtype=torch.bool)
        if dtype == torch.float32:
            clear_t = decided(layer, x_td, layer.budget.price, inputs)
        assert clear_t.sum() >= 10

        def outputs(price: float = layer.budget.price, clear_t: Tensor = clear_t) -> list[Tensor]:
            layer.zero_grad()
            layer.pool._forget()
            x = x_td[clear_t].requires_grad_()
            y = at(layer, price, inputs)(x)
            (y * slope[clear_t].to(y.dtype)).sum().backward()
            with torch.no_grad():
                alone = at(layer, price, inputs)(x)
            assert alone.dtype == y.dtype == dtype
            return [y.detach(), alone, *(p.grad for p in (x, *layer.parameters()) if p.grad is not None)]

        for got, wanted in zip(outputs(), plainly(outputs), strict=True):
            # Where two ways to read an expert are worth the same, either may be taken: in half precision, often.
            assert off(got, wanted) < NUMBER_TYPES[dtype] * (1 if dtype == torch.float32 else 3)


def test_autocast_takes_its_number_type(seed: int) -> None:
    layer = make(seed, d_model=48, num_experts=150, dtype=torch.float32)
    x_td = torch.randn(40, 48)
    at(layer, middling(layer, x_td))

    def gradients() -> list[Tensor]:
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            y = layer.train()(x_td)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        return [y.detach(), *(p.grad for p in layer.parameters() if p.grad is not None)]

    for got, wanted in zip(gradients(), plainly(gradients), strict=True):
        assert got.dtype == wanted.dtype
        assert off(got, wanted) < 3e-2


@torch.no_grad()
def test_memory_is_not_read_before_it_is_written(seed: int) -> None:
    layer = make(seed, d_model=48, num_experts=150, dtype=torch.float32)
    x_td = torch.randn(40, 48)
    at(layer, middling(layer, x_td))
    wanted = layer(x_td)
    layer.pool._forget()
    with pytest.MonkeyPatch.context() as patch:
        real = torch.empty

        def poisoned(*size: Any, **options: Any) -> Tensor:
            made = real(*size, **options)
            return made.fill_(torch.nan if made.is_floating_point() else 77)

        patch.setattr(torch, "empty", poisoned)
        patch.setattr(torch, "empty_like", lambda like, **options: poisoned(like.shape, dtype=like.dtype, **options))
        assert torch.equal(layer(x_td), wanted)


@torch.no_grad()
def test_any_number_of_threads(seed: int) -> None:
    layer = make(seed, d_model=48, num_experts=150, dtype=torch.float32)
    x_td, pool = torch.randn(40, 48), layer.pool
    price = [middling(layer, x_td), *pool.costs(1.0)[1:]]
    gate_tn, u_tn, _ = pool.products(x_td)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 8):
            torch.set_num_threads(threads)
            pool._forget()
            copies = pool.copies()
            choosing = peer_many.Choosing(pool, copies, gate_tn.clone(), u_tn.clone(), None, price)
            rest = choosing.settle(x_td, (gate_tn, u_tn), everything=True)
            found.append([copies.fine.u_nd, copies.coarse.v_error_n, choosing.tier_tn, choosing.gate_tn, *rest])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))
