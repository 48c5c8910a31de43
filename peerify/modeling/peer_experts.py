# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The experts of a PEER layer: their tables, and their evaluation.

Shape suffixes: t tokens, d d_model, n experts, c candidates, s the shortlisted of them, k experts that are added up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .peer_keys import Retrieved, activation_module
from .peer_selection import FAR_BELOW, Candidates, kept, topk_indices

GATHERED = 2**19  # numbers of gathered rows at a time on a CPU: from its cache they are read in a third of the time


class ExpertPool(nn.Module):
    """The tables of single-neuron experts, and their evaluation for given indices.

    Row i of `u`, `gate` and `v` is expert i's input, gate and output vector. The first `num_shared` experts are always
    on. The pool is a module of its own, so that hooks for offloading and sharding see every access, and so that two
    layers can share one pool.

    Re-ranking (`rerank`) computes one projection, "gate" or "up", of every candidate. It shortlists those with the
    largest estimate of their contribution |a_i| ||v_i||. The logarithm of the estimate is log |probed factor| +
    log rerank_scale + rerank_slope * retrieval score, where the score stands in for the factor that is not computed.
    For the shortlisted both factors are then computed, and those with the largest contributions are kept.
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
        # The contribution per unit of the probed projection, E|other factor| ||v_i||. These are parameters, though no
        # gradient reaches them, because code that loads or offloads weights piece by piece may skip buffers.
        self.rerank_scale = nn.Parameter(torch.empty(num_experts), requires_grad=False) if rerank else None
        self.rerank_slope = nn.Parameter(torch.empty(1), requires_grad=False) if rerank else None
        # ||v_i|| as of the last fit, so that the rows of `v` which are left out need not be read.
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

    def forward(
        self, x_td: torch.Tensor, found: Retrieved | Candidates | None, shortlist: int, topk: int
    ) -> torch.Tensor:
        """Weighted sum of experts, (t, d).

        Args:
            x_td: tokens.
            found: candidates of each token, as indices or among all experts; None: all experts, each with weight 1.
            shortlist: how many candidates both projections are computed of (all of them without `rerank`).
            topk: how many of those are kept (all of them without `rerank_norm`).
        """
        if isinstance(found, Retrieved):
            return self.gathered(x_td, found, shortlist, topk)
        u_tn, gate_tn, a_tn = self.products(x_td)
        weight_tn = self.weights(found, u_tn, gate_tn, a_tn, shortlist, topk)
        return (a_tn if weight_tn is None else a_tn * weight_tn) @ self.v

    def products(self, x_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Up and gate projections, and activations, of all experts by dense products: each (t, n)."""
        u_tn = F.linear(x_td, self.u, self.u_bias)
        gate_tn = None if self.gate is None else F.linear(x_td, self.gate, self.gate_bias)
        return u_tn, gate_tn, self.activate(u_tn, gate_tn)

    def weights(
        self,
        found: Candidates | None,
        u_tn: torch.Tensor,
        gate_tn: torch.Tensor | None,
        a_tn: torch.Tensor,
        shortlist: int,
        topk: int,
    ) -> torch.Tensor | None:
        """Gate values of all experts, (t, n), 0 for those that are not kept; None: all are, each with weight 1."""
        if found is None:
            return None
        weight_tn = found.weight_tn * kept(self, found, u_tn, gate_tn, a_tn, shortlist, topk)
        return F.pad(weight_tn.to(u_tn.dtype), (self.num_shared, 0), value=1.0)

    def gathered(self, x_td: torch.Tensor, found: Retrieved, shortlist: int, topk: int) -> torch.Tensor:
        """`forward` with candidates given as indices: only their rows are read."""
        at_once = max(1, GATHERED // (found.index_tc.shape[1] * x_td.shape[1]))
        if x_td.device.type == "cpu" and len(x_td) > at_once:
            parts = zip(x_td.split(at_once), found.split(at_once), strict=True)
            return torch.cat([self.gathered(x, part, shortlist, topk) for x, part in parts])
        index_tc, weight_tc, score_tc = found

        def project(table: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor:
            y = torch.einsum("td,tcd->tc", x_td, table[index])
            return y if bias is None else y + bias[index]

        if self.rerank_scale is not None and shortlist < index_tc.shape[1]:
            probe_tc = project(*self._probed(), index_tc)
            rerank_tc = self.rerank_score(probe_tc, weight_tc, score_tc, self.rerank_scale[index_tc])
            top_ts = topk_indices(rerank_tc, shortlist)
            index_tc, weight_tc = index_tc.gather(1, top_ts), weight_tc.gather(1, top_ts)
        u_ts = project(self.u, self.u_bias, index_tc)
        gate_ts = None if self.gate is None else project(self.gate, self.gate_bias, index_tc)
        a_tk, index_tk = self.activate(u_ts, gate_ts) * weight_tc.to(x_td.dtype), index_tc
        if self.rerank_norm is not None and topk < shortlist:
            top_tk = topk_indices(self.contribution(a_tk, self.rerank_norm[index_tk]), topk)
            a_tk, index_tk = a_tk.gather(1, top_tk), index_tk.gather(1, top_tk)
        y_td = torch.einsum("tk,tkd->td", a_tk, self.v[index_tk])
        return y_td + self._shared(x_td) if self.num_shared else y_td

    def _shared(self, x_td: torch.Tensor) -> torch.Tensor:
        """Sum of the always-on experts' outputs, (t, d)."""

        def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return F.linear(x_td, table[: self.num_shared], None if bias is None else bias[: self.num_shared])

        gate = None if self.gate is None else project(self.gate, self.gate_bias)
        return self.activate(project(self.u, self.u_bias), gate) @ self.v[: self.num_shared]

    @torch.no_grad()
    def update_norm(self) -> None:
        """Bring `rerank_norm`, if there is one, up to date."""
        if self.rerank_norm is not None:
            self.rerank_norm.copy_(self.v.norm(dim=1))

    @torch.no_grad()
    def contribution(self, a: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Sizes |a_i| ||v_i|| of what experts add."""
        size = a.abs()  # a copy, so the rest is done in place: memory is what this costs
        size = size if size.dtype == torch.float64 else size.float()
        return size.mul_(norm)

    @torch.no_grad()
    def rerank_score(
        self, probe: torch.Tensor, weight: torch.Tensor | None, score: torch.Tensor | None, scale: torch.Tensor
    ) -> torch.Tensor:
        """Logarithm of an expert's estimated contribution, to re-rank by; below all others where its weight is 0.

        Args:
            probe: its probed projection.
            weight, score: its gate value (None: 1) and retrieval score.
            scale: its `rerank_scale`.
        """
        size = self.rerank_factor(probe)  # a copy, so the rest is done in place: memory is what this costs
        size = (size if size.dtype == torch.float64 else size.float()).mul_(scale)
        if weight is None:
            result = size.log_()
        else:
            out = weight.clone().eq_(0)  # as numbers; these stay different from each other, see `topk_indices`
            result = size.mul_(weight.abs() + out).log_().sub_(out, alpha=FAR_BELOW)
        return result if score is None or self.rerank_slope is None else result.addcmul_(score, self.rerank_slope)

    def _probed(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Table and bias of the projection that re-ranks."""
        if self.rerank == "gate" and self.gate is not None:
            return self.gate, self.gate_bias
        return self.u, self.u_bias

    def activate(self, u: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        """Activations a_i of experts from their projections: what multiplies their output vectors."""
        return self.act(u) if gate is None else self.act_of(gate) * self.up_of(u)

    def act_of(self, gate: torch.Tensor) -> torch.Tensor:
        """The activated gate projections, within their limits where the dense layer has any."""
        if "gate" in self.clamp:
            gate = gate.clamp(max=self.clamp["gate"])
        a = self.act(gate)
        return a.clamp(max=self.clamp["act"]) if "act" in self.clamp else a

    def up_of(self, u: torch.Tensor) -> torch.Tensor:
        if "up" in self.clamp:
            u = u.clamp(-self.clamp["up"], self.clamp["up"])
        return u + self.clamp["shift"] if "shift" in self.clamp else u

    def rerank_factor(self, projected: torch.Tensor) -> torch.Tensor:
        """Size of the factor of a_i that the probing projection determines."""
        return (
            self.up_of(projected) if self.rerank == "up" and self.gate is not None else self.act_of(projected)
        ).abs()
