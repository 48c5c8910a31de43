"""The GPU kernels compute what the plain path does. `test_gpu_kernel.py` runs these cases in Triton's interpreter.

On a machine with a GPU, `PEERIFY_KERNELS=triton python -m pytest tests/modeling/gpu_kernel_cases.py` compiles them.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from elastic_reference import at, make, middling
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peer_reference import normals
from test_cpu_kernel import _as_float32, _in, decided, error, size
from tiny import FAMILIES
from torch import Tensor

from peerify.config.peer import PeerConfig
from peerify.conversion.model import convert
from peerify.modeling import peer_cpu, peer_elastic_pool, peer_gpu, peer_kernels, peer_triton
from peerify.modules import peer_layers

pytestmark = pytest.mark.skipif(peer_triton.obstacle() is not None, reason=str(peer_triton.obstacle()))
DEVICE = "cuda" if torch.cuda.is_available() and not peer_triton.interpreted else "cpu"
EXAMPLES = 20 if peer_triton.interpreted else 200
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _not_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_kernels, "enabled", False)
    if peer_triton.interpreted:  # a program takes long, and chunks of several blocks are to be met
        monkeypatch.setattr(peer_gpu, "PROGRAMS", 3)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each launch had."""
    counts: list[int] = []
    real = peer_gpu._launch
    monkeypatch.setattr(peer_gpu, "_launch", lambda x, *rest: counts.append(len(x)) or real(x, *rest))
    return counts


def build(seed: int, d_model: int = 24, num_experts: int = 40, dtype: torch.dtype = torch.float32, **form: Any) -> Any:
    layer = make(seed, d_model, num_experts, dtype, **{"group": 16} | form)
    for table in (layer.pool.u, layer.pool.gate):
        table.data.mul_(0.3)
    return layer.eval().to(DEVICE)


