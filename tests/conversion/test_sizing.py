"""From what the user asked for to one layer: the compute is met, and what has no room is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peerify.config.peer import PeerConfig
from peerify.conversion.sizing import plan_layer, router_cost
from peerify.errors import ConversionError
from peerify.modeling.peer_layer import PEER


def plan(config: PeerConfig, **changes: Any) -> dict[str, Any]:
    layer = {"path": "model.mlp", "d_model": 96, "d_ff": 256, "gated": True, "activation": "silu"}
    return plan_layer(config, **layer | changes)


def built(kwargs: dict[str, Any]) -> PEER:
    with torch.device("meta"):
        return PEER(**kwargs)


@settings(max_examples=80, deadline=None)
@given(
    d_ff=st.integers(8, 12_000), active=st.floats(0.05, 1), gated=st.booleans(), share_pool=st.booleans(),
    gates=st.sampled_from(["unit", "softmax", "sigmoid"]), data=st.data(),
)  # fmt: skip
def test_compute_is_what_was_asked_for(
    d_ff: int, active: float, gated: bool, share_pool: bool, gates: str, data: st.DataObject
) -> None:
    num_shared = data.draw(st.integers(0, int(active * d_ff / 2)))
    config = PeerConfig(active=active, gates=gates, num_shared=num_shared, share_pool=share_pool)  # type: ignore[arg-type]
    try:
        kwargs = plan(config, d_ff=d_ff, gated=gated)
    except ConversionError:  # less than one expert and the router
        assert active < 1
        return
    router = router_cost(kwargs) / ((3 if gated else 2) * d_ff)
    if (active - router) * d_ff - num_shared < 8:
        return  # less than one expert for each of the heads of a shared pool
    layer = built(kwargs)
    assert layer.num_experts == d_ff
    # Gates that are scores need a router even where everything is retrieved.
    on_top = router if active == 1 and gates != "unit" else 0.0
    assert layer.bytes_fraction <= active + on_top + 1e-9
    # Rounded down to whole experts of each of the heads; where all fit, there is nothing to choose and no router.
    lost = 2 * layer.num_heads / d_ff + (0 if layer.needs_routing else router)
    assert layer.bytes_fraction >= active - lost - 1e-9
    if d_ff > 1000 and active >= 0.25 and not num_shared and layer.needs_routing:
        assert layer.bytes_fraction > 0.9 * active
    if active == 1 and gates == "unit":
        assert layer.bytes_fraction == layer.macs_fraction == 1


@settings(max_examples=80, deadline=None)
@given(
    num_experts=st.integers(1, 5000), heads=st.none() | st.integers(1, 40), share_pool=st.booleans(),
    shared=st.integers(0, 3), data=st.data(),
)  # fmt: skip
def test_direct_numbers_are_kept(
    num_experts: int, heads: int | None, share_pool: bool, shared: int, data: st.DataObject
) -> None:
    """heads and topk as given make a layer, whatever the number of experts, or a clear refusal."""
    topk = data.draw(st.integers(1, 20))
    try:
        config = PeerConfig(
            num_experts=num_experts, num_heads=heads, topk=topk, share_pool=share_pool, num_shared=shared
        )
    except ValueError:
        return
    try:
        kwargs = plan(config, d_ff=1000)
    except ConversionError:
        return
    layer = built(kwargs)
    assert layer.num_experts == num_experts
    assert heads is None or layer.num_heads == heads
    routed = num_experts - shared
    assert layer.topk == min(routed, layer.num_heads * topk)
    cells = layer.keys.grid[0] * layer.keys.grid[1]
    assert layer.num_shared == shared
    assert cells * (1 if share_pool else layer.num_heads) >= routed


def test_default_router_spends_its_budget() -> None:
    """1536 neurons, as in SmolLM2-135M, in grids of their heads' own without a spare cell; and more experts."""
    kwargs = plan(PeerConfig(keys="product"), d_model=576, d_ff=1536)
    rows, columns = kwargs["grid"]
    assert 0.3 <= rows / columns <= 1
    assert rows * columns * kwargs["num_heads"] == 1536
    assert (kwargs["gates"], kwargs["joint_topk"], kwargs["query_dim"]) == ("unit", True, None)
    layer = built(kwargs)
    router = router_cost(kwargs) / (3 * 1536)
    assert 0.48 < layer.bytes_fraction <= 0.5
    assert 0.15 <= router / layer.bytes_fraction <= 0.2  # a quarter of what it retrieves
    kwargs = plan(PeerConfig(active=0.1, num_experts=20000), d_model=576, d_ff=1536)
    rows, columns = kwargs["grid"]
    assert 0.5 <= rows / columns <= 1
    assert 20000 <= rows * columns * kwargs["num_heads"] <= 1.05 * 20000


