"""Gradients of tables that hold the retrieved rows alone: the rows of the whole gradient, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import normals
from torch import Tensor

from peerify.modeling import peer_kernels
from peerify.modeling.peer_experts import ExpertPool
from peerify.modeling.peer_keys import Retrieved

TABLES = ("u", "gate", "v")


def pool_of(seed: int, dtype: torch.dtype, experts: int, width: int) -> ExpertPool:
    torch.manual_seed(seed)
    pool = ExpertPool(
        width, experts, activation="silu", gated=True, expert_bias=False, gate_bias=False, num_shared=0
    )  # fmt: skip
    return pool.to(dtype)


def gradients(pool: ExpertPool, batches: list[tuple[Tensor, Retrieved]], *, sparse: bool) -> dict[str, Tensor]:
    """Of the tables and of the first x, added up over micro-batches."""
    pool.zero_grad()
    pool.sparse = sparse
    first = batches[0][0].clone().requires_grad_()
    for x, found in [(first, batches[0][1]), *batches[1:]]:
        (pool(x, found) * torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)).sum().backward()
    assert first.grad is not None
    return {"x": first.grad} | {name: getattr(pool, name).grad for name in TABLES}


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_they_are_the_rows_of_the_whole_gradient(data: st.DataObject, seed: int) -> None:
    """With kernels (float32, bfloat16) and without (float64); of one micro-batch, and of several."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), "dtype")
    experts, width = data.draw(st.integers(1, 60), "experts"), 16 * data.draw(st.integers(1, 3), "width / 16")
    count = data.draw(st.integers(1, 3), "micro-batches")
    pool, generator = pool_of(seed, dtype, experts, width), torch.Generator().manual_seed(seed)
    batches = []
    for number in range(count):
        tokens, k = data.draw(st.integers(0, 7), "tokens"), data.draw(st.integers(1, 5), "k")
        index_tk = torch.randint(experts, (tokens, k), generator=generator)
        x_td, gate_tk = normals(tokens, width, seed=seed + number), normals(tokens, k, seed=seed - number - 1)
        batches.append((x_td.to(dtype), Retrieved(index_tk, gate_tk.to(dtype))))
    whole, sparse = gradients(pool, batches, sparse=False), gradients(pool, batches, sparse=True)
    assert torch.equal(whole["x"], sparse["x"])
    found = torch.cat([found.index_tk.flatten() for _, found in batches]).unique()
    for name in TABLES:
        got = sparse[name].coalesce()
        assert got.indices()[0].tolist() == found.tolist()
        assert got.dtype == dtype
        if dtype == torch.float64 or count > 2:  # sums in another order
            torch.testing.assert_close(got.to_dense(), whole[name])
        else:
            assert torch.equal(got.to_dense(), whole[name])


def test_they_take_memory_of_the_retrieved_rows() -> None:
    pool = pool_of(0, torch.float32, 2**18, 16)
    found = Retrieved(torch.tensor([[7, 200_000], [7, 9]]), torch.ones(2, 2))
    for gradient in list(gradients(pool, [(torch.ones(2, 16), found)], sparse=True).values())[1:]:
        assert gradient.coalesce().indices().tolist() == [[7, 9, 200_000]]
        assert gradient._values().numel() <= 4 * 16


@pytest.mark.skipif(peer_kernels.obstacle() is not None, reason=str(peer_kernels.obstacle()))
def test_they_have_no_derivative() -> None:
    pool: Any = pool_of(0, torch.float32, 9, 16)
    pool.sparse = True
    x = torch.ones(2, 16, requires_grad=True)
    y = pool(x, Retrieved(torch.tensor([[1, 2], [3, 1]]), torch.ones(2, 2)))
    with pytest.raises(RuntimeError, match="no derivative: set `sparse`"):
        torch.autograd.grad(y.square().sum(), [pool.u], create_graph=True)
