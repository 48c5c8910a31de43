# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token keeps: the rule, and its form for many tokens.

Always-on experts take part for every token and count in no budget. Of the others, the routed experts, three steps
choose, and each keeps exactly its number, or all where there are fewer:

1. Candidates: for each head those with the largest retrieval scores, or for all heads together with a joint budget.
   Their gate values weigh them. An expert that several heads retrieve from one pool is one candidate, with the sum of
   its gate values; with unit gates its weight is 1. A score of -inf is that of a cell without an expert.
2. Shortlist, with re-ranking: the candidates with the largest `ExpertPool.rerank_score`.
3. Kept, for gated experts with re-ranking: the shortlisted with the largest `ExpertPool.contribution`.

Scores are compared in float32, or in float64 where the layer computes in it: sums of half-precision scores tie far too
often. Which of several equal experts is kept at the end of a budget is left open.

Two functions implement it. `kept` marks experts among all of a pool, for many tokens: a threshold is found and compared
several times as fast as indices are sorted out. `ExpertPool.gathered` follows indices, for few tokens and many experts.

Shape suffixes: t tokens, n experts (here without the always-on ones), h heads, c cells of one head's grid.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

FAR_BELOW = 1e5  # in logarithms of sizes; differences of .01 are still seen there


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, in no order.

    Many equal values make it several times as slow on a CPU.
    """
    if _eager_on_cpu(score):
        place = score.shape[-1] - k
        index = np.argpartition(score.detach().numpy(), place, axis=-1)  # several times as fast as topk
        return torch.from_numpy(index[..., place:].copy())
    return score.topk(k, dim=-1, sorted=False).indices


def threshold(score: torch.Tensor, k: int) -> torch.Tensor:
    """The `k`-th largest along the last dimension, kept as a dimension of size 1; the least where there are fewer.

    Many equal values make it several times as slow on a CPU.
    """
    score, place = score.detach(), max(0, score.shape[-1] - k)
    if _eager_on_cpu(score) and score.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(np.partition(score.numpy(), place, axis=-1)[..., place : place + 1].copy())
    return score.kthvalue(place + 1, dim=-1, keepdim=True).values


def at_least(score: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
    """1 where `score` >= `level`, else 0, in the type of `score`; without a gradient.

    Masks are numbers: CPUs compare and multiply these in a fifth of the time of booleans.
    """
    return score.detach().clone().ge_(level)


def among_logs(score: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logarithms `score`, below all others where `mask` is 0, but no two the same for that: see `threshold`."""
    return torch.add(score, 1 - mask, alpha=-FAR_BELOW)


