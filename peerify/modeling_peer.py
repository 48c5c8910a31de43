# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""PEER layers and the transformers classes that hold them.

This file needs torch and transformers only. It is part of the peerify package *and* is copied verbatim beside the
weights of every converted model, so that ``from_pretrained(..., trust_remote_code=True)`` works without peerify.

PEER (Parameter Efficient Expert Retrieval) is the layer of "Mixture of A Million Experts", arXiv 2407.04153:

    y = sum over i in R(x) of g_i(x) e_i(x)  [+ shared neurons + bias],
    e_i(x) = act(u_i . x + b_i) v_i                      for plain experts (paper, section 2.2)
    e_i(x) = act(gate_i . x + c_i) (u_i . x + b_i) v_i   for GLU experts,

where R(x) is found by product keys: expert i sits in cell (a, b) of a grid and its score is row(a) + column(b), so the
best of N experts are found among 2 sqrt(N) sub-keys (paper, section 2.1).

Shape suffixes: t tokens, d d_model, n experts, h heads, a grid rows, b grid columns, m rows + columns,
c candidates (all heads together), s the shortlisted of them, k experts evaluated in full.
"""

from __future__ import annotations

import copy
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, conversion_mapping
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.auto import configuration_auto

FORMAT = 1  # of the `peer` entry in config.json; raised when an older modeling_peer.py could not read it

FAR_BELOW = 1e5  # in logarithms of sizes; differences of .01 are still seen there


def best(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, in no order.

    Many equal values make it several times as slow on a CPU.
    """
    if score.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
        place = score.shape[-1] - k
        index = np.argpartition(score.detach().numpy(), place, axis=-1)  # several times as fast as topk
        return torch.from_numpy(index[..., place:].copy())
    return score.topk(k, dim=-1, sorted=False).indices


def activation_module(name: str) -> nn.Module:
    """An activation function by transformers' name for it, or "linear"."""
    return nn.Identity() if name == "linear" else ACT2FN[name]


