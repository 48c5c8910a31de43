# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""A PEER layer that reads each expert as closely as a token needs it, at any budget.

    y = sum over i in F(x) of e_i(x)  +  sum over copies c of sum over i in C_c(x) of a^_ci(x) v^_ci  [+ bias]

Every expert has a coarse copy of few bits and a fine one of twice as many (peer_copies.py). The input and gate vectors
of the coarse one are the expert's key. For each token and expert the products with the key tell the squared error that
the output would have if the expert were left out, or taken from its coarse or its fine copy. Of these three, and of
reading it in full, without error and at the cost 1, what makes error plus price times cost least is taken. The key is
read anyway, so the coarse copy costs only its output vector.

A price is a threshold: nothing is sorted, and hard tokens take more than easy ones. A layer knows the prices for
several budgets. With a budget of 1 every expert is evaluated in full, and the layer is the dense layer. A memory
(peer_memory.py) that has learned something adds to it at any budget.

Experts evaluated by their copy alone are what product-key memory has (Lample et al., 1907.05242): values weighted by a
function of the product of key and query. Those evaluated in full are PEER's.

Shape suffixes: t tokens, d d_model, n experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import initialization as init

from .peer_elastic_pool import Budget, ElasticPool, mean_counts
from .peer_evaluation import NONE
from .peer_memory import Memory, memory_cost


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
        self.memory: Memory | None = None
        self.budget: Budget | None = None
        self.prefill_all = True

    def set_active(self, active: float) -> None:
        """Spend so much of the dense layers' bytes from now on: 1 evaluates every expert in full.

        What a memory reads comes besides. Shares between two budgets are interpolated, in the logarithm of the price.

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
        if self.memory is not None:
            self.memory.reset_parameters()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Same shape and dtype in and out: (..., d_model)."""
        x_td = hidden_states.reshape(-1, self.d_model)
        y_td = self.pool(x_td, self.budget, hurry=self.prefill_all and not self.training)
        if self.bias is not None:
            y_td = y_td + self.bias
        if self.memory is not None:
            y_td = y_td + self.memory(x_td)
        return y_td.view(hidden_states.shape)

    @torch.no_grad()
    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        """Which experts add to the output of each token at the budget, in full or by their copies: bool (t, n)."""
        return self.usage(x_td)[0]

    @torch.no_grad()
    def usage(self, x_td: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        """`active_experts`, and what these tokens spend at the budget: mean bytes and multiply-adds, as `cost`."""
        if self.budget is None or self.budget.price == 0:
            everything = torch.ones(len(x_td), self.num_experts, dtype=torch.bool, device=x_td.device)
            read, done = memory_cost(self)
            return everything, 1.0 + read, 1.0 + done
        return self._spent(self.pool(x_td, self.budget, choice=True).tier_tn, self.budget)

    def watch(self, used: Callable[[torch.Tensor, float, float], None] | None) -> None:
        """From now on call `used` with what `usage` returns for the tokens of each forward pass at a budget."""
        if used is None:
            self.pool.observer = None
            return

        def observe(tier_tn: torch.Tensor) -> None:
            assert self.budget is not None
            used(*self._spent(tier_tn, self.budget))

        self.pool.observer = observe

    def _spent(self, tier_tn: torch.Tensor, budget: Budget) -> tuple[torch.Tensor, float, float]:
        return tier_tn != NONE, *self.cost(budget.inputs, mean_counts(tier_tn))

    def cost(self, inputs: float, counts: Sequence[float]) -> tuple[float, float]:
        """Bytes and multiply-adds of a token, those of the memory among them, as shares of the dense layer's.

        Args:
            inputs: share of the inputs that meet the keys.
            counts: experts that are read by their coarse copies, by their fine ones, and in full.
        """
        vectors = 2 if self.pool.gate is None else 3
        key, coarse, fine = self.pool.costs(inputs)
        of_key = inputs * (vectors - 1) / vectors
        read = sum(n * cost for n, cost in zip(counts, (coarse, fine, 1.0), strict=True))
        again = 1 if inputs == 1 else 2 - 1 / vectors  # the fine copy's part of the key; if not all was read, the rest
        done = sum(n * cost for n, cost in zip(counts, (1 / vectors, again, 1.0), strict=True))
        norms = 1 / vectors  # of the inputs
        memory = memory_cost(self)
        return (
            (self.num_experts * key + read + norms) / self.d_ff + memory[0],
            (self.num_experts * of_key + done) / self.d_ff + memory[1],
        )

    @property
    def bytes_fraction(self) -> float:
        """Bytes of weights that a token reads, over the dense layer's in bfloat16; as measured on calibration text,
        and the memory's."""
        return (1.0 if self.budget is None else self.budget.bytes) + memory_cost(self)[0]

    @property
    def macs_fraction(self) -> float:
        """Multiply-adds of a token over the dense layer's, likewise."""
        return (1.0 if self.budget is None else self.budget.macs) + memory_cost(self)[1]

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
