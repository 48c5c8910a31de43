"""The selection rule: both of its forms against the loop in peer_reference.py, and its parts at ties."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import make, normals, reference

from peerify.modeling import peer_experts
from peerify.modeling.peer_selection import largest, threshold, topk_indices


def test_thresholds_of_numpy_are_those_of_torch() -> None:
    x = torch.randn(7, 33)
    for k in (1, 5, 32, 33, 40):
        wanted = x.topk(min(k, 33), dim=-1).values[:, -1:]
        assert torch.equal(threshold(x, k), wanted)
        assert torch.equal(threshold(x.double(), k).float(), wanted)
        assert torch.equal(threshold(x.bfloat16(), k), x.bfloat16().topk(min(k, 33), dim=-1).values[:, -1:])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.lists(st.integers(-2, 2), min_size=7, max_size=7), min_size=1, max_size=5),
    st.integers(1, 8),
)
def test_exactly_k_are_kept_however_many_are_equal(rows: list[list[int]], k: int) -> None:
    """Also where there are fewer than k, or -inf is the score of many."""
    score = torch.tensor(rows, dtype=torch.float32).masked_fill(torch.tensor(rows) == -2, -torch.inf)
    level = threshold(score, k)
    mask = largest(score, level, k)
    assert mask.sum(1).tolist() == [min(k, 7)] * len(rows)
    assert ((mask == 1) | (score <= level)).all()
    assert ((mask == 0) | (score >= level)).all()


@torch.no_grad()
@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_both_forms_are_the_rule(data: st.DataObject, seed: int) -> None:
    """Any gates, any number of heads, with pools of their own or one for all, budgets of their own or joint: masks over
    all experts, indices of what is retrieved, and the loop keep the same."""
    gated = data.draw(st.booleans(), "gated")
    gates = data.draw(st.sampled_from(["unit", "sigmoid", "softmax"]), "gates")
    share_pool = data.draw(st.booleans(), "share_pool")
    heads = data.draw(st.integers(1, 3), "heads")
    rows, columns = data.draw(st.integers(1, 4), "rows"), data.draw(st.integers(2, 6), "columns")
    cells = rows * columns * (1 if share_pool else heads)
    spare = data.draw(st.integers(0, columns - 1), "spare") if rows > 1 else 0
    topk = data.draw(st.integers(1, rows * columns), "topk")
    shared = data.draw(st.integers(0, 3), "shared")
    query_dim = data.draw(st.sampled_from([None, 6]), "query_dim")
    options: dict[str, Any] = {
        "d_model": 10,
        "num_experts": cells - spare + shared,
        "grid": (rows, columns),
        "num_heads": heads,
        "topk": topk,
        "activation": "silu" if gated else "gelu",
        "gated": gated,
        "num_shared": shared,
        "share_pool": share_pool,
        "share_keys": share_pool and query_dim is not None,
        "joint_topk": not share_pool and data.draw(st.booleans(), "joint"),
        "gates": gates,
        "query_dim": query_dim,
        "key_bias": data.draw(st.booleans(), "key_bias"),
    }
    layer = make(seed, **options)
    x_td = normals(data.draw(st.integers(1, 4), "tokens"), 10, seed=seed + 1)
    expected = [reference(layer, options, x_d) for x_d in x_td]
    y_td, a_tn, active_tn = (torch.stack(part) for part in zip(*expected, strict=True))
    torch.testing.assert_close(layer.activations(x_td), a_tn)
    assert torch.equal(layer.active_experts(x_td) & (a_tn != 0), active_tn & (a_tn != 0))
    torch.testing.assert_close(layer(x_td), y_td)
    if layer.needs_routing:
        torch.testing.assert_close(layer.pool.gathered(x_td, layer.retrieve(x_td)), y_td)


@pytest.mark.parametrize("gates", ["unit", "softmax"])
def test_tokens_are_gathered_a_few_at_a_time(gates: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    layer = make(seed, d_model=5, num_experts=64, grid=(8, 8), num_heads=2, topk=4, gates=gates, share_keys=False)
    x_td = normals(11, 5, seed=seed + 1)
    with torch.no_grad():
        found = layer.retrieve(x_td)
        together = layer.pool.gathered(x_td, found)
        monkeypatch.setattr(peer_experts, "GATHERED", 8 * 5 * 3)  # three tokens
        torch.testing.assert_close(layer.pool.gathered(x_td, found), together)


def test_indices_are_of_the_largest() -> None:
    x = torch.randn(5, 40)
    for k in (1, 7, 40):
        assert torch.equal(topk_indices(x, k).sort(dim=1).values, x.topk(k, dim=1).indices.sort(dim=1).values)
