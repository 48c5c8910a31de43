"""Kernels for gathered rows and the largest scores: they compute what plain PyTorch does, and are never in the way."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import make, normals
from torch import Tensor

from peerify.modeling import peer_kernels
from peerify.modeling.peer_gathered import Combine, Project, Rows, Scatter, usable
from peerify.modeling.peer_keys import Retrieved
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_topk import cells, largest, searches

pytestmark = pytest.mark.skipif(peer_kernels.obstacle() is not None, reason=str(peer_kernels.obstacle()))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def error(got: Tensor, expected: Tensor) -> float:
    return float(
        (got.double() - expected.double()).norm().detach() / expected.double().norm().detach().clamp_min(1e-12)
    )


def layer_of(seed: int, d_model: int = 32, side: int = 8, heads: int = 2, topk: int = 3, **options: Any) -> PEER:
    """In float32, with scores of a size at which gates are not all 0 or 1."""
    form = {"activation": "gelu", "gates": "softmax", "query_dim": 8, "share_keys": False} | options
    experts = side * side + form.get("num_shared", 0)
    layer = make(seed, d_model=d_model, num_experts=experts, grid=(side, side), num_heads=heads, topk=topk, **form)
    for parameter in layer.keys.parameters():
        parameter.data.mul_(0.3)
    return layer.float()


def gradients(layer: Any, x: Tensor, run: Any = None) -> dict[str, Tensor]:
    """Of x and of every parameter, and the output."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = (run or layer)(x)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (y * weight).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {
        name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None
    }


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# --- The products -------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_products_and_their_derivatives(data: st.DataObject, seed: int) -> None:
    """Against float64, for all shapes, layouts and number types; indices may repeat, within a token as well."""
    dtype = data.draw(st.sampled_from([*TOLERANCE]), "dtype")
    t, k = data.draw(st.integers(0, 9), "tokens"), data.draw(st.integers(1, 9), "k")
    d, n = 16 * data.draw(st.integers(1, 9), "d / 16"), data.draw(st.integers(1, 80), "experts")
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(data.draw(st.sampled_from([1, n]), "of") if n else 1, (t, k), generator=generator)
    table, x, a = normals(n, d, seed=seed).to(dtype), normals(t, d, seed=seed + 1), normals(t, k, seed=seed + 2)
    x, a = x.float(), a.float()
    if data.draw(st.booleans(), "transposed"):
        x, a, index = (each.T.contiguous().T for each in (x, a, index))
    rows = Rows(index, n)
    wide, x64, a64 = table.double(), x.double(), a.double()
    expected = [torch.einsum("td,tkd->tk", x64, wide[index]), torch.einsum("tk,tkd->td", a64, wide[index])]
    pairs = (a64[..., None] * x64[:, None]).flatten(0, 1)
    expected.append(torch.zeros(n, d, dtype=torch.float64).index_add(0, index.flatten(), pairs))
    inputs = [(Project, (x, table, rows)), (Combine, (a, table, rows)), (Scatter, (a, x, rows, dtype))]
    for (product, given_), wanted in zip(inputs, expected, strict=True):
        got = product.apply(*given_)
        tolerance = TOLERANCE[dtype] if product is Scatter else 1e-5
        assert got.dtype == (dtype if product is Scatter else torch.float32)
        assert (got.double() - wanted).norm() <= tolerance * max(1.0, float(wanted.norm())), product.__name__


