"""Retrieved experts by the GPU kernels are what they are in float64, gradients too. See gpu_kernel_cases.py."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerify.modeling import peer_gathered_gpu, peer_triton
from peerify.modeling.peer_experts import ExpertPool
from peerify.modeling.peer_keys import Retrieved

pytestmark = pytest.mark.skipif(peer_triton.obstacle() is not None, reason=str(peer_triton.obstacle()))
DEVICE = "cuda" if torch.cuda.is_available() and not peer_triton.interpreted else "cpu"
EXAMPLES = 40 if peer_triton.interpreted else 200
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def pool_of(seed: int, d_model: int, experts: int, dtype: torch.dtype, **form: Any) -> ExpertPool:
    torch.manual_seed(seed)
    pool = ExpertPool(
        d_model, experts, **{"activation": "silu", "gated": True, "expert_bias": False, "gate_bias": False,
        "num_shared": 0} | form,
    )  # fmt: skip
    for bias in (pool.u_bias, pool.gate_bias):
        if bias is not None:
            bias.data.normal_()
    return pool.to(DEVICE, dtype)


def retrieved(tokens: int, slots: int, experts: int, dtype: torch.dtype) -> Retrieved:
    """Experts at random, several of them twice, some left out."""
    index_tk = torch.randint(experts, (tokens, slots))
    weight_tk = torch.rand(tokens, slots) * (torch.rand(tokens, slots) < 0.8)
    return Retrieved(index_tk.to(DEVICE), weight_tk.to(DEVICE, dtype))


def results(pool: Any, x: Tensor, found: Retrieved, learn: bool = True) -> list[Tensor]:
    """The output, and the gradients of the input, of the gate values where they learn, and of all tables."""
    x = x.detach().requires_grad_()
    weight_tk = found.weight_tk.detach().requires_grad_(learn)
    found = Retrieved(found.index_tk, weight_tk)
    y = pool.gathered(x, found)
    wanted = [x, *([weight_tk] if learn else []), *pool.parameters()]
    # Numbers that 16 bits hold: rounded, they would be another function's gradients, far from these where terms cancel.
    given = torch.sin(torch.arange(y.numel())).mul(64).round().div(64).view_as(y).to(y)
    return [y.detach(), *torch.autograd.grad(y, wanted, given)]


@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_outputs_and_gradients(data: st.DataObject, seed: int) -> None:
    dtype = data.draw(st.sampled_from([*TOLERANCE]), "dtype")
    biased, gated = data.draw(st.booleans(), "biased"), data.draw(st.booleans(), "gated")
    experts, d_model = data.draw(st.integers(1, 20), "experts"), data.draw(st.integers(1, 150), "d_model")
    pool = pool_of(
        seed, d_model, experts, dtype, gated=gated, expert_bias=biased, gate_bias=biased,
        activation=data.draw(st.sampled_from(["silu", "gelu", "relu2", "linear", "tanh"]), "activation"),
        clamp=data.draw(st.sampled_from([None, {"gate": 1.0, "up": 1.5, "shift": 1.0}]), "clamp"),
    )  # fmt: skip
    tokens, slots = data.draw(st.integers(1, 5), "tokens"), data.draw(st.integers(1, 20), "slots")
    x = torch.randn(tokens, d_model).to(DEVICE, dtype)
    found, learn = retrieved(tokens, slots, experts, dtype), data.draw(st.booleans(), "learn")
    assert peer_gathered_gpu.usable_on_gpu(x, pool.u)
    assert pool.has_kernel(x)
    got = results(pool, x, found, learn)
    exact = copy.deepcopy(pool).double()
    expected = results(exact, x.double(), Retrieved(found.index_tk, found.weight_tk.double()), learn)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == dtype
        assert float((ours.double() - theirs).norm()) <= TOLERANCE[dtype] * max(float(theirs.norm()), 1e-2)


def test_they_are_the_same_every_time(seed: int) -> None:
    pool, found = pool_of(seed, 40, 9, torch.float32), retrieved(30, 4, 9, torch.float32)
    x = torch.randn(30, 40, device=DEVICE)
    once, again = (results(pool, x, found) for _ in range(2))
    assert all(map(torch.equal, once, again))


def test_memory_is_not_read_before_it_is_written(seed: int) -> None:
    """Experts that nobody retrieved have gradients of 0."""
    pool, x = pool_of(seed, 24, 12, torch.float32), torch.randn(3, 24, device=DEVICE)
    found = retrieved(3, 2, 4, torch.float32)
    expected = results(pool, x, found, False)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert all(map(torch.equal, results(pool, x, found, False), expected))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not expected[2][4:].any()


def test_sparse_gradients_are_the_rows_of_whole_ones(seed: int) -> None:
    pool, x = pool_of(seed, 24, 40, torch.float32), torch.randn(5, 24, device=DEVICE)
    found = retrieved(5, 3, 40, torch.float32)
    whole = results(pool, x, found)
    pool.sparse = True
    for ours, theirs in zip(results(pool, x, found), whole, strict=True):
        assert torch.equal(ours.to_dense() if ours.is_sparse else ours, theirs)
    gradient = results(pool, x, found)[-1]
    assert gradient.coalesce().indices()[0].tolist() == found.index_tk.unique().tolist()


def test_rows_that_do_not_learn_get_no_gradient(seed: int) -> None:
    pool, x = pool_of(seed, 24, 5, torch.float32), torch.randn(2, 24, device=DEVICE)
    pool.u.requires_grad_(False)
    pool.gathered(x, retrieved(2, 3, 5, torch.float32)).sum().backward()
    assert pool.u.grad is None
    assert pool.v.grad is not None


def test_kernels_that_fail_are_told_of_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such instruction\nand more")

    pool, x, found = (
        pool_of(seed, 24, 5, torch.float32),
        torch.randn(2, 24, device=DEVICE),
        retrieved(2, 3, 5, torch.float32),
    )
    expected = pool.gathered(x, found)
    monkeypatch.setattr(peer_triton, "_broken", [])
    monkeypatch.setattr(peer_gathered_gpu, "_tried", set())
    monkeypatch.setattr(peer_gathered_gpu, "project", fails)
    for _ in range(2):
        torch.testing.assert_close(pool.gathered(x, found), expected)
    assert capsys.readouterr().err == (
        "peerify: the GPU kernels are not used, it failed: RuntimeError: no such instruction\n"
    )
