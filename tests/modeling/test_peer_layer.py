"""The PEER layer against a loop written from the docstring's formula, and against the paper."""

from __future__ import annotations

import itertools
import math
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import make, normals, randomise, reference
from torch import Tensor
from torch.nn import functional as F

from peerify.config.peer import PeerConfig
from peerify.conversion.sizing import plan_layer
from peerify.modeling.peer_layer import PEER

POOLS = [  # share_pool, joint_topk, heads, experts to retrieve for a grid of 3 x 4
    (True, False, 3, 11),
    (False, False, 2, 22),
    (False, True, 2, 23),
]
QUERIES = [  # query_dim, share_keys, query_norm
    (None, False, False),
    (6, False, False),
    (6, True, False),
    (6, True, True),
    (4, False, True),
]
BIASES = [(False, False, False), (True, True, True), (True, False, True)]


def combinations() -> list[dict[str, Any]]:
    cases = []
    for gates, gated, bias, pool, query, shared, topk in itertools.product(
        ("unit", "softmax", "sigmoid"), (False, True), BIASES, POOLS, QUERIES, (0, 2), (2, 5, 12)
    ):
        if query[1] and not pool[0]:
            continue
        cases.append(
            {
                "d_model": 5,
                "num_experts": pool[3] + shared,
                "grid": (3, 4),
                "num_heads": pool[2],
                "topk": topk,
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
                "key_bias": not query[2],
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
            assert torch.equal(layer.active_experts(x_td), active_tn), about
            if layer.needs_routing:
                gathered = layer.pool.gathered(x_td, layer.retrieve(x_td)) + bias
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
    gathered = layer.pool.gathered

    def count(*args: Any) -> Tensor:
        calls.append(len(args[0]))
        return gathered(*args)

    monkeypatch.setattr(layer.pool, "gathered", count)
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
    heads=st.integers(1, 4), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_everything_retrieved_is_the_dense_layer(
    gated: bool, biased: bool, share_pool: bool, shared: int, heads: int, seed: int
) -> None:
    """The exactness law, also through the router itself, which the layer skips when it may."""
    cells = 12 * (1 if share_pool else heads)
    layer = make(
        seed, d_model=5, num_experts=cells + shared, grid=(3, 4), num_heads=heads, topk=12, gates="unit", gated=gated,
        expert_bias=biased, gate_bias=biased and gated, output_bias=biased, num_shared=shared, share_pool=share_pool,
        share_keys=False,
    )  # fmt: skip
    pool = layer.pool
    x_td = normals(4, 5, seed=seed + 1)
    with torch.no_grad():
        up = F.linear(x_td, pool.u, pool.u_bias)
        hidden = F.gelu(up) if not gated else F.gelu(F.linear(x_td, pool.gate, pool.gate_bias)) * up
        dense = F.linear(hidden, pool.v.T, layer.bias)
        torch.testing.assert_close(layer(x_td), dense, rtol=1e-10, atol=1e-10)
        assert layer.active_experts(x_td).all()
        with patch.object(PEER, "needs_routing", True):  # no shortcut: each head goes through its product keys
            routed = layer.retrieve(x_td)
            torch.testing.assert_close(layer(x_td), dense, rtol=1e-10, atol=1e-10)
        bias = 0 if layer.bias is None else layer.bias
        torch.testing.assert_close(pool.gathered(x_td, routed) + bias, dense, rtol=1e-10, atol=1e-10)


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


def test_tables_are_built_on_meta_and_initialised_later(seed: int) -> None:
    with torch.device("meta"):
        layer = PEER(8, 12, (3, 4), 2, 2, query_dim=4, query_norm=True, gates="unit", output_bias=True)
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
