"""The CPU kernel: what the plain path computes, whatever is asked of it; and it is never in the way."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from elastic_reference import at, make, middling
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peer_reference import normals
from tiny import FAMILIES
from torch import Tensor

from peerify.config.peer import PeerConfig
from peerify.conversion.model import convert
from peerify.modeling import peer_cpu, peer_elastic_pool, peer_faster, peer_kernels
from peerify.modules import peer_layers

pytestmark = pytest.mark.skipif(peer_cpu.obstacle() is not None, reason=str(peer_cpu.obstacle()))
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


def build(seed: int, d_model: int = 48, num_experts: int = 70, dtype: torch.dtype = torch.float32, **form: Any) -> Any:
    layer = make(seed, d_model, num_experts, dtype, **{"group": 32} | form)
    for table in (layer.pool.u, layer.pool.gate):
        table.data.mul_(0.3)
    return layer.eval()


@torch.no_grad()
def plain(layer: Any, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """What the layer computes without the kernel, in a number type of its own; its copies are those of its weights."""
    peer_kernels.enabled = False
    try:
        if dtype is None:
            return layer(x)  # type: ignore[no-any-return]
        again = copy.deepcopy(layer).to(dtype)
        codes = peer_cpu.make_codes(layer.pool)
        again.pool._copies.keep(_in(dtype, peer_cpu.make_copies(_as_float32(layer.pool), codes)), again.pool._tables())
        return again(x.to(dtype))  # type: ignore[no-any-return]
    finally:
        peer_kernels.enabled = True


def _as_float32(pool: Any) -> Any:
    return copy.deepcopy(pool).float()


def _in(dtype: torch.dtype, value: Any) -> Any:
    """The same (nested) tuple of tensors in that number type."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return value if value is None else type(value)(*(_in(dtype, each) for each in value))


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12))


def size(layer: Any, x: Tensor) -> Tensor:
    """What the output would be about if no input and no expert were in line with or against another."""
    pool, norm_t1 = layer.pool, x.double().norm(dim=1, keepdim=True)
    gate_n, u_n = (table.double().norm(dim=1) / layer.d_model**0.5 for table in (pool.gate, pool.u))
    return ((norm_t1 * gate_n * norm_t1 * u_n).square() @ pool.v.double().square()).sqrt()


def decided(layer: Any, x: Tensor, price: float, inputs: float) -> bool:
    """Whether every choice is clear, so that roundings cannot turn one."""
    wide = copy.deepcopy(layer).double()
    low, high = (at(wide, price * by, inputs).pool(x.double(), wide.budget, choice=True).tier_tn for by in (0.99, 1.01))
    return bool((low == high).all())


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_it_computes_what_the_plain_path_does(data: st.DataObject, seed: int) -> None:
    dtype = data.draw(st.sampled_from([*TOLERANCE]), "dtype")
    biased = data.draw(st.booleans(), "biased")
    layer = build(
        seed, 16 * data.draw(st.integers(1, 9), "d_model / 16"), data.draw(st.integers(1, 200), "experts"),
        group=data.draw(st.sampled_from([32, 64]), "group"), expert_bias=biased, gate_bias=biased,
        activation=data.draw(st.sampled_from([*peer_cpu.ACTIVATIONS]), "activation"),
    )  # fmt: skip
    layer.to(dtype)
    x = normals(data.draw(st.integers(1, peer_cpu.FEW), "tokens"), layer.d_model, seed=seed + 1).to(dtype)
    inputs = data.draw(st.sampled_from([1.0, 0.7, 0.3, 0.01]), "inputs")
    price = middling(copy.deepcopy(layer).double(), x.double()) * 10 ** data.draw(st.floats(-4, 2), "price")
    at(layer, price, inputs)
    assert peer_cpu.usable(layer.pool, x)
    got = layer(x)
    assert got.dtype == dtype
    exact, x = layer.float(), x.float()  # plainly in bfloat16, products are rounded, and choices may differ
    assume(decided(exact, x, price, inputs))
    expected = plain(exact, x, torch.float64)
    far = (got.double() - expected).norm() / torch.maximum(expected.norm(), size(exact, x).norm())
    assert far <= TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_and_everything(dtype: torch.dtype, seed: int) -> None:
    layer, x = build(seed).to(dtype), normals(3, 48, seed=seed + 1).to(dtype)
    assert torch.equal(at(layer, 1e30)(x), torch.zeros_like(x))
    everything = at(layer, 1e-30)(x)
    assert error(everything, plain(at(layer.float(), 0.0), x.float())) <= TOLERANCE[dtype]


