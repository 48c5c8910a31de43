"""What a PEER layer's options cost, and which of them contradict each other."""

from __future__ import annotations

from typing import Any

import pytest

from peerify.modeling.peer_layer import PEER


@pytest.mark.parametrize(
    ("options", "active", "router"),
    [
        # plain: 2 vectors of 32 neurons; 3 heads x 2 experts read u and v
        ({"num_heads": 3, "topk": 2, "query_dim": 4}, 12 / 64, (3 * 4 * 10 + 3 * (4 + 8) * 2) / (64 * 10)),
        ({"num_heads": 1, "topk": 6, "gated": True, "num_experts": 37, "num_shared": 5}, 33 / 96, 12 * 10 / 960),
        # heads with pools of their own, the last one smaller: at most all 60 experts
        (
            {"num_heads": 2, "topk": 32, "share_pool": False, "share_keys": False, "num_experts": 60},
            60 / 32,
            2 * 12 / 64,
        ),
        ({"num_heads": 1, "topk": 32, "gates": "unit"}, 1.0, 0.0),
        ({"num_heads": 1, "topk": 32, "gates": "softmax"}, 1.0, 12 / 64),
    ],
)
def test_cost_by_hand(options: dict[str, Any], active: float, router: float) -> None:
    layer = PEER(**{"d_model": 10, "num_experts": 32, "grid": (4, 8), "d_ff": 32} | options)
    assert layer.macs_fraction == pytest.approx(active + router)
    # Sub-keys that all heads share are read once, and multiplied by each.
    dense = (3 if options.get("gated") else 2) * 320
    again = (layer.num_heads - len(layer.keys.sub_keys)) * 12 * layer.keys.sub_keys.shape[-1] if router else 0
    assert layer.bytes_fraction == pytest.approx(active + router - again / dense)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": "relu"}, "gates"),
        ({"topk": 0}, "topk"),
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
