"""Product keys against brute force, and the PEER layer against a loop written from the docstring's formula."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from peerify.config import PeerConfig
from peerify.modeling_peer import PEER, ProductKeys
from peerify.plan import plan_layer

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "linear": lambda x: x}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter and buffer, those that start as constants too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            # variances and what a probe is worth are positive; norm weights may be anything
            tensor.data.copy_(
                value.abs() + 0.1 if name.endswith(("running_var", "rerank_scale", "rerank_norm")) else value
            )


def make(seed: int = 0, **options: Any) -> PEER:
    layer = PEER(**options).double().eval()
    randomise(layer, seed)
    return layer


def normals(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- The reference ------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_of_every_cell(keys: ProductKeys, x_d: Tensor) -> Tensor:
    """(h, n): the score of each expert in each head's grid, -inf where a head does not own it; one cell at a time."""
    rows, columns = keys.grid
    score_hn = torch.full((keys.num_heads, keys.num_keys), -math.inf, dtype=x_d.dtype)
    for h in range(keys.num_heads):
        key_md = keys.sub_keys[h if len(keys.sub_keys) > 1 else 0]
        row_query = column_query = x_d
        if keys.query_proj is not None:
            query = keys.query_proj.weight @ x_d
            if (norm := keys.query_norm) is not None:
                query = (query - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            width = len(query) // keys.num_heads
            row_query = column_query = query
            if not keys.share_query:
                query = query[h * width : (h + 1) * width]
                row_query, column_query = query[: width // 2], query[width // 2 :]
        row = [float(key_md[a] @ row_query) for a in range(rows)]
        column = [float(key_md[rows + b] @ column_query) for b in range(columns)]
        if keys.sub_key_bias is not None:
            bias = keys.sub_key_bias[h if len(keys.sub_key_bias) > 1 else 0].tolist()
            row = [score + bias[a] for a, score in enumerate(row)]
            column = [score + bias[rows + b] for b, score in enumerate(column)]
        for a, b in itertools.product(range(rows), range(columns)):
            expert = a * columns + b + (0 if keys.share_pool else h * rows * columns)
            if expert < keys.num_keys:
                score_hn[h, expert] = row[a] + column[b]
    return score_hn


def best(score_n: Tensor, count: int) -> list[int]:
    order = score_n.argsort(descending=True).tolist()
    return [i for i in order[:count] if score_n[i] > -math.inf]


@torch.no_grad()
def reference(layer: PEER, options: dict[str, Any], x_d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y_d, what multiplies each expert's output vector (n,), whether it takes part (n,)), as loops."""
    act = ACTIVATIONS[options["activation"]]
    pool, shared, gates = layer.pool, options["num_shared"], options["gates"]
    routed = options["num_experts"] - shared
    heads, topk = options["num_heads"], options["topk"]
    shortlist = options.get("shortlist") or topk
    candidates = options["candidates"] or shortlist
    score_hn = score_of_every_cell(layer.keys, x_d)

    weight: dict[int, float] = {}
    score: dict[int, float] = {}
    if gates == "unit" and heads * candidates >= routed:  # the budget covers all experts
        weight = dict.fromkeys(range(routed), 1.0)
        if heads == 1 or not options["share_pool"]:
            score = dict(enumerate(score_hn.amax(0)[:routed].tolist()))
    else:
        if options["joint_topk"]:
            retrieved = [best(score_hn.amax(0), heads * candidates)]
            score_hn = score_hn.amax(0, keepdim=True)
        else:
            retrieved = [best(score_n, candidates) for score_n in score_hn]
        for score_n, found in zip(score_hn, retrieved, strict=True):
            total = sum(math.exp(score_n[i]) for i in found)
            if heads == 1 or not options["share_pool"]:
                score |= {i: float(score_n[i]) for i in found}
            for i in found:
                if gates == "unit":
                    weight[i] = 1.0
                elif gates == "softmax":
                    weight[i] = weight.get(i, 0.0) + math.exp(score_n[i]) / total
                else:
                    weight[i] = weight.get(i, 0.0) + 1 / (1 + math.exp(-score_n[i]))

    def u(i: int) -> Tensor:
        return pool.u[i] @ x_d + (0 if pool.u_bias is None else pool.u_bias[i])

    def gate(i: int) -> Tensor:
        return pool.gate[i] @ x_d + (0 if pool.gate_bias is None else pool.gate_bias[i])

    if options["rerank"]:

        def size(i: int) -> float:
            expert = i + shared
            if options["rerank"] == "gate":
                factor = act(gate(expert))
            else:
                factor = u(expert) if options["gated"] else act(u(expert))
            prior = math.exp(float(pool.rerank_slope) * score[i]) if score else 1.0
            return float(abs(factor) * pool.rerank_scale[expert] * weight[i]) * prior

        weight = {i: weight[i] for i in sorted(weight, key=size, reverse=True)[: heads * shortlist]}

    if shortlist > topk:

        def contribution(i: int) -> float:
            expert = i + shared
            return float(abs(act(gate(expert)) * u(expert) * weight[i]) * pool.rerank_norm[expert])

        weight = {i: weight[i] for i in sorted(weight, key=contribution, reverse=True)[: heads * topk]}

    a_n = torch.zeros(options["num_experts"], dtype=x_d.dtype)
    active_n = torch.zeros(options["num_experts"], dtype=torch.bool)
    y_d = torch.zeros_like(x_d) if layer.bias is None else layer.bias.clone()
    for expert, w in [(i, 1.0) for i in range(shared)] + [(i + shared, w) for i, w in weight.items()]:
        active_n[expert] = True
        a_n[expert] = w * (act(gate(expert)) * u(expert) if options["gated"] else act(u(expert)))
        y_d = y_d + a_n[expert] * pool.v[expert]
    return y_d, a_n, active_n


# --- Product keys -------------------------------------------------------------------------------------------------


@st.composite
def retrievals(draw: st.DrawFn) -> dict[str, Any]:
    rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    heads, share_pool = draw(st.integers(1, 4)), draw(st.booleans())
    spare = draw(st.integers(0, rows * columns - 1))
    query_dim = draw(st.sampled_from([None, 2, 6]))
    return {
        "grid": (rows, columns),
        "num_heads": heads,
        "num_keys": (1 if share_pool else heads) * rows * columns - spare,
        "share_pool": share_pool,
        "query_dim": query_dim,
        "share_keys": draw(st.booleans()) if query_dim else False,
        "query_norm": draw(st.booleans()) if query_dim else False,
        "key_bias": draw(st.booleans()),
        "topk": draw(st.integers(1, rows * columns + 3)),
        "joint": draw(st.booleans()) if not share_pool else False,
        "seed": draw(st.integers(0, 2**31)),
    }


@settings(max_examples=100, deadline=None)
@given(case=retrievals())
def test_topk_is_brute_force(case: dict[str, Any]) -> None:
    topk, joint, seed = case.pop("topk"), case.pop("joint"), case.pop("seed")
    keys = ProductKeys(5, **case).double().eval()
    randomise(keys, seed)
    x_td = normals(3, 5, seed=seed + 1)
    index_thk, score_thk = keys(x_td, topk, joint)
    owners = 1 if joint else case["num_heads"]
    assert index_thk.shape == score_thk.shape
    assert index_thk.shape[:2] == (3, owners)
    assert index_thk.shape[2] <= topk
    for x_d, index_hk, score_hk in zip(x_td, index_thk, score_thk, strict=True):
        every_hn = score_of_every_cell(keys, x_d)
        if joint:
            every_hn = every_hn.amax(0, keepdim=True)
        for every_n, index_k, score_k in zip(every_hn, index_hk, score_hk, strict=True):
            expected = best(every_n, topk)
            found = score_k > -math.inf
            assert int(found.sum()) == len(expected)
            assert sorted(index_k[found].tolist()) == sorted(expected)
            torch.testing.assert_close(score_k[found], every_n[index_k[found]], rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 8), columns=st.integers(1, 8), topk=st.integers(1, 70), data=st.data(),
)  # fmt: skip
def test_topk_with_ties(rows: int, columns: int, topk: int, data: st.DataObject) -> None:
    """Whole-number scores, full of ties: which of the tied is free, but scores are the best and cells are distinct."""
    row_tha = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=rows, max_size=rows))).double()
    column_thb = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=columns, max_size=columns))).double()
    keys = ProductKeys(
        1, rows * columns, (rows, columns), 1,
        share_pool=True, share_keys=False, query_dim=None, query_norm=False, key_bias=False,
    ).double()  # fmt: skip
    keys.sub_keys.data.copy_(torch.cat([row_tha, column_thb]).view(1, -1, 1))
    index, score = (tensor.flatten() for tensor in keys(torch.ones(1, 1, dtype=torch.float64), topk, False))
    every = (row_tha[:, None] + column_thb).flatten()
    assert score.sort(descending=True).values.tolist() == every.sort(descending=True).values[:topk].tolist()
    assert len(set(index.tolist())) == len(index) == min(topk, rows * columns)
    assert torch.equal(score, every[index])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_keys": 13}, "does not fit"),
        ({"num_keys": 0}, "does not fit"),
        ({"num_heads": 2, "share_pool": False, "num_keys": 12}, "does not fit"),
        ({"num_heads": 2, "share_keys": True}, "share_keys"),
        ({"query_dim": 3}, "even"),
        ({"query_norm": True}, "query_dim"),
    ],
)
def test_keys_that_contradict_themselves(changes: dict[str, Any], message: str) -> None:
    options = {"num_keys": 12, "grid": (3, 4), "num_heads": 1, "share_pool": True, "share_keys": False}
    options |= {"query_dim": None, "query_norm": False, "key_bias": True}
    ProductKeys(4, **options)
    with pytest.raises(ValueError, match=message):
        ProductKeys(4, **options | changes)


