"""PEER layers for the tests of training's parts."""

from __future__ import annotations

from typing import Any

from peerify.modeling.peer_layer import PEER


def peer(**options: Any) -> PEER:
    settings: dict[str, Any] = {
        "share_pool": False,
        "share_keys": False,
        "joint_topk": True,
        "gates": "unit",
        "key_bias": True,
        "activation": "silu",
        "gated": True,
        "candidates": 6,
        "rerank": "gate",
        "grid": (4, 4),
        "num_heads": 3,
    }
    return PEER(12, 46, topk=4, **(settings | options))


PLAIN = {"candidates": None, "rerank": None}
ESTIMATING = {
    "grid": (1, 46), "num_heads": 1, "query_dim": 5, "share_query": True, "estimate": True, "rerank": "up",
}  # fmt: skip
