# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Kernels for GPUs: whether they can be used. They are written in Triton, and were compared with the plain path there.

Their speed has not been measured on any GPU yet, so they run only where the environment has PEERIFY_KERNELS=triton.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
from typing import Any

import torch
from torch.autograd import forward_ad

from .peer_kernels import SWITCH

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
enabled = os.environ.get(SWITCH) == "triton"
interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # then kernels run on a CPU, for tests
_broken: list[str] = []  # why the kernels cannot be used, once that is known


def obstacle() -> str | None:
    """Why no layer can use the kernels here; None: nothing is in the way."""
    if not enabled:
        off = os.environ.get(SWITCH) == "0"
        return f"switched off by {SWITCH}=0" if off else f"not measured yet; {SWITCH}=triton switches it on"
    if not _has_triton():
        return "triton is not installed"
    if not interpreted and not torch.cuda.is_available():
        return "there is no GPU"
    return _broken[0] if _broken else None


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def reaches(tensor: torch.Tensor) -> bool:
    """Whether that is memory of a GPU (of a CPU where kernels are interpreted), and nothing of a tracer."""
    return (
        enabled
        and (tensor.is_cuda or (interpreted and tensor.is_cpu))
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def broken(error: Exception) -> None:
    """Kernels failed: they are not used any more, and a person is told."""
    _broken.append(f"it failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    print(f"peerify: the GPU kernels are not used, {_broken[-1]}", file=sys.stderr, flush=True)  # noqa: T201


def on_device(x: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Launches go to the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