# --- The layer ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_scores_that_estimate_sizes() -> None:
    """The expectation is exact where nothing but z^2 is integrated, and near where an activation bends."""
    options: dict[str, Any] = {
        "share_pool": False, "share_keys": False, "query_dim": 4, "query_norm": False, "key_bias": True,
        "share_query": True,
    }  # fmt: skip
    x_td = normals(20, 6, seed=1)
    for activation in ("linear", "silu", "gelu"):
        keys = ProductKeys(6, 9, (1, 9), 1, **options, estimate=activation).double()
        randomise(keys, 2)
        assert keys.log_scale is not None
        assert keys.deviation is not None
        z_tn = keys.products(x_td)[:, 0, 1:]
        if activation == "linear":
            square_tn = z_tn.square() + keys.deviation.square()
            rtol = 1e-9
        else:
            keys.deviation.data *= 0.5
            e = normals(20_000, seed=3)[:, None, None] * keys.deviation
            square_tn = getattr(F, activation)(z_tn + e).square().mean(0)
            rtol = 0.15
        row_t1, score_tn = (score_th[:, 0] for score_th in keys.sub_scores(x_td))  # the row's is common to all
        torch.testing.assert_close(score_tn.exp(), square_tn.sqrt() * keys.log_scale.exp(), rtol=rtol, atol=0.02)
        index_thc, score_thc = keys(x_td, 3, joint=True)
        torch.testing.assert_close(score_thc[:, 0].sort().values, score_tn.topk(3).values.sort().values + row_t1)
        assert torch.equal(index_thc.sort().values[:, 0], score_tn.topk(3).indices.sort().values)