def among_sizes(size: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Likewise for numbers that are not negative."""
    return (mask - 1e-12).mul_(size)


def largest(score: torch.Tensor, level: torch.Tensor, k: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """1 where `score` >= its `k`-th largest `level`; of several that equal it the last are left out, down to `k`.

    Args:
        among: 1 for those that count, 0 for others; these are marked if they would be kept, did they count.
    """
    mask = at_least(score, level)
    counted = mask if among is None else mask * among
    surplus = counted.sum(-1, keepdim=True) - k
    if _eager_on_cpu(score) and not bool((surplus > 0).any()):
        return mask
    tie = (score.detach() == level) & (counted != 0)
    last = tie.flip(-1).cumsum(-1).flip(-1) <= surplus
    return mask.masked_fill(tie & last, 0)


def _eager_on_cpu(score: torch.Tensor) -> bool:
    """Where numpy, which selects many times as fast as torch, can be used: it can be neither compiled nor traced."""
    return score.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


class Candidates(NamedTuple):
    """Step 1, for all routed experts."""

    weight_tn: torch.Tensor
    """Gate values; 0 for those that are no candidates."""
    score_tn: torch.Tensor | None
    """Retrieval scores; None where an expert may have several, or nothing depends on them."""
    unit: bool
    """Whether all weights are 0 or 1."""


def cell_scores(keys: Any, row_tha: torch.Tensor, column_thb: torch.Tensor) -> torch.Tensor:
    """Scores of the experts that each head searches: (t, h, n) where heads share the pool, else (t, 1, n)."""
    score_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
    if not keys.share_pool:
        score_thc = score_thc.flatten(1)[:, None]
    return score_thc[..., : keys.num_keys]


@torch.no_grad()
def candidates(layer: Any, score_thn: torch.Tensor) -> tuple[torch.Tensor, Candidates]:
    """Step 1 with unit gates, from the scores of all experts.

    Returns:
        The score of the last candidate, (t, h, 1), or (t, 1, n) where heads have pools and budgets of their own; and
        the candidates.
    """
    keys = layer.keys
    score_tn = score_thn[:, 0].detach() if score_thn.shape[1] == 1 else None
    if not layer.joint_topk and not keys.share_pool and keys.num_heads > 1:
        cells = keys.grid[0] * keys.grid[1]
        spare = keys.num_heads * cells - keys.num_keys
        score_thc = F.pad(score_thn[:, 0].detach(), (0, spare), value=-math.inf).unflatten(1, (keys.num_heads, cells))
        level_th1 = threshold(score_thc, layer.per_head)
        mask_thc = largest(score_thc, level_th1, layer.per_head)
        lowest = torch.finfo(score_thn.dtype).min
        level_t1n = level_th1.expand_as(score_thc).flatten(1)[:, None, : keys.num_keys].clamp_min(lowest)
        return level_t1n, Candidates(mask_thc.flatten(1)[:, : keys.num_keys], score_tn, True)
    level_th1 = threshold(score_thn, layer.per_head)
    mask_thn = largest(score_thn, level_th1, layer.per_head)
    mask_tn = mask_thn[:, 0] if mask_thn.shape[1] == 1 else mask_thn.amax(1)  # which would copy it slowly
    return level_th1, Candidates(mask_tn, score_tn, True)


@torch.no_grad()
def kept(
    pool: Any,
    found: Candidates,
    u_tn: torch.Tensor,
    gate_tn: torch.Tensor | None,
    a_tn: torch.Tensor,
    shortlist: int,
    topk: int,
) -> torch.Tensor:
    """Steps 2 and 3: 1 for the routed experts that are kept, and for those that would be were they candidates; else 0.

    Args:
        pool: the `ExpertPool`.
        found: step 1.
        u_tn, gate_tn, a_tn: projections and activations of all experts, the always-on ones first.
        shortlist, topk: how many experts steps 2 and 3 keep.
    """
    weight_tn, score_tn, unit = found
    shared = pool.num_shared
    if pool.rerank is None or topk >= weight_tn.shape[1]:
        return torch.ones_like(weight_tn)
    among_tn = weight_tn if unit else (weight_tn != 0).to(weight_tn.dtype)
    probe_tn = (gate_tn if pool.rerank == "gate" and gate_tn is not None else u_tn)[:, shared:]
    rerank_tn = pool.rerank_score(probe_tn, None if unit else weight_tn, score_tn, pool.rerank_scale[shared:])
    least_t1 = threshold(among_logs(rerank_tn, among_tn), shortlist)
    kept_tn = largest(rerank_tn, least_t1, shortlist, among_tn)
    if topk < shortlist:
        size_tn = pool.contribution(a_tn[:, shared:], pool.rerank_norm[shared:])
        if not unit:
            size_tn *= weight_tn.abs()
        among_tn = kept_tn * among_tn
        least_t1 = threshold(among_sizes(size_tn, among_tn), topk)
        kept_tn *= largest(size_tn, least_t1, topk, among_tn)
    return kept_tn


@torch.no_grad()
def select(
    layer: Any, score_thn: torch.Tensor, u_tn: torch.Tensor, gate_tn: torch.Tensor | None, a_tn: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All steps of a layer with unit gates whose experts are not all kept.

    Returns:
        The score of the last candidate and the candidates, see `candidates`; and what is `kept` of them. Added up are
        the experts for which both masks are 1.
    """
    level, found = candidates(layer, score_thn)
    return level, found.weight_tn, kept(layer.pool, found, u_tn, gate_tn, a_tn, layer.shortlist, layer.topk)
