# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The PEER layer of "Mixture of A Million Experts", arXiv 2407.04153.

    y = sum over i in R(x) of g_i(x) e_i(x)  [+ shared neurons + bias],
    e_i(x) = act(u_i . x + b_i) v_i                      for plain experts (paper, section 2.2)
    e_i(x) = act(gate_i . x + c_i) (u_i . x + b_i) v_i   for GLU experts,

where R(x) is found by product keys: expert i sits in cell (a, b) of a grid and its score is row(a) + column(b), so the
best of N experts are found among 2 sqrt(N) sub-keys (paper, section 2.1).

Shape suffixes: t tokens, d d_model, n experts, h heads, k retrieved experts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .peer_experts import ExpertPool
from .peer_keys import ProductKeys, Retrieved
from .peer_memory import Memory, memory_cost
from .peer_selection import kept


class PEER(nn.Module):
    """A PEER layer in place of a feed-forward layer: it retrieves experts by product keys and sums their outputs.

    Args:
        d_model: width of input and output.
        num_experts: experts in the pool, including the `num_shared` always-on ones.
        grid: rows x columns of the product-key grid (of each head's own grid unless `share_pool`).
        num_heads: retrieval heads h.
        topk: experts kept per head, k; with `joint_topk` the heads share a budget of h*k.
        gated, activation, expert_bias, gate_bias, output_bias: the form of the experts (see the module docstring).
        num_shared: always-on experts, which take part for every token without retrieval.
        share_pool: all heads retrieve from one pool (the paper); otherwise each owns a part of it.
        share_keys: all heads use the same sub-keys (the paper, Eq. 7).
        joint_topk: the heads share one budget instead of spending `topk` each.
        gates: "softmax" over what a head retrieved (paper, Algorithm 1), "sigmoid" of the score (Eq. 2), or "unit":
            exactly 1, and once where several heads retrieve an expert. With unit gates and every expert kept, the
            layer is the dense layer.
        query_dim, query_norm: see `ProductKeys`; query_norm is the paper's query batch norm.
        key_bias: a bias for each sub-key.
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
        query_norm: bool = False,
        key_bias: bool = False,
        clamp: dict[str, float] | None = None,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        if gates not in ("unit", "softmax", "sigmoid"):
            raise ValueError(f"gates must be 'unit', 'softmax' or 'sigmoid', not {gates!r}")
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
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
        )
        self.pool = ExpertPool(
            d_model,
            num_experts,
            activation=activation,
            gated=gated,
            expert_bias=expert_bias,
            gate_bias=gate_bias,
            num_shared=num_shared,
            clamp=clamp,
        )
        self.bias = nn.Parameter(torch.zeros(d_model)) if output_bias else None
        self.memory: Memory | None = None
        # `topk` is of all heads together, `per_head` what one call of the retrieval is asked for.
        self.topk = min(num_heads * topk, self.keys.num_keys)
        self.per_head = self.topk if joint_topk else min(topk, grid[0] * grid[1])

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded."""
        self.keys.reset_parameters()
        self.pool.reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)
        if self.memory is not None:
            self.memory.reset_parameters()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype in and out: (..., d_model)."""
        x_td = hidden_states.reshape(-1, self.d_model)
        y_td = self.pool(x_td, self.retrieve(x_td) if self._gathers(x_td) else self.weights(x_td))
        return self.rest(x_td, y_td).view(hidden_states.shape)

    def rest(self, x_td: torch.Tensor, y_td: torch.Tensor) -> torch.Tensor:
        """`y_td`, the sum of experts, and what the layer adds to it: its bias, and its memory."""
        if self.bias is not None:
            y_td = y_td + self.bias
        return y_td if self.memory is None else y_td + self.memory(x_td)

    def _gathers(self, x_td: torch.Tensor) -> bool:
        """Whether reading the rows of what is retrieved takes less time than multiplying with all experts."""
        if not self.needs_routing:
            return False
        tokens = len(x_td)
        has_kernel = getattr(self.pool, "has_kernel", None)  # an adapter around the pool does not say
        if has_kernel is not None and has_kernel(x_td):
            # A single token reads rows in no order, at half of the speed. With many, a dense product takes as long as
            # ten rows of each token in a hundred (d_model 576 and 1024, forward and backward, AVX-512).
            return tokens * self.topk < self.num_experts * (0.4 + tokens / 10)
        # A gathered row is read, written and read again, for each token. A dense product reads each table once for all
        # tokens; then some 18 of them take as long as the reading (d_model 576 and 1024, on CPUs).
        return 3 * tokens * self.topk < self.num_experts * (1 + tokens / 18)

    def activations(self, x_td: torch.Tensor) -> torch.Tensor:
        """What multiplies each expert's output vector, (t, n): 0 for experts that are not added up.

        By dense products with all experts: for many tokens and few experts.
        """
        a_tn, weight_tn = self.pool.products(x_td)[2], self.weights(x_td)
        return a_tn if weight_tn is None else a_tn * weight_tn.to(a_tn.dtype)

    @torch.no_grad()
    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        """Which experts are added up for each token: bool (t, n)."""
        weight_tn = self.weights(x_td)
        if weight_tn is None:
            return torch.ones(len(x_td), self.num_experts, dtype=torch.bool, device=x_td.device)
        return weight_tn != 0

    def weights(self, x_td: torch.Tensor) -> torch.Tensor | None:
        """Gate values of all experts, (t, n), 0 for those that are not kept; None: all are, each with weight 1."""
        if not self.needs_routing:
            return None
        if self.gates == "unit":
            with torch.no_grad():
                weight_tn = kept(self, self.keys(x_td, None)[1])[1]
        else:
            index_tk, weight_tk = self.retrieve(x_td)
            weight_tn = torch.zeros(len(x_td), self.keys.num_keys, dtype=weight_tk.dtype, device=x_td.device)
            weight_tn = weight_tn.scatter_add(1, index_tk - self.num_shared, weight_tk)
        return F.pad(weight_tn, (self.num_shared, 0), value=1.0)

    def retrieve(self, x_td: torch.Tensor) -> Retrieved:
        """What is kept of each token, where anything depends on scores."""
        index_thk, score_thk = self.keys(x_td, self.per_head, self.joint_topk)
        found_thk = score_thk > -math.inf
        if self.gates == "softmax":
            weight_thk = score_thk.softmax(dim=-1)
        elif self.gates == "sigmoid":
            weight_thk = score_thk.sigmoid()
        else:
            weight_thk = found_thk.to(score_thk.dtype)
        index_tk = index_thk.masked_fill(~found_thk, 0).flatten(1)
        weight_tk = weight_thk.masked_fill(~found_thk, 0.0).flatten(1)
        if self.gates == "unit" and self.share_pool and self.num_heads > 1:
            # Several heads may retrieve the same expert, which is added up once: at its first mention.
            index_tk, order = torch.where(found_thk.flatten(1), index_tk, -1).sort(dim=1)
            first_tk = torch.ones_like(index_tk, dtype=torch.bool)
            first_tk[:, 1:] = index_tk[:, 1:] != index_tk[:, :-1]
            weight_tk = weight_tk.gather(1, order).masked_fill(~first_tk, 0.0)
            index_tk = index_tk.clamp_min(0)
        return Retrieved(index_tk + self.num_shared, weight_tk)

    @property
    def needs_routing(self) -> bool:
        """Whether anything depends on scores."""
        return self.gates != "unit" or self.num_experts - self.num_shared > self.topk

    @property
    def weight(self) -> torch.Tensor:
        """Empty, of the experts' number type and device: what an architecture may ask of the linear layer it had."""
        return self.pool.u.detach().new_empty(0, 1)

    @property
    def bytes_fraction(self) -> float:
        """Bytes of weights that a token reads, router and memory among them, over the dense layer's."""
        return self._fraction(self.keys.sub_keys.numel()) + memory_cost(self)[0]

    @property
    def macs_fraction(self) -> float:
        """Multiply-adds of a token, likewise, over the dense layer's."""
        keys = self.num_heads * sum(self.keys.grid) * self.keys.sub_keys.shape[-1]
        return self._fraction(keys) + memory_cost(self)[1]

    def _fraction(self, keys: int) -> float:
        """What a token takes, `keys` of it for products with sub-keys, over what the dense layer takes."""
        query = 0 if self.keys.query_proj is None else self.keys.query_proj.weight.numel()
        dense = (2 if self.pool.gate is None else 3) * self.d_ff * self.d_model
        return (self.topk + self.num_shared) / self.d_ff + (query + keys if self.needs_routing else 0) / dense

    def usage(self, x_td: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """`active_experts`, and the bytes and multiply-adds of a token, over the dense layer's."""
        return self.active_experts(x_td), self.bytes_fraction, self.macs_fraction

    def extra_repr(self) -> str:
        rows, columns = self.keys.grid
        return (
            f"d_model={self.d_model}, num_experts={self.num_experts}, grid={rows}x{columns}, "
            f"num_heads={self.num_heads}, topk={self.topk}, gates={self.gates!r}"
        )
