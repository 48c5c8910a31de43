# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Rows of the experts that each token retrieved, in Triton; peer_gathered_gpu.py launches this.

Rows are met where they are in their tables: nothing of the size (t, k, d) is made. Each result is written by one
program, which adds up in a fixed order.

Shape suffixes: t tokens, d d_model, n experts, k slots: the experts of a token.
"""

from __future__ import annotations

try:  # transformers refuses code that imports what is not installed, unless it stands in such a block
    import triton
    import triton.language as tl
except ImportError:
    raise


@triton.jit(do_not_specialize=["slots"])
def project_rows(x, table, index, z, slots, d_model, K: tl.constexpr, D: tl.constexpr):
    """z_tk = x_t . row index_tk of the table (n, d_model)."""
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1) * K + tl.arange(0, K)
    n_k = tl.load(index + t * slots + k, k < slots, 0)
    sum_kd = tl.zeros([K, D], tl.float32)
    for first in range(0, d_model, D):
        d = first + tl.arange(0, D)
        x_d = tl.load(x + t * d_model + d, d < d_model, 0.0).to(tl.float32)
        row_kd = tl.load(
            table + n_k[:, None] * d_model + d[None, :], (k < slots)[:, None] & (d < d_model)[None, :], 0.0
        )
        sum_kd += row_kd.to(tl.float32) * x_d[None, :]
    tl.store(z + t * slots + k, tl.sum(sum_kd, 1), k < slots)


@triton.jit(do_not_specialize=["slots"])
def combine_rows(a, table, index, y, slots, d_model, K: tl.constexpr, D: tl.constexpr):
    """y_t = sum over k of a_tk times row index_tk of the table."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    sum_kd = tl.zeros([K, D], tl.float32)
    for first in range(0, slots, K):
        k = first + tl.arange(0, K)
        n_k, a_k = tl.load(index + t * slots + k, k < slots, 0), tl.load(a + t * slots + k, k < slots, 0.0)
        row_kd = tl.load(
            table + n_k[:, None] * d_model + d[None, :], (k < slots)[:, None] & (d < d_model)[None, :], 0.0
        )
        sum_kd += a_k[:, None] * row_kd.to(tl.float32)
    tl.store(y + t * d_model + d, tl.sum(sum_kd, 0).to(y.dtype.element_ty), d < d_model)


@triton.jit(do_not_specialize=["slots"])
def scatter_rows(a, x, order, start, table, slots, d_model, K: tl.constexpr, D: tl.constexpr):
    """Row i of the table: the sum of a_tk x_t over all pairs of token t and expert i.

    `order` lists the pairs of each expert, one expert after another; those of expert i begin at start_i.
    """
    n, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * D + tl.arange(0, D)
    end = tl.load(start + n + 1)
    sum_kd = tl.zeros([K, D], tl.float32)
    for first in range(tl.load(start + n), end, K):
        i = first + tl.arange(0, K)
        slot_k = tl.load(order + i, i < end, 0)
        a_k = tl.load(a + slot_k, i < end, 0.0)
        x_kd = tl.load(
            x + (slot_k // slots)[:, None] * d_model + d[None, :], (i < end)[:, None] & (d < d_model)[None, :], 0.0
        )
        sum_kd += a_k[:, None] * x_kd.to(tl.float32)
    tl.store(table + n * d_model + d, tl.sum(sum_kd, 0).to(table.dtype.element_ty), d < d_model)
