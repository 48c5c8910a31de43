# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Products with the tables of experts.

Those of a type that a CPU has no products of are taken in float32: those of float16, and of bfloat16 on most x86 CPUs.
PyTorch's own take 5 to 10 times as long for many tokens, and 10 to 50 times where the table does not lie by outputs
(2.13; float16 with AVX-512, both with AVX2).

Shape suffixes: t tokens, n experts, d d_model, i inputs, o outputs.
"""

from __future__ import annotations

import platform

import torch
import torch.nn.functional as F

FEW = 3  # tokens, up to which a product with a table that lies by outputs is the faster one in 16 bits


def linear(x_ti: torch.Tensor, w_oi: torch.Tensor, b_o: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b."""
    if _by_float32(x_ti, w_oi) and len(x_ti) > FEW:
        return F.linear(x_ti.float(), w_oi.float(), None if b_o is None else b_o.float()).to(x_ti.dtype)
    return F.linear(x_ti, w_oi, b_o)


def combined(a_tn: torch.Tensor, v_nd: torch.Tensor) -> torch.Tensor:
    """The sum of output vectors, each times its activation."""
    return (a_tn.float() @ v_nd.float()).to(a_tn.dtype) if _by_float32(a_tn, v_nd) else a_tn @ v_nd


def _by_float32(x: torch.Tensor, table: torch.Tensor) -> bool:
    slow = x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and LACKS_BFLOAT16)
    return slow and x.dtype == table.dtype and x.is_cpu and not torch.is_autocast_enabled("cpu")


def has_bfloat16() -> bool:
    """Whether the CPU is an x86 with instructions for products in bfloat16; torch has no public word for it."""
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


LACKS_BFLOAT16 = platform.machine() in ("x86_64", "AMD64") and not has_bfloat16()  # a constant, for torch.compile