def test_each_product_is_the_derivative_of_another(seed: int) -> None:
    """First and second derivatives of all three, against PyTorch's own of the plain form."""
    index = torch.randint(9, (5, 4), generator=torch.Generator().manual_seed(seed))
    rows = Rows(index, 9)
    x, a, table = (normals(*shape, seed=seed + i).float() for i, shape in enumerate([(5, 16), (5, 4), (9, 16)]))

    def by_kernel(x: Tensor, a: Tensor, table: Tensor) -> Tensor:
        y = Combine.apply(a * Project.apply(x, table, rows).tanh(), table, rows)
        return y.square().sum() + Scatter.apply(a, x, rows, torch.float32).pow(3).sum()

    def plainly(x: Tensor, a: Tensor, table: Tensor) -> Tensor:
        z = torch.einsum("td,tkd->tk", x, table[index]).tanh()
        y = torch.einsum("tk,tkd->td", a * z, table[index])
        pairs = (a[..., None] * x[:, None]).flatten(0, 1)
        return y.square().sum() + torch.zeros_like(table).index_add(0, index.flatten(), pairs).pow(3).sum()

    found = []
    for function, dtype in ((by_kernel, torch.float32), (plainly, torch.float64)):
        parts = [part.to(dtype).requires_grad_() for part in (x.clone(), a.clone(), table.clone())]
        first = torch.autograd.grad(function(*parts), parts, create_graph=True)
        second = torch.autograd.grad(sum(each.square().sum() for each in first), parts)
        found.append([*first, *second])
    assert max(map(error, *found)) <= 1e-4


def test_memory_is_not_read_before_it_is_written(seed: int) -> None:
    layer, x = layer_of(seed), normals(6, 32, seed=seed + 1).float()
    expected = gradients(layer, x)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        got = gradients(layer, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_large_tables_have_gradients_that_are_zero_elsewhere(seed: int) -> None:
    rows = Rows(torch.tensor([[5, 9000]]), 16384)
    grad = Scatter.apply(torch.ones(1, 2), torch.ones(1, 16), rows, torch.float32)
    assert grad.nonzero()[:, 0].unique().tolist() == [5, 9000]
    assert grad.sum() == 32
    grad.add_(1)  # memory like any other
    assert grad.min() == 1


def test_experts_that_are_not_there_are_refused() -> None:
    for index in (-1, 4):
        with pytest.raises(IndexError, match="of 4"):
            Rows(torch.tensor([[0, index]]), 4)


# --- The search ---------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_the_largest_are_found(data: st.DataObject, seed: int) -> None:
    """In any layout; of equal scores it may be any."""
    rows, columns = data.draw(st.integers(1, 90), "rows"), data.draw(st.integers(1, 90), "columns")
    t, h = data.draw(st.integers(0, 5), "tokens"), data.draw(st.integers(1, 3), "heads")
    row, column = normals(h, t, rows, seed=seed).float(), normals(h, t, columns, seed=seed + 1).float()
    if data.draw(st.booleans(), "ties"):
        row, column = row.round(), column.round()
    if data.draw(st.booleans(), "by heads"):
        row, column = row.transpose(0, 1), column.transpose(0, 1)
    k = data.draw(st.integers(1, min(64, rows)), "k")
    assert searches(row, k)
    index = largest(row, k)
    torch.testing.assert_close(row.gather(-1, index), row.topk(k).values, rtol=0, atol=0)
    k = data.draw(st.integers(1, min(64, rows * columns)), "cells")
    i, j = cells(row, column, k)
    every = (row[..., None] + column[..., None, :]).flatten(-2)
    torch.testing.assert_close(row.gather(-1, i) + column.gather(-1, j), every.topk(k).values, rtol=0, atol=0)
    cell = (i * columns + j).sort().values
    assert (cell[..., 1:] != cell[..., :-1]).all()


def test_numbers_that_are_none_are_not_hidden(seed: int) -> None:
    score = normals(3, 50, seed=seed).float()
    score[1, 40] = torch.nan
    score[2] = torch.nan
    assert 40 in largest(score, 4)[1]
    assert sorted(set(largest(score, 4)[2].tolist())) == sorted(largest(score, 4)[2].tolist())
    layer, x = layer_of(seed), normals(3, 32, seed=seed + 1).float()
    x[1, 7] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


# --- The layer ----------------------------------------------------------------------------------------------------

FORMS: list[dict[str, Any]] = [
    {"query_norm": True, "output_bias": True},
    {"gates": "sigmoid", "gated": True, "expert_bias": True, "gate_bias": True, "key_bias": True},
    {"gates": "unit", "gated": True, "num_shared": 2, "clamp": {"gate": 1.0, "up": 1.0, "shift": 0.5}},
    {"share_keys": True, "activation": "relu"},
]


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_what_it_is_in_float64(form: dict[str, Any], seed: int) -> None:
    """Output and all gradients; in float64 kernels are not used."""
    layer, x = layer_of(seed, side=20, **form), normals(6, 32, seed=seed + 1).float() * 0.3
    wide = copy.deepcopy(layer).double()
    assert layer._gathers(x)
    assert not usable(x.double(), wide.pool.u)
    same = (layer.active_experts(x) == wide.active_experts(x.double())).all(1)
    x = x[same]  # scores that differ by rounding only may change places
    got, expected = gradients(layer, x), gradients(wide, x.double())
    errors = {name: error(got[name], expected[name]) for name in got}
    assert all(value < 2e-5 for value in errors.values()), errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, seed: int) -> None:
    """The products are closer to the truth than the plain path's, and have its number types."""
    layer, x = layer_of(seed, activation="linear").to(dtype), normals(6, 32, seed=seed + 1).to(dtype)
    found = layer.retrieve(x)
    y = layer.pool.gathered(x, found)
    exact = copy.deepcopy(layer.pool).double().gathered(x.double(), found._replace(weight_tk=found.weight_tk.double()))
    assert y.dtype == dtype
    assert error(y, exact) <= TOLERANCE[dtype]
    y.sum().backward()
    assert layer.pool.u.grad.dtype == dtype
    assert (layer.pool.u.grad != 0).any(1).sum() == found.index_tk.unique().numel()


