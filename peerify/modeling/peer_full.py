# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""All experts in full, for few tokens on a CPU: each row is read once, as fast as memory gives it.

Sums are in float32. peer_faster.py says where PyTorch's products are no faster.

Shape suffixes: t tokens, d d_model, n experts, c chunks of experts.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from .peer_faster import DTYPES
from .peer_kernels import kernel, obstacle, plain, run
from .peer_many import ACTIVATIONS

# What the kernel is told, by place: numbers, and addresses of contiguous arrays of float32 or as said.
(
    X,  # (t, d)
    Y,  # (t, d): the result
    PARTS,  # (c, t, d): the sum of each chunk
    CHUNKS,
    EACH,  # experts of a chunk
    NEXT,  # the first chunk that no thread has taken
    DONE,  # how many chunks are done
    TOKENS,
    D_MODEL,
    EXPERTS,
    KIND,  # of the activation function: `ACTIVATIONS`
    GATED,
    BIAS,  # (2, n), of gate and up; 0: none
    U,  # (n, d): the experts, in their own number type
    GATE,
    V,
    FIELDS,
) = range(17)
Frame = ctypes.c_int64 * FIELDS
FEW = 8  # tokens, the most that the kernel is used for
LANES, CHUNK = 16, 96  # numbers of a vector; experts of a chunk, more where there would be more than CHUNKS_AT_MOST
CHUNKS_AT_MOST = 16


def full_usable(pool: Any, x_td: torch.Tensor) -> bool:
    """Whether the kernel can compute the sum of all experts of `pool` for these tokens."""
    u_nd = pool.u
    return (
        0 < len(x_td) <= FEW
        and x_td.dtype in DTYPES
        and plain(x_td)
        and x_td.dtype == u_nd.dtype
        and x_td.shape[1] % LANES == 0
        and not (torch.is_grad_enabled() and (x_td.requires_grad or u_nd.requires_grad))
        and pool.activation in ACTIVATIONS
        and not pool.clamp
        and pool._parameters.keys() >= {"u", "v"} | ({"gate"} if pool.gate is not None else set())  # no adapters'
        and all(w is None or (plain(w.detach()) and w.is_contiguous()) for w in (u_nd, pool.gate, pool.v))
        and not hasattr(pool, "_hf_hook")
        and not torch.is_autocast_enabled("cpu")
        and obstacle() is None
        and _work(x_td.dtype) is not None
    )


@torch.no_grad()
def in_full(pool: Any, x_td: torch.Tensor) -> torch.Tensor:
    """The sum of all experts (t, d); `full_usable` says when."""
    tokens, d_model = x_td.shape
    experts = len(pool.u)
    each = max(CHUNK, math.ceil(experts / CHUNKS_AT_MOST))
    chunks = math.ceil(experts / each)
    x, y_td = x_td.float().contiguous(), torch.empty(tokens, d_model)
    parts = torch.empty(chunks, tokens, d_model)
    biases = [pool.gate_bias, pool.u_bias]
    bias = None
    if any(each is not None for each in biases):
        bias = torch.stack([torch.zeros(experts) if b is None else b.float() for b in biases])
    frame = Frame()
    frame[X], frame[Y], frame[PARTS] = x.data_ptr(), y_td.data_ptr(), parts.data_ptr()
    frame[CHUNKS], frame[EACH], frame[TOKENS], frame[D_MODEL], frame[EXPERTS] = chunks, each, tokens, d_model, experts
    frame[KIND], frame[GATED] = ACTIVATIONS[pool.activation], pool.gate is not None
    frame[BIAS] = 0 if bias is None else bias.data_ptr()
    gate_nd = pool.u if pool.gate is None else pool.gate
    frame[U], frame[GATE], frame[V] = pool.u.data_ptr(), gate_nd.data_ptr(), pool.v.data_ptr()
    run(_work(x_td.dtype), frame)
    return y_td.to(x_td.dtype)


def _work(dtype: torch.dtype) -> Any:
    name = str(dtype).removeprefix("torch.")

    def compile_it() -> Any:
        from .peer_full_kernel import compiled

        return compiled(name)

    return kernel(f"kernel for all experts in {name}", compile_it)
