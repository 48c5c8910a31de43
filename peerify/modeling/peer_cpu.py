# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""An elastic layer for few tokens on a CPU, in one pass over what each token reads; needs numba.

What `ElasticPool` does by dense products with numbers is done here on packed codes, so that time follows the bytes that
a budget leaves. Where kernels cannot be used (peer_kernels.py), layers run without this.

Keys lie by inputs: a byte holds the gate's code of an expert in its low half and the up code in its high half, so that
inputs which are not read are skipped, and products run along experts. All other codes lie by experts. A byte of those
holds numbers j and j + half a group of one vector.

Shape suffixes: t tokens, d d_model filled up to whole groups, n experts, k blocks, b experts of a block, c chunks of
blocks, g groups.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
import torch.nn.functional as F

from .peer_copies import Rounded, make_codes, make_copies
from .peer_faster import DTYPES
from .peer_kernels import kernel, obstacle, run
from .peer_many import ACTIVATIONS, BLOCK

FEW = 8  # tokens, the most that the kernel is used for
# Of the experts of a block where their keys lie: the bits of 4 and of 16 change places; see `key_products`.
KEY_ORDER = [b & 0b101011 | (b >> 2 & 0b00100) | (b << 2 & 0b10000) for b in range(BLOCK)]
CHUNKS_AT_MOST = 16  # of blocks; each has a sum of its own, so that results do not depend on the threads


# What the kernel is told, by place: numbers, and addresses of contiguous arrays of float32 or as said.
(
    X,  # (t, d_model)
    Y,  # (t, d_model): the result
    PARTS,  # (c, t, d): the sum of each chunk
    CHUNKS,
    NEXT,  # the first chunk that no thread has taken
    DONE,  # how many chunks are done
    THREADS,
    TOKENS,
    INPUTS,  # how many of them meet the keys
    PRICE,  # (3,): the price, and the costs of a coarse and of a fine copy
    D_MODEL,
    PADDED,  # d_model filled up to whole groups
    GROUP,
    EXPERTS,
    BLOCKS,
    KIND,  # of the activation function: `ACTIVATIONS`
    KEY,  # uint8 (k, d, b) in `KEY_ORDER`: gate codes in the low halves, up codes in the high ones
    KEY_STEP,  # (k, g, 2, b), of gate and up
    KEY_N,  # uint8 (n, d): the keys once more, by experts
    KEY_STEP_N,  # (n, 2, g)
    CODE,  # uint8 (n, 2 d): what the fine copy adds to the key, the coarse copy of v, what the fine one adds to that
    STEP,  # (n, 4, g), of these: gate, up, and twice v
    STAT,  # (8, n): see `pack`
    BIAS,  # (2, n), of gate and up
    SCALE,  # (d_model,): what inputs are divided by before they meet codes
    REACH,  # (d_model,)
    U,  # (n, d_model): the experts, in their own number type
    GATE,
    V,
    FIELDS,
) = range(30)
Frame = ctypes.c_int64 * FIELDS


class Packed:
    """What the kernel reads of a layer besides its experts: `tables`, in the order of the fields from KEY to REACH."""

    def __init__(self, pool: Any, tables: list[torch.Tensor], padded: int, blocks: int) -> None:
        self.tables = tables
        chunks = math.ceil(blocks / math.ceil(blocks / CHUNKS_AT_MOST))
        self.parts = chunks * padded  # numbers of the sums of one token
        self._costs, self._d_model = pool.costs, pool.u.shape[1]
        self._frame = Frame()
        self._frame[D_MODEL], self._frame[PADDED], self._frame[GROUP] = self._d_model, padded, pool.group
        self._frame[EXPERTS], self._frame[BLOCKS], self._frame[KIND] = len(pool.u), blocks, ACTIVATIONS[pool.activation]
        self._frame[CHUNKS] = chunks
        for place, table in enumerate([*tables, pool.u, pool.gate, pool.v], KEY):
            self._frame[place] = table.data_ptr()
        self._at: dict[tuple[Any, int], tuple[bytes, torch.Tensor]] = {}

    def frame(self, budget: Any, tokens: int) -> Any:
        """A frame that lacks only where tokens and results are. It costs as little as can be: it is made every time."""
        if (budget, tokens) not in self._at:
            price = torch.tensor([budget.price, *self._costs(budget.inputs)[1:]], dtype=torch.float32)
            frame = Frame.from_buffer_copy(self._frame)
            frame[TOKENS], frame[INPUTS] = tokens, max(1, round(budget.inputs * self._d_model))
            frame[PRICE] = price.data_ptr()
            self._at[budget, tokens] = bytes(frame), price
        return Frame.from_buffer_copy(self._at[budget, tokens][0])


# --- Whether it can be used ---------------------------------------------------------------------------------------


def misfit(pool: Any) -> str | None:
    """Why the kernel cannot be used for these experts; None: it can."""
    d_model, group = pool.u.shape[1], pool.group
    if group % 32 or d_model % 16:
        return f"{d_model} inputs in groups of {group} are not multiples of 16 and 32"
    return unsuited(pool)