def test_only_keys_of_single_experts_estimate() -> None:
    with pytest.raises(ValueError, match="estimate needs a key for each expert"):
        PEER(6, 24, (4, 6), 1, 3, estimate=True, query_dim=4, share_query=True, share_keys=False)


POOLS = [  # share_pool, joint_topk, heads, experts to retrieve for a grid of 3 x 4
    (True, False, 3, 11),
    (False, False, 2, 22),
    (False, True, 2, 23),
]
QUERIES = [  # query_dim, share_keys, query_norm, share_query
    (None, False, False, False),
    (6, False, False, False),
    (6, True, False, False),
    (6, True, True, False),
    (4, False, True, False),
    (3, False, False, True),
    (4, False, True, True),
]
BIASES = [(False, False, False), (True, True, True), (True, False, True)]


def combinations() -> list[dict[str, Any]]:
    cases = []
    for gates, gated, bias, pool, query, shared, rerank in itertools.product(
        ("unit", "softmax", "sigmoid"), (False, True), BIASES, POOLS, QUERIES, (0, 2), (None, "up", "gate")
    ):
        if (rerank == "gate" and not gated) or (query[1] and not pool[0]):
            continue
        for topk, shortlist, candidates in [
            (2, None, None),
            (2, None, 4),
            (5, None, None),
            (2, None, 12),
            (2, 3, 4),
            (2, 4, None),
            (2, 5, 12),
        ]:
            if (candidates or shortlist) and (rerank is None or gates == "softmax"):
                continue
            if shortlist and not gated:
                continue
            cases.append(
                {
                    "d_model": 5,
                    "num_experts": pool[3] + shared,
                    "grid": (3, 4),
                    "num_heads": pool[2],
                    "topk": topk,
                    "candidates": candidates,
                    "shortlist": shortlist,
                    "activation": "silu" if gated else "gelu",
                    "gated": gated,
                    "expert_bias": bias[0],
                    "gate_bias": bias[1] and gated,
                    "output_bias": bias[2],
                    "num_shared": shared,
                    "share_pool": pool[0],
                    "joint_topk": pool[1],
                    "share_keys": query[1],
                    "gates": gates,
                    "query_dim": query[0],
                    "query_norm": query[2],
                    "share_query": query[3],
                    "key_bias": not query[2],
                    "rerank": rerank,
                }
            )
    return cases


