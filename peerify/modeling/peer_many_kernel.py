# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The kernels of peer_many.py, compiled by numba.

Each thread takes rows of a table, or tokens, until none is left. What becomes of one does not depend on the others.

Shape suffixes: t tokens, d d_model, n experts, g groups, j numbers of a group, b experts of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_choice_kernel import activate, activated, decide
from .peer_cpu_vectors import add_full, full_dots
from .peer_lanes import Lanes, equal
from .peer_many import (
    ALL_A,
    BIAS,
    BLOCK,
    COARSE_A,
    D_MODEL,
    EXPERTS,
    FINE_A,
    FINE_GATE_Z,
    FINE_UP_Z,
    GATE,
    GATE_Z,
    KIND,
    NEXT,
    OMITTED,
    OUT,
    PRICE,
    STAT,
    TIER,
    TOKENS,
    UP,
    UP_Z,
    X,
    Y,
)
from .peer_rounding_kernel import rounding
from .peer_vectors import FAST, LANES, after, along, at, bytes_, floats, halves, take, words

try:  # see peer_vectors.py
    from numba import cfunc, njit, types
    from numba.extending import intrinsic
except ImportError:
    raise

FINE, FULL = 2, 3  # of peer_evaluation.py, which imports more than is read here


@njit(fastmath=set(FAST))
def _choice(frame: Any) -> None:
    tokens, experts, kind = frame[TOKENS], frame[EXPERTS], frame[KIND]
    blocks = (experts + BLOCK - 1) // BLOCK
    stride = blocks * BLOCK
    stat, omitted, price = floats(frame[STAT]), floats(frame[OMITTED]), floats(frame[PRICE])
    bias, room = np.zeros((2, stride), np.float32), np.zeros((6, BLOCK), np.float32)
    tier_b, a_3b = np.empty(BLOCK, np.uint8), at(room, 3 * BLOCK)
    while True:
        t = take(after(frame, NEXT))
        if t >= tokens:
            break
        for k in range(blocks):
            start = t * experts + k * BLOCK
            here = min(BLOCK, experts - k * BLOCK)
            gate, u = after(floats(frame[GATE_Z]), start), after(floats(frame[UP_Z]), start)
            coarse, tier = after(floats(frame[COARSE_A]), start), after(bytes_(frame[TIER]), start)
            if here == BLOCK:
                decide(
                    gate, u, after(stat, k * BLOCK), at(bias, 0), stride, omitted[t], price, kind, a_3b, coarse, tier
                )
                continue
            for b in range(here):
                room[0, b] = gate[b]
                room[1, b] = u[b]
            decide(
                at(room, 0), at(room, BLOCK), after(stat, k * BLOCK), at(bias, 0), stride, omitted[t], price, kind,
                a_3b, at(room, 2 * BLOCK), at(tier_b, 0),
            )  # fmt: skip
            for b in range(here):
                coarse[b] = room[2, b]
                tier[b] = tier_b[b]


@intrinsic
def _take_fine(_: Any, tier: Any, act: Any, u: Any, fine: Any, __: Any) -> Any:
    """Activations of what is read finely, from activated gate projections; 0 of others."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        tier, act, u, fine, count = values
        with along(b, 0, count) as (j, _):
            a = Lanes.loaded(b, act, j) * Lanes.loaded(b, u, j)
            equal(b, tier, j, FINE).choose(a, a.like(0.0)).store(fine, j)

    return types.void(tier, act, u, fine, types.int64), build


@intrinsic
def _where_fine(_: Any, tier: Any, z: Any, fine_z: Any, __: Any) -> Any:
    """Put projections by the fine copies where these are read."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        tier, z, fine_z, count = values
        with along(b, 0, count) as (j, _):
            equal(b, tier, j, FINE).choose(Lanes.loaded(b, fine_z, j), Lanes.loaded(b, z, j)).store(z, j)

    return types.void(tier, z, fine_z, types.int64), build


@njit(fastmath=set(FAST))
def _settle(frame: Any, gate: Any, up: Any, out: Any) -> None:
    tokens, experts, d_model, kind = frame[TOKENS], frame[EXPERTS], frame[D_MODEL], frame[KIND]
    bias, fine, everything = floats(frame[BIAS]), frame[FINE_GATE_Z] != 0, frame[ALL_A] != 0
    whole = experts - experts % LANES
    row_n = np.empty(experts, np.float32)
    act, x, y = at(row_n, 0), floats(frame[X]), floats(frame[Y])
    while True:
        t = take(after(frame, NEXT))
        if t >= tokens:
            break
        start = t * experts
        tier = after(bytes_(frame[TIER]), start)
        gate_z, u_z = after(floats(frame[GATE_Z]), start), after(floats(frame[UP_Z]), start)
        coarse_a, fine_a = after(floats(frame[COARSE_A]), start), after(floats(frame[FINE_A]), start)
        all_a = after(floats(frame[ALL_A]), start)
        if fine:
            fine_gate, fine_u = after(floats(frame[FINE_GATE_Z]), start), after(floats(frame[FINE_UP_Z]), start)
            for n in range(experts):
                act[n] = fine_gate[n]
            activate(act, experts, kind)
            _take_fine(tier, act, fine_u, fine_a, whole)
            for n in range(whole, experts):
                fine_a[n] = act[n] * fine_u[n] if tier[n] == FINE else np.float32(0.0)
            if everything:
                _where_fine(tier, gate_z, fine_gate, whole)
                _where_fine(tier, u_z, fine_u, whole)
                for n in range(whole, experts):
                    gate_z[n] = fine_gate[n] if tier[n] == FINE else gate_z[n]
                    u_z[n] = fine_u[n] if tier[n] == FINE else u_z[n]
        if everything:
            for n in range(experts):
                all_a[n] = coarse_a[n] + fine_a[n] if fine else coarse_a[n]
        for n in range(experts):
            if tier[n] == FULL:
                z_gate, z_u = full_dots(
                    after(gate, n * d_model), after(up, n * d_model), after(x, t * d_model), d_model
                )
                z_gate += bias[n]
                z_u += bias[experts + n]
                a = activated(z_gate, kind) * z_u
                add_full(after(out, n * d_model), after(y, t * d_model), a, d_model)
                if everything:
                    gate_z[n] = z_gate
                    u_z[n] = z_u
                    all_a[n] = a


def _float32(frame: Any) -> None:
    _settle(frame, floats(frame[GATE]), floats(frame[UP]), floats(frame[OUT]))


def _bfloat16(frame: Any) -> None:
    _settle(frame, words(frame[GATE]), words(frame[UP]), words(frame[OUT]))


def _float16(frame: Any) -> None:
    _settle(frame, halves(frame[GATE]), halves(frame[UP]), halves(frame[OUT]))


def _round_all(frame: Any) -> None:
    rounding(frame)


def _choose_all(frame: Any) -> None:
    _choice(frame)


def compiled(name: str) -> Any:
    """The kernel of that name, as a C function of the address of the frame."""
    work = {
        "rounding": _round_all, "choice": _choose_all, "float32": _float32, "bfloat16": _bfloat16, "float16": _float16,
    }[name]  # fmt: skip
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