def unsuited(pool: Any) -> str | None:
    """Why no kernel for few tokens, of whatever device, can be used for these experts; None: one may."""
    for wrong, reason in (
        (pool.gate is None, "its experts have no gate"),
        (pool.bits != 4, f"its copies have {pool.bits} bits, not 4"),
        (bool(pool.clamp), "its experts are clamped"),
        (pool.activation not in ACTIVATIONS, f"its activation function is {pool.activation}"),
    ):
        if wrong:
            return reason
    return None


def usable(pool: Any, x_td: torch.Tensor) -> bool:
    """Whether the kernel can compute what these tokens ask of `pool`."""
    u_nd = pool.u
    return (
        0 < len(x_td) <= FEW
        and type(x_td) is torch.Tensor  # no tensor of a tracer
        and x_td.is_cpu
        and x_td.dtype == u_nd.dtype
        and x_td.dtype in DTYPES
        and not (torch.is_grad_enabled() and (x_td.requires_grad or u_nd.requires_grad))
        and pool.misfit is None
        # Tables that change unseen, or come and go, would be packed for every token.
        and not u_nd.is_inference()
        and pool._parameters.keys() >= {"u", "gate", "v"}  # none is computed from adapters
        and not hasattr(pool, "_hf_hook")
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and obstacle() is None
        and _work(x_td.dtype) is not None
    )


# --- Packing ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pack(pool: Any) -> Packed:
    """The codes of a pool's experts as they are now, and what is known of their errors."""
    codes = make_codes(pool)
    copies = make_copies(pool, codes)
    assert codes.gate is not None
    n = len(pool.u)
    blocks = math.ceil(n / BLOCK)
    filling = blocks * BLOCK - n  # with zeros, so that what is there is left out

    def by_inputs(table: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (k, ..., b)."""
        padded = F.pad(table, (0, 0) * (table.dim() - 1) + (0, filling))
        return padded.unflatten(0, (blocks, BLOCK)).movedim(1, -1)

    def paired(gate: Rounded, u: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, d) and steps (n, 2, g) of gate and up vectors."""
        return (gate.code_ngc | (u.code_ngc << 4)).flatten(1), torch.stack([gate.step_ng, u.step_ng], 1)

    def halved(v: Rounded) -> torch.Tensor:
        low, high = v.code_ngc.split(pool.group // 2, -1)
        return (low | (high << 4)).flatten(1)

    (key, key_steps), (rest, rest_steps) = (paired(*pair) for pair in zip(codes.gate, codes.u, strict=True))
    coarse, fine = copies.coarse, copies.fine
    stats = [
        coarse.u_error_n, coarse.gate_error_n, copies.u_rms_n, copies.gate_rms_n, copies.energy_n, coarse.v_error_n,
        fine.gate_error_n, fine.v_error_n,
    ]  # fmt: skip
    none = torch.zeros(n)
    biases = [none if bias is None else bias.float() for bias in (pool.gate_bias, pool.u_bias)]
    tables = [
        by_inputs(key)[..., KEY_ORDER],
        by_inputs(key_steps.transpose(1, 2)),
        key,
        key_steps,
        # One piece of memory for each expert, since several would be waited for one by one: what the fine copy adds to
        # the key, the coarse copy of the output vector, and what the fine one adds to that.
        torch.cat([rest, *map(halved, codes.v)], 1),
        torch.cat([rest_steps, *(v.step_ng[:, None] for v in codes.v)], 1),
        F.pad(torch.stack([stat.float() for stat in stats]), (0, filling)),  # type: ignore[union-attr]
        F.pad(torch.stack(biases), (0, filling)),
        codes.scale_d.float(),
        copies.reach_d.float(),
    ]
    tables = [table.contiguous() for table in tables]
    return Packed(pool, tables, key.shape[1], blocks)


# --- Running ------------------------------------------------------------------------------------------------------


def few_tokens(packed: Packed, x_td: torch.Tensor, budget: Any) -> torch.Tensor:
    """What the pool that was packed computes at a budget with a price; `usable` says when."""
    whole = x_td.dtype == torch.float32
    x_td = x_td.contiguous()
    x, y_td = x_td if whole else x_td.float(), torch.empty_like(x_td, dtype=torch.float32)
    parts = torch.empty(len(x_td) * packed.parts)
    frame = packed.frame(budget, len(x_td))
    frame[THREADS] = torch.get_num_threads()
    frame[X], frame[Y], frame[PARTS] = x.data_ptr(), y_td.data_ptr(), parts.data_ptr()
    work = _work(x_td.dtype)
    assert work is not None
    run(work, frame)
    return y_td if whole else y_td.to(x_td.dtype)


def _work(dtype: torch.dtype) -> Any:
    """The kernel for that number type, compiled where it was not before; None where that fails."""
    name = str(dtype).removeprefix("torch.")

    def compile_it() -> Any:
        from .peer_cpu_kernel import compiled

        return compiled(name)

    return kernel(f"kernel for {name}", compile_it)