@pytest.mark.parametrize("gates", ["unit", "softmax", "sigmoid"])
def test_every_combination_is_the_formula(gates: str, seed: int) -> None:
    """Each option with each other: gathered rows = dense products = the loop; drawn without repetition."""
    cases = [case for case in combinations() if case["gates"] == gates]
    generator = torch.Generator().manual_seed(seed)
    for i in torch.randperm(len(cases), generator=generator)[:60].tolist():
        options = cases[i]
        layer = make(seed + i, **options)
        x_td = normals(2, 5, seed=seed + i + 1)
        expected = [reference(layer, options, x_d) for x_d in x_td]
        y_td, a_tn, active_tn = (torch.stack(part) for part in zip(*expected, strict=True))
        about = f"{options}"
        bias = 0 if layer.bias is None else layer.bias
        with torch.no_grad():
            assert torch.allclose(layer(x_td), y_td, rtol=1e-9, atol=1e-9), about
            assert torch.allclose(layer.activations(x_td), a_tn, rtol=1e-9, atol=1e-9), about
            # An activation that is exactly 0 (gelu of -9) leaves nothing for re-ranking to tell the expert by.
            assert torch.equal(layer.active_experts(x_td) & (a_tn != 0), active_tn & (a_tn != 0)), about
            found = layer._retrieve(x_td)
            if found is not None:
                gathered = layer.pool._gathered(x_td, found, layer.shortlist, layer.topk) + bias
                assert torch.allclose(gathered, y_td, rtol=1e-9, atol=1e-9), about
        # No more experts than the compute that active_fraction reports, and never fewer than the shared ones.
        active = active_tn.sum(1)
        assert int(active.max()) <= layer.topk + layer.num_shared, about
        if not options["share_pool"] and options["joint_topk"]:
            assert active.tolist() == [layer.topk + layer.num_shared] * 2, about


