"""Product keys against brute force."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peer_reference import best, normals, randomise, score_of_every_cell

from peerify.modeling.peer_keys import ProductKeys


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
