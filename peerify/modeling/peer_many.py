# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The steps of an elastic layer for many tokens that are no matrix products, each in one pass on a CPU.

Plain PyTorch rounds a table in some hundred passes over it, and decides how experts are read in some thirty passes over
(t, n) numbers; between matrix products these take most of the time. Here are kernels for them (peer_kernels.py), which
compute what peer_copies.py and peer_evaluation.py do. Where they cannot be used, layers run without.

Shape suffixes: t tokens, d d_model, n experts, g groups.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .peer_kernels import kernel, obstacle, plain, run

# What a kernel is told, by place: numbers, and addresses of contiguous arrays of float32 or as said. Of rounding:
(
    ROWS,
    COLUMNS,
    GROUP,
    HALF,  # of the levels
    NEXT,  # the first row, or token, that no thread has taken
    TABLE,  # (n, d)
    SCALE,  # (d,): what numbers are multiplied with before they are rounded
    WEIGHT,  # (d,): of errors
    CODE,  # uint8 (2, n, groups times their numbers)
    STEP,  # (2, n, g)
    NUMBERS,  # (2, n, d): the coarse and the fine copy; 0: nobody asks
    ERROR,  # (2, n): sums of squares
) = range(12)
# Of the choice and what follows from it; NEXT as above:
(
    TOKENS,
    EXPERTS,
    D_MODEL,
    KIND,  # of the activation function: `ACTIVATIONS`
    _,
    PRICE,  # (3,): the price, and the costs of a coarse and of a fine copy
    STAT,  # (8, n filled up to whole blocks): see `statistics`
    OMITTED,  # (t,): squared norms of the inputs that were not read
    GATE_Z,  # (t, n): projections by the coarse copies, and in the end by what was read
    UP_Z,
    TIER,  # uint8 (t, n)
    COARSE_A,  # (t, n): activations of what is read coarsely, 0 elsewhere
    FINE_GATE_Z,  # (t, n); 0: nothing is read finely
    FINE_UP_Z,
    FINE_A,  # (t, n)
    ALL_A,  # (t, n): activations of all that is read; 0: nobody asks
    X,  # (t, d)
    Y,  # (t, d): the sum of what is read in full
    GATE,  # (n, d), in a number type of its own
    UP,
    OUT,
    BIAS,  # (2, n), of gate and up
    FIELDS,
) = range(23)
Frame = ctypes.c_int64 * FIELDS

ACTIVATIONS = {"silu": 0, "swish": 0, "gelu": 1, "gelu_pytorch_tanh": 2, "gelu_new": 2, "relu": 3, "relu2": 4}
BLOCK = 64  # experts that are decided on at once: a cache line of codes holds what one input meets
LANES = 16  # numbers of a vector
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Table(NamedTuple):
    """Both copies of a table (n, d); the first of each pair is of the coarse one, the second of the fine one."""

    code: torch.Tensor
    """uint8 (2, n, groups times their numbers); the second says what the fine copy adds."""
    step: torch.Tensor
    """float32 (2, n, g)"""
    numbers: torch.Tensor | None
    """float32 (2, n, d)"""
    error: torch.Tensor
    """float32 (2, n): roots of the sums of squared weighted errors."""


def can_round(w_nd: torch.Tensor) -> bool:
    """Whether `both_copies` can be computed of that table."""
    return plain(w_nd.detach()) and w_nd.dtype in DTYPES and obstacle() is None and _work("rounding") is not None


def both_copies(
    w_nd: torch.Tensor, bits: int, group: int, scale_d: torch.Tensor, weight_d: torch.Tensor, *, numbers: bool
) -> Table:
    """A table rounded to 2^bits levels in groups along d, and what that leaves rounded likewise.

    Args:
        scale_d: what numbers are multiplied with before they are rounded.
        weight_d: what errors are multiplied with.
        numbers: whether the copies are wanted as numbers, too.
    """
    rows, columns = w_nd.shape
    groups = math.ceil(columns / group)
    w_nd = w_nd.detach().float().contiguous()
    found = Table(
        torch.empty(2, rows, groups * group, dtype=torch.uint8),
        torch.empty(2, rows, groups),
        torch.empty(2, rows, columns) if numbers else None,
        torch.empty(2, rows),
    )
    frame = Frame()
    frame[ROWS], frame[COLUMNS], frame[GROUP], frame[HALF] = rows, columns, group, 2 ** (bits - 1)
    held = w_nd, scale_d.float().contiguous(), weight_d.float().contiguous(), *found
    for place, tensor in enumerate(held, TABLE):
        frame[place] = 0 if tensor is None else tensor.data_ptr()
    run(_work("rounding"), frame)
    return found._replace(error=found.error.sqrt_())


