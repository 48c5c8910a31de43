# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The PEER layer of "Mixture of A Million Experts", arXiv 2407.04153.

    y = sum over i in R(x) of g_i(x) e_i(x)  [+ shared neurons + bias],
    e_i(x) = act(u_i . x + b_i) v_i                      for plain experts (paper, section 2.2)
    e_i(x) = act(gate_i . x + c_i) (u_i . x + b_i) v_i   for GLU experts,

where R(x) is found by product keys: expert i sits in cell (a, b) of a grid and its score is row(a) + column(b), so the
best of N experts are found among 2 sqrt(N) sub-keys (paper, section 2.1).

Shape suffixes: t tokens, d d_model, n experts, h heads, a grid rows, b grid columns, m rows + columns,
c candidates (all heads together), s the shortlisted of them, k experts evaluated in full.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .peer_experts import ExpertPool
from .peer_keys import ProductKeys, Retrieved
from .peer_selection import Candidates, candidates


class Products(NamedTuple):
    """What a layer computes of its input by dense products with all keys and experts."""

    score_thn: torch.Tensor | None
    """Retrieval scores, with unit gates where anything depends on them; see `cell_scores`."""
    u_tn: torch.Tensor
    gate_tn: torch.Tensor | None
    a_tn: torch.Tensor
    """Activations of all experts."""


