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
from torch import nn
from transformers import initialization as init

from .peer_copies import Copies, Estimate, estimate, make_copies, meet_keys
from .peer_cpu import few_tokens, misfit, pack, unsuited, usable
from .peer_evaluation import COARSE, FINE, FULL, at_budget
from .peer_experts import ExpertPool
from .peer_faster import budget_pays, reading_once_pays
from .peer_full import full_usable, in_full
from .peer_gpu import AT_MOST, PackedForGPU, few_tokens_on_gpu, pack_for_gpu, packs_for_gpu
from .peer_products import combined


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
    """How each expert is read for each token."""

    a_tn: torch.Tensor
    """Activations by the coarse copies."""
    tier_tn: torch.Tensor
    """NONE, COARSE, FINE or FULL: uint8."""


def mean_counts(tier_tn: torch.Tensor) -> list[float]:
    """Experts of a token that are read by their coarse copies, by their fine ones, and in full: means."""
    return [float((tier_tn == tier).sum()) / len(tier_tn) for tier in (COARSE, FINE, FULL)]


class Kept:
    """Something made from weights, as long as these are the same; it is neither copied nor pickled with a model."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        self.value: Any = None
        self._made_from: list[tuple[Any, int, int]] = []

    def keep(self, value: Any, tables: list[torch.Tensor]) -> None:
        self.value = value
        self._made_from = [(weakref.ref(table), table.data_ptr(), table._version) for table in tables]

    def is_of(self, tables: list[torch.Tensor]) -> bool:
        """Whether the value was made from these very tensors, as they are now."""
        for table, (ref, place, version) in zip(tables, self._made_from, strict=False):
            if ref() is not table or table.data_ptr() != place or table._version != version:
                return False
        return self.value is not None

    def __deepcopy__(self, _: Any) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


class ElasticPool(ExpertPool):
    """Experts with copies of few bits.

    `input_rms` (d,) is the root mean square of each input on calibration text; it guides the rounding.
    """

    def __init__(self, d_model: int, num_experts: int, *, bits: int, group: int, **form: Any) -> None:
        super().__init__(d_model, num_experts, num_shared=0, **form)
        self.bits, self.group, self.activation = bits, group, form["activation"]
        self.input_rms = nn.Parameter(torch.empty(d_model), requires_grad=False)
        init.ones_(self.input_rms)
        self._copies, self._packed, self._for_gpu = Kept(), Kept(), Kept()
        self.misfit, self.gpu_misfit = misfit(self), unsuited(self)  # None: the kernels take these experts
        self.observer: Callable[[torch.Tensor], None] | None = None

    def reset_parameters(self, *, outputs: bool = True) -> None:
        super().reset_parameters(outputs=outputs)
        if hasattr(self, "input_rms"):  # else still being made
            init.ones_(self.input_rms)

    def forward(  # type: ignore[override]
        self, x_td: torch.Tensor, budget: Budget | None, choice: bool = False, hurry: bool = False
    ) -> torch.Tensor | Choice:
        """The sum of experts (t, d), of all in full without a price; or the `choice` of experts.

        Args:
            hurry: evaluate all in full where it would take no less time to read less.
        """
        if self._learns():
            self._forget()
        if budget is None or budget.price == 0:
            return self._everything(x_td)
        by_kernel = not choice and self.observer is None
        if by_kernel and (not hurry or budget_pays(x_td, budget.bytes)) and usable(self, x_td):
            return few_tokens(self._current(self._packed, pack), x_td, budget)
        on_gpu = self._packed_for_gpu(x_td) if by_kernel else None
        if on_gpu is not None and 0 < len(x_td) <= AT_MOST:
            y_td = few_tokens_on_gpu(on_gpu, x_td, budget)
            if y_td is not None:
                return y_td
        if hurry:
            return self._everything(x_td)
        copies = self.copies()
        return self.choose(x_td, copies, budget) if choice else at_budget(self, x_td, copies, budget)

    def _everything(self, x_td: torch.Tensor) -> torch.Tensor:
        if reading_once_pays(x_td) and full_usable(self, x_td):
            return in_full(self, x_td)
        return combined(self.products(x_td)[2], self.v)

    def choose(self, x_td: torch.Tensor, copies: Copies, budget: Budget) -> Choice:
        """How each expert is read for each token; see the docstring of peer_elastic.py."""
        found = self.estimate(x_td, copies, budget.inputs)
        return Choice(found.a_tn, self.tiers(found, budget.price, budget.inputs))

    def estimate(self, x_td: torch.Tensor, copies: Copies, inputs: float) -> Estimate:
        """What the copies tell of each expert for each token, from that share of its inputs."""
        return estimate(self, copies, meet_keys(self, copies, x_td, inputs))

    def tiers(self, found: Estimate, price: float, inputs: float) -> torch.Tensor:
        """How each expert is read at that price, once that share of the inputs has met the keys: uint8 (t, n)."""
        _, coarse, fine = self.costs(inputs)
        least_tn, tier_tn = found.left_out_tn, torch.zeros_like(found.left_out_tn, dtype=torch.uint8)
        for tier, loss_tn in (
            (COARSE, found.coarse_tn + price * coarse),
            (FINE, found.fine_tn + price * fine),
            (FULL, torch.full_like(least_tn, price)),
        ):
            keeps_tn = loss_tn > least_tn  # not so of numbers that are none: those are not hidden
            tier_tn = tier_tn.masked_fill_(~keeps_tn, tier)
            least_tn = torch.where(keeps_tn, least_tn, loss_tn)
        return tier_tn

    def train(self, mode: bool = True) -> ElasticPool:
        """As of modules; what was made from the weights before is made anew: not every change of them can be seen."""
        self._forget()
        return super().train(mode)

    def _forget(self) -> None:
        self._copies.forget()
        self._packed.forget()
        self._for_gpu.forget()

    def _current(self, kept: Kept, make: Callable[[ElasticPool], Any]) -> Any:
        """What is kept, made anew where it is not of the weights as they are now."""
        tables = self._tables()
        if not kept.is_of(tables):
            kept.keep(make(self), tables)
        return kept.value

    def copies(self) -> Copies:
        """Copies of the experts as they are now."""
        tables = self._tables()
        if self._learns():
            return make_copies(self)
        if torch.compiler.is_compiling() and self._copies.value is not None:
            return self._copies.value  # type: ignore[no-any-return]
        if torch.compiler.is_compiling() or any(table.is_inference() for table in tables):
            return make_copies(self)
        return self._current(self._copies, make_copies)  # type: ignore[no-any-return]

    def _packed_for_gpu(self, x_td: torch.Tensor) -> PackedForGPU | None:
        """What the GPU kernels read; None where they cannot be used. A compiled pass takes what an earlier one made."""
        if torch.compiler.is_compiling():
            usable_now = x_td.dtype == self.u.dtype and not self._learns() and not x_td.requires_grad
            return self._for_gpu.value if usable_now else None
        return self._current(self._for_gpu, pack_for_gpu) if packs_for_gpu(self, x_td) else None

    def _learns(self) -> bool:
        """Whether experts may be about to change: not every optimizer says so (fused AdamW raises no version)."""
        return torch.is_grad_enabled() and any(table.requires_grad for table in self._tables())

    def _tables(self) -> list[torch.Tensor]:
        return [table for table in (self.u, self.gate, self.v) if table is not None]

    def costs(self, inputs: float) -> tuple[float, float, float]:
        """Bytes over those of an expert in bfloat16: of its key, and of what the coarse and the fine copy take besides.

        Args:
            inputs: share of the inputs that meet the keys. Steps of the groups are read anyway. Keys lie by inputs, so
                that those of some inputs can be read; a fine copy needs the rest, and then reads its own key again.
        """
        vectors, d_model = 2 if self.gate is None else 3, self.u.shape[1]
        vector = d_model * self.bits / 8 + 2 * math.ceil(d_model / self.group)
        unread = (1 - inputs) * (vectors - 1) * d_model * self.bits / 8
        again = (vectors - 1) * vector if unread else 0
        numbers = 2 * (2 * vectors + 2)  # of errors and sizes, two bytes each
        parts = (vectors - 1) * vector - unread + numbers, vector, vector + again + vectors * vector
        key, coarse, fine = (part / (2 * vectors * d_model) for part in parts)
        return key, coarse, fine