def test_few_tokens_gather_and_many_multiply(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """`forward` takes both ways, by the number of rows to read, with one answer."""
    layer = make(seed, d_model=5, num_experts=64, grid=(8, 8), num_heads=1, topk=4, gates="sigmoid", share_keys=False)
    x_td = normals(40, 5, seed=seed + 1)
    calls = []
    gathered = layer.pool._gathered

    def count(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return gathered(*args)

    monkeypatch.setattr(layer.pool, "_gathered", count)
    with torch.no_grad():
        together = layer(x_td)
        assert calls == []
        alone = torch.cat([layer(x_d[None]) for x_d in x_td])
    assert calls == [1] * 40
    assert torch.allclose(together, alone, rtol=1e-10, atol=1e-10)


def test_shape_of_input(seed: int) -> None:
    layer = make(seed, d_model=5, num_experts=12, grid=(3, 4), num_heads=2, topk=2, query_dim=4)
    x = normals(2, 3, 5, seed=seed + 1)
    with torch.no_grad():
        assert torch.allclose(layer(x).flatten(0, 1), layer(x.flatten(0, 1)), rtol=1e-10, atol=1e-10)
        assert layer(x).shape == x.shape
        assert layer(x[:0]).shape == (0, 3, 5)  # as a router of tokens among devices may leave none


GRADIENT_CASES: list[dict[str, Any]] = [
    {"gates": "softmax", "query_dim": 4, "query_norm": True, "output_bias": True},
    {"gates": "sigmoid", "gated": True, "expert_bias": True, "gate_bias": True, "share_keys": False, "key_bias": True},
    {"gates": "sigmoid", "query_dim": 4, "gated": True, "candidates": 3, "rerank": "gate"},
    {"gates": "sigmoid", "query_dim": 4, "gated": True, "shortlist": 3, "candidates": 4, "rerank": "up"},
    {"gates": "unit", "gated": True, "num_shared": 1, "num_experts": 10, "share_keys": False, "key_bias": True},
    {"gates": "unit", "candidates": 3, "rerank": "up", "share_pool": False, "joint_topk": True, "num_experts": 17}
    | {"share_keys": False},
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
        retrieved = torch.func.functional_call(_Method(layer, "_retrieve"), _below(parts), (x_td,))
        y_td = torch.func.functional_call(
            _Method(layer.pool, "_gathered"),
            _below({name[5:]: value for name, value in parts.items() if name.startswith("pool.")}),
            (x_td, retrieved, layer.shortlist, layer.topk),
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
        weight_tn = half.pool.weights(x_td, half._retrieve(x_td), half.shortlist, half.topk).double()
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


@pytest.mark.parametrize("path", ["forward", "activations"])
def test_training_on_a_single_token(path: str, seed: int) -> None:
    """Batch statistics of one token do not exist."""
    layer = make(seed, d_model=5, num_experts=12, grid=(3, 4), num_heads=2, topk=2, query_dim=4, query_norm=True)
    before = layer.keys.query_norm.running_mean.clone()
    x_td = normals(1, 5, seed=seed + 1)
    expected = getattr(layer, path)(x_td)
    layer.train()
    result = getattr(layer, path)(x_td)
    assert torch.equal(result, expected)
    result.sum().backward()
    assert torch.equal(layer.keys.query_norm.running_mean, before)
    layer(normals(2, 5, seed=seed + 2))
    assert not torch.equal(layer.keys.query_norm.running_mean, before)


@settings(max_examples=40, deadline=None)
@given(
    gated=st.booleans(), biased=st.booleans(), share_pool=st.booleans(), shared=st.integers(0, 3),
    heads=st.integers(1, 4), rerank=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_everything_retrieved_is_the_dense_layer(
    gated: bool, biased: bool, share_pool: bool, shared: int, heads: int, rerank: bool, seed: int
) -> None:
    """The exactness law, also through the router itself, which the layer skips when it may."""
    cells = 12 * (1 if share_pool else heads)
    layer = make(
        seed, d_model=5, num_experts=cells + shared, grid=(3, 4), num_heads=heads, topk=12, gates="unit", gated=gated,
        expert_bias=biased, gate_bias=biased and gated, output_bias=biased, num_shared=shared, share_pool=share_pool,
        share_keys=False, rerank="up" if rerank else None,
    )  # fmt: skip
    pool = layer.pool
    x_td = normals(4, 5, seed=seed + 1)
    with torch.no_grad():
        up = F.linear(x_td, pool.u, pool.u_bias)
        hidden = F.gelu(up) if not gated else F.gelu(F.linear(x_td, pool.gate, pool.gate_bias)) * up
        dense = F.linear(hidden, pool.v.T, layer.bias)
        torch.testing.assert_close(layer(x_td), dense, rtol=1e-10, atol=1e-10)
        assert layer.active_experts(x_td).all()
        with patch.object(PEER, "chooses", True):  # no shortcut: each head goes through its product keys
            routed = layer._retrieve(x_td)
            assert routed is not None
            torch.testing.assert_close(layer(x_td), dense, rtol=1e-10, atol=1e-10)
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(
            pool._gathered(x_td, routed, layer.shortlist, layer.topk) + bias, dense, rtol=1e-10, atol=1e-10
        )


def test_duplicates_count_once_with_unit_gates(seed: int) -> None:
    """Heads with equal keys retrieve the same experts: as good as one head alone. Sigmoid gates add up."""
    one = make(seed, d_model=5, num_experts=30, grid=(5, 6), num_heads=1, topk=4, gates="unit")
    three = make(
        seed, d_model=5, num_experts=30, grid=(5, 6), num_heads=3, topk=4, gates="unit", share_keys=False, key_bias=True
    )
    for name in ("u", "v"):
        getattr(three.pool, name).data.copy_(getattr(one.pool, name))
    three.keys.sub_keys.data.copy_(one.keys.sub_keys)
    three.keys.sub_key_bias.data.zero_()
    x_td = normals(7, 5, seed=seed + 1)
    with torch.no_grad():
        torch.testing.assert_close(three(x_td), one(x_td), rtol=1e-10, atol=1e-10)
        assert three.active_experts(x_td).sum(1).tolist() == [4] * 7
        one.gates = three.gates = "sigmoid"
        torch.testing.assert_close(three(x_td), 3 * one(x_td), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "active", "router"),
    [
        # plain: 2 vectors of 32 neurons; 3 heads x 2 experts read u and v
        ({"num_heads": 3, "topk": 2, "query_dim": 4}, 12 / 64, (3 * 4 * 10 + 3 * (4 + 8) * 2) / (64 * 10)),
        # one probe of 3 x 5 candidates, then the other vector of 3 x 2
        (
            {"num_heads": 3, "topk": 2, "candidates": 5, "rerank": "up", "gates": "unit", "query_dim": 4},
            (15 + 6) / 64,
            (3 * 4 * 10 + 3 * 12 * 2) / 640,
        ),
        (
            {"num_heads": 1, "topk": 6, "candidates": 20, "rerank": "gate", "gates": "unit", "gated": True},
            (20 + 2 * 6) / 96,
            12 * 10 / 960,
        ),
        ({"num_heads": 1, "topk": 6, "gated": True, "num_experts": 37, "num_shared": 5}, 33 / 96, 12 * 10 / 960),
        # heads with pools of their own, the last one smaller: at most all 60 experts
        (
            {"num_heads": 2, "topk": 32, "share_pool": False, "share_keys": False, "num_experts": 60},
            60 / 32,
            2 * 12 / 64,
        ),
        ({"num_heads": 1, "topk": 32, "gates": "unit"}, 1.0, 0.0),
        (
            {"num_heads": 1, "topk": 8, "candidates": 32, "gated": True, "gates": "unit", "rerank": "up"},
            (8 * 2 + 32) / 96,
            12 * 10 / 960,  # all are candidates: scores have a say in which of them are kept,
        ),
        (
            {"num_heads": 2, "topk": 8, "candidates": 16, "gated": True, "gates": "unit", "rerank": "up"}
            | {"share_keys": False},
            (16 * 2 + 32) / 96,
            0.0,  # unless an expert has several
        ),
        (
            {
                "num_heads": 1,
                "topk": 6,
                "shortlist": 9,
                "candidates": 20,
                "rerank": "up",
                "gates": "unit",
                "gated": True,
            },
            (20 + 9 + 6) / 96,
            12 * 10 / 960,
        ),
        ({"num_heads": 1, "topk": 32, "gates": "softmax"}, 1.0, 12 / 64),
    ],
)
def test_compute_by_hand(options: dict[str, Any], active: float, router: float) -> None:
    layer = PEER(**{"d_model": 10, "num_experts": 32, "grid": (4, 8), "d_ff": 32} | options)
    assert layer.active_fraction == pytest.approx(active)
    assert layer.router_fraction == pytest.approx(router)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "relu"}, "gates"),
        ({"topk": 0}, "topk"),
        ({"candidates": 1}, "candidates"),
        ({"candidates": 3}, "rerank"),
        ({"candidates": 3, "rerank": "up", "gates": "softmax"}, "softmax"),
        ({"shortlist": 1}, "shortlist"),
        ({"shortlist": 4, "candidates": 3, "rerank": "up", "gated": True}, "shortlist"),
        ({"shortlist": 3, "gated": True}, "rerank"),
        ({"shortlist": 3, "rerank": "up", "gates": "unit"}, "gated"),
        ({"rerank": "gate"}, "rerank"),
        ({"rerank": "down"}, "rerank"),
        ({"joint_topk": True}, "joint_topk"),
        ({"num_shared": 1}, None),  # one spare cell is fine
        ({"num_shared": 12}, "does not fit"),
        ({"num_heads": 2}, "share_keys"),
        ({"query_norm": True}, "query_dim"),
    ],
)
def test_options_that_contradict_each_other(options: dict[str, Any], message: str | None) -> None:
    options = {"d_model": 4, "num_experts": 12, "grid": (3, 4), "num_heads": 1, "topk": 2} | options
    if message is None:
        PEER(**options)
    else:
        with pytest.raises(ValueError, match=message):
            PEER(**options)


