# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Products with the tables of experts.

Those of float16 on a CPU are taken in float32. PyTorch's own take 5 times as long for many tokens, and 10 times as long
where the table does not lie by outputs (2.13, AVX-512 without float16).

Shape suffixes: t tokens, n experts, d d_model, i inputs, o outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

FEW = 3  # tokens, up to which a product with a table that lies by outputs is the faster one in float16


def linear(x_ti: torch.Tensor, w_oi: torch.Tensor, b_o: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b."""
    if _by_float32(x_ti, w_oi) and len(x_ti) > FEW:
        return F.linear(x_ti.float(), w_oi.float(), None if b_o is None else b_o.float()).to(x_ti.dtype)
    return F.linear(x_ti, w_oi, b_o)


def combined(a_tn: torch.Tensor, v_nd: torch.Tensor) -> torch.Tensor:
    """The sum of output vectors, each times its activation."""
    return (a_tn.float() @ v_nd.float()).to(a_tn.dtype) if _by_float32(a_tn, v_nd) else a_tn @ v_nd


def _by_float32(x: torch.Tensor, table: torch.Tensor) -> bool:
    return x.dtype == table.dtype == torch.float16 and x.is_cpu and not torch.is_autocast_enabled("cpu")