# --- The choice ---------------------------------------------------------------------------------------------------


def can_choose(pool: Any, x_td: torch.Tensor) -> bool:
    """Whether `Choosing` can be used for these tokens."""
    return (
        plain(x_td)
        and x_td.dtype in DTYPES
        and pool.gate is not None
        and not pool.clamp
        and pool.activation in ACTIVATIONS
        and x_td.shape[1] % LANES == 0
        and plain(pool.u.detach())
        and pool.u.dtype in DTYPES
        and obstacle() is None
        and _work(_name(pool.u.dtype)) is not None
        and _work("choice") is not None
    )


def statistics(copies: Any) -> torch.Tensor:
    """What is known of experts and their copies, float32 (8, n filled up to whole blocks)."""
    coarse, fine = copies.coarse, copies.fine
    stats = [
        coarse.u_error_n, coarse.gate_error_n, copies.u_rms_n, copies.gate_rms_n, copies.energy_n, coarse.v_error_n,
        fine.gate_error_n, fine.v_error_n,
    ]  # fmt: skip
    return F.pad(torch.stack([stat.float() for stat in stats]), (0, -len(copies.energy_n) % BLOCK)).contiguous()


class Choosing:
    """How experts are read for some tokens, and what follows; in the order of the methods.

    Args:
        gate_tn, u_tn: projections by the keys, float32; in the end they are those by what was read.
        omitted_t1: squared norms of the inputs that were not read; None: all were.
        price: and the costs of a coarse and of a fine copy.
    """

    def __init__(
        self,
        pool: Any,
        copies: Any,
        gate_tn: torch.Tensor,
        u_tn: torch.Tensor,
        omitted_t1: torch.Tensor | None,
        price: list[float],
    ) -> None:
        self.pool = pool
        self.gate_tn, self.u_tn = gate_tn.float().contiguous(), u_tn.float().contiguous()
        tokens, experts = gate_tn.shape
        self.tier_tn = torch.empty(tokens, experts, dtype=torch.uint8)
        self.coarse_tn = torch.empty(tokens, experts)
        omitted_t = torch.zeros(tokens) if omitted_t1 is None else omitted_t1.float().flatten().contiguous()
        self._held = [torch.tensor(price), statistics(copies), omitted_t, self.gate_tn, self.u_tn]
        frame = self._frame = Frame()
        frame[TOKENS], frame[EXPERTS], frame[KIND] = tokens, experts, ACTIVATIONS[pool.activation]
        for place, tensor in enumerate([*self._held, self.tier_tn, self.coarse_tn], PRICE):
            frame[place] = tensor.data_ptr()
        run(_work("choice"), frame)

    def settle(
        self, x_td: torch.Tensor, fine: tuple[torch.Tensor, torch.Tensor] | None, everything: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
        """Activations of what is read finely (t, n), the sum of what is read in full (t, d), and all activations.

        Args:
            fine: gate and up projections by the fine copies (t, n), where anything is read finely.
            everything: whether all activations are wanted, and projections by what was read in place of the keys'.
        """
        pool, frame = self.pool, self._frame
        tables = [table.detach().contiguous() for table in (pool.gate, pool.u, pool.v)]
        biases = [
            torch.zeros(len(pool.u)) if bias is None else bias.detach().float()
            for bias in (pool.gate_bias, pool.u_bias)
        ]
        numbers = [None, None] if fine is None else [z.float().contiguous() for z in fine]
        fine_tn = None if fine is None else torch.empty_like(self.coarse_tn)
        all_tn = torch.empty_like(self.coarse_tn) if everything else None
        x_td = x_td.detach().float().contiguous()
        y_td = torch.zeros_like(x_td)
        held = [*numbers, fine_tn, all_tn, x_td, y_td, *tables, torch.stack(biases)]
        for place, tensor in enumerate(held, FINE_GATE_Z):
            frame[place] = 0 if tensor is None else tensor.data_ptr()
        frame[NEXT], frame[D_MODEL] = 0, x_td.shape[1]
        run(_work(_name(pool.u.dtype)), frame)
        return fine_tn, y_td, all_tn


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _work(name: str) -> Any:
    def compiled() -> Any:
        from .peer_many_kernel import compiled

        return compiled(name)

    return kernel(f"kernel for many tokens, {name}", compiled)
