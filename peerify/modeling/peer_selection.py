# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Which experts a token keeps: the rule, and its form for many tokens.

Always-on experts take part for every token and count in no budget. Of the others, the routed experts, each head keeps
those with the largest retrieval scores, or all heads together do with a joint budget: exactly the budget's number, or
all where there are fewer. Their gate values weigh them. An expert that several heads retrieve from one pool is weighed
by the sum of its gate values; with unit gates its weight is 1. A score of -inf is that of a cell without an expert.

Scores are compared in float32, or in float64 where the layer computes in it: sums of half-precision scores tie far too
often. Which of several equal experts is kept at the end of a budget is left open.

Two functions implement it. `kept` marks experts among all of a pool, for many tokens: a threshold is found and compared
several times as fast as indices are sorted out. `PEER.retrieve` follows indices, for few tokens and many experts.

Shape suffixes: t tokens, n experts (here without the always-on ones), h heads, c cells of one head's grid.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .peer_kernels import plain
from .peer_topk import Picked, searches
from .peer_topk import largest as by_kernel


def topk_indices(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, in no order.

    Many equal values make it several times as slow on a CPU.
    """
    if searches(score, k):
        return by_kernel(score, k)
    if _eager_on_cpu(score):
        place = score.shape[-1] - k
        index = np.argpartition(score.detach().numpy(), place, axis=-1)  # several times as fast as topk
        return torch.from_numpy(index[..., place:].copy())
    return score.topk(k, dim=-1, sorted=False).indices


def sorted_topk(score: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` largest along the last dimension in falling order, and their indices."""
    if searches(score, k):
        index = by_kernel(score, k)
        return Picked.apply(score, index), index
    values, index = score.topk(k, dim=-1)
    return values, index


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


def largest(score: torch.Tensor, level: torch.Tensor, k: int) -> torch.Tensor:
    """1 where `score` >= its `k`-th largest `level`; of several that equal it the last are left out, down to `k`."""
    mask = at_least(score, level)
    surplus = mask.sum(-1, keepdim=True) - k
    if _eager_on_cpu(score) and not bool((surplus > 0).any()):
        return mask
    tie = score.detach() == level
    last = tie.flip(-1).cumsum(-1).flip(-1) <= surplus
    return mask.masked_fill(tie & last, 0)


def _eager_on_cpu(score: torch.Tensor) -> bool:
    """Where numpy, which selects many times as fast as torch, can be used."""
    return plain(score)


def cell_scores(keys: Any, row_tha: torch.Tensor, column_thb: torch.Tensor) -> torch.Tensor:
    """Scores of the experts that each head searches: (t, h, n) where heads share the pool, else (t, 1, n)."""
    score_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
    if not keys.share_pool:
        score_thc = score_thc.flatten(1)[:, None]
    return score_thc[..., : keys.num_keys]


@torch.no_grad()
def kept(layer: Any, score_thn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice of a layer with unit gates whose routed experts are not all kept, from the scores of all of them.

    Returns:
        The score of the last expert that is kept, (t, h, 1), or (t, 1, n) where heads have pools and budgets of their
        own; and 1 for the experts that are kept, else 0, (t, n).
    """
    keys = layer.keys
    if not layer.joint_topk and not keys.share_pool and keys.num_heads > 1:
        cells = keys.grid[0] * keys.grid[1]
        spare = keys.num_heads * cells - keys.num_keys
        score_thc = F.pad(score_thn[:, 0].detach(), (0, spare), value=-math.inf).unflatten(1, (keys.num_heads, cells))
        level_th1 = threshold(score_thc, layer.per_head)
        mask_thc = largest(score_thc, level_th1, layer.per_head)
        lowest = torch.finfo(score_thn.dtype).min
        level_t1n = level_th1.expand_as(score_thc).flatten(1)[:, None, : keys.num_keys].clamp_min(lowest)
        return level_t1n, mask_thc.flatten(1)[:, : keys.num_keys]
    level_th1 = threshold(score_thn, layer.per_head)
    mask_thn = largest(score_thn, level_th1, layer.per_head)
    return level_th1, mask_thn[:, 0] if mask_thn.shape[1] == 1 else mask_thn.amax(1)  # which would copy it slowly
