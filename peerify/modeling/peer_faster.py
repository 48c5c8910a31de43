# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Which way of evaluating an elastic layer takes the least time on a CPU, from measurements.

For few tokens there are three: PyTorch's products with all experts, the kernel that reads all of them once
(peer_full.py), and the one that keeps to the budget (peer_cpu.py). Processors differ in all three. PyTorch's products
are a library of Intel's, which with one token reads memory twice as fast on Intel's processors as on others.

All figures are from benchmarks/speed/few_tokens.py, on two cores. With more cores for the same memory the budget would
pay at larger shares.
"""

from __future__ import annotations

import functools
import platform
from typing import NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Limits(NamedTuple):
    """Where which kernel is the fastest way, by number type.

    Attributes:
        budget: for up to so many tokens, the largest share of the dense layer's bytes at which the budget's kernel is.
        full: for how many tokens, at least and at most, the kernel is, of the ways that evaluate all experts.
    """

    budget: dict[torch.dtype, tuple[tuple[int, float], ...]]
    full: dict[torch.dtype, tuple[int, int]]


INTEL = Limits(  # Xeon with AVX-512 and AMX
    budget={
        torch.float32: ((1, 0.6), (2, 0.5), (4, 0.4), (6, 0.33), (8, 0.2)),
        torch.bfloat16: ((1, 0.65), (2, 0.55), (3, 0.45), (4, 0.3), (6, 0.18), (8, 0.12)),
        torch.float16: ((1, 0.6), (2, 0.55), (3, 0.5), (4, 0.28), (6, 0.22), (8, 0.18)),
    },
    full={torch.float32: (3, 8), torch.bfloat16: (1, 8), torch.float16: (1, 8)},
)
AMD = Limits(  # EPYC with AVX-512
    budget={
        torch.float32: ((1, 0.6), (2, 0.25), (4, 0.15)),
        torch.bfloat16: ((1, 0.25),),
        torch.float16: ((1, 0.15),),
    },
    full={torch.float32: (1, 8), torch.bfloat16: (1, 8)},
)
AMD_AVX2 = Limits(  # EPYC of the first generations, without AVX-512
    budget={
        torch.float32: ((1, 0.4), (2, 0.25), (3, 0.2), (6, 0.12)),
        torch.bfloat16: ((3, 0.2), (8, 0.13)),
        torch.float16: ((3, 0.2), (8, 0.12)),
    },
    full={torch.float32: (1, 8), torch.bfloat16: (1, 8), torch.float16: (1, 8)},
)
# Not measured: what pays on the others.
INTEL_AVX2 = Limits(AMD_AVX2.budget, INTEL.full)
OTHERS = Limits(AMD.budget, full={torch.float32: (3, 8), torch.bfloat16: (1, 8)})


@functools.cache
def limits() -> Limits:
    """Those of this machine's processor."""
    try:
        from llvmlite import binding
    except ImportError:  # then there are no kernels
        return OTHERS
    if platform.machine() not in ("x86_64", "AMD64"):
        return OTHERS
    amd = binding.get_host_cpu_name().startswith(("znver", "bdver", "btver"))
    if binding.get_host_cpu_features().get("avx512bw"):
        return AMD if amd else INTEL
    return AMD_AVX2 if amd else INTEL_AVX2


def budget_pays(x_td: torch.Tensor, share: float) -> bool:
    """Whether keeping to that share of the bytes takes less time than evaluating all experts for these tokens."""
    if torch.compiler.is_compiling():  # kernels are not traced
        return False
    tokens = len(x_td)
    return any(tokens <= few and share <= most for few, most in limits().budget.get(x_td.dtype, ()))


def reading_once_pays(x_td: torch.Tensor) -> bool:
    """Whether all experts by the kernel take less time than by PyTorch's products."""
    if torch.compiler.is_compiling():
        return False
    least, most = limits().full.get(x_td.dtype, (1, 0))
    return least <= len(x_td) <= most
