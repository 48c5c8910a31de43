"""The selection of experts as masks over all of them, by thresholds instead of indices.

For many tokens of dense products a threshold is found and compared several times as fast as indices are sorted out,
gathered and scattered. Of experts that tie at the threshold, masks take all; the layer itself takes just k. Masks are
numbers 1 and 0: on CPUs they are compared, and multiplied, in a fifth of the time of booleans.

Suffixes: t tokens, n experts (scores: routed ones only), h heads, a rows, b columns, c cells of one head's grid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from peerify.modeling.peer_selection import FAR_BELOW


def cell_scores(keys: Any, row_tha: Tensor, column_thb: Tensor) -> Tensor:
    """Scores of the experts that each head searches: (t, h, n) where heads share the pool, else (t, 1, n)."""
    score_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
    if not keys.share_pool:
        score_thc = score_thc.flatten(1)[:, None]
    return score_thc[..., : keys.num_keys]


def threshold(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest value along the last dimension, kept as a dimension of size 1; of fewer, the least.

    Many equal values make it several times as slow.
    """
    x, place = x.detach(), max(0, x.shape[-1] - k)
    # numpy's selection is many times as fast as torch's, but knows no half precision and cannot be compiled.
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return torch.from_numpy(np.partition(x.numpy(), place, axis=-1)[..., place : place + 1].copy())
    return x.kthvalue(place + 1, dim=-1, keepdim=True).values


def at_least(x: Tensor, level: Tensor) -> Tensor:
    """1 where `x` >= `level`, else 0, in the type of `x`; without a gradient."""
    return x.detach().clone().ge_(level)


def among_logs(x: Tensor, mask: Tensor) -> Tensor:
    """Logarithms `x`, below all others where `mask` is 0, but no two the same for that: see `threshold`."""
    return torch.add(x, 1 - mask, alpha=-FAR_BELOW)


def among_sizes(x: Tensor, mask: Tensor) -> Tensor:
    """Likewise for numbers that are not negative."""
    return (mask - 1e-12).mul_(x)


class Projected(NamedTuple):
    """All of a PEER layer's products with its input, whatever is selected."""

    score_thn: Tensor
    u_tn: Tensor
    gate_tn: Tensor | None
    a_tn: Tensor
    """Activations of all experts."""


def project(layer: Any, x_td: Tensor) -> Projected:
    """The products, and what they are without a selection."""
    pool = layer.pool
    u_tn = F.linear(x_td, pool.u, pool.u_bias).to(x_td.dtype)
    gate_tn = None if pool.gate is None else F.linear(x_td, pool.gate, pool.gate_bias).to(x_td.dtype)
    score_thn = cell_scores(layer.keys, *layer.keys.sub_scores(x_td))
    return Projected(score_thn, u_tn, gate_tn, pool._activate(u_tn, gate_tn))


def activations(layer: Any, projected: Projected) -> Tensor:
    """`PEER.activations` of a layer with unit gates, from its products: in less than half of the time."""
    _, found_tn, kept_tn = selected(layer, projected)
    a_tn = projected.a_tn.clone()
    a_tn[:, layer.num_shared :] *= found_tn * kept_tn
    return a_tn


def levels(layer: Any, score_thn: Tensor) -> Tensor:
    """The score at which an expert is just retrieved: (t, h, 1), or (t, 1, n) where parts have budgets of their own."""
    if layer.joint_topk or layer.keys.share_pool or layer.num_heads == 1:
        return threshold(score_thn, layer._per_head)
    cells = layer.keys.grid[0] * layer.keys.grid[1]
    spare = layer.num_heads * cells - layer.keys.num_keys
    part_thc = F.pad(score_thn[:, 0].detach(), (0, spare), value=-math.inf).unflatten(1, (layer.num_heads, cells))
    level_thc = threshold(part_thc, layer._per_head).expand_as(part_thc)
    level_t1n = level_thc.flatten(1)[:, None, : score_thn.shape[-1]]
    return level_t1n.clamp_min(torch.finfo(level_t1n.dtype).min)


def selected(layer: Any, projected: Projected) -> tuple[Tensor, Tensor, Tensor]:
    """Which routed experts a PEER layer with unit gates takes, as masks.

    Returns:
        The `levels`; which experts are candidates (t, n); which of all experts are added up, or would be if they were
        candidates (t, n). Added up are those for which both are 1.
    """
    pool, shared = layer.pool, layer.num_shared
    score_thn, u_tn, gate_tn, a_tn = projected
    level = levels(layer, score_thn)
    found_thn = at_least(score_thn, level)
    found_tn = found_thn[:, 0] if found_thn.shape[1] == 1 else found_thn.amax(1)  # which would copy it slowly
    if not layer.chooses:  # all are, even where several heads that search one pool name some twice
        found_tn = torch.ones_like(found_tn)
    if pool.rerank is None:
        return level, found_tn, torch.ones_like(found_tn)
    probe_tn = (gate_tn if pool.rerank == "gate" and gate_tn is not None else u_tn)[:, shared:]
    score_tn = None
    if layer.chooses and (not layer.share_pool or layer.num_heads == 1):
        score_tn = score_thn[:, 0]
    worth_tn = pool.worth(probe_tn, None, score_tn, pool.rerank_scale[shared:])
    kept_tn = at_least(worth_tn, threshold(among_logs(worth_tn, found_tn), layer.shortlist))
    if layer.topk < layer.shortlist:
        size_tn = pool._contribution(a_tn[:, shared:], pool.rerank_norm[shared:])
        kept_tn *= at_least(size_tn, threshold(among_sizes(size_tn, found_tn * kept_tn), layer.topk))
    return level, found_tn, kept_tn