def test_tables_are_built_on_meta_and_initialised_later(seed: int) -> None:
    with torch.device("meta"):
        layer = PEER(8, 12, (3, 4), 2, 2, query_dim=4, query_norm=True, rerank="up", gates="unit", output_bias=True)
    layer = layer.to_empty(device="cpu")
    for tensor in [*layer.parameters(), *layer.buffers()]:
        tensor.data.fill_(77)
    for module in layer.modules():  # the convention of torch: each sees to its own
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    state = layer.state_dict()
    assert all(not (tensor == 77).any() for tensor in state.values())
    assert layer(torch.randn(3, 8)).isfinite().all()


# --- The paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 6])
def test_preset_is_the_papers_algorithm_1(tokens: int, seed: int) -> None:
    """arXiv 2407.04153, Algorithm 1: h query networks with batch norm, one set of product keys, k of k x k sums,
    softmax over them, heads summed."""
    h, k, d = 4, 3, 12
    config = PeerConfig(preset="peer-paper", num_heads=h, topk=k)
    options = plan_layer(config, path="mlp", d_model=d, d_ff=49, gated=False, activation="relu")
    layer = PEER(**options).double().eval()
    randomise(layer, seed)
    names = {name for name, _ in layer.named_parameters()}
    assert names == {
        "keys.sub_keys", "keys.query_proj.weight", "keys.query_norm.weight", "keys.query_norm.bias", "pool.u", "pool.v",
    }  # fmt: skip
    x_td = normals(tokens, d, seed=seed + 1)

    side = math.isqrt(49)
    assert options["grid"] == [side, side]
    c1, c2 = layer.keys.sub_keys[0].split(side)
    norm = layer.keys.query_norm
    queries = x_td @ layer.keys.query_proj.weight.T
    queries = F.batch_norm(queries, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    q1, q2 = queries.view(tokens, h, 2, -1).unbind(2)
    s1, i1 = (q1 @ c1.T).topk(k)
    s2, i2 = (q2 @ c2.T).topk(k)
    every_score = (s1[..., :, None] + s2[..., None, :]).flatten(2)
    every_index = (i1[..., :, None] * side + i2[..., None, :]).flatten(2)
    scores, pick = every_score.topk(k)
    indices = every_index.gather(2, pick)
    w_down, w_up = layer.pool.u[indices], layer.pool.v[indices]
    hidden = F.relu(torch.einsum("td,thkd->thk", x_td, w_down)) * scores.softmax(-1)
    expected = torch.einsum("thk,thkd->td", hidden, w_up)
    with torch.no_grad():
        torch.testing.assert_close(layer(x_td), expected, rtol=1e-9, atol=1e-9)
