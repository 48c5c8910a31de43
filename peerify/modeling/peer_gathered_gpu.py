# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The three products of peer_gathered.py on a GPU, in Triton (peer_triton.py).

Each number of a result is summed by one program in a fixed order, so that gradients are the same every time.

Shape suffixes: as in peer_gathered.py.
"""

from __future__ import annotations

from typing import Any

import torch

from .peer_triton import DTYPES, broken, obstacle, on_device, reaches

SLOTS, WIDTH = 16, 128  # of the rows that a program handles at a time
_tried: set[tuple[torch.dtype, torch.device]] = set()


def usable_on_gpu(x_td: torch.Tensor, u_nd: torch.Tensor) -> bool:
    """Whether the products can be computed of these tokens and such tables."""
    return (
        reaches(x_td)
        and not torch.compiler.is_compiling()
        and u_nd.device == x_td.device
        and u_nd.dtype in DTYPES
        and obstacle() is None
        and _works(u_nd)
    )


def _works(table: torch.Tensor) -> bool:
    """Tries each kernel once for tables of such numbers."""
    tried = (table.dtype, table.device)
    if tried not in _tried:
        one = torch.ones(1, 1, device=table.device)
        index = torch.zeros(1, 1, dtype=torch.int64, device=table.device)
        try:
            project(one, one, one.to(table.dtype), index)
            combine(one, one, one.to(table.dtype), index)
            scatter(one, one, one.to(table.dtype), index, index[0], torch.tensor([0, 1], device=table.device))
        except Exception as error:  # those of Triton, of the compilers under it and of drivers have no class in common
            broken(error)
            return False
        _tried.add(tried)
    return True


def project(z_tk: torch.Tensor, x_td: torch.Tensor, table_nd: torch.Tensor, index_tk: torch.Tensor) -> None:
    """Overwrites z_tk."""
    from .peer_gathered_gpu_kernel import project_rows

    (tokens, slots), d_model = index_tk.shape, x_td.shape[1]
    with on_device(x_td):
        project_rows[(tokens, -(-slots // SLOTS))](
            x_td, table_nd, index_tk, z_tk, slots, d_model, K=SLOTS, D=_width(d_model)
        )


def combine(a_tk: torch.Tensor, y_td: torch.Tensor, table_nd: torch.Tensor, index_tk: torch.Tensor) -> None:
    """Overwrites y_td."""
    from .peer_gathered_gpu_kernel import combine_rows

    (tokens, slots), d_model = index_tk.shape, y_td.shape[1]
    width = _width(d_model)
    with on_device(a_tk):
        combine_rows[(tokens, -(-d_model // width))](
            a_tk, table_nd, index_tk, y_td, slots, d_model, K=SLOTS, D=width
        )  # fmt: skip


def scatter(
    a_tk: torch.Tensor, x_td: torch.Tensor, table_nd: torch.Tensor, index_tk: torch.Tensor, order_p: Any, start: Any
) -> None:
    """Overwrites the whole table; `start` (n + 1,) says where the pairs of each expert begin in `order_p`."""
    from .peer_gathered_gpu_kernel import scatter_rows

    (experts, d_model), slots = table_nd.shape, index_tk.shape[1]
    width = _width(d_model)
    with on_device(x_td):
        scatter_rows[(experts, -(-d_model // width))](
            a_tk, x_td, order_p, start, table_nd, slots, d_model, K=SLOTS, D=width
        )  # fmt: skip


def _width(d_model: int) -> int:
    return min(WIDTH, 1 << (d_model - 1).bit_length())
