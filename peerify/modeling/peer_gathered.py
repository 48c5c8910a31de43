# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Experts that are given as indices, evaluated without a copy of their rows.

Three products make up the experts and all of their derivatives. With table_nd and the experts index_tk of each token,

    project:  z_tk = x_td . table[index_tk]             combine:  y_td = sum over k of a_tk table[index_tk]
    scatter:  table_nd = sum over all (t, k) with index_tk = n of a_tk x_td

and the derivatives of each are the other two: that of a product with a table is a scatter, and so on. Plain PyTorch
makes a (t, k, d) copy of rows for the first two. Activation functions stand between them and are PyTorch's own.

A scatter into large tables writes few of their rows: with `Rows.sparse` gradients of tables hold these alone, as those
of torch.nn.Embedding(sparse=True) do.

Sums are in float32, whatever the tables have. A row of a scatter is summed in the order of tokens by one thread, so
gradients are the same every time. The kernels are numba's on a CPU (peer_kernels.py), and Triton's on a GPU
(peer_gathered_gpu.py). Where they cannot be used, or do not fit, layers run without.

Shape suffixes: t tokens, d d_model, n experts, k experts of a token, p pairs of a token and an expert, s experts that
any token has.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from typing import Any

import torch
from torch import nn

from .peer_gathered_gpu import combine, project, scatter, usable_on_gpu
from .peer_kernels import kernel, obstacle, plain, run
from .peer_triton import reaches

# What a kernel is told, by place: numbers, and addresses of contiguous arrays of float32 or as said.
(
    PRODUCT,
    NUMBERS,  # (t, k): z or a
    VECTORS,  # (t, d): x or y
    TABLE,  # (n, d), in a number type of its own
    INDEX,  # int64 (t, k)
    NEXT,  # the first piece of the work that no thread has taken
    COUNT,  # tokens, or in a scatter experts that any token has
    WIDTH,  # d
    EACH,  # k
    ROW_BYTES,  # of the table
    ORDER,  # int64 (p,): pairs, those of one expert beside each other
    START,  # int64 (s + 1,): where those of each expert begin
    EXPERT,  # int64 (s,): which expert it is
    FIELDS,
) = range(14)
PROJECT, COMBINE, SCATTER = range(3)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LANES = 16  # numbers of a vector
Frame = ctypes.c_int64 * FIELDS


