"""From what the user asked for to the arguments of one PEER layer. Arithmetic only: needs no torch and no weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import psutil

from peerify.config.peer import PeerConfig
from peerify.errors import ConversionError

# Multiply-adds of queries and sub-keys as a share of those of the experts they retrieve: retrieval stays cheap. Whole
# experts round the compute that is really spent down, and a quarter shall not be passed.
ROUTER_SHARE = 0.245
# Cells of one head's grid: with fewer, a + b sub-keys are hardly fewer than the a * b experts they stand for.
SMALLEST_GRID = 48
MOST_SPARE = 15  # spare cells for each expert: they take memory like experts


def plan_layer(
    config: PeerConfig,
    *,
    path: str,
    d_model: int,
    d_ff: int,
    gated: bool,
    activation: str,
    expert_bias: bool = False,
    gate_bias: bool = False,
    output_bias: bool = False,
) -> dict[str, Any]:
    """Keyword arguments of `PEER` for one dense layer.

    Raises:
        ConversionError: `config` asks for something that this layer has no room for.
    """
    config = config.expanded()
    vectors = 3 if gated else 2
    num_experts = config.num_experts or d_ff
    num_shared = config.num_shared or 0
    routed = num_experts - num_shared
    _require_room(path, d_model, d_ff, num_experts, num_shared, vectors)
    gates = config.gates or "unit"
    share_pool = bool(config.share_pool)
    joint_topk = not share_pool if config.joint_topk is None else config.joint_topk

    compute = _compute(config, path, d_ff, num_shared, vectors)
    spent = vectors * (config.num_heads or 8) * (config.topk or 1) if compute is None else compute
    num_heads, grid = _grid(config, path, routed, share_pool, ROUTER_SHARE * spent)
    query_dim = config.query_dim
    if query_dim is None and (config.share_keys or config.query_norm):
        query_dim = 64 if d_model <= 1024 else 128  # per head; the paper's shared keys need queries of their own
    keys = {"d_model": d_model, "num_heads": num_heads, "grid": list(grid), "share_keys": bool(config.share_keys)}
    keys["query_dim"] = query_dim
    if compute is not None and config.active != 1:
        compute = _left(config, path, d_ff, num_shared, vectors, router_cost(keys))

    topk = config.topk
    if compute is not None:
        whole = compute >= vectors * routed
        topk = math.ceil(routed / num_heads) if whole else max(1, int(compute / vectors / num_heads))
    assert topk is not None
    cells = routed if share_pool else math.ceil(routed / num_heads)
    if config.topk is not None and num_heads * topk > routed * (num_heads if share_pool else 1):
        raise ConversionError(
            f"{path}: {num_heads} heads x {topk} retrieved each is above its {routed} experts: lower num_heads or topk"
        )
    return keys | {
        "num_experts": num_experts,
        "topk": min(topk, cells) if not joint_topk else topk,
        "activation": activation,
        "gated": gated,
        "expert_bias": expert_bias,
        "gate_bias": gate_bias,
        "output_bias": output_bias,
        "num_shared": num_shared,
        "share_pool": share_pool,
        "joint_topk": joint_topk,
        "gates": gates,
        "query_norm": bool(config.query_norm),
        "key_bias": not config.query_norm,  # a batch norm has a bias of its own
        "d_ff": d_ff,
    }


def _require_room(path: str, d_model: int, d_ff: int, num_experts: int, num_shared: int, vectors: int) -> None:
    """Raise ConversionError for a layer without neurons, nothing left to retrieve, or more experts than memory."""
    if min(d_model, d_ff) < 1:
        raise ConversionError(f"{path}: a layer of {d_model}×{d_ff} has no neurons to convert")
    if num_experts - num_shared < 1:
        raise ConversionError(
            f"{path}: num_shared {num_shared} leaves nothing to retrieve of {num_experts} experts: lower it"
        )
    taken, there = 4 * vectors * num_experts * d_model, psutil.virtual_memory().total
    if num_experts > d_ff and taken > there:
        raise ConversionError(
            f"{path}: {num_experts:,} experts of width {d_model} take {taken / 1e9:,.0f} GB, and this machine has "
            f"{there / 1e9:,.0f} GB: lower num_experts"
        )


def _compute(config: PeerConfig, path: str, d_ff: int, num_shared: int, vectors: int) -> float | None:
    """What `active` leaves for routed experts beside a router of ROUTER_SHARE, in multiply-adds per d_model: one
    projection of one expert is 1.

    None where numbers of experts are given instead. Raises ConversionError where it is less than one expert.
    """
    if config.active is None:
        return None
    router = 0.0 if config.active == 1 else config.active * vectors * d_ff * ROUTER_SHARE / (1 + ROUTER_SHARE)
    return _left(config, path, d_ff, num_shared, vectors, router)


def _left(config: PeerConfig, path: str, d_ff: int, num_shared: int, vectors: int, router: float) -> float:
    """What `active` leaves beside always-on experts and a router that takes `router`; see `_compute`."""
    assert config.active is not None
    compute = config.active * vectors * d_ff - vectors * num_shared - router
    if compute < vectors:
        least = (num_shared + 1 + router / vectors) / d_ff
        also = " or lower num_shared" if num_shared else ""
        raise ConversionError(
            f"{path}: active {config.active} of {d_ff} neurons is less than {num_shared + 1} of them and their router, "
            f"the least there can be: raise active to at least {least:.2g}{also}"
        )
    return compute


def router_cost(keys: Mapping[str, Any]) -> float:
    """Numbers of queries and sub-keys, per d_model.

    Args:
        keys: "d_model", "grid", "num_heads", "share_keys" and "query_dim" of a layer.
    """
    d_model, dim, heads = keys["d_model"], keys["query_dim"], keys["num_heads"]
    query, key_dim = (0, d_model) if dim is None else (d_model * dim * heads, dim // 2)
    return (query + (1 if keys["share_keys"] else heads) * sum(keys["grid"]) * key_dim) / d_model  # type: ignore[no-any-return]


def _grid(
    config: PeerConfig, path: str, routed: int, share_pool: bool, key_budget: float
) -> tuple[int, tuple[int, int]]:
    """Number of heads and the grid of each.

    Heads that own parts of the pool: as many sub-keys as `key_budget` allows, since they decide how well retrieval
    can be fitted, with few spare cells.
    """
    heads = config.num_heads
    if config.grid is not None:
        cells = config.grid[0] * config.grid[1]
        heads = heads or (8 if share_pool else math.ceil(routed / cells))
        spare = cells * (1 if share_pool else heads) - routed
        if not 0 <= spare < cells or spare > MOST_SPARE * routed:
            raise ConversionError(
                f"{path}: a grid of {config.grid[0]}x{config.grid[1]} with {heads} heads has "
                f"{cells * (1 if share_pool else heads)} cells for {routed} experts: choose cells that hold all of "
                "them without leaving a whole grid, or nearly all of it, empty"
            )
        return heads, config.grid
    if share_pool:
        rows = math.isqrt(routed)
        best = min(_shapes(routed, 1), key=lambda shape: (shape[1], shape[0]), default=(rows, 0, (rows + 1, rows + 1)))
        return heads or 8, best[2]
    options = []
    for count in [heads] if heads else range(1, max(1, routed // SMALLEST_GRID) + 1):
        options += [(sum(grid) * count, spare, count, grid) for _, spare, grid in _shapes(routed, count)]
    if not options:  # more heads than experts, or so many that even the smallest grids leave a head empty
        raise ConversionError(f"{path}: {heads} heads cannot divide {routed} experts: lower num_heads")
    affordable = [option for option in options if option[0] <= key_budget] or [min(options)]
    # Among equally wasteful ones, most sub-keys; a spare cell costs as much as a sub-key gains.
    _, _, count, grid = max(affordable, key=lambda o: (o[0] - 4 * o[1], -o[2], o[3]))
    return count, grid


def _shapes(routed: int, heads: int) -> list[tuple[int, int, tuple[int, int]]]:
    """(sub-keys, spare cells, grid) of the grids that hold `routed` experts in `heads` parts, rows <= columns."""
    cells = math.ceil(routed / heads)
    shapes = []
    for rows in range(max(1, math.isqrt(cells // 2)), math.isqrt(cells) + 1):
        columns = math.ceil(cells / rows)
        spare = heads * rows * columns - routed
        if spare < rows * columns:
            shapes.append((rows + columns, spare, (rows, columns)))
    return shapes