def tokens(count: int, d_model: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return normals(count, d_model, seed=seed + 1).to(DEVICE, dtype)


@torch.no_grad()
def plain(layer: Any, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """What the layer computes without the kernels, in a number type of its own, by the copies of its weights."""
    peer_triton.enabled = False
    try:
        again = copy.deepcopy(layer).to(dtype)
        codes = peer_gpu.make_codes(layer.pool)
        again.pool._copies.keep(_in(dtype, peer_gpu.make_copies(_as_float32(layer.pool), codes)), again.pool._tables())
        return again(x.to(dtype))  # type: ignore[no-any-return]
    finally:
        peer_triton.enabled = True


@torch.no_grad()
@settings(max_examples=EXAMPLES, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_they_compute_what_the_plain_path_does(data: st.DataObject, seed: int) -> None:
    dtype = data.draw(st.sampled_from([*TOLERANCE]), "dtype")
    biased = data.draw(st.booleans(), "biased")
    layer = build(
        seed, data.draw(st.integers(1, 60), "d_model"), data.draw(st.integers(1, 40), "experts"),
        group=data.draw(st.sampled_from([16, 24, 64, 256]), "group"), expert_bias=biased, gate_bias=biased,
        activation=data.draw(st.sampled_from([*peer_cpu.ACTIVATIONS]), "activation"),
    )  # fmt: skip
    layer.to(dtype)
    x = tokens(data.draw(st.sampled_from([1, 1, 2, 5]), "tokens"), layer.d_model, seed, dtype)
    inputs = data.draw(st.sampled_from([1.0, 0.7, 0.3, 0.01]), "inputs")
    price = middling(copy.deepcopy(layer).double(), x.double()) * 10 ** data.draw(st.floats(-4, 2), "price")
    at(layer, price, inputs)
    assert peer_gpu.packs_for_gpu(layer.pool, x)
    got = layer(x)
    assert got.dtype == dtype
    exact, x = layer.float(), x.float()  # plainly in bfloat16, products are rounded, and choices may differ
    assume(decided(exact, x, price, inputs))
    expected = plain(exact, x)
    far = (got.double() - expected).norm() / torch.maximum(expected.norm(), size(exact, x).norm())
    assert far <= TOLERANCE[dtype]


@torch.no_grad()
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_nothing_and_everything(dtype: torch.dtype, seed: int) -> None:
    layer, x = build(seed).to(dtype), tokens(3, 24, seed, dtype)
    assert torch.equal(at(layer, 1e30)(x), torch.zeros_like(x))
    everything = at(layer, 1e-30)(x)
    assert error(everything, plain(at(layer.float(), 0.0), x.float())) <= TOLERANCE[dtype]


@torch.no_grad()
def test_up_to_64_tokens(seed: int, launches: list[int]) -> None:
    layer, x = build(seed), tokens(65, 24, seed)
    at(layer, middling(layer, x))
    expected = plain(layer, x)
    for count in (17, 64):
        assert error(layer(x[:count]), expected[:count]) <= 1e-5
    layer(x)
    assert layer(x[:0]).shape == (0, 24)
    assert launches == [17, 64]


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_memory_is_not_read_before_it_is_written(inputs: float, seed: int) -> None:
    layer, x = build(seed), tokens(2, 24, seed)
    at(layer, middling(layer, x), inputs)
    expected = layer(x)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        assert torch.equal(layer(x), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_a_number_that_is_none_is_not_hidden(inputs: float, seed: int) -> None:
    layer, x = build(seed), tokens(3, 24, seed)
    at(layer, middling(layer, x), inputs)
    x[1, 7] = torch.nan
    y = layer(x)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@torch.no_grad()
def test_any_layout_of_the_input(seed: int) -> None:
    layer, x = build(seed), tokens(24, 4, seed).T
    at(layer, middling(layer, x))
    assert not x.is_contiguous()
    assert torch.equal(layer(x), layer(x.contiguous()))
    assert torch.equal(layer(x.view(2, 2, 24)), layer(x).view(2, 2, 24))


@torch.no_grad()
def test_two_layers_in_turn(seed: int) -> None:
    layers, x = [build(seed), build(seed + 1, num_experts=33, group=24)], tokens(2, 24, seed)
    for layer in layers:
        at(layer, middling(layer, x))
    expected = [layer(x) for layer in layers]
    assert all(torch.equal(layers[i](x), expected[i]) for i in (1, 0, 0, 1))
    assert all(error(y, plain(layer, x)) <= 1e-5 for layer, y in zip(layers, expected, strict=True))


@torch.no_grad()
def test_what_was_packed_follows_the_weights(seed: int) -> None:
    layer, x = build(seed), tokens(2, 24, seed)
    at(layer, middling(layer, x))
    before, twin = layer(x), copy.deepcopy(layer)
    layer.pool.v.mul_(2)
    assert torch.equal(twin(x), before)
    assert error(layer(x), plain(layer, x)) <= 1e-5
    assert error(layer(x), before) > 0.5


def test_gradients_pass_as_without_them(seed: int, launches: list[int]) -> None:
    layer, x = build(seed), tokens(2, 24, seed).requires_grad_()
    at(layer, middling(layer, x))
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.pool.v.grad.abs().sum() > 0
    assert launches == []


@torch.no_grad()
def test_layers_they_do_not_fit_say_why(seed: int, launches: list[int]) -> None:
    for form, reason in (
        ({"bits": 3}, "3 bits"),
        ({"gated": False}, "no gate"),
        ({"activation": "tanh"}, "tanh"),
        ({"clamp": {"up": 1.0}}, "clamped"),
    ):
        layer = make(seed, **{"d_model": 24, "group": 16, "dtype": torch.float32} | form).to(DEVICE)
        assert reason in layer.pool.gpu_misfit
        x = tokens(2, 24, seed)
        assert at(layer, middling(layer, x))(x).isfinite().all()
    assert launches == []


@torch.no_grad()
def test_a_failure_is_told_once(seed: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("out of registers\nand more")

    monkeypatch.setattr(peer_gpu, "_launch", fails)
    monkeypatch.setattr(peer_triton, "_broken", [])
    layer, x = build(seed), tokens(2, 24, seed)
    at(layer, middling(layer, x))
    assert torch.equal(layer(x), layer(x))
    text = "it failed: RuntimeError: out of registers"
    assert capfd.readouterr().err == f"peerify: the GPU kernels are not used, {text}\n"
    assert peer_triton.obstacle() == text


# --- torch.compile and the operator -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.5])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_without_a_break(backend: str, inputs: float, seed: int) -> None:
    graphs: list[Any] = []

    def recorded(module: Any, examples: Any) -> Any:
        graphs.append(module.code)
        return torch._dynamo.lookup_backend(backend)(module, examples)

    torch.compiler.reset()
    layer, x = build(seed), tokens(3, 24, seed)
    at(layer, middling(layer, x), inputs)
    expected = layer(x)
    compiled = torch.compile(layer, backend=recorded, fullgraph=True)
    assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x[:1]), layer(x[:1]))
    at(layer, 2 * layer.budget.price, inputs)
    assert torch.equal(compiled(x), layer(x))
    assert all(peer_gpu._NAME.partition("::")[2] in graph for graph in graphs)


@torch.no_grad()
@pytest.mark.parametrize("inputs", [1.0, 0.5])
def test_the_operator_keeps_the_rules(inputs: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    real = peer_gpu._launch
    monkeypatch.setattr(peer_gpu, "_launch", lambda *args: given.append(args) or real(*args))
    layer, x = build(seed), tokens(2, 24, seed)
    at(layer, middling(layer, x), inputs)(x)
    torch.library.opcheck(peer_gpu._operator, given[0])


def _loaded(name: str) -> ModuleType:
    """peer_gpu.py once more, as transformers loads it from the folder of a model."""
    spec = importlib.util.spec_from_file_location(f"peerify.modeling.{name}", peer_gpu.__file__)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@torch.no_grad()
def test_each_model_brings_an_operator_of_its_own(seed: int) -> None:
    layer, x = build(seed), tokens(1, 24, seed)
    at(layer, middling(layer, x))
    expected, packed = layer(x), layer.pool._for_gpu.value
    other, again = _loaded("other_gpu"), _loaded("other_gpu")
    assert other._NAME == again._NAME != peer_gpu._NAME
    price, (_, coarse, fine) = layer.budget.price, packed.costs(1.0)
    rest = (None, None, packed.tables, packed.experts, packed.group, packed.kind, price, price * coarse, price * fine)
    for module in (peer_gpu, again):
        assert torch.equal(module._operator(x, *rest), expected)


if DEVICE == "cuda":  # the interpreter has no streams

    @torch.no_grad()
    @pytest.mark.parametrize("inputs", [1.0, 0.5])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_captured_in_a_graph(dtype: torch.dtype, inputs: float, seed: int) -> None:
        layer, x = build(seed, d_model=256, num_experts=1000).to(dtype), tokens(4, 256, seed, dtype)
        at(layer, middling(layer, x), inputs)
        expected, other = layer(x), layer(x.flip(0))  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for tokens_of, wanted in ((x.clone(), expected), (x.flip(0), other)) * 10:
            x.copy_(tokens_of)
            graph.replay()
            assert torch.equal(y, wanted)

    @torch.no_grad()
    @pytest.mark.parametrize("count", [1, 8, 64])
    @pytest.mark.parametrize("dtype", TOLERANCE)
    def test_a_layer_of_a_large_model(dtype: torch.dtype, count: int, seed: int) -> None:
        layer, x = build(seed, 4096, 14336, group=64).to(dtype), tokens(count, 4096, seed, dtype)
        exact = copy.deepcopy(layer).double()
        at(layer, middling(exact, x.double()))
        y = layer(x)
        assert all(torch.equal(layer(x), y) for _ in range(20))
        assert error(y, plain(layer.float(), x.float())) <= 10 * TOLERANCE[dtype]  # some choices are near ties


# --- Models -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_generation_uses_them_and_gives_the_same_tokens(
    seed: int, launches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FAMILIES["llama"](3)
    monkeypatch.setattr(peer_triton, "enabled", False)
    convert(model, PeerConfig(active=0.6), torch.randint(3, 128, (8, 32)))
    monkeypatch.setattr(peer_triton, "enabled", True)
    model.eval().to(DEVICE).set_active(0.6)
    ids = torch.randint(3, 128, (1, 66), generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with_kernels = model.generate(ids, **options)
    assert launches == [1] * (3 * 3), "three layers, three tokens after the one that the prompt gives"
    for layer in peer_layers(model).values():
        layer.prefill_all = False  # else the plain path evaluates all experts in full
        layer.pool.gpu_misfit = "it is not asked for"
    logits = model(with_kernels[:, :-1]).logits[:, 65:]
    best = logits.amax(-1)
    taken = logits.gather(-1, with_kernels[:, 66:, None])[..., 0]
    assert torch.all(taken[:, 1:] >= best[:, 1:] - 0.05 * logits.std())  # a near tie may part them


def test_it_is_never_asked_on_the_way_to_the_choice(seed: int, launches: list[int]) -> None:
    layer, x = build(seed), tokens(2, 24, seed)
    at(layer, middling(layer, x))
    seen: list[float] = []
    layer.usage(x)
    layer.watch(lambda _, bytes_, macs: seen.append(bytes_ + macs))
    with torch.no_grad():
        layer(x)
    assert len(seen) == 1
    assert launches == []
    assert peer_elastic_pool.AT_MOST == 64
