# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Experts that a token reads not at all, from copies of few bits, or in full; the layer is in peer_elastic.py.

Shape suffixes: t tokens, d d_model, n experts.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .peer_copies import Copies, Estimate, estimate, largest_inputs, make_copies, with_gradients
from .peer_experts import ExpertPool

AT_ONCE = 256  # tokens, on a CPU: so many fit its cache
PREFILL = 8  # more tokens of a sequence than this at once are prefill
PER_EXPERT = 2  # numbers that describe a copy, for each of its vectors: two of error and size each


class Budget(NamedTuple):
    """How a layer spends a share of the dense layer's bytes."""

    active: float
    """Share that the whole model was to spend."""
    inputs: float
    """Share of a token's inputs that meet the keys: the largest ones."""
    price: float
    """Squared error of the output that reading an expert must save; 0: all are evaluated in full, without keys."""
    bytes: float
    """Share of the dense layer's bytes that this layer spends, as measured on calibration text."""
    macs: float
    """Likewise of its multiply-adds."""


class Choice(NamedTuple):
    """What is evaluated for each token."""

    a_tn: torch.Tensor
    """Activations by the copies."""
    copied_tn: torch.Tensor
    """Which experts are evaluated by their copies: bool."""
    full_tn: torch.Tensor
    """Which are evaluated in full: bool."""


class Kept:
    """Something made from weights, as long as these are the same; it is neither copied nor pickled with a model."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.value: Any = None
        self._made_from: list[tuple[Any, ...]] = []

    def keep(self, value: Any, tables: list[torch.Tensor]) -> None:
        self.value, self._made_from = value, [(weakref.ref(table), *self._state(table)) for table in tables]

    def is_of(self, tables: list[torch.Tensor]) -> bool:
        """Whether the value was made from these very tensors, as they are now."""
        pairs = zip(tables, self._made_from, strict=False)
        return self.value is not None and all(
            ref() is table and state == self._state(table) for table, (ref, *state) in pairs
        )

    @staticmethod
    def _state(table: torch.Tensor) -> list[Any]:
        return [table.data_ptr(), table._version, table.dtype, table.device]

    def __deepcopy__(self, _: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class ElasticPool(ExpertPool):
    """Experts with copies of few bits.

    `input_rms` (d,) is the root mean square of each input on calibration text; it guides the rounding.
    """

    def __init__(self, d_model: int, num_experts: int, *, bits: int, group: int, **form: Any) -> None:
        super().__init__(d_model, num_experts, num_shared=0, rerank=None, **form)
        self.bits, self.group = bits, group
        self.input_rms = nn.Parameter(torch.empty(d_model), requires_grad=False)
        init.ones_(self.input_rms)
        self._copies = Kept()
        self.observer: Callable[[torch.Tensor, torch.Tensor], None] | None = None

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if hasattr(self, "input_rms"):  # else still being made
            init.ones_(self.input_rms)

    def forward(  # type: ignore[override]
        self, x_td: torch.Tensor, budget: Budget | None, choice: bool = False
    ) -> torch.Tensor | Choice:
        """The sum of experts (t, d), of all in full without a price; or the `choice` of experts."""
        if self._learns():
            self._copies.forget()
        if budget is None or budget.price == 0:
            return self.products(x_td)[2] @ self.v
        copies = self.copies()
        if choice:
            return self.choose(x_td, copies, budget)
        if torch.is_grad_enabled():
            copies = with_gradients(self, copies)
        if x_td.device.type == "cpu" and len(x_td) > AT_ONCE and not torch.compiler.is_compiling():
            return torch.cat([self._summed(part, copies, budget) for part in x_td.split(AT_ONCE)])
        return self._summed(x_td, copies, budget)

    def _summed(self, x_td: torch.Tensor, copies: Copies, budget: Budget) -> torch.Tensor:
        with torch.no_grad():
            estimated_tn, copied_tn, full_tn = self.choose(x_td, copies, budget)
        if torch.is_grad_enabled():
            # The gradient is that of the activation in the middle of what it may be: it costs a third to remember.
            read_td, _ = largest_inputs(x_td, copies.reach_d, budget.inputs)
            gate_tn = None if copies.gate_nd is None else F.linear(read_td, copies.gate_nd, self.gate_bias)
            middle_tn = self.activate(F.linear(read_td, copies.u_nd, self.u_bias), gate_tn)
            estimated_tn = middle_tn + (estimated_tn - middle_tn).detach()
        if self.observer is not None:
            self.observer(copied_tn, full_tn)
        rows: Any = slice(None)
        if len(x_td) <= PREFILL and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            rows = full_tn.any(0).nonzero()[:, 0]
        u_tn = F.linear(x_td, self.u[rows], None if self.u_bias is None else self.u_bias[rows])
        gate_tn = None
        if self.gate is not None:
            gate_tn = F.linear(x_td, self.gate[rows], None if self.gate_bias is None else self.gate_bias[rows])
        a_tn = self.activate(u_tn, gate_tn) * full_tn[:, rows]
        return a_tn @ self.v[rows] + (estimated_tn * copied_tn).to(x_td.dtype) @ copies.v_nd

    def choose(self, x_td: torch.Tensor, copies: Copies, budget: Budget) -> Choice:
        """What is evaluated for each token; see the module docstring."""
        found = self.estimate(x_td, copies, budget.inputs)
        return Choice(found.a_tn, *self.tiers(found, budget.price))

    def estimate(self, x_td: torch.Tensor, copies: Copies, inputs: float) -> Estimate:
        """What the copies tell of each expert for each token, from that share of its inputs."""
        return estimate(self, copies, x_td, inputs)

    def tiers(self, found: Estimate, price: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Which experts are evaluated by their copies, and which in full: bool (t, n) each."""
        share = self.costs()[1]
        limit = price * (1 - share)
        kept_tn = found.left_out_tn >= found.copied_tn.clamp(max=limit) + price * share
        full_tn = kept_tn & (found.copied_tn >= limit)
        return kept_tn & ~full_tn, full_tn

    def train(self, mode: bool = True) -> ElasticPool:
        """As of modules; what was made from the weights before is made anew: not every change of them can be seen."""
        self._copies.forget()
        return super().train(mode)

    def copies(self) -> Copies:
        """Copies of the experts as they are now."""
        tables = self._tables()
        if self._learns():
            return make_copies(self)
        if torch.compiler.is_compiling() and self._copies.value is not None:
            return self._copies.value  # type: ignore[no-any-return]
        if torch.compiler.is_compiling() or any(table.is_inference() for table in tables):
            return make_copies(self)
        if not self._copies.is_of(tables):
            self._copies.keep(make_copies(self), tables)
        return self._copies.value  # type: ignore[no-any-return]

    def _learns(self) -> bool:
        """Whether experts may be about to change: not every optimizer says so (fused AdamW raises no version)."""
        return torch.is_grad_enabled() and any(table.requires_grad for table in self._tables())

    def _tables(self) -> list[torch.Tensor]:
        return [table for table in (self.u, self.gate, self.v) if table is not None]

    def costs(self) -> tuple[float, float]:
        """Bytes of a key, and of a copy's output vector, over those of an expert in bfloat16."""
        vectors, d_model = 2 if self.gate is None else 3, self.u.shape[1]
        copy = d_model * self.bits / 8 + 2 * math.ceil(d_model / self.group)
        numbers = 2 * PER_EXPERT * vectors
        return ((vectors - 1) * copy + numbers) / (2 * vectors * d_model), copy / (2 * vectors * d_model)
