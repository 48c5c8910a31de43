# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The experts of a PEER layer: their tables, and their evaluation.

Shape suffixes: t tokens, d d_model, n experts, k experts that are added up.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN

from .peer_gathered import Combine, Project, Rows, usable
from .peer_keys import Retrieved
from .peer_products import combined, linear

GATHERED = 2**19  # numbers of gathered rows at a time on a CPU: from its cache they are read in a third of the time


class ExpertPool(nn.Module):
    """The tables of single-neuron experts, and their evaluation for given indices.

    Row i of `u`, `gate` and `v` is expert i's input, gate and output vector. The first `num_shared` experts are always
    on. The pool is a module of its own, so that hooks for offloading and sharding see every access, and so that two
    layers can share one pool.

    Attributes:
        sparse: as of torch.nn.Embedding: gradients that `gathered` gives to the tables hold the retrieved rows alone.
            Always-on experts and biases have gradients of whole tables.
    """

    sparse = False

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
        clamp: dict[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.num_shared = num_shared
        self.act = nn.Identity() if activation == "linear" else ACT2FN[activation]
        self.act.to(torch.get_default_dtype())  # xIELU has parameters, in bfloat16
        self.clamp = clamp or {}
        self.u = nn.Parameter(torch.empty(num_experts, d_model))
        self.v = nn.Parameter(torch.empty(num_experts, d_model))
        self.gate = nn.Parameter(torch.empty(num_experts, d_model)) if gated else None
        self.u_bias = nn.Parameter(torch.empty(num_experts)) if expert_bias else None
        self.gate_bias = nn.Parameter(torch.empty(num_experts)) if gated and gate_bias else None
        self.reset_parameters()

    def reset_parameters(self, *, outputs: bool = True) -> None:
        """Random initialisation, of output vectors if asked to; leaves weights alone that transformers has loaded."""
        for table in (self.u, self.v if outputs else None, self.gate):
            if table is not None:
                init.normal_(table, std=table.shape[1] ** -0.5)
        for bias in (self.u_bias, self.gate_bias):
            if bias is not None:
                init.zeros_(bias)

    def forward(self, x_td: torch.Tensor, found: Retrieved | torch.Tensor | None) -> torch.Tensor:
        """Weighted sum of experts, (t, d).

        Args:
            x_td: tokens.
            found: what is kept of each token, as indices, or as gate values of all experts (t, n); None: all experts,
                each with weight 1.
        """
        if isinstance(found, Retrieved):
            return self.gathered(x_td, found)
        a_tn = self.products(x_td)[2]
        return combined(a_tn if found is None else a_tn * found.to(a_tn.dtype), self.v)

    def products(self, x_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Up and gate projections, and activations, of all experts by dense products: each (t, n)."""
        u_tn = linear(x_td, self.u, self.u_bias)
        gate_tn = None if self.gate is None else linear(x_td, self.gate, self.gate_bias)
        return u_tn, gate_tn, self.activate(u_tn, gate_tn)

    def gathered(self, x_td: torch.Tensor, found: Retrieved) -> torch.Tensor:
        """`forward` of routed experts that are given as indices: only their rows are read."""
        u_nd, gate_nd, v_nd = self.u, self.gate, self.v  # each once: adapters compute them
        if usable(x_td, *(table for table in (u_nd, gate_nd, v_nd) if table is not None)):
            y_td = self._by_kernel(x_td, found, u_nd, gate_nd, v_nd)
            return y_td + self._shared(x_td) if self.num_shared else y_td
        at_once = max(1, GATHERED // (found.index_tk.shape[1] * x_td.shape[1]))
        # Each part would make gradients of whole tables of its own.
        if x_td.device.type == "cpu" and len(x_td) > at_once and not torch.is_grad_enabled():
            parts = zip(x_td.split(at_once), found.split(at_once), strict=True)
            return torch.cat([self.gathered(x, part) for x, part in parts])
        index_tk, weight_tk = found

        def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            y_tk = torch.einsum("td,tkd->tk", x_td, self._copied(table, index_tk))
            return y_tk if bias is None else y_tk + bias[index_tk]

        gate_tk = None if self.gate is None else project(self.gate, self.gate_bias)
        a_tk = self.activate(project(self.u, self.u_bias), gate_tk) * weight_tk.to(x_td.dtype)
        y_td = torch.einsum("tk,tkd->td", a_tk, self._copied(self.v, index_tk))
        return y_td + self._shared(x_td) if self.num_shared else y_td

    def _copied(self, table: torch.Tensor, index_tk: torch.Tensor) -> torch.Tensor:
        """Rows of a table, (t, k, d)."""
        return F.embedding(index_tk, table, sparse=True) if self.sparse else table[index_tk]

    def has_kernel(self, x_td: torch.Tensor) -> bool:
        """Whether `gathered` makes no copies of rows for these tokens."""
        return usable(x_td, *(table for table in (self.u, self.v, self.gate) if table is not None))

    def _by_kernel(
        self,
        x_td: torch.Tensor,
        found: Retrieved,
        u_nd: torch.Tensor,
        gate_nd: torch.Tensor | None,
        v_nd: torch.Tensor,
    ) -> torch.Tensor:
        """`gathered` without copies of rows and without the always-on experts; computed in float32."""
        rows, x = Rows(found.index_tk, len(u_nd), sparse=self.sparse), x_td.float()

        def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            z_tk = Project.apply(x, table, rows)
            # In float32 before it is read, so that its gradient is summed in float32, too.
            return z_tk if bias is None else z_tk + bias.float()[rows.index_tk]

        gate_tk = None if gate_nd is None else project(gate_nd, self.gate_bias)
        a_tk = self.activate(project(u_nd, self.u_bias), gate_tk) * found.weight_tk
        y_td = Combine.apply(a_tk.float(), v_nd, rows)
        device = x_td.device.type
        return y_td.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_td.dtype)

    def _shared(self, x_td: torch.Tensor) -> torch.Tensor:
        """Sum of the always-on experts' outputs, (t, d)."""

        def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return linear(x_td, table[: self.num_shared], None if bias is None else bias[: self.num_shared])

        gate = None if self.gate is None else project(self.gate, self.gate_bias)
        return combined(self.activate(project(self.u, self.u_bias), gate), self.v[: self.num_shared])

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