@torch.no_grad()
def test_memory_is_not_read_before_it_is_written(seed: int) -> None:
    layer, x = build(seed), normals(2, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    expected = layer(x)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert torch.equal(layer(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
def test_a_number_that_is_none_is_not_hidden(seed: int) -> None:
    layer, x = build(seed), normals(3, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    x[1, 7] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@torch.no_grad()
def test_any_layout_of_the_input(seed: int) -> None:
    layer, x = build(seed), normals(48, 4, seed=seed + 1).float().T
    at(layer, middling(layer, x))
    assert not x.is_contiguous()
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    torch.testing.assert_close(layer(x.view(2, 2, 48)), layer(x).view(2, 2, 48), rtol=0, atol=0)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.usefixtures("threads")
def test_any_number_of_threads(seed: int) -> None:
    layer, x = build(seed, num_experts=900), normals(2, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    torch.set_num_threads(1)
    expected = layer(x)
    for count in (2, 8):
        torch.set_num_threads(count)
        for _ in range(20):
            assert torch.equal(layer(x), expected)


@torch.no_grad()
def test_two_models_and_many_callers_at_once(seed: int) -> None:
    layers = [build(seed + i, num_experts=300) for i in range(2)]
    tokens = [normals(2, 48, seed=seed + i).float() for i in range(8)]
    for layer in layers:
        at(layer, middling(layer, tokens[0]))
    asked = [(layer, x) for layer in layers for x in tokens] * 5
    expected = [layer(x) for layer, x in asked]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda pair: _without_gradients(*pair), asked))
    assert all(torch.equal(y, z) for y, z in zip(got, expected, strict=True))


def _without_gradients(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():  # holds in one thread only
        return layer(x)  # type: ignore[no-any-return]


@torch.no_grad()
def test_what_was_packed_follows_the_weights(seed: int) -> None:
    layer, x = build(seed), normals(2, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    before, twin = layer(x), copy.deepcopy(layer)
    layer.pool.v.mul_(2)
    torch.testing.assert_close(twin(x), before, rtol=0, atol=0)
    assert error(layer(x), plain(layer, x)) <= 1e-5
    assert error(layer(x), before) > 0.5
    layer.pool.u = torch.nn.Parameter(layer.pool.u * 0.5)
    assert error(layer(x), plain(layer, x)) <= 1e-5


def test_gradients_pass_as_without_it(seed: int) -> None:
    layer, x = build(seed), normals(2, 48, seed=seed + 1).float().requires_grad_()
    at(layer, middling(layer, x))
    assert not peer_cpu.usable(layer.pool, x)
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.pool.v.grad.abs().sum() > 0


@torch.no_grad()
def test_it_is_chosen_where_it_is_faster(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the table; elsewhere all experts are evaluated in full, unless the budget is to be kept always."""
    layer, x = build(seed), normals(4, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    at_budget, dense = plain(layer, x), layer.pool(x, None)
    assert error(at_budget, dense) > 1e-4
    layer.prefill_all = True
    table = peer_faster.Limits(budget={torch.float32: ((2, 0.6),)}, full={})
    monkeypatch.setattr(peer_faster, "limits", lambda: table)
    assert error(layer(x), dense) <= 1e-6
    assert error(layer(x[:2]), at_budget[:2]) <= 1e-5
    layer.budget = layer.budget._replace(bytes=0.7)
    assert error(layer(x[:2]), dense[:2]) <= 1e-6
    layer.prefill_all = False
    assert error(layer(x), at_budget) <= 1e-5


@torch.no_grad()
def test_layers_it_does_not_fit_say_why(seed: int) -> None:
    for form, reason in (
        ({"d_model": 40}, "40 inputs in groups of 32"),
        ({"group": 16}, "48 inputs in groups of 16"),
        ({"bits": 3}, "3 bits"),
        ({"gated": False}, "no gate"),
        ({"activation": "tanh"}, "tanh"),
        ({"clamp": {"up": 1.0}}, "clamped"),
    ):
        layer = make(seed, **{"d_model": 48, "group": 32, "dtype": torch.float32} | form)
        assert reason in layer.pool.misfit
        x = normals(2, layer.d_model, seed=seed).float()
        assert not peer_cpu.usable(layer.pool, x)
        assert at(layer, middling(layer, x))(x).isfinite().all()


def test_a_kernel_that_cannot_be_built_is_told_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from peerify.modeling import peer_cpu_kernel

    def fails(_: str) -> None:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr(peer_cpu_kernel, "compiled", fails)
    monkeypatch.setattr(peer_kernels, "_compiled", {})
    monkeypatch.setattr(peer_kernels, "_broken", [])
    layer, x = build(seed), normals(2, 48, seed=seed + 1).float()
    at(layer, middling(layer, x))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x))
    text = "it could not be built: RuntimeError: no such instruction"
    assert capfd.readouterr().err == f"peerify: the CPU kernel is not used, {text}\n"
    assert peer_cpu.obstacle() == text


SCRIPT = """
import os, sys
{first}
import torch
from elastic_reference import at, middling
from test_cpu_kernel import build, error, normals, plain, peer_cpu
torch.set_grad_enabled(False)
layer, x = build({seed}), normals(2, 48, seed={seed}).float()
at(layer, middling(layer, x))
{then}
"""


def run(seed: int, first: str, then: str, **environment: str) -> str:
    folders = [os.path.dirname(__file__), os.path.join(os.path.dirname(__file__), "..", "helpers")]
    path = os.pathsep.join([*folders, os.environ["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seed=seed, first=first, then=then)],
        env={**os.environ, "PYTHONPATH": path, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_child_of_a_fork_goes_on_with_one_thread(seed: int) -> None:
    then = """
torch.set_num_threads(2)
expected = layer(x)
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.equal(layer(x), expected) else 3)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert run(seed, "", then) == "0"


def test_it_can_be_switched_off(seed: int) -> None:
    assert run(seed, "", "print(peer_cpu.obstacle(), layer(x).shape[1])", PEERIFY_KERNELS="0") == (
        "switched off by PEERIFY_KERNELS=0 48"
    )


def test_models_run_where_numba_is_absent(seed: int) -> None:
    first = "sys.modules['numba'] = sys.modules['llvmlite'] = None"
    assert run(seed, first, "print(peer_cpu.obstacle(), layer(x).shape[1])") == "numba is not installed 48"


@pytest.fixture(scope="module")
def converted() -> Any:
    model = FAMILIES["llama"](3)
    convert(model, PeerConfig(active=0.6), torch.randint(3, 128, (8, 32)))
    model.set_active(0.6, prefill="budget")
    assert all(layer.pool.misfit is None for layer in peer_layers(model).values())
    return model.eval()


@pytest.mark.parametrize("way", ["cached", "uncached", "batch", "beams", "assisted"])
def test_generation_gives_the_same_tokens(converted: Any, way: str, seed: int) -> None:
    """In float64 nothing is a tie; the kernel computes in float32, so a near tie may part them: tokens before agree."""
    ids = torch.randint(3, 128, (2 if way == "batch" else 1, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    if way == "batch":
        mask[1, :3] = 0
    options: dict[str, Any] = {
        "cached": {}, "uncached": {"use_cache": False}, "batch": {}, "beams": {"num_beams": 3},
        "assisted": {"assistant_model": FAMILIES["llama"](4)},
    }[way]  # fmt: skip
    found = []
    for peer_kernels.enabled in (False, True):
        found.append(
            converted.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                pad_token_id=0,
                **options,
            )
        )
    assert found[0].shape == found[1].shape
    rows = [(a == b).int().cumprod(0).sum() for a, b in zip(*found, strict=True)]
    assert min(rows) >= 7 + 6, found


def test_generation_uses_it(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = peer_elastic_pool.few_tokens
    monkeypatch.setattr(peer_elastic_pool, "few_tokens", lambda *args: calls.append(len(args[1])) or real(*args))
    converted.generate(torch.arange(5, 25)[None], max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert calls == [1] * (3 * 3), "three layers, three tokens after the one that the prompt gives"


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("size", [256, 512])
@pytest.mark.parametrize("has", ["+avx512bw,+avx2", "+avx2", ""])
def test_products_of_pairs_with_every_instruction(has: str, size: int, bits: int, seed: int) -> None:
    """Also with those of processors that this one can stand for."""
    numba, numpy = pytest.importorskip("numba"), pytest.importorskip("numpy")
    from llvmlite import ir
    from numba.extending import intrinsic

    from peerify.modeling import peer_vectors

    if not all(each in peer_vectors.instructions() for each in has.split(",")):
        pytest.skip(f"this processor has not all of {has}")
    vector = ir.VectorType(ir.IntType(bits), size // bits)

    @intrinsic
    def products(_: Any, x: Any, y: Any, z: Any) -> Any:
        def build(_: Any, b: Any, __: Any, values: Any) -> Any:
            *factors, z = values
            zero = ir.Constant(peer_vectors.I64, 0)
            x, y = (peer_vectors.load(b, factor, zero, vector) for factor in factors)
            found = peer_vectors.products_of_pairs(b, x, y, has)
            b.store(found, b.bitcast(z, ir.PointerType(found.type)), align=1)

        return numba.types.void(x, y, z), build

    @numba.njit
    def run(x: Any, y: Any, z: Any) -> None:
        products(peer_vectors.at(x, 0), peer_vectors.at(y, 0), peer_vectors.at(z, 0))

    random = numpy.random.default_rng(seed)
    if bits == 8:  # codes without signs, and digits
        factors = (
            random.integers(0, 16, vector.count, numpy.uint8),
            random.integers(-128, 128, vector.count, numpy.int8),
        )
    else:
        factors = tuple(random.integers(-32767, 32768, vector.count).astype(numpy.int16) for _ in range(2))
    z = numpy.empty(vector.count // 2, f"int{2 * bits}")
    run(*factors, z)
    x, y = (factor.astype(numpy.int64) for factor in factors)
    assert (z == (x * y).reshape(-1, 2).sum(1).astype(z.dtype)).all()


@pytest.mark.parametrize("dtype", ["float32", "uint16"])  # uint16: bits of bfloat16
def test_digits_are_the_input(dtype: str, seed: int) -> None:
    """Also the largest one, which a rounding may carry beyond the largest whole number."""
    numba, numpy = pytest.importorskip("numba"), pytest.importorskip("numpy")
    from peerify.modeling.peer_inputs_kernel import digits
    from peerify.modeling.peer_vectors import at

    @numba.njit
    def run(x: Any, scale: Any, scaled: Any, digit: Any, step: Any, middle: Any, table: Any) -> None:
        digits(
            at(x, 0), at(scale, 0), 0, len(x), len(x), at(scaled, 0), at(digit, 0), at(step, 0), at(middle, 0),
            at(table, 0),
        )  # fmt: skip

    random, count = numpy.random.default_rng(seed), 3 if dtype == "float32" else 2
    for _ in range(200):
        x = (random.standard_normal(32) * 10.0 ** random.uniform(-8, 8)).astype(numpy.float32)
        scaled, step = numpy.empty_like(x), numpy.empty(2, numpy.float32)
        digit, middle = numpy.empty(count * 32, numpy.int8), numpy.empty(1, numpy.float32)
        run(x, numpy.ones_like(x), scaled, digit, step, middle, numpy.empty(1, dtype))
        whole = sum(part.astype(numpy.int64) * 256**i for i, part in enumerate(digit.reshape(count, 32)))
        assert abs(whole * step[0].astype(numpy.float64) - x).max() <= 1.01 * max(step[0] / 2, 2e-7 * abs(x).max())
        assert step[1] == pytest.approx(float(step[0]) * 256**2)
        assert middle[0] == pytest.approx(-7.5 * x.sum(dtype=numpy.float64), rel=1e-4, abs=1e-5 * float(abs(x).max()))