def test_autocast(seed: int) -> None:
    layer, x = layer_of(seed), normals(6, 32, seed=seed + 1).float()
    found = layer.retrieve(x)
    results = []
    for peer_kernels.enabled in (True, False):
        try:
            with torch.autocast("cpu", torch.bfloat16):
                results.append(layer.pool.gathered(x, found))
                results.append(layer.pool.gathered(x.bfloat16(), found))
        finally:
            peer_kernels.enabled = True
    assert {y.dtype for y in results} == {torch.bfloat16}
    assert max(error(results[i], results[i + 2]) for i in range(2)) < 2e-2


def test_gradients_of_biases_are_summed_in_float32(seed: int) -> None:
    """Even where their terms cancel, and all are of one expert: a sum in bfloat16 was off by more than itself."""
    index_tk = torch.zeros(4, 10, dtype=torch.int64)

    def of(pool: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        y_td = pool.gathered(x, Retrieved(index_tk, weight))
        given = torch.sin(torch.arange(y_td.numel())).mul(64).round().div(64).view_as(y_td).to(y_td)
        return torch.autograd.grad(y_td, [pool.u_bias, pool.gate_bias], given)

    for i in range(20):
        layer = layer_of(
            seed + i, side=1, topk=1, heads=8, gated=True, expert_bias=True, gate_bias=True
        ).pool.bfloat16()
        x_td, weight_tk = normals(4, 32, seed=seed + i).bfloat16(), torch.rand(4, 10).bfloat16()
        assert layer.has_kernel(x_td)
        exact = of(copy.deepcopy(layer).double(), x_td.double(), weight_tk.double())
        for ours, theirs in zip(of(layer, x_td, weight_tk), exact, strict=True):
            assert float((ours.double() - theirs).norm()) <= 1e-2 * max(float(theirs.norm()), 1e-2)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_and_every_time_the_same_bits(seed: int) -> None:
    layer, x = layer_of(seed, side=20, heads=4), normals(50, 32, seed=seed + 1).float()
    torch.set_num_threads(1)
    found = layer.retrieve(x)
    grad = [Scatter.apply(found.weight_tk, x, Rows(found.index_tk, 400), torch.float32)]
    y = [layer.pool.gathered(x, found)]
    for count in (2, 2, 8):
        torch.set_num_threads(count)
        grad.append(Scatter.apply(found.weight_tk, x, Rows(found.index_tk, 400), torch.float32))
        y.append(layer.pool.gathered(x, found))
    assert all(torch.equal(each, grad[0]) for each in grad)
    assert all(torch.equal(each, y[0]) for each in y)


def test_an_empty_batch_and_one_token(seed: int) -> None:
    layer = layer_of(seed)
    got = gradients(layer, torch.empty(0, 32))
    assert got["y"].shape == (0, 32)
    assert not got["pool.u"].any()
    assert gradients(layer, torch.ones(1, 32))["pool.u"].any(1).sum() <= 6


def test_gradient_checkpointing(seed: int) -> None:
    layer, x = layer_of(seed), normals(6, 32, seed=seed + 1).float()
    again = gradients(layer, x, lambda x: torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False))
    expected = gradients(layer, x)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_what_the_backward_pass_needs_does_not_grow_with_the_experts(seed: int) -> None:
    kept = []
    for side in (20, 60):
        layer, sizes = layer_of(seed, side=side), []
        own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}

        def keep(tensor: Tensor, own: set[int] = own, sizes: list[int] = sizes) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(normals(6, 32, seed=seed + 1).float())
        kept.append(sum(sizes))
    assert kept[0] == kept[1] > 0


