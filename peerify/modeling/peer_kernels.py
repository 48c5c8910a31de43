# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Kernels for CPUs: whether they can be used, how numba builds them, and the threads they run in.

Threads are those of PyTorch, started by its own OpenMP library: a second set of threads would wait for the first one's
cores. Without numba or that library, layers run without kernels.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

SWITCH = "PEERIFY_KERNELS"  # environment variable: 0 switches kernels off
enabled = os.environ.get(SWITCH) != "0"
PATIENCE = 3.0  # seconds of compiling, after which a person is told why nothing happens


def obstacle() -> str | None:
    """Why no layer can use a kernel here; None: nothing is in the way."""
    if not enabled:
        return f"switched off by {SWITCH}=0"
    if not _has_numba():
        return "numba is not installed"
    if torch.get_num_threads() > 1 and _openmp() is None:
        return "PyTorch's threads are not OpenMP's, or its library cannot be called"
    return _broken[0] if _broken else None


@functools.cache
def _has_numba() -> bool:
    return importlib.util.find_spec("numba") is not None


def plain(tensor: torch.Tensor) -> bool:
    """Whether that is memory of a CPU to be read now, and nothing of a compiler, a tracer or a transformation."""
    return (
        type(tensor) is torch.Tensor
        and tensor.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


def run(work: Any, frame: Any) -> None:
    """Run a kernel in each of PyTorch's threads; each is given the address of the same frame."""
    threads = 1 if _forked else torch.get_num_threads()
    if threads == 1:
        work(ctypes.addressof(frame))
    else:
        openmp = _openmp()
        assert openmp is not None
        openmp(work, ctypes.addressof(frame), threads, 0)


@functools.cache
def _openmp() -> Callable[..., None] | None:
    """`GOMP_parallel(function, argument, threads, flags)` of the library whose threads PyTorch uses."""
    try:  # PyTorch loads its libraries so that every other one finds their symbols
        found = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None
    found.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    found.restype = None
    return found  # type: ignore[no-any-return]


_broken: list[str] = []  # why a kernel could not be built, once that is known
_forked: list[bool] = []  # threads of OpenMP do not survive a fork
_compiling = threading.Lock()
_compiled: dict[str, Any] = {}
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: _forked.append(True))


def kernel(name: str, compiled: Callable[[], Any]) -> Any:
    """The kernel of that name, a C function of the address of a frame; None where it cannot be built.

    Args:
        name: what a person is told is being compiled.
        compiled: compiles it by numba's `cfunc`; called once.
    """
    if name not in _compiled:
        with _compiling:
            if name not in _compiled:
                _compiled[name] = _built(name, compiled)
    return _compiled[name]


def _built(name: str, compiled: Callable[[], Any]) -> Any:
    told = threading.Timer(PATIENCE, _say, [f"compiling the CPU {name}: once, about ten seconds"])
    told.daemon = True
    told.start()
    try:
        function = compiled()
    except Exception as error:  # numba's and LLVM's errors have no class in common
        _broken.append(f"it could not be built: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        _say(f"the CPU kernel is not used, {_broken[-1]}")
        return None
    finally:
        told.cancel()
    work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function.address)
    work.compiled = function  # type: ignore[attr-defined]  # lives as long
    return work


def _say(text: str) -> None:
    print(f"peerify: {text}", file=sys.stderr, flush=True)  # noqa: T201
