# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Retrieved experts on a GPU without copies of their rows, forwards and backwards; needs triton.

`ExpertPool.gathered` copies the rows of what each token retrieved: three tables (t, k, d), kept for the backward pass,
which adds them up again in an order that changes. Two functions do without. `row_dots` multiplies each token with the
rows that it retrieved, and `row_sums` adds up rows. Each is the other's gradient for the tokens. The gradient of a
table sums what the slots of each expert give, sorted once by expert, token and slot, so that gradients are the same
every time. What is between the two functions is of the size (t, k), in float32, and left to PyTorch.

As in peer_gpu.py, results were compared in Triton's interpreter, and no speed has been measured on any GPU.

Shape suffixes: t tokens, d d_model, n experts, k slots: the experts of a token.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .peer_gpu import DTYPES, gpu_obstacle, interpreted
from .peer_keys import Retrieved

SLOTS, WIDTH = 16, 128  # of the rows that a program handles at a time


class Slots(NamedTuple):
    """Which expert is in which slot."""

    index_tk: torch.Tensor
    """Below 0: none."""
    order: torch.Tensor
    """Slots by expert, token and place; those without an expert come first."""
    start: torch.Tensor
    """(n + 1,): where those of each expert begin in `order`."""


def gathers_on_gpu(pool: Any, x_td: torch.Tensor) -> bool:
    """Whether `gathered_on_gpu` can compute what these tokens ask of `pool`."""
    tables = [table for table in (pool.u, pool.gate, pool.v) if table is not None]
    return (
        len(x_td) > 0
        and (x_td.is_cuda or (interpreted and x_td.is_cpu))
        and x_td.dtype in DTYPES
        and all(table.dtype == x_td.dtype and table.device == x_td.device for table in tables)
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and gpu_obstacle() is None
    )


def gathered_on_gpu(pool: Any, x_td: torch.Tensor, found: Retrieved) -> torch.Tensor:
    """The weighted sum of the experts that each token retrieved, (t, d), without the shared ones."""
    index_tk, weight_tk = found
    if not weight_tk.requires_grad:
        index_tk = index_tk.masked_fill(weight_tk == 0, -1)  # not even read
    slots = sorted_slots(index_tk, len(pool.u))
    one_t1 = x_td.new_ones(len(x_td), 1)

    def project(table: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        z_tk = row_dots(x_td, table, slots)
        return z_tk if bias is None else z_tk + row_dots(one_t1, bias[:, None], slots)

    gate_tk = None if pool.gate is None else project(pool.gate, pool.gate_bias)
    a_tk = pool.activate(project(pool.u, pool.u_bias), gate_tk) * weight_tk
    return row_sums(a_tk.float(), pool.v, slots).to(x_td.dtype)


@torch.no_grad()
def sorted_slots(index_tk: torch.Tensor, experts: int) -> Slots:
    """The slots, and their order by expert."""
    index_tk = index_tk.contiguous()
    expert, order = index_tk.flatten().sort(stable=True)
    start = torch.searchsorted(expert, torch.arange(experts + 1, device=expert.device))
    return Slots(index_tk, order, start)


def row_dots(x_td: torch.Tensor, table_nd: torch.Tensor, slots: Slots) -> torch.Tensor:
    """Products of each token with the rows in its slots, float32 (t, k); 0 where there is none."""
    return _RowDots.apply(x_td, table_nd, *slots)  # type: ignore[no-any-return, no-untyped-call]


def row_sums(a_tk: torch.Tensor, table_nd: torch.Tensor, slots: Slots) -> torch.Tensor:
    """The rows in the slots of each token, times `a_tk`, added up: (t, d) of the table's number type."""
    return _RowSums.apply(a_tk, table_nd, *slots)  # type: ignore[no-any-return, no-untyped-call]


class _RowDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_td: torch.Tensor, table_nd: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x_td, table_nd, *slots)
        return _dots(x_td, table_nd, slots[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, z_tk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_td, table_nd, *slots = ctx.saved_tensors
        of_x, of_table = ctx.needs_input_grad[:2]
        return (
            _sums(z_tk, table_nd, slots[0]).to(x_td.dtype) if of_x else None,
            _gradient(z_tk, x_td, table_nd, Slots(*slots)) if of_table else None,
            *(None,) * 3,
        )


class _RowSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a_tk: torch.Tensor, table_nd: torch.Tensor, *slots: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a_tk, table_nd, *slots)
        return _sums(a_tk, table_nd, slots[0])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, y_td: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        a_tk, table_nd, *slots = ctx.saved_tensors
        of_a, of_table = ctx.needs_input_grad[:2]
        return (
            _dots(y_td, table_nd, slots[0]) if of_a else None,
            _gradient(a_tk, y_td, table_nd, Slots(*slots)) if of_table else None,
            *(None,) * 3,
        )


# --- Launches -----------------------------------------------------------------------------------------------------


def _dots(x_td: torch.Tensor, table_nd: torch.Tensor, index_tk: torch.Tensor) -> torch.Tensor:
    from .peer_gpu_experts_kernel import dot_rows

    (tokens, slots), d_model, width = index_tk.shape, x_td.shape[1], _width(x_td.shape[1])
    z_tk = torch.empty(index_tk.shape, dtype=torch.float32, device=x_td.device)
    with _on(x_td):
        dot_rows[(tokens, -(-slots // SLOTS))](
            x_td.contiguous(), table_nd.contiguous(), index_tk, z_tk, slots, d_model, K=SLOTS, D=width
        )
    return z_tk


def _sums(a_tk: torch.Tensor, table_nd: torch.Tensor, index_tk: torch.Tensor) -> torch.Tensor:
    from .peer_gpu_experts_kernel import sum_rows

    (tokens, slots), d_model, width = index_tk.shape, table_nd.shape[1], _width(table_nd.shape[1])
    y_td = table_nd.new_empty(tokens, d_model)
    with _on(a_tk):
        sum_rows[(tokens, -(-d_model // width))](
            a_tk.contiguous(), table_nd.contiguous(), index_tk, y_td, slots, d_model, K=SLOTS, D=width
        )
    return y_td


def _gradient(a_tk: torch.Tensor, x_td: torch.Tensor, table_nd: torch.Tensor, slots: Slots) -> torch.Tensor:
    """That of a table whose rows were multiplied with `x_td` for a result of which `a_tk` is the gradient."""
    from .peer_gpu_experts_kernel import gradient_rows

    (experts, d_model), width = table_nd.shape, _width(table_nd.shape[1])
    gradient_nd = torch.empty_like(table_nd, memory_format=torch.contiguous_format)
    with _on(x_td):
        gradient_rows[(experts, -(-d_model // width))](
            a_tk.contiguous(), x_td.contiguous(), slots.order, slots.start, gradient_nd,
            slots.index_tk.shape[1], d_model, K=SLOTS, D=width,
        )  # fmt: skip
    return gradient_nd


def _width(d_model: int) -> int:
    return min(WIDTH, 1 << (d_model - 1).bit_length())


def _on(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
