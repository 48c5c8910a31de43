"""All experts in full by the kernel for few tokens: what float64 gives, and only where it can be used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import normals
from torch import Tensor

from peerify.modeling import peer_full, peer_kernels
from peerify.modeling.peer_elastic_pool import ElasticPool

pytestmark = pytest.mark.skipif(peer_kernels.obstacle() is not None, reason=str(peer_kernels.obstacle()))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def pool_of(seed: int, d_model: int, experts: int, dtype: torch.dtype = torch.float32, **form: Any) -> ElasticPool:
    form = {"activation": "silu", "gated": True, "expert_bias": False, "gate_bias": False} | form
    torch.manual_seed(seed)
    pool = ElasticPool(d_model, experts, bits=4, group=64, **form)
    for bias in (pool.u_bias, pool.gate_bias):
        if bias is not None:
            bias.data.normal_()
    return pool.to(dtype).requires_grad_(False).eval()


def exactly(pool: ElasticPool, x: Tensor) -> Tensor:
    def projected(table: Tensor, bias: Tensor | None) -> Tensor:
        z = x.double() @ table.double().T
        return z if bias is None else z + bias.double()

    gate = None if pool.gate is None else projected(pool.gate, pool.gate_bias)
    return pool.activate(projected(pool.u, pool.u_bias), gate) @ pool.v.double()


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_it_computes_what_float64_gives(data: st.DataObject, seed: int) -> None:
    dtype = data.draw(st.sampled_from([*TOLERANCE]), "dtype")
    gated, biased = data.draw(st.booleans(), "gated"), data.draw(st.booleans(), "biased")
    pool = pool_of(
        seed, 16 * data.draw(st.integers(1, 9), "d_model / 16"), data.draw(st.integers(1, 400), "experts"), dtype,
        gated=gated, expert_bias=biased, gate_bias=biased and gated,
        activation=data.draw(st.sampled_from([*peer_full.ACTIVATIONS]), "activation"),
    )  # fmt: skip
    x = normals(data.draw(st.integers(1, peer_full.FEW), "tokens"), pool.u.shape[1], seed=seed + 1).to(dtype)
    assert peer_full.full_usable(pool, x)
    got, expected = pool(x, None), exactly(pool, x)
    assert got.dtype == dtype
    size = pool.v.double().norm() * x.double().norm(dim=1).mean()  # of what might cancel out
    assert (got.double() - expected).norm() <= TOLERANCE[dtype] * torch.maximum(expected.norm(), size)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_threads_do_not_change_a_bit(threads: int, seed: int) -> None:
    pool, x = pool_of(seed, 48, 700), normals(5, 48, seed=seed).float()
    expected, before = pool(x, None), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(pool(x, None), expected) for _ in range(5))
    finally:
        torch.set_num_threads(before)


def test_what_is_no_number_stays_so(seed: int) -> None:
    pool, x = pool_of(seed, 32, 70), normals(3, 32, seed=seed).float()
    x[1, 5] = torch.nan
    got = pool(x, None)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()
    pool.gate.data[40, 3] = torch.inf
    assert not pool(x[:1], None).isfinite().any()


def test_where_it_is_not_used(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, x = pool_of(seed, 32, 70), normals(3, 32, seed=seed).float()
    assert peer_full.full_usable(pool, x)
    assert peer_full.full_usable(pool, x.T.contiguous().T), "inputs need not be contiguous"
    for wrong in (x[:0], normals(9, 32, seed=1).float(), x.double(), x.bfloat16(), x.requires_grad_()):
        assert not peer_full.full_usable(pool, wrong)
    with torch.no_grad():
        assert peer_full.full_usable(pool, x)
        assert not peer_full.full_usable(pool_of(seed, 24, 70), normals(3, 24, seed=1).float())
        assert not peer_full.full_usable(pool_of(seed, 32, 70, activation="tanh"), x)
        assert not peer_full.full_usable(pool_of(seed, 32, 70, clamp={"up": 1.0}), x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not peer_full.full_usable(pool, x)
        with_kernel = pool(x, None)
        monkeypatch.setattr(peer_kernels, "enabled", False)
        assert not peer_full.full_usable(pool, x)
        torch.testing.assert_close(with_kernel, pool(x, None))
        compiled = torch.compile(pool, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x, None), with_kernel)


def test_every_other_row_of_a_batch_and_tables_that_are_not_contiguous(seed: int) -> None:
    pool, x = pool_of(seed, 32, 70), normals(8, 32, seed=seed).float()
    torch.testing.assert_close(pool(x[::2], None), pool(x, None)[::2])
    expected = pool(x, None)
    pool.v.data = pool.v.data.T.contiguous().T
    assert not peer_full.full_usable(pool, x)
    torch.testing.assert_close(pool(x, None), expected)