class Rows:
    """Which rows of the tables each token meets.

    Args:
        index_tk: experts, int64.
        experts: how many there are.
        sparse: gradients of tables are sparse, of the rows that any token meets; they have no derivative.

    Raises:
        IndexError: there is no such expert; kernels would read what is not theirs. On a GPU nobody looks, for that
            would wait until all indices are there.
    """

    def __init__(self, index_tk: torch.Tensor, experts: int, *, sparse: bool = False) -> None:
        self.index_tk, self.experts, self.sparse = index_tk.contiguous(), experts, sparse
        if index_tk.numel() and not index_tk.is_cuda:
            low, high = map(int, torch.aminmax(index_tk))
            if low < 0 or high >= experts:
                raise IndexError(f"experts {low} to {high} are asked for, of {experts}")

    @property
    def shared(self) -> bool:
        """Whether tokens have so many experts in common that to go by experts reads fewer rows from memory."""
        return len(self.index_tk) > 1 and 4 * self.index_tk.numel() > self.experts

    @functools.cached_property
    def by_expert(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pairs by expert (p,), where those of each expert begin (s + 1,), and which expert it is (s,)."""
        expert_p, order_p = self.index_tk.flatten().sort(stable=True)
        expert_s, count_s = torch.unique_consecutive(expert_p, return_counts=True)
        start = count_s.new_zeros(len(expert_s) + 1)
        torch.cumsum(count_s, 0, out=start[1:])
        return order_p, start, expert_s

    @functools.cached_property
    def of_all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs by expert (p,), and where those of each expert there is begin (n + 1,): known without waiting."""
        expert_p, order_p = self.index_tk.flatten().sort(stable=True)
        return order_p, torch.searchsorted(expert_p, torch.arange(self.experts + 1, device=expert_p.device))


def _run(product: int, numbers_tk: torch.Tensor, vectors_td: torch.Tensor, table_nd: torch.Tensor, rows: Rows) -> None:
    """One of the products, of contiguous tensors; it overwrites the one of them that is its result.

    A scatter may go to a table of those experts alone that any token has, in their order.
    """
    whole = len(table_nd) == rows.experts
    if reaches(table_nd):
        if product == PROJECT:
            project(numbers_tk, vectors_td, table_nd, rows.index_tk)
        elif product == COMBINE:
            combine(numbers_tk, vectors_td, table_nd, rows.index_tk)
        else:
            scatter(numbers_tk, vectors_td, table_nd, rows.index_tk, *(rows.of_all if whole else rows.by_expert[:2]))
        return
    frame = Frame()
    frame[PRODUCT], frame[COUNT] = product, len(vectors_td)
    frame[WIDTH], frame[EACH] = vectors_td.shape[1], numbers_tk.shape[1]
    frame[ROW_BYTES] = table_nd.shape[1] * table_nd.element_size()
    frame[NUMBERS], frame[VECTORS], frame[TABLE] = numbers_tk.data_ptr(), vectors_td.data_ptr(), table_nd.data_ptr()
    frame[INDEX] = rows.index_tk.data_ptr()
    if product == SCATTER:
        order_p, start, expert_s = rows.by_expert
        place_s = expert_s if whole else torch.arange(len(expert_s))
        frame[COUNT] = len(expert_s)
        frame[ORDER], frame[START], frame[EXPERT] = order_p.data_ptr(), start.data_ptr(), place_s.data_ptr()
    elif product == PROJECT and rows.shared:
        frame[ORDER] = rows.by_expert[0].data_ptr()
    run(_work(table_nd.dtype), frame)


class Project(torch.autograd.Function):
    """z_tk of x_td (float32), a table and `Rows`."""

    @staticmethod
    def forward(ctx: Any, x_td: torch.Tensor, table_nd: torch.Tensor, rows: Rows) -> torch.Tensor:
        x_td = x_td.contiguous()
        ctx.save_for_backward(x_td, table_nd)
        ctx.rows = rows
        z_tk = x_td.new_empty(rows.index_tk.shape)
        _run(PROJECT, z_tk, x_td, table_nd, rows)
        return z_tk

    @staticmethod
    def backward(ctx: Any, grad_tk: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x_td, table_nd = ctx.saved_tensors
        to_x, to_table, _ = ctx.needs_input_grad
        return (
            Combine.apply(grad_tk, table_nd, ctx.rows) if to_x else None,
            _to_table(grad_tk, x_td, ctx.rows, table_nd.dtype) if to_table else None,
            None,
        )


class Combine(torch.autograd.Function):
    """y_td of a_tk (float32), a table and `Rows`."""

    @staticmethod
    def forward(ctx: Any, a_tk: torch.Tensor, table_nd: torch.Tensor, rows: Rows) -> torch.Tensor:
        a_tk = a_tk.contiguous()
        ctx.save_for_backward(a_tk, table_nd)
        ctx.rows = rows
        y_td = a_tk.new_empty(len(a_tk), table_nd.shape[1])
        _run(COMBINE, a_tk, y_td, table_nd, rows)
        return y_td

    @staticmethod
    def backward(ctx: Any, grad_td: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        a_tk, table_nd = ctx.saved_tensors
        to_a, to_table, _ = ctx.needs_input_grad
        return (
            Project.apply(grad_td, table_nd, ctx.rows) if to_a else None,
            _to_table(a_tk, grad_td, ctx.rows, table_nd.dtype) if to_table else None,
            None,
        )


class Scatter(torch.autograd.Function):
    """table_nd, in a number type of its own, of a_tk and x_td (float32) and `Rows`: 0 where no token has the expert."""

    @staticmethod
    def forward(ctx: Any, a_tk: torch.Tensor, x_td: torch.Tensor, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
        a_tk, x_td = a_tk.contiguous(), x_td.contiguous()
        ctx.save_for_backward(a_tk, x_td)
        ctx.rows = rows
        size = rows.experts, x_td.shape[1]
        table_nd = x_td.new_empty(size, dtype=dtype) if reaches(x_td) else zeros(*size, dtype)
        _run(SCATTER, a_tk, x_td, table_nd, rows)
        return table_nd

    @staticmethod
    def backward(ctx: Any, grad_nd: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        a_tk, x_td = ctx.saved_tensors
        to_a, to_x, _, _ = ctx.needs_input_grad
        grad_nd = grad_nd.contiguous()
        return (
            Project.apply(x_td, grad_nd, ctx.rows) if to_a else None,
            Combine.apply(a_tk, grad_nd, ctx.rows) if to_x else None,
            None,
            None,
        )


def _to_table(a_tk: torch.Tensor, x_td: torch.Tensor, rows: Rows, dtype: torch.dtype) -> torch.Tensor:
    """A table's gradient: `Scatter`, or of rows alone.

    Raises:
        RuntimeError: a derivative of sparse gradients is asked for.
    """
    if not rows.sparse:
        return Scatter.apply(a_tk, x_td, rows, dtype)  # type: ignore[no-any-return]
    if torch.is_grad_enabled():
        raise RuntimeError("sparse gradients of tables have no derivative: set `sparse` of the pool to False")
    expert_s = rows.by_expert[2]
    value_sd = x_td.new_empty(len(expert_s), x_td.shape[1], dtype=dtype)
    _run(SCATTER, a_tk.contiguous(), x_td.contiguous(), value_sd, rows)
    size = rows.experts, x_td.shape[1]
    return torch.sparse_coo_tensor(expert_s[None], value_sd, size, is_coalesced=True, check_invariants=False)


def zeros(experts: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """A table of zeros in memory of its own, of which the system makes only those pages that are written.

    Large pages would be fewer, but the system may take a second to find room for them.
    """
    size = experts * width * dtype.itemsize
    if size < 2**20 or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.zeros(experts, width, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(experts, width)


# --- Whether they can be used -------------------------------------------------------------------------------------


def usable(x_td: torch.Tensor, *tables: torch.Tensor) -> bool:
    """Whether the products can be computed of these tokens and tables."""
    u_nd = tables[0]
    return (
        type(x_td) is torch.Tensor
        and x_td.dtype in DTYPES
        and (x_td.dtype == u_nd.dtype or torch.is_autocast_enabled(x_td.device.type))
        and x_td.shape[1] == u_nd.shape[1]
        and all(
            type(table) in (torch.Tensor, nn.Parameter)
            and table.device == x_td.device
            and table.dtype == u_nd.dtype in DTYPES
            and table.shape == u_nd.shape
            and table.is_contiguous()
            for table in tables
        )
        and (usable_on_gpu(x_td, u_nd) or _usable_on_cpu(x_td, u_nd))
    )


def _usable_on_cpu(x_td: torch.Tensor, u_nd: torch.Tensor) -> bool:
    return plain(x_td) and x_td.shape[1] % LANES == 0 and obstacle() is None and _work(u_nd.dtype) is not None


def _work(dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")

    def compile_it() -> Any:
        from .peer_gathered_kernel import compiled

        return compiled(name)

    return kernel(f"kernel for gathered rows in {name}", compile_it)