class PEER(nn.Module):
    """A PEER layer in place of a feed-forward layer: it retrieves experts by product keys and sums their outputs.

    Args:
        d_model: width of input and output.
        num_experts: experts in the pool, including the `num_shared` always-on ones.
        grid: rows x columns of the product-key grid (of each head's own grid unless `share_pool`).
        num_heads: retrieval heads h.
        topk: experts kept per head, k; with `joint_topk` the heads share a budget of h*k.
        candidates: experts retrieved per head, of which re-ranking keeps `shortlist`; None: `shortlist`.
        shortlist: candidates per head whose activation is computed; the `topk` that contribute most are kept.
            None: `topk`.
        gated, activation, expert_bias, gate_bias, output_bias: the form of the experts (see the module docstring).
        num_shared: always-on experts, which take part for every token without retrieval.
        share_pool: all heads retrieve from one pool (the paper); otherwise each owns a part of it.
        share_keys: all heads use the same sub-keys (the paper, Eq. 7).
        joint_topk: the heads share one budget instead of spending `topk` each.
        gates: "softmax" over what a head retrieved (paper, Algorithm 1), "sigmoid" of the score (Eq. 2), or "unit":
            exactly 1, and once where several heads retrieve an expert. With unit gates and every expert kept, the
            layer is the dense layer.
        query_dim, share_query, query_norm: see `ProductKeys`; query_norm is the paper's query batch norm.
        key_bias: a bias for each sub-key.
        estimate: scores estimate the size of each expert's output, see `ProductKeys`.
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
        # In all heads together; `per_head` is what one call of the retrieval is asked for.
        self.candidates = min(self.num_heads * candidates, self.keys.num_keys)
        self.shortlist = min(self.num_heads * shortlist, self.keys.num_keys)
        self.topk = min(self.num_heads * topk, self.keys.num_keys)
        self.per_head = self.candidates if self.joint_topk else min(candidates, rows * columns)

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded."""
        self.keys.reset_parameters()
        self.pool.reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype in and out: (..., d_model)."""
        x_td = hidden_states.reshape(-1, self.d_model)
        found = self.retrieve(x_td) if self._gathers(len(x_td)) else self.candidates_of(x_td)
        y_td = self.pool(x_td, found, self.shortlist, self.topk)
        if self.bias is not None:
            y_td = y_td + self.bias
        return y_td.view(hidden_states.shape)

    def _gathers(self, tokens: int) -> bool:
        """Whether reading the candidates' rows takes less time than multiplying with all experts."""
        # A gathered row is read, written and read again, for each token. A dense product reads each table once for all
        # tokens; then some 18 of them take as long as the reading (d_model 576 and 1024, on CPUs).
        return self.needs_routing and 3 * tokens * self.candidates < self.num_experts * (1 + tokens / 18)

    def activations(self, x_td: torch.Tensor, products: Products | None = None) -> torch.Tensor:
        """What multiplies each expert's output vector, (t, n): 0 for experts that are not added up.

        By dense products with all experts: for many tokens and few experts.

        Args:
            products: as `products` gives them for x_td, if they are known.
        """
        products = self.products(x_td) if products is None else products
        weight_tn = self.weights(x_td, products)
        return products.a_tn if weight_tn is None else products.a_tn * weight_tn

    @torch.no_grad()
    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        """Which experts are added up for each token: bool (t, n)."""
        weight_tn = self.weights(x_td, self.products(x_td))
        if weight_tn is None:
            return torch.ones(len(x_td), self.num_experts, dtype=torch.bool, device=x_td.device)
        return weight_tn != 0

    def weights(self, x_td: torch.Tensor, products: Products) -> torch.Tensor | None:
        """Gate values of all experts, (t, n), 0 for those that are not kept; None: all are, each with weight 1."""
        score_thn, u_tn, gate_tn, a_tn = products
        found = self.candidates_of(x_td, score_thn)
        return self.pool.weights(found, u_tn, gate_tn, a_tn, self.shortlist, self.topk)

    def products(self, x_td: torch.Tensor) -> Products:
        """All products of x_td with this layer that do not depend on what is selected."""
        score_thn = self._scores(x_td) if self.gates == "unit" and self.needs_routing else None
        return Products(score_thn, *self.pool.products(x_td))

    def _scores(self, x_td: torch.Tensor) -> torch.Tensor:
        return self.keys(x_td, None)[1]  # type: ignore[no-any-return]

    def candidates_of(self, x_td: torch.Tensor, score_thn: torch.Tensor | None = None) -> Candidates | None:
        """Candidates of each token among all experts; None: all are kept, each with weight 1.

        Args:
            score_thn: with unit gates, the retrieval scores, if they are known.
        """
        if self.gates == "unit" and self.needs_routing:
            with torch.no_grad():
                return candidates(self, self._scores(x_td) if score_thn is None else score_thn)[1]
        if self.topk >= self.keys.num_keys and not self.needs_routing:
            return None
        found, score_tn = self.retrieve(x_td), None
        weight_tn = torch.zeros(len(x_td), self.keys.num_keys, dtype=x_td.dtype, device=x_td.device)
        if found is None:
            return Candidates(weight_tn + 1, None, True)
        index_tc = found.index_tc - self.num_shared
        if found.score_tc is not None:
            score_tc = found.score_tc.detach()
            score_tn = score_tc.new_zeros(weight_tn.shape).scatter_add(1, index_tc, score_tc)
        weight_tn = weight_tn.scatter_add(1, index_tc, found.weight_tc.to(weight_tn.dtype))
        return Candidates(weight_tn, score_tn, False)

    def retrieve(self, x_td: torch.Tensor) -> Retrieved | None:
        """Candidates of each token; None: all experts, each with weight 1."""
        if not self.needs_routing:
            return None
        index_thc, score_thc = self.keys(x_td, self.per_head, self.joint_topk)
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
    def needs_routing(self) -> bool:
        """Whether anything depends on scores."""
        routed, one_score = self.num_experts - self.num_shared, not self.share_pool or self.num_heads == 1
        # Where all are candidates, scores still have a say in re-ranking, if an expert has just one.
        return self.gates != "unit" or routed > (self.topk if one_score else self.candidates)

    @property
    def weight(self) -> torch.Tensor:
        """Empty, of the experts' number type and device: what an architecture may ask of the linear layer it had."""
        return self.pool.u.detach().new_empty(0, 1)

    @property
    def bytes_fraction(self) -> float:
        """Bytes of weights that a token reads, router and re-ranking among them, over the dense layer's."""
        keys = self.keys.sub_keys.numel()
        return self._expert_fraction + (self._query + keys if self.needs_routing else 0) / self._dense

    @property
    def macs_fraction(self) -> float:
        """Multiply-adds of a token, router and re-ranking among them, over the dense layer's."""
        scores = self.num_heads * sum(self.keys.grid) * self.keys.sub_keys.shape[-1]
        return self._expert_fraction + (self._query + scores if self.needs_routing else 0) / self._dense

    @property
    def _dense(self) -> int:
        """Weights of the dense layer."""
        return (2 if self.pool.gate is None else 3) * self.d_ff * self.d_model

    @property
    def _query(self) -> int:
        return 0 if self.keys.query_proj is None else self.keys.query_proj.weight.numel()

    @property
    def _expert_fraction(self) -> float:
        """What evaluating experts takes, candidates that re-ranking then drops among them."""
        factors = 2 if self.pool.gate is None else 3
        probed = self.candidates if self.pool.rerank is not None else self.topk
        shortlisted = 0 if self.pool.gate is None else self.shortlist
        return (probed + shortlisted + self.topk + factors * self.num_shared) / (factors * self.d_ff)

    def usage(self, x_td: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """`active_experts`, and the bytes and multiply-adds of a token, over the dense layer's."""
        return self.active_experts(x_td), self.bytes_fraction, self.macs_fraction

    def extra_repr(self) -> str:
        rows, columns = self.keys.grid
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, grid={rows}x{columns}, "
            f"num_heads={self.num_heads}, topk={self.topk} of {self.shortlist} of {self.candidates} candidates, "
            f"gates={self.gates!r}"
        )
