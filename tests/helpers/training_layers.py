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
        "grid": (4, 4),
        "num_heads": 3,
    }
    return PEER(12, 46, topk=4, **(settings | options))