class ProductKeys(nn.Module):
    """Product-key retrieval: the best-scoring cells of one grid per head.

    Heads that share the pool (the paper) all search the same `grid`; otherwise head h owns the experts
    h*a*b ... (h+1)*a*b - 1. The last grid may have spare cells at its end; they are never retrieved.
    The query is x itself (`query_dim=None`: sub-keys live in the model's space), a projection of x for each head whose
    halves meet row and column keys (the paper), or one low-rank projection of x that all sub-keys of all heads meet
    (`share_query`). A grid of one row makes its columns plain keys: every cell has a key of its own.

    With `estimate`, such keys do not score experts but estimate the projections that their activation function is
    applied to, z_i, gate_i . x or for plain experts u_i . x, from the query alone. The score is then the logarithm of
    the size that the expert is likely to have, log_scale_i + log sqrt(E act(z_i + e_i)^2), where e_i ~ N(0,
    deviation_i^2) is what the query leaves out.
    """

    def __init__(
        self,
        d_model: int,
        num_keys: int,
        grid: tuple[int, int],
        num_heads: int,
        *,
        share_pool: bool,
        share_keys: bool,
        query_dim: int | None,
        query_norm: bool,
        key_bias: bool,
        share_query: bool = False,
        estimate: str | None = None,
    ) -> None:
        super().__init__()
        self.num_keys, self.grid, self.num_heads = num_keys, tuple(grid), num_heads
        self.share_pool, self.share_query = share_pool, share_query
        rows, columns = self.grid
        spare = (1 if share_pool else num_heads) * rows * columns - num_keys
        if not 0 <= spare < rows * columns:
            raise ValueError(
                f"grid {rows}x{columns} with {num_heads} heads (share_pool={share_pool}) does not fit "
                f"{num_keys} experts: it leaves {spare} spare cells, and 0 to {rows * columns - 1} are allowed"
            )
        # Cells fill row by row, so only the last grid has rows that are empty or partly filled.
        self.full_rows, self.tail = divmod(rows * columns - spare, columns)
        if share_keys and num_heads > 1 and (query_dim is None or share_query):
            raise ValueError("share_keys needs a query of its own for each head: give query_dim, not share_query")
        self.query_proj: nn.Linear | None = None
        self.query_norm: nn.BatchNorm1d | None = None
        key_dim = d_model
        if query_dim is not None:
            if query_dim % 2 and not share_query:
                raise ValueError(f"query_dim {query_dim} must be even: its halves meet row and column keys")
            queries = query_dim * (1 if share_query else num_heads)
            self.query_proj = nn.Linear(d_model, queries, bias=False)
            key_dim = query_dim if share_query else query_dim // 2
            self.query_norm = nn.BatchNorm1d(queries) if query_norm else None
        elif query_norm or share_query:
            raise ValueError("query_norm and share_query are for projected queries: give query_dim as well")
        key_heads = 1 if share_keys else num_heads
        self.sub_keys = nn.Parameter(torch.empty(key_heads, rows + columns, key_dim))
        self.sub_key_bias = nn.Parameter(torch.empty(key_heads, rows + columns)) if key_bias else None
        self.act: nn.Module | None = None
        self.log_scale: nn.Parameter | None = None
        self.deviation: nn.Parameter | None = None
        if estimate is not None:
            if rows != 1 or num_heads != 1 or not share_query:
                raise ValueError("estimate needs a key for each expert: a grid of one row, one head and share_query")
            self.act = activation_module(estimate)
            self.log_scale = nn.Parameter(torch.empty(num_keys))
            self.deviation = nn.Parameter(torch.empty(num_keys), requires_grad=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded.

        query_proj and query_norm are modules of torch, which initialise themselves.
        """
        init.normal_(self.sub_keys, std=self.sub_keys.shape[-1] ** -0.5)
        if self.sub_key_bias is not None:
            init.zeros_(self.sub_key_bias)
        if self.log_scale is not None:
            init.zeros_(self.log_scale)
        if self.deviation is not None:
            init.ones_(self.deviation)

    def sub_scores(self, x_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the row keys (t, h, a) and of the column keys (t, h, b)."""
        row_tha, column_thb = self.products(x_td).split(self.grid, dim=-1)
        return row_tha, column_thb if self.act is None else self._log_size(column_thb)

    def _log_size(self, z_tn: torch.Tensor) -> torch.Tensor:
        """Logarithm of the size that experts of the estimated projections `z_tn` are likely to have."""
        assert self.act is not None
        assert self.log_scale is not None
        assert self.deviation is not None
        # The expectation by Gauss-Hermite quadrature of three nodes, exact for polynomials of degree 5; in place, since
        # memory is what this costs.
        step_n = 3**0.5 * self.deviation.to(z_tn.dtype)
        low_tn, middle_tn, high_tn = self.act(z_tn - step_n), self.act(z_tn), self.act(z_tn + step_n)
        square_tn = (low_tn * low_tn).addcmul_(high_tn, high_tn).addcmul_(middle_tn, middle_tn, value=4)
        offset_n = self.log_scale.to(z_tn.dtype) - math.log(6) / 2
        return square_tn.clamp_min(1e-20).log().mul_(0.5).add_(offset_n)

    def products(self, x_td: torch.Tensor) -> torch.Tensor:
        """Sub-keys times queries, with biases: (t, h, m)."""
        tokens, heads = x_td.shape[0], self.num_heads
        query = x_td if self.query_proj is None else self.query_proj(x_td)
        if self.query_norm is not None:
            # Batch statistics of a single token do not exist: use the running ones, as in evaluation.
            if self.training and tokens == 1:
                norm = self.query_norm
                query = F.batch_norm(query, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            else:
                query = self.query_norm(query)
        if self.query_proj is None or self.share_query:
            score_thm = (query @ self.sub_keys.flatten(0, 1).T).view(tokens, len(self.sub_keys), sum(self.grid))
        else:
            half_th2r = query.view(tokens, heads, 2, self.sub_keys.shape[-1])
            row_key, column_key = self.sub_keys.split(self.grid, dim=1)
            row_tha = torch.einsum("thr,har->tha", half_th2r[:, :, 0], row_key.expand(heads, -1, -1))
            column_thb = torch.einsum("thr,hbr->thb", half_th2r[:, :, 1], column_key.expand(heads, -1, -1))
            score_thm = torch.cat([row_tha, column_thb], dim=-1)
        if self.sub_key_bias is not None:
            score_thm = score_thm + self.sub_key_bias
        # Sums of two half-precision scores tie far too often for a sharp top-k.
        return score_thm if score_thm.dtype == torch.float64 else score_thm.float()

    def forward(self, x_td: torch.Tensor, topk: int, joint: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The best experts of each token.

        Args:
            x_td: tokens (t, d_model).
            topk: experts for each head, or for all heads together where `joint`.
            joint: one budget shared by all heads (the heads then search grids of their own).

        Returns:
            (index, score), each (t, h, topk), or (t, 1, topk) where `joint`. Where a head has fewer experts than
            `topk`, the rest has score -inf.
        """
        index_thc, score_thc = self._candidates(*self.sub_scores(x_td), topk)
        if joint:
            index_thc, score_thc = index_thc.flatten(1)[:, None], score_thc.flatten(1)[:, None]
        if score_thc.shape[-1] > topk:
            kept_thc = best(score_thc, topk)
            score_thc, index_thc = score_thc.gather(-1, kept_thc), index_thc.gather(-1, kept_thc)
        return index_thc, score_thc

    def _candidates(
        self, row_tha: torch.Tensor, column_thb: torch.Tensor, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells among which the `topk` best of each head surely are, with their scores."""
        rows, columns = self.grid
        device, tail_thb = row_tha.device, None
        grids = torch.arange(self.num_heads, device=device)[:, None] * (0 if self.share_pool else rows * columns)
        if self.full_rows < rows:  # spare cells: drop the incomplete rows of the last grid, look at its tail apart
            is_last = torch.ones(self.num_heads, dtype=torch.bool, device=device)
            is_last[:-1] = self.share_pool
            incomplete_ha = is_last[:, None] & (torch.arange(rows, device=device) >= self.full_rows)
            if self.tail:
                filled_hb = is_last[:, None] & (torch.arange(columns, device=device) < self.tail)
                tail_thb = row_tha[..., self.full_rows, None] + column_thb
                tail_thb = tail_thb.masked_fill(~filled_hb, -math.inf)
            row_tha = row_tha.masked_fill(incomplete_ha, -math.inf)

        if topk * topk < rows * columns:
            # With rows and columns sorted, (i+1)(j+1) cells are at least as good as cell (i, j): only those pairs
            # with (i+1)(j+1) <= topk can be among the best, about k ln k instead of k^2.
            row_tha, row_index = row_tha.topk(min(topk, rows), dim=-1)
            column_thb, column_index = column_thb.topk(min(topk, columns), dim=-1)
            pairs = [
                (i, j) for i in range(row_tha.shape[-1]) for j in range(min(topk // (i + 1), column_thb.shape[-1]))
            ]
            i, j = torch.tensor(pairs, device=device).unbind(1)
            score_thc = row_tha[..., i] + column_thb[..., j]
            index_thc = row_index[..., i] * columns + column_index[..., j] + grids
        else:
            score_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
            index_thc = (torch.arange(rows * columns, device=device) + grids).expand_as(score_thc)
        if tail_thb is not None:
            tail_index = grids + self.full_rows * columns + torch.arange(columns, device=device)
            score_thc = torch.cat([score_thc, tail_thb], dim=-1)
            index_thc = torch.cat([index_thc, tail_index.expand_as(tail_thb)], dim=-1)
        return index_thc, score_thc


class Retrieved(NamedTuple):
    """What product keys found for each token."""

    index_tc: torch.Tensor
    """Candidates."""
    weight_tc: torch.Tensor
    """Their gate values; 0 leaves a candidate out."""
    score_tc: torch.Tensor | None
    """Their scores; None where several heads search one pool, so that an expert may have several."""


class ExpertPool(nn.Module):
    """The tables of single-neuron experts, and their evaluation for given indices.

    A module of its own, so that offload and sharding hooks see every access, and two layers that share the module
    share the experts. Row i of `u`, `gate` and `v` is expert i's input, gate and output vector. The first
    `num_shared` experts take part for every token.

    With `rerank`, one projection ("gate" or "up") of every candidate is evaluated first; only those whose estimated
    contribution |a_i| ||v_i|| is largest are shortlisted. The estimate of its logarithm is
    log |probed factor| + log rerank_scale + rerank_slope * retrieval score: the score speaks for the other factor.
    Once both projections of the shortlisted are known, so is |a_i|, and only the largest contributions are added up.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        activation: str,
        gated: bool,
        expert_bias: bool,
        gate_bias: bool,
        num_shared: int,
        rerank: str | None,
        clamp: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        if rerank not in (None, "up", "gate") or (rerank == "gate" and not gated):
            raise ValueError(f"rerank must be None, 'up' or (for gated experts) 'gate', not {rerank!r}")
        self.num_shared, self.rerank = num_shared, rerank
        self.act = activation_module(activation)
        self.act.to(torch.get_default_dtype())  # xIELU has parameters, in bfloat16
        self.clamp = clamp or {}
        self.u = nn.Parameter(torch.empty(num_experts, d_model))
        self.v = nn.Parameter(torch.empty(num_experts, d_model))
        self.gate = nn.Parameter(torch.empty(num_experts, d_model)) if gated else None
        self.u_bias = nn.Parameter(torch.empty(num_experts)) if expert_bias else None
        self.gate_bias = nn.Parameter(torch.empty(num_experts)) if gated and gate_bias else None
        # What one unit of the probing projection is worth, E|other factor| ||v_i||. Parameters, though no gradient
        # reaches them: what loads and offloads weights piece by piece may pass buffers over.
        self.rerank_scale = nn.Parameter(torch.empty(num_experts), requires_grad=False) if rerank else None
        self.rerank_slope = nn.Parameter(torch.empty(1), requires_grad=False) if rerank else None
        # ||v_i|| as of the last fit: the rows of `v` that are left out need not be read to know.
        self.rerank_norm = nn.Parameter(torch.empty(num_experts), requires_grad=False) if rerank and gated else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded."""
        for table in (self.u, self.v, self.gate):
            if table is not None:
                init.normal_(table, std=table.shape[1] ** -0.5)
        for bias in (self.u_bias, self.gate_bias):
            if bias is not None:
                init.zeros_(bias)
        for scale in (self.rerank_scale, self.rerank_norm):
            if scale is not None:
                init.ones_(scale)
        if self.rerank_slope is not None:
            init.zeros_(self.rerank_slope)

    def forward(self, x_td: torch.Tensor, found: Retrieved | None, shortlist: int, keep: int) -> torch.Tensor:
        """Weighted sum of experts, (t, d).

        Args:
            x_td: tokens.
            found: candidates of each token; None: all experts, each with weight 1.
            shortlist: how many candidates both projections are evaluated of (all of them, unless `rerank`).
            keep: how many of those are added up (all of them, unless there is `rerank_norm`).
        """
        # A gathered row is read, written and read again; a dense product reads each table once for all tokens.
        if found is not None and 3 * found.index_tc.numel() < self.u.shape[0]:
            return self._gathered(x_td, found, shortlist, keep)
        return self.activations(x_td, found, shortlist, keep) @ self.v

    def weights(self, x_td: torch.Tensor, found: Retrieved | None, shortlist: int, keep: int) -> torch.Tensor:
        """Gate values (t, n) of the experts that `forward` adds up, 0 for all others."""
        return self._dense(x_td, found, shortlist, keep)[1]

    def activations(self, x_td: torch.Tensor, found: Retrieved | None, shortlist: int, keep: int) -> torch.Tensor:
        """What multiplies each expert's output vector, (t, n): gate value times activation, 0 if not added.

        All experts by dense products: for many tokens and few experts.
        """
        a_tn, weight_tn = self._dense(x_td, found, shortlist, keep)
        return a_tn * weight_tn

    def _dense(
        self, x_td: torch.Tensor, found: Retrieved | None, shortlist: int, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Activations of all experts and their weights, each (t, n)."""
        u_tn = F.linear(x_td, self.u, self.u_bias)
        gate_tn = None if self.gate is None else F.linear(x_td, self.gate, self.gate_bias)
        a_tn = self._activate(u_tn, gate_tn)
        if found is None and shortlist >= self.u.shape[0] - self.num_shared:
            weight_tn = x_td.new_ones(1, 1).expand_as(a_tn)
        else:
            probe_tn = gate_tn if gate_tn is not None and self.rerank == "gate" else u_tn
            weight_tn = self._spread(x_td, found, probe_tn, shortlist)
        if self.rerank_norm is not None and keep < shortlist:
            routed = slice(self.num_shared, None)
            size_tn = self._contribution(a_tn[:, routed], self.rerank_norm[routed])
            size_tn *= weight_tn[:, routed].abs().to(size_tn.dtype) - 1e-12  # negative for those out; see `best`
            kept_tn = torch.zeros_like(size_tn).scatter_(1, best(size_tn, keep), 1.0)
            weight_tn = weight_tn * F.pad(kept_tn.to(weight_tn.dtype), (self.num_shared, 0), value=1.0)
        return a_tn, weight_tn

    def _gathered(self, x_td: torch.Tensor, found: Retrieved, shortlist: int, keep: int) -> torch.Tensor:
        """Only the candidates' rows are read: for few tokens or many experts."""
        index_tc, weight_tc, score_tc = found

        def project(table: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
            y = torch.einsum("td,tcd->tc", x_td, table[index])
            return y if bias is None else y + bias[index]

        if self.rerank_scale is not None and shortlist < index_tc.shape[1]:
            probe_tc = project(*self._probed(), index_tc)
            worth_tc = self.worth(probe_tc, weight_tc, score_tc, self.rerank_scale[index_tc])
            best_ts = best(worth_tc, shortlist)
            index_tc, weight_tc = index_tc.gather(1, best_ts), weight_tc.gather(1, best_ts)
        u_ts = project(self.u, self.u_bias, index_tc)
        gate_ts = None if self.gate is None else project(self.gate, self.gate_bias, index_tc)
        a_tk, index_tk = self._activate(u_ts, gate_ts) * weight_tc.to(x_td.dtype), index_tc
        if self.rerank_norm is not None and keep < shortlist:
            best_tk = best(self._contribution(a_tk, self.rerank_norm[index_tk]), keep)
            a_tk, index_tk = a_tk.gather(1, best_tk), index_tk.gather(1, best_tk)
        y_td = torch.einsum("tk,tkd->td", a_tk, self.v[index_tk])
        return y_td + self._shared(x_td) if self.num_shared else y_td

    def _shared(self, x_td: torch.Tensor) -> torch.Tensor:
        """What the experts that take part for every token say."""

        def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return F.linear(x_td, table[: self.num_shared], None if bias is None else bias[: self.num_shared])

        gate = None if self.gate is None else project(self.gate, self.gate_bias)
        return self._activate(project(self.u, self.u_bias), gate) @ self.v[: self.num_shared]

    @torch.no_grad()
    def update_norm(self) -> None:
        """Bring `rerank_norm`, if there is one, up to date."""
        if self.rerank_norm is not None:
            self.rerank_norm.copy_(self.v.norm(dim=1))

    @torch.no_grad()
    def _contribution(self, a: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Sizes |a_i| ||v_i|| of what experts add."""
        size = a.abs()  # a copy, so the rest is done in place: memory is what this costs
        size = size if size.dtype == torch.float64 else size.float()
        return size.mul_(norm)

    @torch.no_grad()
    def worth(
        self, probe: torch.Tensor, weight: torch.Tensor | None, score: torch.Tensor | None, scale: torch.Tensor
    ) -> torch.Tensor:
        """Logarithm of an expert's estimated contribution, to re-rank by; below all others where its weight is 0.

        Args:
            probe: its probed projection.
            weight, score: its gate value (None: 1) and retrieval score.
            scale: its `rerank_scale`.
        """
        size = self._size(probe)  # a copy, so the rest is done in place: memory is what this costs
        size = (size if size.dtype == torch.float64 else size.float()).mul_(scale)
        if weight is None:
            worth = size.log_()
        else:
            out = weight.clone().eq_(0)  # as numbers; these stay different from each other, see `best`
            worth = size.mul_(weight.abs() + out).log_().sub_(out, alpha=FAR_BELOW)
        return worth if score is None or self.rerank_slope is None else worth.addcmul_(score, self.rerank_slope)

    def _probed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Table and bias of the projection that re-ranks."""
        if self.rerank == "gate" and self.gate is not None:
            return self.gate, self.gate_bias
        return self.u, self.u_bias

    def _activate(self, u: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return self.act(u) if gate is None else self._act(gate) * self._up(u)

    def _act(self, gate: torch.Tensor) -> torch.Tensor:
        """The activated gate projections, within their limits where the dense layer has any."""
        if "gate" in self.clamp:
            gate = gate.clamp(max=self.clamp["gate"])
        a = self.act(gate)
        return a.clamp(max=self.clamp["act"]) if "act" in self.clamp else a

    def _up(self, u: torch.Tensor) -> torch.Tensor:
        if "up" in self.clamp:
            u = u.clamp(-self.clamp["up"], self.clamp["up"])
        return u + self.clamp["shift"] if "shift" in self.clamp else u

    def _size(self, projected: torch.Tensor) -> torch.Tensor:
        """Size of the factor of a_i that the probing projection determines."""
        return (self._up(projected) if self.rerank == "up" and self.gate is not None else self._act(projected)).abs()

    def _spread(
        self, x_td: torch.Tensor, found: Retrieved | None, probe_tn: torch.Tensor, shortlist: int
    ) -> torch.Tensor:
        """Candidate weights scattered over all experts, cut to the `shortlist` worthiest where `rerank`."""
        tokens, experts, shared = x_td.shape[0], self.u.shape[0], self.num_shared
        score_tn = None
        if found is None:
            weight_tn = x_td.new_ones(tokens, experts)
        else:
            weight_tn = x_td.new_zeros(tokens, experts).scatter_add(1, found.index_tc, found.weight_tc.to(x_td.dtype))
        if self.rerank_scale is not None and shortlist < experts - shared:
            if found is not None and found.score_tc is not None:
                score_tn = torch.zeros_like(weight_tn, dtype=found.score_tc.dtype)
                score_tn = score_tn.scatter_add(1, found.index_tc, found.score_tc.detach())
            worth_tn = self.worth(probe_tn, weight_tn, score_tn, self.rerank_scale)
            best_ts = best(worth_tn[:, shared:], shortlist) + shared
            weight_tn = weight_tn * torch.zeros_like(weight_tn).scatter_(1, best_ts, 1.0)
        if shared:
            weight_tn = torch.cat([weight_tn.new_ones(tokens, shared), weight_tn[:, shared:]], dim=1)
        return weight_tn


class PEER(nn.Module):
    """A PEER layer in place of a feed-forward layer: retrieve experts by product keys, sum what they say.

    Args:
        d_model: width of input and output.
        num_experts: experts in the pool, the `num_shared` always-on ones included.
        grid: rows x columns of the product-key grid (of each head's own grid unless `share_pool`).
        num_heads: retrieval heads h.
        topk: experts evaluated in full per head, k; with `joint_topk` the heads share a budget of h*k.
        candidates: experts retrieved per head, of which `rerank` keeps `shortlist`; None: as many as that.
        shortlist: candidates per head whose activation is evaluated, of which those `topk` are added up that
            contribute most; None: as many as `topk`.
        gated, activation, expert_bias, gate_bias, output_bias: the form of the experts (see the module docstring).
        num_shared: experts that take part for every token, without retrieval.
        share_pool: all heads retrieve from one pool (the paper); otherwise each owns a part of it.
        share_keys: all heads use the same sub-keys (the paper, Eq. 7).
        joint_topk: the heads share one budget instead of spending `topk` each.
        gates: "softmax" over what a head retrieved (paper, Algorithm 1), "sigmoid" of the score (Eq. 2), or "unit":
            exactly 1, an expert that several heads retrieve counting once. Unit gates with everything retrieved are
            the dense layer.
        query_dim, share_query, query_norm: see `ProductKeys`; query_norm is the paper's query batch norm.
        key_bias: a bias for each sub-key.
        estimate: scores are the sizes that experts are likely to have, see `ProductKeys`.
        rerank: None, "gate" or "up": see `ExpertPool`.
        clamp: limits inside GLU experts, each optional: "gate" (gate projections at most this), "act" (their
            activation at most this), "up" (up projections at most this in size), and "shift" (added to up then).
        d_ff: neurons of the dense layer this one replaces; for reporting only. Default: `num_experts`.

    Raises:
        ValueError: options that contradict each other.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        grid: tuple[int, int],
        num_heads: int,
        topk: int,
        *,
        candidates: int | None = None,
        shortlist: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        expert_bias: bool = False,
        gate_bias: bool = False,
        output_bias: bool = False,
        num_shared: int = 0,
        share_pool: bool = True,
        share_keys: bool = True,
        joint_topk: bool = False,
        gates: str = "softmax",
        query_dim: int | None = None,
        share_query: bool = False,
        query_norm: bool = False,
        key_bias: bool = False,
        estimate: bool = False,
        rerank: str | None = None,
        clamp: dict[str, float] | None = None,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        shortlist = topk if shortlist is None else shortlist
        candidates = shortlist if candidates is None else candidates
        if gates not in ("unit", "softmax", "sigmoid"):
            raise ValueError(f"gates must be 'unit', 'softmax' or 'sigmoid', not {gates!r}")
        if not 1 <= topk <= shortlist <= candidates:
            raise ValueError(
                f"need 1 <= topk <= shortlist <= candidates, not topk={topk}, shortlist={shortlist}, "
                f"candidates={candidates}"
            )
        if candidates > topk and (rerank is None or gates == "softmax"):
            raise ValueError("candidates above topk need rerank, and gates that are not normalised over them (softmax)")
        if shortlist > topk and not gated:
            raise ValueError("a shortlist above topk is for gated experts: plain ones have one projection to go by")
        if joint_topk and share_pool:
            raise ValueError("joint_topk is for heads with pools of their own: set share_pool=False")
        self.d_model, self.num_experts, self.num_heads, self.num_shared = d_model, num_experts, num_heads, num_shared
        self.share_pool, self.joint_topk, self.gates = share_pool, joint_topk, gates
        self.d_ff = num_experts if d_ff is None else d_ff
        self.keys = ProductKeys(
            d_model,
            num_experts - num_shared,
            grid,
            num_heads,
            share_pool=share_pool,
            share_keys=share_keys,
            query_dim=query_dim,
            query_norm=query_norm,
            key_bias=key_bias,
            share_query=share_query,
            estimate=activation if estimate else None,
        )
        self.pool = ExpertPool(
            d_model,
            num_experts,
            activation=activation,
            gated=gated,
            expert_bias=expert_bias,
            gate_bias=gate_bias,
            num_shared=num_shared,
            rerank=rerank,
            clamp=clamp,
        )
        self.bias = nn.Parameter(torch.zeros(d_model)) if output_bias else None
        self.set_budget(topk, shortlist, candidates)

    def set_budget(self, topk: int, shortlist: int, candidates: int) -> None:
        """Experts added up, shortlisted and retrieved for each head."""
        rows, columns = self.keys.grid
        # In all heads together; `_per_head` is what one call of the retrieval is asked for.
        self.candidates = min(self.num_heads * candidates, self.keys.num_keys)
        self.shortlist = min(self.num_heads * shortlist, self.keys.num_keys)
        self.topk = min(self.num_heads * topk, self.keys.num_keys)
        self._per_head = self.candidates if self.joint_topk else min(candidates, rows * columns)

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded."""
        self.keys.reset_parameters()
        self.pool.reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype in and out: (..., d_model)."""
        x_td = hidden_states.reshape(-1, self.d_model)
        y_td = self.pool(x_td, self._retrieve(x_td), self.shortlist, self.topk)
        if self.bias is not None:
            y_td = y_td + self.bias
        return y_td.view(hidden_states.shape)

    def activations(self, x_td: torch.Tensor) -> torch.Tensor:
        """What multiplies each expert's output vector, (t, n): 0 for experts that are not added up."""
        return self.pool.activations(x_td, self._retrieve(x_td), self.shortlist, self.topk)

    @torch.no_grad()
    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        """Which experts are added up for each token: bool (t, n)."""
        return self.pool.weights(x_td, self._retrieve(x_td), self.shortlist, self.topk) != 0

    def _retrieve(self, x_td: torch.Tensor) -> Retrieved | None:
        """Candidates of each token; None: all experts, each with weight 1."""
        if not self.chooses:
            return None
        index_thc, score_thc = self.keys(x_td, self._per_head, self.joint_topk)
        found_thc = score_thc > -math.inf
        if self.gates == "softmax":
            weight_thc = score_thc.softmax(dim=-1)
        elif self.gates == "sigmoid":
            weight_thc = score_thc.sigmoid()
        else:
            weight_thc = found_thc.to(score_thc.dtype)
        index_tc = index_thc.masked_fill(~found_thc, 0).flatten(1)
        weight_tc = weight_thc.masked_fill(~found_thc, 0.0).flatten(1)
        if self.share_pool and self.num_heads > 1 and (self.gates == "unit" or self.pool.rerank is not None):
            # Several heads may retrieve the same expert, which re-ranking takes or leaves as one: its first mention
            # carries the gate values of all, with unit gates just its own.
            index_tc, order = torch.where(found_thc.flatten(1), index_tc, -1).sort(dim=1)
            first_tc = torch.ones_like(index_tc, dtype=torch.bool)
            first_tc[:, 1:] = index_tc[:, 1:] != index_tc[:, :-1]
            weight_tc = weight_tc.gather(1, order)
            if self.gates != "unit":
                first_mention_tc = torch.where(first_tc, torch.arange(index_tc.shape[1], device=index_tc.device), 0)
                weight_tc = torch.zeros_like(weight_tc).scatter_add(1, first_mention_tc.cummax(1).values, weight_tc)
            weight_tc = weight_tc.masked_fill(~first_tc, 0.0)
            index_tc = index_tc.clamp_min(0)
        one_score = not self.share_pool or self.num_heads == 1
        score_tc = score_thc.masked_fill(~found_thc, 0.0).flatten(1) if one_score else None
        return Retrieved(index_tc + self.num_shared, weight_tc, score_tc)

    @property
    def chooses(self) -> bool:
        """Whether anything depends on scores."""
        routed, one_score = self.num_experts - self.num_shared, not self.share_pool or self.num_heads == 1
        # Where all are candidates, scores still have a say in re-ranking, if an expert has just one.
        return self.gates != "unit" or routed > (self.topk if one_score else self.candidates)

    @property
    def weight(self) -> torch.Tensor:
        """Empty, of the experts' number type and device: what an architecture may ask of the linear layer it had."""
        return self.pool.u.detach().new_empty(0, 1)

    @property
    def active_fraction(self) -> float:
        """Multiply-adds of the experts per token, as a share of the dense layer's (the router's not counted)."""
        factors = 2 if self.pool.gate is None else 3
        probed = self.candidates if self.pool.rerank is not None else self.topk
        shortlisted = 0 if self.pool.gate is None else self.shortlist
        return (probed + shortlisted + self.topk + factors * self.num_shared) / (factors * self.d_ff)

    @property
    def router_fraction(self) -> float:
        """Multiply-adds of queries and sub-keys per token, as a share of the dense layer's; 0: nothing to choose."""
        if not self.chooses:
            return 0.0
        rows, columns = self.keys.grid
        query = 0 if self.keys.query_proj is None else self.keys.query_proj.weight.numel()
        scores = self.num_heads * (rows + columns) * self.keys.sub_keys.shape[-1]
        return (query + scores) / ((2 if self.pool.gate is None else 3) * self.d_ff * self.d_model)

    def extra_repr(self) -> str:
        rows, columns = self.keys.grid
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, grid={rows}x{columns}, "
            f"num_heads={self.num_heads}, topk={self.topk} of {self.shortlist} of {self.candidates} candidates, "
            f"gates={self.gates!r}"
        )


class _Removed(nn.Identity):
    """Where the second half of a feed-forward layer was that has no module of its own.

    Some architectures initialise the weights of its linear layers from above, by name: they find empty ones.
    """

    weight = property(lambda self: torch.empty(0, 1))
    bias = property(lambda self: torch.empty(0, 1))


def _gone(layer: PEER, name: str) -> Any:
    """`PEER.__getattr__` while weights are initialised."""
    try:
        return nn.Module.__getattr__(layer, name)
    except AttributeError:
        return _Removed()


def _install(model: PreTrainedModel, peer: dict[str, Any]) -> None:
    """Put PEER layers and identities where `peer` says. Idempotent; parts that this model class lacks are passed over.

    Raises:
        ValueError: `peer` was written by a newer peerify, or names no module of this model.
    """
    if peer["format"] > FORMAT:
        raise ValueError(
            f"the config's `peer` entry has format {peer['format']} and this modeling_peer.py reads up to {FORMAT}: "
            "update peerify, or load with trust_remote_code=True to use the file beside the weights"
        )
    prefix = model.base_model_prefix + "."
    found = 0
    children = [name + "." for name, _ in model.named_children()]
    for path, new in [*peer["layers"].items(), *((path, None) for path in peer["identities"])]:
        # Heads of one architecture may hold the same base model under names of their own.
        below = path.partition(".")[2]
        renamed = (path.removeprefix(prefix), prefix + path, below, prefix + below)
        for candidate in (path, *renamed, *(child + path for child in children)):
            try:
                old = model.get_submodule(candidate)
            except AttributeError:
                continue
            found += 1
            if not isinstance(old, PEER if new is not None else nn.Identity):
                model.set_submodule(candidate, PEER(**new) if new is not None else _Removed())
            break
    if peer["layers"] and not found:
        raise ValueError(f"none of the layers named in the config's `peer` entry exists in {type(model).__name__}")


def _own_part(config: PretrainedConfig, model_class: Any) -> PretrainedConfig:
    """`config`, or its text part where `model_class` is built from that.

    Auto classes load text models out of larger ones, with the config of the whole, which has the layers by their names
    in the whole.
    """
    dense = model_class.config_class.__base__
    if isinstance(config, dense) or config.sub_configs.get("text_config") is not dense:
        return config

    def inside(path: str) -> str:
        """The rest of a path that leads into the language model; empty for others."""
        below = (f".{path}".partition(f".{holder}.")[2] for holder in ("language_model", "text_model"))
        return next(filter(None, below), "")

    peer = config.peer  # type: ignore[attr-defined]
    own = {
        "format": peer["format"],
        "layers": {inside(path): layer for path, layer in peer["layers"].items() if inside(path)},
        "identities": [inside(path) for path in peer["identities"] if inside(path)],
    }
    return _adopt_config(copy.deepcopy(config.get_text_config()), model_class, own)


class PeerModelMixin:
    """What a transformers class needs to hold PEER layers; comes before the architecture's own class."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(_own_part(config, type(self)), *args, **kwargs)  # type: ignore[call-arg]

    def post_init(self) -> None:
        _install(self, self.config.peer)  # type: ignore[arg-type, attr-defined]
        # The models inside listed their tied weights when they still had the layers that are now replaced. Innermost
        # first: each list holds those of the children.
        for part in reversed([*self.modules()][1:]):  # type: ignore[attr-defined]
            if isinstance(part, PreTrainedModel) and hasattr(part, "all_tied_weights_keys"):
                part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=False)
                for name, child in part.named_children():
                    tied = getattr(child, "all_tied_weights_keys", None) or {}
                    part.all_tied_weights_keys.update({f"{name}.{k}": f"{name}.{v}" for k, v in tied.items()})
        super().post_init()  # type: ignore[misc]

    def initialize_weights(self) -> None:
        # The architecture's `_init_weights` knows nothing of these parameters, nor would a sub-model's be asked.
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PEER):
                module.reset_parameters()
        # For classes from elsewhere, transformers leaves out modules without parameters of their own; but some
        # architectures fill the buffers of their parts there (Falcon-H1).
        # Others initialise the layers of a block by name (V-JEPA 2): what is gone lets everything be done to it.
        self.is_custom_code = lambda: False
        PEER.__getattr__ = _gone  # type: ignore[assignment, method-assign]
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            del self.is_custom_code, PEER.__getattr__

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # transformers copies the code of classes that came from a repository, not of registered ones.
        if kwargs.get("is_main_process", True):
            shutil.copyfile(__file__, Path(save_directory) / "modeling_peer.py")


def _auto_classes() -> dict[str, type]:
    """The Auto classes that build models, by name."""
    from transformers.models.auto import modeling_auto

    return {
        name: value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(value, "_model_mapping", None) is not None
    }


def _heads(model_type: str, preferred: str | None = None) -> dict[str, str]:
    """Auto class name -> class name, for every head that an architecture has."""
    heads = {}
    for auto, cls in _auto_classes().items():
        names = cls._model_mapping._model_mapping.get(model_type)  # type: ignore[attr-defined]
        if names:
            names = [names] if isinstance(names, str) else list(names)
            heads[auto] = str(preferred if preferred in names else names[0])
    return heads


def __getattr__(name: str) -> type:
    """Make `Peer<Class>` for a transformers class on demand (PEP 562), so that auto_map and pickle find it."""
    base_name = name.removeprefix("Peer")
    base = getattr(transformers, base_name, None) if base_name != name and base_name else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, PretrainedConfig):
        members: dict[str, Any] = {
            "model_type": "peer_" + base.model_type,
            "__module__": __name__,
            "__qualname__": name,
        }
        cls = type(name, (base,), members)
        globals()[name] = cls
        _register(cls, base)
    elif issubclass(base, PreTrainedModel):
        dense_config: Any = base.config_class
        config_name = "Peer" + dense_config.__name__
        config_class: Any = globals().get(config_name) or __getattr__(config_name)
        members = {"config_class": config_class, "__module__": __name__, "__qualname__": name}
        cls = globals()[name] = type(name, (PeerModelMixin, base), members)
        # transformers skips the renaming of checkpoint keys for classes that are not its own.
        # Under the type where the original has it under the type: a model inside a model then counts once.
        for dense_key, key in ((base_name, name), (dense_config.model_type, config_class.model_type)):
            mapping = conversion_mapping.get_checkpoint_conversion_mapping(dense_key)
            if mapping is not None:
                conversion_mapping.register_checkpoint_conversion_mapping(key, mapping, overwrite=True)
    else:
        raise AttributeError(f"{base_name} is neither a configuration nor a model of transformers")
    return cls


def _register(config_class: type, base: type) -> None:
    """Make the Auto classes know a Peer config: generic heads build their backbone with AutoModel.from_config."""
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]
    autos = _auto_classes()
    for auto, model_name in _heads(base.model_type).items():  # type: ignore[attr-defined]
        dense = getattr(transformers, model_name, None)
        if not isinstance(dense, type) or not issubclass(dense, PreTrainedModel):
            continue  # not exported, or a stand-in for what lacks a package
        # Some Auto classes name a model for a type whose config it cannot take: a part of a larger one, not its text.
        parts = {name: part for name, part in base.sub_configs.items() if name != "text_config"}  # type: ignore[attr-defined]
        if dense.config_class in parts.values():
            continue
        model = globals().get("Peer" + model_name) or __getattr__("Peer" + model_name)
        # Not by the Auto class's own `register`, which insists on the model's own config class: ShieldGemma 2 builds
        # Gemma 3 with its config.
        autos[auto]._model_mapping.register(config_class, model, exist_ok=True)  # type: ignore[attr-defined]


def adopt(model: PreTrainedModel, peer: dict[str, Any]) -> PreTrainedModel:
    """Make a dense model whose modules have been replaced an instance of its Peer class, in place.

    Args:
        model: an instance of a class of transformers; its PEER layers and identities are already in place.
        peer: the config entry: {"format", "layers": {path: keyword arguments of PEER}, "identities": [path]}.

    Raises:
        ValueError: the class of `model` is not part of transformers.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ValueError(f"{name} is not a class of transformers: a converted model could not be loaded back")
    model.__class__ = globals().get("Peer" + name) or __getattr__("Peer" + name)
    _adopt_config(model.config, type(model), peer)
    return model


def _adopt_config(config: PretrainedConfig, model_class: Any, peer: dict[str, Any]) -> PretrainedConfig:
    """Make a dense config that of a Peer class, in place, and say in it where the classes of this file are."""
    model_type, name = type(config).model_type, model_class.__name__
    config.__class__ = model_class.config_class
    config.__dict__.pop("model_type", None)  # an instance attribute of the dense type would shadow the class's
    config.peer = peer
    config.auto_map = {"AutoConfig": f"modeling_peer.{type(config).__name__}"}
    heads = _heads(model_type, name.removeprefix("Peer"))
    config.auto_map |= {auto: f"modeling_peer.Peer{head}" for auto, head in heads.items()}
    config.architectures = [name]
    return config


class _PeerConfigs(dict):  # type: ignore[type-arg]
    """Extra entries of transformers' config mapping: `peer_<type>` for every type it knows, made when asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._base(key) is not None)

    def __missing__(self, key: str) -> type:
        base = self._base(key)
        if base is None:
            raise KeyError(key)
        return globals().get("Peer" + base) or __getattr__("Peer" + base)

    @staticmethod
    def _base(key: str) -> str | None:
        return (
            configuration_auto.CONFIG_MAPPING_NAMES.get(key.removeprefix("peer_")) if key.startswith("peer_") else None
        )


def register() -> None:
    """Let transformers load converted models of every architecture without trust_remote_code. Idempotent."""
    mapping = configuration_auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _PeerConfigs):
        mapping._extra_content = _PeerConfigs(mapping._extra_content)
