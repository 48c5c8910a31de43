"""The shape of what config.json says of layers.

It lies in folders that strangers hand out, so what is read is checked before anything uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from peerify.checkpoint.record import MORE, checked
from peerify.errors import PeerifyError

Count = Annotated[int, Field(ge=0, lt=2**53)]


@with_config(MORE)
class MemoryOptions(TypedDict):
    """What a layer was given to grow, see `peerify.modeling.peer_memory.Memory`."""

    num_experts: Count
    grid: Annotated[list[Count], Field(min_length=2, max_length=2)]
    num_heads: Annotated[int, Field(ge=1, lt=2**53)]
    topk: Annotated[int, Field(ge=1, lt=2**53)]
    query_dim: Annotated[int, Field(ge=2, lt=2**53)]
    pool_of: NotRequired[str | None]


@with_config(MORE)
class ElasticLayer(TypedDict):
    """An entry of config.json's "peer": a layer whose experts have copies as keys, see `ElasticPEER`."""

    kind: Literal["elastic"]
    d_model: Count
    num_experts: Count
    bits: Annotated[int, Field(ge=2, le=8)]
    group: Annotated[int, Field(ge=1, lt=2**53)]
    budgets: list[Annotated[list[float], Field(min_length=5, max_length=5)]]
    d_ff: NotRequired[Count | None]
    activation: NotRequired[str]
    clamp: NotRequired[dict[str, float] | None]
    gated: NotRequired[bool]
    expert_bias: NotRequired[bool]
    gate_bias: NotRequired[bool]
    output_bias: NotRequired[bool]
    memory: NotRequired[MemoryOptions | None]


@with_config(MORE)
class Layer(TypedDict):
    """Likewise: a layer with product keys, see `PEER`."""

    kind: NotRequired[Literal["product"]]

    d_model: Count
    num_experts: Count
    grid: Annotated[list[Count], Field(min_length=2, max_length=2)]
    num_heads: Count
    topk: Count
    num_shared: Count
    query_dim: NotRequired[Count | None]
    d_ff: NotRequired[Count | None]
    activation: NotRequired[str]
    gates: NotRequired[str]
    clamp: NotRequired[dict[str, float] | None]
    gated: NotRequired[bool]
    expert_bias: NotRequired[bool]
    gate_bias: NotRequired[bool]
    output_bias: NotRequired[bool]
    memory: NotRequired[MemoryOptions | None]
    share_pool: NotRequired[bool]
    share_keys: NotRequired[bool]
    joint_topk: NotRequired[bool]
    query_norm: NotRequired[bool]
    key_bias: NotRequired[bool]


def _kind(layer: Any) -> str:
    return str(layer.get("kind", "product")) if isinstance(layer, dict) else "product"


@with_config(MORE)
class Peer(TypedDict):
    """The "peer" entry of a converted model's config.json."""

    layers: dict[
        str,
        Annotated[Annotated[ElasticLayer, Tag("elastic")] | Annotated[Layer, Tag("product")], Discriminator(_kind)],
    ]


_PEER: TypeAdapter[Peer] = TypeAdapter(Peer)


def check_layers(config: Mapping[str, Any], where: str, fault: type[PeerifyError]) -> None:
    """Raise `fault`, which begins with `where`, unless "peer" in a config.json is what peerify writes there."""
    checked(_PEER, config.get("peer"), f"{where}: peer", fault, "convert again")
