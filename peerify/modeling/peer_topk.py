# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The search for the largest scores, on a CPU by kernels where these can be used (peer_kernels.py).

Shape suffixes: t tokens, h heads, a grid rows, b grid columns, k retrieved experts.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from .peer_kernels import kernel, obstacle, plain, run

# What a kernel is told, by place: numbers, and addresses of contiguous arrays of float32 or as said.
(
    SCORES,  # (r, m): rows of scores
    OTHER_SCORES,  # of grids: scores of columns, those of rows being in SCORES
    INDEX,  # int64 (r, k): the result. Of grids, the rows that were found
    COLUMN_INDEX,  # and the columns
    NEXT,  # the first piece of the work that no thread has taken
    ROWS,  # r
    WIDTH,  # m
    OTHER_WIDTH,
    EACH,  # k
    FIELDS,
) = range(10)
MOST = 64  # that are searched for one by one; for more, to put all into two parts is faster
Frame = ctypes.c_int64 * FIELDS


def searches(score: torch.Tensor, k: int) -> bool:
    """Whether the kernels can find the `k` largest, and take less time than PyTorch."""
    return (
        plain(score)
        and score.dtype == torch.float32
        and 0 < k <= min(MOST, score.shape[-1])
        and obstacle() is None
        and _work("largest") is not None
        and _work("cells") is not None
    )


def largest(score: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the `k` largest along the last dimension, in falling order; `searches` says when."""
    score, back = _in_order(score)
    index = torch.empty(*score.shape[:-1], k, dtype=torch.int64)
    frame = Frame()
    frame[SCORES], frame[INDEX] = score.data_ptr(), index.data_ptr()
    frame[ROWS], frame[WIDTH], frame[EACH] = index.numel() // k, score.shape[-1], k
    run(_work("largest"), frame)
    return index.permute(back)


def cells(row_tha: torch.Tensor, column_thb: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns (t, h, k) of the cells with the `k` largest scores, a cell's being the sum of its row's and its
    column's, in falling order; where `searches` says so for both, and there are so many cells.
    """
    row_tha, back = _in_order(row_tha)
    column_thb = column_thb.detach().permute(back).contiguous()  # of two numbers, to and fro are the same
    row_thk = torch.empty(*row_tha.shape[:-1], k, dtype=torch.int64)
    column_thk = torch.empty_like(row_thk)
    frame = Frame()
    frame[SCORES], frame[OTHER_SCORES] = row_tha.data_ptr(), column_thb.data_ptr()
    frame[INDEX], frame[COLUMN_INDEX] = row_thk.data_ptr(), column_thk.data_ptr()
    frame[ROWS], frame[EACH] = row_thk.numel() // k, k
    frame[WIDTH], frame[OTHER_WIDTH] = row_tha.shape[-1], column_thb.shape[-1]
    run(_work("cells"), frame)
    return row_thk.permute(back), column_thk.permute(back)


class Picked(torch.autograd.Function):
    """`score.gather(-1, index)`, of which the backward pass needs indices only: PyTorch's own keeps all scores."""

    @staticmethod
    def forward(ctx: Any, score: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(index)
        ctx.width = score.shape[-1]
        return score.gather(-1, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        return grad.new_zeros(*index.shape[:-1], ctx.width).scatter_add(-1, index, grad), None


def _in_order(score: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Scores in the order in which they lie in memory, by heads or by tokens, so that nothing is copied; and the order
    of dimensions that leads back.
    """
    last = score.dim() - 1
    order = [*sorted(range(last), key=score.stride, reverse=True), last]
    return score.detach().permute(order).contiguous(), [order.index(dim) for dim in range(last + 1)]


def _work(what: str) -> Any:
    def compile_it() -> Any:
        from .peer_topk_kernel import compiled

        return compiled(what)

    return kernel(f"kernel for the largest scores ({what})", compile_it)