def test_options_reach_the_layer() -> None:
    config = PeerConfig(
        topk=3, num_heads=2, grid=(10, 13), gates="sigmoid", num_experts=260, query_dim=10,
        query_norm=True, joint_topk=False,
    )  # fmt: skip
    kwargs = plan(config, expert_bias=True, gate_bias=False, output_bias=True)
    expected = {
        "d_model": 96, "num_experts": 260, "grid": [10, 13], "num_heads": 2, "topk": 3,
        "activation": "silu", "gated": True, "expert_bias": True, "gate_bias": False, "output_bias": True,
        "num_shared": 0, "share_pool": False, "share_keys": False, "joint_topk": False, "gates": "sigmoid",
        "query_dim": 10, "query_norm": True, "key_bias": False, "d_ff": 256,
    }  # fmt: skip
    assert kwargs == expected


def test_preset() -> None:
    kwargs = plan(PeerConfig(preset="peer-paper", topk=4), gated=False, activation="gelu")
    assert (kwargs["share_pool"], kwargs["share_keys"], kwargs["query_norm"]) == (True, True, True)
    assert (kwargs["gates"], kwargs["joint_topk"]) == ("softmax", False)
    assert (kwargs["num_heads"], kwargs["grid"], kwargs["topk"]) == (8, [16, 16], 4)
    assert kwargs["query_dim"] > 0


@pytest.mark.parametrize(
    ("options", "layer", "message"),
    [
        ({"num_shared": 256}, {}, "num_shared 256 leaves nothing"),
        ({"num_shared": 200}, {}, "or lower num_shared"),
        ({"active": 0.003}, {}, "raise active"),
        ({"num_heads": 8, "topk": 33}, {}, "8 heads x 33"),
        ({"topk": 257, "share_pool": True}, {}, "heads x 257"),
        ({"num_heads": 300}, {}, "300 heads cannot divide 256"),
        ({"num_heads": 30, "num_experts": 100, "topk": 1}, {}, "30 heads cannot divide 100"),
        ({"grid": (10, 10), "num_heads": 2}, {}, "a grid of 10x10 with 2 heads has 200 cells for 256"),
        ({"grid": (10, 10), "num_heads": 4}, {}, "a grid of 10x10 with 4 heads has 400 cells for 256"),
        ({"grid": (10, 10), "share_pool": True}, {}, "a grid of 10x10 with 8 heads has 100 cells for 256"),
        (
            {"grid": (10**9, 10**9)},
            {},
            "a grid of 1000000000x1000000000 with 1 heads has 1000000000000000000 cells for 256",
        ),
    ],
)
def test_no_room(options: dict[str, Any], layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConversionError, match=r"^model\.mlp: ") as error:
        plan(PeerConfig(**options), **layer)
    assert message in str(error.value)


def test_more_experts_than_the_machine_holds_are_refused_before_any_is_made() -> None:
    with pytest.raises(ConversionError, match=r"2,000,000,000 experts of width 64 take [\d,]+ GB, and this machine"):
        plan(PeerConfig(num_experts=2_000_000_000), d_model=64)
