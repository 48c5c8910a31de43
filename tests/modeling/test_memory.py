"""A memory of many experts beside a layer: the paper's sum, nothing at the start, and one pool for several layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from peerify.modeling.modeling_peer import make_layer
from peerify.modeling.peer_install import layers_below
from peerify.modeling.peer_memory import Memory

ELASTIC = {"kind": "elastic", "d_model": 16, "num_experts": 24, "bits": 4, "group": 16}
ELASTIC |= {"budgets": [[0.3, 1.0, 0.01, 0.3, 0.4]]}
PRODUCT = {"d_model": 16, "num_experts": 24, "grid": [4, 6], "num_heads": 1, "topk": 5, "gates": "unit"}
SMALL = {"num_experts": 64, "grid": [8, 8], "num_heads": 2, "topk": 4, "query_dim": 6}


def learned(memory: Memory) -> Memory:
    """As training may leave it."""
    torch.nn.init.normal_(memory.pool.v)
    return memory


def by_the_paper(memory: Memory, x_td: torch.Tensor) -> torch.Tensor:
    """Algorithm 1, a token, a head and an expert at a time, over all cells."""
    keys, pool = memory.keys, memory.pool
    rows, columns = keys.grid
    row_ar, column_br = keys.sub_keys[0].split(keys.grid)
    y_td = torch.zeros_like(x_td)
    for t, x_d in enumerate(x_td):
        query_hq = F.linear(x_d, keys.query_proj.weight, keys.query_proj.bias).view(memory.num_heads, -1)
        for query_q in query_hq:
            half = len(query_q) // 2
            score_ab = (row_ar @ query_q[:half])[:, None] + (column_br @ query_q[half:])[None]
            best = score_ab.flatten().topk(memory.topk)
            for gate, i in zip(best.values.softmax(0), best.indices, strict=True):
                a = pool.act(pool.u[i] @ x_d if pool.gate is None else pool.gate[i] @ x_d)
                y_td[t] += gate * (a if pool.gate is None else a * (pool.u[i] @ x_d)) * pool.v[i]
        assert rows * columns == memory.num_experts
    return y_td


@settings(max_examples=25, deadline=None)
@given(
    gated=st.booleans(),
    grid=st.sampled_from([(8, 8), (4, 16), (3, 5)]),
    num_heads=st.integers(1, 3),
    topk=st.integers(1, 6),
    d_model=st.sampled_from([10, 16]),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_a_memory_computes_what_the_paper_says(
    gated: bool, grid: tuple[int, int], num_heads: int, topk: int, d_model: int, seed: int
) -> None:
    torch.manual_seed(seed)
    memory = learned(
        Memory(d_model, grid[0] * grid[1], grid, num_heads, topk, query_dim=6, gated=gated, activation="silu")
    )
    x_td = torch.randn(5, d_model)
    torch.testing.assert_close(memory(x_td), by_the_paper(memory, x_td), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [0.3, 1.0])
@pytest.mark.parametrize(
    "options", [ELASTIC, PRODUCT, PRODUCT | {"gates": "softmax"}], ids=lambda o: str(o.get("gates"))
)
@torch.no_grad()
def test_a_new_memory_changes_nothing_and_a_learned_one_adds_itself(
    options: dict[str, Any], active: float, dtype: torch.dtype
) -> None:
    options = options | {"gated": True, "activation": "silu", "output_bias": True}
    bare, layer = make_layer(options).to(dtype), make_layer(options | {"memory": SMALL}).to(dtype)
    layer.load_state_dict(bare.state_dict(), strict=False)
    for part in (bare, layer):
        part.eval()
        if "kind" in options:
            part.set_active(active)
    x = torch.randn(2, 7, 16, dtype=dtype)
    assert torch.equal(layer(x), bare(x))
    learned(layer.memory)
    expected = bare(x) + layer.memory(x.flatten(0, 1)).view_as(x)
    assert torch.equal(layer(x), expected)
    assert not torch.equal(layer(x), bare(x))
    assert torch.equal(copy.deepcopy(layer)(x), expected)


@pytest.mark.parametrize("options", [ELASTIC, PRODUCT])
def test_what_a_memory_takes_is_counted(options: dict[str, Any]) -> None:
    """By hand: 2 x 4 experts of 3 x 16 numbers, queries of 2 x 6 x 16, and 16 sub-keys of 3 that two heads meet."""
    bare, layer = make_layer(options | {"gated": True}), make_layer(options | {"gated": True, "memory": SMALL})
    layer.load_state_dict(bare.state_dict(), strict=False)
    dense = 24 * 3 * 16
    read, done = 8 * 3 * 16 + 2 * 6 * 16 + 16 * 3, 8 * 3 * 16 + 2 * 6 * 16 + 2 * 16 * 3
    assert layer.bytes_fraction - bare.bytes_fraction == pytest.approx(read / dense)
    assert layer.macs_fraction - bare.macs_fraction == pytest.approx(done / dense)
    x_td = torch.randn(3, 16)
    for one, other, share in zip(layer.usage(x_td)[1:], bare.usage(x_td)[1:], (read, done), strict=True):
        assert one - other == pytest.approx(share / dense)
    if "kind" in options:
        layer.set_active(0.3), bare.set_active(0.3)
        assert layer.bytes_fraction - bare.bytes_fraction == pytest.approx(read / dense)
        for one, other, share in zip(layer.usage(x_td)[1:], bare.usage(x_td)[1:], (read, done), strict=True):
            assert one - other == pytest.approx(share / dense)


def test_gradients_reach_output_vectors_first() -> None:
    """As of an adapter: what multiplies v = 0 has no gradient yet, and v has one."""
    layer = make_layer(ELASTIC | {"memory": SMALL, "gated": True})
    layer(torch.randn(9, 16)).square().sum().backward()
    assert layer.memory.pool.v.grad.any()
    assert not layer.memory.pool.u.grad.any()
    assert not layer.memory.keys.sub_keys.grad.any()
    learned(layer.memory).zero_grad()
    layer(torch.randn(9, 16)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in layer.memory.parameters())


def test_a_part_of_a_model_has_its_layers_under_its_own_names() -> None:
    whole = {
        "model.language_model.layers.0.mlp": {"memory": SMALL},
        "model.language_model.layers.1.mlp": {"memory": SMALL | {"pool_of": "model.language_model.layers.0.mlp"}},
        "model.vision_tower.layers.0.mlp": ELASTIC,
    }
    part = layers_below(whole, lambda path: path.partition("language_model.")[2])
    assert part == {
        "layers.0.mlp": {"memory": SMALL},
        "layers.1.mlp": {"memory": SMALL | {"pool_of": "layers.0.mlp"}},
    }
    assert whole["model.language_model.layers.1.mlp"]["memory"]["pool_of"] == "model.language_model.layers.0.mlp"


def test_what_is_no_memory_is_refused() -> None:
    with pytest.raises(ValueError, match="a memory of 60 experts has a cell for each, and its grid is 8x8"):
        Memory(16, 60, (8, 8), 2, 4, query_dim=6)
    with pytest.raises(ValueError, match="topk must be 1 to 64, not 65"):
        Memory(16, 64, (8, 8), 2, 65, query_dim=6)
