"""Selections as masks are those of the layer's own indices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerify.masks import project, selected, threshold
from peerify.modeling.peer_layer import PEER
from peerify.refit import _activations


def test_thresholds_of_numpy_are_those_of_torch() -> None:
    x = torch.randn(7, 33)
    for k in (1, 5, 32, 33, 40):
        wanted = x.topk(min(k, 33), dim=-1).values[:, -1:]
        assert torch.equal(threshold(x, k), wanted)
        assert torch.equal(threshold(x.double(), k).float(), wanted)


@torch.no_grad()
@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(0, 2**31))
def test_masks_take_what_the_layer_takes(data: st.DataObject, seed: int) -> None:
    """Any number of heads, with pools of their own or one for all, budgets of their own or joint, re-ranked or not."""
    torch.manual_seed(seed)
    gated = data.draw(st.booleans())
    rerank = data.draw(st.sampled_from([None, "up", "gate"] if gated else [None, "up"]))
    share_pool = data.draw(st.booleans())
    heads = data.draw(st.integers(1, 3))
    rows, columns = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 6))
    cells = rows * columns * (1 if share_pool else heads)
    spare = data.draw(st.integers(0, columns - 1)) if rows > 1 else 0
    shared = data.draw(st.integers(0, 3))
    topk = data.draw(st.integers(1, rows * columns))
    shortlist = data.draw(st.integers(topk, rows * columns))
    query_dim = data.draw(st.sampled_from([None, 6]))
    layer = PEER(
        10,
        cells - spare + shared,
        (rows, columns),
        heads,
        topk,
        shortlist=shortlist if rerank and gated else None,
        candidates=data.draw(st.integers(shortlist, rows * columns)) if rerank else None,
        activation="silu",
        gated=gated,
        num_shared=shared,
        share_pool=share_pool,
        share_keys=share_pool and query_dim is not None,
        joint_topk=not share_pool and data.draw(st.booleans()),
        gates="unit",
        query_dim=query_dim,
        key_bias=data.draw(st.booleans()),
        rerank=rerank,
    )
    if layer.pool.rerank_norm is not None:
        layer.pool.rerank_norm.data.copy_(torch.rand(layer.num_experts))
    if layer.pool.rerank_slope is not None:
        layer.pool.rerank_slope.data.fill_(0.7)
    x_td = torch.randn(data.draw(st.integers(1, 9)), 10)
    torch.testing.assert_close(_activations(layer, x_td), layer.activations(x_td))
    if layer.candidates < layer.num_experts - shared:
        _, found_tn, kept_tn = selected(layer, project(layer, x_td))
        assert torch.equal(found_tn * kept_tn > 0, layer.active_experts(x_td)[:, shared:])
