"""The PEER layer's gradients against finite differences, and its arithmetic in float32 and bfloat16."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peer_reference import make, normals
from torch import Tensor
from torch.nn import functional as F

from peerify.modeling import peer_products

GRADIENT_CASES: list[dict[str, Any]] = [
    {"gates": "softmax", "query_dim": 4, "query_norm": True, "output_bias": True},
    {"gates": "sigmoid", "gated": True, "expert_bias": True, "gate_bias": True, "share_keys": False, "key_bias": True},
    {"gates": "sigmoid", "query_dim": 4, "gated": True},
    {"gates": "unit", "gated": True, "num_shared": 1, "num_experts": 10, "share_keys": False, "key_bias": True},
    {"gates": "unit", "share_pool": False, "joint_topk": True, "num_experts": 17, "share_keys": False},
    {"gates": "softmax", "share_pool": False, "share_keys": False, "num_experts": 16, "expert_bias": True},
]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize(("case", "training"), [*((case, False) for case in GRADIENT_CASES), (GRADIENT_CASES[0], True)])
def test_gradients_are_finite_differences(case: dict[str, Any], gather: bool, training: bool, seed: int) -> None:
    """To x and to every parameter; the selection does not move within a finite difference."""
    options = {"d_model": 3, "num_experts": 9, "grid": (3, 3), "num_heads": 2, "topk": 2, "activation": "gelu"}
    layer = make(seed, **options | case).train(training)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x_td = normals(3, 3, seed=seed + 1).requires_grad_()

    def f(x_td: Tensor, *values: Tensor) -> Tensor:
        parts = dict(zip(names, values, strict=True))
        if not gather:
            return torch.func.functional_call(layer, parts, (x_td,))
        retrieved = torch.func.functional_call(_Method(layer, "retrieve"), _below(parts), (x_td,))
        y_td = torch.func.functional_call(
            _Method(layer.pool, "gathered"),
            _below({name[5:]: value for name, value in parts.items() if name.startswith("pool.")}),
            (x_td, retrieved),
        )
        return y_td if layer.bias is None else y_td + parts["bias"]

    values = [parameter.detach().clone().requires_grad_() for parameter in parameters]
    assert torch.autograd.gradcheck(f, (x_td, *values), eps=1e-7, atol=1e-4, rtol=1e-3, fast_mode=True)


class _Method(torch.nn.Module):
    """A method of a module, as something that functional_call can call."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__()
        self.module, self.name = module, name

    def forward(self, *args: Any) -> Any:
        return getattr(self.module, self.name)(*args)


def _below(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": value for name, value in parts.items()}


@pytest.mark.parametrize("gates", ["unit", "softmax", "sigmoid"])
def test_float32_is_float64(gates: str, seed: int) -> None:
    layer = make(
        seed, d_model=16, num_experts=47, grid=(6, 8), num_heads=4, topk=3, gates=gates, gated=True, activation="silu",
        query_dim=8, query_norm=True, output_bias=True,
    )  # fmt: skip
    x_td = normals(64, 16, seed=seed + 1)
    single = copy.deepcopy(layer).float()
    with torch.no_grad():
        same = (layer.active_experts(x_td) == single.active_experts(x_td.float())).all(1)
        assert same.float().mean() > 0.9  # scores that differ by rounding only may change places
        torch.testing.assert_close(single(x_td.float())[same].double(), layer(x_td)[same], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gates", ["unit", "softmax", "sigmoid"])
@pytest.mark.parametrize("tokens", [1, 40])
def test_bfloat16(gates: str, tokens: int, seed: int) -> None:
    options = {"d_model": 16, "num_experts": 60, "grid": (7, 8), "num_heads": 2, "topk": 5, "gates": gates}
    options |= {"num_shared": 4, "query_dim": 8, "query_norm": True, "gated": True, "output_bias": True}
    layer = make(seed, **options)
    half = copy.deepcopy(layer).bfloat16()
    x_td = normals(tokens, 16, seed=seed + 1).bfloat16()
    with torch.no_grad():
        half_td = half(x_td)
        # Rounding may change what is retrieved, never what is then computed of it.
        weight_tn = half.weights(x_td).double()
        pool, x_td = layer.pool, x_td.double()
        assert pool.gate is not None
        a_tn = pool.act(F.linear(x_td, pool.gate, pool.gate_bias)) * F.linear(x_td, pool.u, pool.u_bias)
        expected_td = (a_tn * weight_tn) @ pool.v + layer.bias
    assert half_td.dtype == torch.bfloat16
    assert (half_td.double() - expected_td).norm() <= 0.05 * expected_td.norm()
    half.train()
    half(x_td.bfloat16()).float().pow(2).sum().backward()
    for name, parameter in half.named_parameters():
        if gates != "unit" or not name.startswith("keys."):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 4, 40])
def test_products_that_a_cpu_lacks_are_taken_in_float32(
    dtype: torch.dtype, tokens: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the exact products, rounded once."""
    monkeypatch.setattr(peer_products, "LACKS_BFLOAT16", True)
    torch.manual_seed(seed)
    x_ti, w_oi, b_o = (torch.randn(*shape).to(dtype) for shape in ((tokens, 96), (80, 96), (80,)))
    a_tn, v_nd = (torch.randn(*shape).to(dtype) for shape in ((tokens, 96), (96, 80)))
    for got, exact in (
        (peer_products.linear(x_ti, w_oi, b_o), x_ti.double() @ w_oi.double().T + b_o.double()),
        (peer_products.combined(a_tn, v_nd), a_tn.double() @ v_nd.double()),
    ):
        assert got.dtype == dtype
        error = (got.double() - exact).abs().max() / exact.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps
