# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The sum of an elastic layer at a budget, for many tokens, and its gradients.

Sums are dense products with copies, where what is not read counts 0. Gradients are those of a layer that evaluates in
full what was read, at the activations that were found: they pass to the experts as if nothing were rounded, and cost no
more than the dense layer's.

Shape suffixes: t tokens, d d_model, n experts, r some of the experts, i inputs, o outputs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .peer_copies import Copies, estimate, meet_keys
from .peer_cpu import FEW
from .peer_many import Choosing, can_choose
from .peer_products import combined, linear

AT_ONCE = 256  # tokens, on a CPU: so many fit its cache
NONE, COARSE, FINE, FULL = range(4)  # how an expert is read: not at all, by one of its copies, in full


class Found(NamedTuple):
    """What was computed at a budget."""

    y_td: torch.Tensor
    tier_tn: torch.Tensor
    """NONE, COARSE, FINE or FULL: uint8."""
    a_tn: torch.Tensor | None
    """Activations of what was read, 0 elsewhere; this and the next where gradients are asked for."""
    gate_tn: torch.Tensor | None
    """Projections by what was read."""
    u_tn: torch.Tensor | None


def at_budget(pool: Any, x_td: torch.Tensor, copies: Copies, budget: Any) -> torch.Tensor:
    """The sum of experts (t, d) of an `ElasticPool` with these copies, at a budget with a price."""
    tables = [pool.u, pool.v, pool.gate, pool.u_bias, pool.gate_bias]
    learns = torch.is_grad_enabled() and any(w is not None and w.requires_grad for w in (x_td, *tables))
    if not learns and x_td.device.type == "cpu" and len(x_td) > AT_ONCE and not torch.compiler.is_compiling():
        return torch.cat([at_budget(pool, part, copies, budget) for part in x_td.split(AT_ONCE)])
    with torch.no_grad():
        evaluated = _by_kernels if can_choose(pool, x_td) else _plainly
        found = evaluated(pool, x_td, copies, budget, learns)
    if pool.observer is not None:
        pool.observer(found.tier_tn)
    return _with_gradients(pool, x_td, found) if learns else found.y_td


def _by_kernels(pool: Any, x_td: torch.Tensor, copies: Copies, budget: Any, learns: bool) -> Found:
    keyed, fine = meet_keys(pool, copies, x_td, budget.inputs), copies.fine
    assert keyed.gate_tn is not None
    costs = [budget.price, *pool.costs(budget.inputs)[1:]]
    choosing = Choosing(pool, copies, keyed.gate_tn, keyed.u_tn, keyed.omitted_t1, costs)
    projected = None
    if bool((choosing.tier_tn == FINE).any()):
        assert fine.gate_nd is not None
        projected = linear(x_td, fine.gate_nd, pool.gate_bias), linear(x_td, fine.u_nd, pool.u_bias)
    fine_tn, full_td, all_tn = choosing.settle(x_td, projected, learns)
    y_td = combined(choosing.coarse_tn.to(x_td.dtype), copies.coarse.v_nd)
    y_td = y_td + full_td.to(y_td.dtype)
    if fine_tn is not None:
        y_td = y_td + combined(fine_tn.to(x_td.dtype), fine.v_nd)
    return Found(y_td, choosing.tier_tn, all_tn, choosing.gate_tn, choosing.u_tn)


def _plainly(pool: Any, x_td: torch.Tensor, copies: Copies, budget: Any, learns: bool) -> Found:
    keyed = meet_keys(pool, copies, x_td, budget.inputs)
    estimated = estimate(pool, copies, keyed)
    tier_tn = pool.tiers(estimated, budget.price, budget.inputs)
    a_tn, gate_tn, u_tn = estimated.a_tn * (tier_tn == COARSE), keyed.gate_tn, keyed.u_tn
    y_td = combined(a_tn.to(x_td.dtype), copies.coarse.v_nd)
    tracing, fine = torch.compiler.is_compiling() or torch.jit.is_tracing(), copies.fine
    for tier, u_nd, gate_nd, v_nd in ((FINE, fine.u_nd, fine.gate_nd, fine.v_nd), (FULL, pool.u, pool.gate, pool.v)):
        mask_tn, rows = tier_tn == tier, slice(None)  # type: torch.Tensor, Any
        if not tracing:
            used_n = mask_tn.any(0)
            if not bool(used_n.any()):
                continue
            if len(x_td) <= FEW and not learns:
                rows = used_n.nonzero()[:, 0]
        u_tr = linear(x_td, u_nd[rows], None if pool.u_bias is None else pool.u_bias[rows])
        gate_tr = None
        if gate_nd is not None:
            gate_tr = linear(x_td, gate_nd[rows], None if pool.gate_bias is None else pool.gate_bias[rows])
        a_tr = pool.activate(u_tr, gate_tr) * mask_tn[:, rows]
        y_td = y_td + combined(a_tr, v_nd[rows])
        if learns:
            a_tn, u_tn = a_tn + a_tr, torch.where(mask_tn, u_tr, u_tn)
            gate_tn = None if gate_tn is None or gate_tr is None else torch.where(mask_tn, gate_tr, gate_tn)
    return Found(y_td, tier_tn, a_tn, gate_tn, u_tn)


def _with_gradients(pool: Any, x_td: torch.Tensor, found: Found) -> torch.Tensor:
    """What was found, as a function of the tokens and of the experts themselves."""
    dtype = found.y_td.dtype
    assert found.u_tn is not None
    assert found.a_tn is not None
    u_tn = _AsLinear.apply(found.u_tn.to(dtype), x_td, pool.u, pool.u_bias)
    gate_tn = None
    if found.gate_tn is not None:
        gate_tn = _AsLinear.apply(found.gate_tn.to(dtype), x_td, pool.gate, pool.gate_bias)
    a_tn = pool.activate(u_tn, gate_tn) * (found.tier_tn != NONE).to(dtype)
    return _AsLinear.apply(found.y_td, _As.apply(found.a_tn.to(dtype), a_tn), pool.v.T, None)  # type: ignore[no-any-return]


class _As(torch.autograd.Function):
    """Numbers with the gradients of others."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor]:  # type: ignore[override]
        return None, grad


class _AsLinear(torch.autograd.Function):
    """Numbers (t, o) with the gradients of x_ti w_oi^T + b_o."""

    @staticmethod
    def forward(
        ctx: Any, value_to: torch.Tensor, x_ti: torch.Tensor, w_oi: torch.Tensor, b_o: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_ti, w_oi)
        return value_to.view_as(value_to)

    @staticmethod
    def backward(ctx: Any, grad_to: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_ti, w_oi = ctx.saved_tensors
        _, to_x, to_w, to_b = ctx.needs_input_grad
        return (
            None,
            (grad_to @ w_oi.to(grad_to.dtype)).to(x_ti.dtype) if to_x else None,
            (grad_to.T @ x_ti.to(grad_to.dtype)).to(w_oi.dtype) if to_w else None,
            grad_to.sum(0).to(w_oi.dtype) if to_b else None,
        )