def test_what_transforms_functions_goes_by_the_plain_way(seed: int) -> None:
    layer, x = layer_of(seed).requires_grad_(False), normals(3, 32, seed=seed + 1).float()
    expected = gradients(layer.requires_grad_(), x)["x"]
    got = torch.func.grad(lambda x: (layer(x) * torch.linspace(-1, 1, 96).view(3, 32)).sum())(x)
    assert error(got, expected) < 1e-5
    _, tangent = torch.func.jvp(layer, (x,), (torch.ones_like(x),))
    assert tangent.shape == x.shape


def test_compiling_goes_by_the_plain_way(seed: int) -> None:
    layer, x = layer_of(seed), normals(6, 32, seed=seed + 1).float()
    whole = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert error(whole(x), layer(x)) < 1e-5


SCRIPT = """
import os, sys
{first}
import torch
from test_gathered import error, gradients, layer_of, normals
from peerify.modeling import peer_kernels
layer, x = layer_of({seed}), normals(6, 32, seed={seed}).float()
got = gradients(layer, x)
{then}
"""


def run(seed: int, first: str, then: str, **environment: str) -> str:
    folders = [os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "helpers")]
    path = os.pathsep.join([*folders, os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seed=seed, first=first, then=then)],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_child_of_a_fork_goes_on_with_one_thread(seed: int) -> None:
    """Its kernels do; PyTorch's own operations on many numbers do not."""
    then = """
from test_gathered import Combine, Project, Rows, cells
torch.set_num_threads(2)
def results():
    rows = Rows(torch.arange(48).view(6, 8), 64)
    scores = x[:, None] * 1
    return [Combine.apply(Project.apply(x, layer.pool.u, rows), layer.pool.v, rows), *cells(scores, scores, 5)]
torch.set_grad_enabled(False)
expected = results()
pid = os.fork()
if pid == 0:
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(results(), expected)) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(seed, "", then) == "0"


@pytest.mark.parametrize("way", ["switched off", "without numba"])
def test_layers_run_without(way: str, seed: int) -> None:
    off = {"PEERIFY_KERNELS": "0"} if way == "switched off" else {}
    first = "sys.modules['numba'] = sys.modules['llvmlite'] = None" if way == "without numba" else ""
    then = "print(peer_kernels.obstacle(), float(got['y'].sum()), float(got['pool.u'].norm()))"
    *obstacle, y, norm = run(seed, first, then, **off).split()
    assert " ".join(obstacle) in ("switched off by PEERIFY_KERNELS=0", "numba is not installed")
    expected = gradients(layer_of(seed), normals(6, 32, seed=seed).float())
    assert float(y) == pytest.approx(float(expected["y"].sum()), rel=1e-3, abs=1e-3)
    assert float(norm) == pytest.approx(float(expected["pool.u"].norm()), rel=1e-4)
