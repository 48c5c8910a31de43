# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""A PEER layer that reads each expert as closely as a token needs it, at any budget.

    y = sum over i in F(x) of e_i(x)  +  sum over i in C(x) of a^_i(x) v^_i  [+ bias]

Every expert has a copy of few bits (peer_copies.py). Its input and gate vectors are the expert's key. For each token
and expert the products with the key tell the squared error that the output would have if the expert were left out, D0,
or taken from its copy, D1. Experts in F are evaluated in full, those in C by their copies, others are left out: of the
three, what makes error plus price times cost least. The cost of reading an expert in full is 1 and that of its copy's
output vector c; the key is read anyway. So, with the price p,

    kept      D0 >= p c + min(D1, p (1 - c)),
    in full   kept and D1 >= p (1 - c).

A price is a threshold: nothing is sorted, and hard tokens take more than easy ones. A layer knows the prices for
several budgets. With a budget of 1 every expert is evaluated in full, and the layer is the dense layer.

Experts evaluated by their copy alone are what product-key memory has (Lample et al., 1907.05242): values weighted by a
function of the product of key and query. Those evaluated in full are PEER's.

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


class ElasticPEER(nn.Module):
    """A PEER layer for any budget; see the module docstring.

    Args:
        d_model: width of input and output.
        num_experts: experts in the pool.
        activation, gated, expert_bias, gate_bias, output_bias, clamp: the form of the experts, as of `PEER`.
        bits: of each number of the copies, 2 to 8.
        group: numbers of a copy that share a step.
        budgets: rows of `Budget`, the smallest share first.
        d_ff: neurons of the dense layer this one replaces; for reporting only. Default: `num_experts`.

    Raises:
        ValueError: bits, a group or a budget outside its range.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        *,
        activation: str = "gelu",
        gated: bool = False,
        expert_bias: bool = False,
        gate_bias: bool = False,
        output_bias: bool = False,
        clamp: dict[str, float] | None = None,
        bits: int = 4,
        group: int = 64,
        budgets: list[list[float]] | None = None,
        d_ff: int | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {bits}")
        if group < 1:
            raise ValueError(f"group must be at least 1, not {group}")
        self.d_model, self.num_experts = d_model, num_experts
        self.d_ff = num_experts if d_ff is None else d_ff
        self.budgets = [Budget(*map(float, row)) for row in budgets or []]
        for before, row in zip([None, *self.budgets], self.budgets, strict=False):
            _check(row, before)
        self.pool = ElasticPool(
            d_model, num_experts, bits=bits, group=group, activation=activation, gated=gated,
            expert_bias=expert_bias, gate_bias=gate_bias, clamp=clamp,
        )  # fmt: skip
        self.bias = nn.Parameter(torch.zeros(d_model)) if output_bias else None
        self.budget: Budget | None = None
        self.prefill_all = True

    def set_active(self, active: float) -> None:
        """Spend so much of the dense layers' bytes from now on: 1 evaluates every expert in full.

        Shares between two budgets are interpolated, in the logarithm of the price.

        Raises:
            ValueError: less than the smallest budget, or above 1.
        """
        if not self.budgets or active == 1:
            least = self.budgets[0].active if self.budgets else 1.0
            if active != 1:
                raise ValueError(f"active must be {least:g} to 1, not {active:g}")
            self.budget = None
            return
        if not self.budgets[0].active <= active <= 1:
            raise ValueError(f"active must be {self.budgets[0].active:g} to 1, not {active:g}")
        above = next((row for row in self.budgets if row.active >= active), None)
        below = [row for row in self.budgets if row.active <= active][-1]
        if above is None or above is below:
            self.budget = below
            return
        part = (active - below.active) / (above.active - below.active)
        mix = [(1 - part) * a + part * b for a, b in zip(below, above, strict=True)]
        price = below.price ** (1 - part) * above.price**part
        # With fewer inputs the same price buys less: between budgets that read other shares of them the lower holds.
        alike = below.inputs == above.inputs and above.price > 0
        self.budget = Budget(mix[0], mix[1], price, mix[3], mix[4]) if alike else below

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded."""
        self.pool.reset_parameters()
        if self.bias is not None:
            init.zeros_(self.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype in and out: (..., d_model)."""
        x_td = hidden_states.reshape(-1, self.d_model)
        prefill = self.prefill_all and not self.training and hidden_states.shape[-2] > PREFILL
        y_td = self.pool(x_td, None if prefill else self.budget)
        if self.bias is not None:
            y_td = y_td + self.bias
        return y_td.view(hidden_states.shape)

    @torch.no_grad()
    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        """Which experts add to the output of each token at the budget, in full or by their copies: bool (t, n)."""
        return self.usage(x_td)[0]

    @torch.no_grad()
    def usage(self, x_td: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """`active_experts`, and what these tokens spend at the budget: mean bytes and multiply-adds, as `cost`."""
        if self.budget is None or self.budget.price == 0:
            return torch.ones(len(x_td), self.num_experts, dtype=torch.bool, device=x_td.device), 1.0, 1.0
        _, copied_tn, full_tn = self.pool(x_td, self.budget, choice=True)
        copied, full = float(copied_tn.sum()) / len(x_td), float(full_tn.sum()) / len(x_td)
        return copied_tn | full_tn, *self.cost(self.budget.inputs, copied, full)

    def watch(self, used: Callable[[torch.Tensor, float, float], None] | None) -> None:
        """From now on call `used` with what `usage` returns for the tokens of each forward pass at a budget."""
        if used is None:
            self.pool.observer = None
            return

        def observe(copied_tn: torch.Tensor, full_tn: torch.Tensor) -> None:
            assert self.budget is not None
            copied, full = float(copied_tn.sum()) / len(copied_tn), float(full_tn.sum()) / len(full_tn)
            used(copied_tn | full_tn, *self.cost(self.budget.inputs, copied, full))

        self.pool.observer = observe

    def cost(self, inputs: float, copied: float, full: float) -> tuple[float, float]:
        """Bytes and multiply-adds of a token, as shares of the dense layer's.

        Args:
            inputs: share of the inputs that meet the keys.
            copied, full: experts evaluated by their copies, and in full.
        """
        pool = self.pool
        key, value = pool.costs()
        vectors = 2 if pool.gate is None else 3
        unread = (1 - inputs) * (vectors - 1) * pool.bits / 8 / (2 * vectors)  # steps of the groups are read anyway
        read = self.num_experts * (key - unread) + copied * value + full + 1 / vectors  # the norms of the inputs
        done = self.num_experts * inputs * (vectors - 1) / vectors + copied / vectors + full
        return read / self.d_ff, done / self.d_ff

    @property
    def bytes_fraction(self) -> float:
        """Bytes of weights that a token reads, over the dense layer's in bfloat16; as measured on calibration text."""
        return 1.0 if self.budget is None else self.budget.bytes

    @property
    def macs_fraction(self) -> float:
        """Multiply-adds of a token over the dense layer's, likewise."""
        return 1.0 if self.budget is None else self.budget.macs

    @property
    def weight(self) -> torch.Tensor:
        """Empty, of the experts' number type and device: what an architecture may ask of the linear layer it had."""
        return self.pool.u.detach().new_empty(0, 1)

    def extra_repr(self) -> str:
        active = 1.0 if self.budget is None else self.budget.active
        return f"d_model={self.d_model}, num_experts={self.num_experts}, active={active:g}, bits={self.pool.bits}"


def _check(row: Budget, before: Budget | None) -> None:
    if not all(map(math.isfinite, row)):
        raise ValueError(f"a budget has a number that is not finite: {[*row]}")
    if not (0 < row.active < 1 and 0 < row.inputs <= 1 and row.price >= 0):
        raise ValueError(f"a budget needs active in (0, 1), inputs in (0, 1] and a price of at least 0, not {[*row]}")
    if before is not None and row.active <= before.active:
        raise ValueError(f"budgets must rise, and {row.active:g} follows {before.active:g}")
