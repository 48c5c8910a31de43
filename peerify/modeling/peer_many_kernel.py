# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The kernels of peer_many.py, compiled by numba.

Each thread takes rows of a table, or tokens, until none is left. What becomes of one does not depend on the others.

Shape suffixes: t tokens, d d_model, n experts, g groups, j numbers of a group, b experts of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_copies import CLIPS, TINY
from .peer_cpu_kernel import FAST, activate, decide
from .peer_cpu_vectors import add_full, full_dots
from .peer_many import (
    ALL_A,
    BIAS,
    BLOCK,
    COARSE_A,
    CODE,
    COLUMNS,
    D_MODEL,
    ERROR,
    EXPERTS,
    FINE_A,
    FINE_GATE_Z,
    FINE_UP_Z,
    GATE,
    GATE_Z,
    GROUP,
    HALF,
    KIND,
    NEXT,
    NUMBERS,
    OMITTED,
    OUT,
    PRICE,
    ROWS,
    SCALE,
    STAT,
    STEP,
    TABLE,
    TIER,
    TOKENS,
    UP,
    UP_Z,
    WEIGHT,
    X,
    Y,
)
from .peer_vectors import after, bytes_, floats, halves, take, words

try:  # see peer_vectors.py
    from numba import carray, cfunc, njit, types
except ImportError:
    raise

FINE, FULL = 2, 3  # of peer_elastic_pool.py, which imports more than is read here
COARSE = 1
SMALLEST = np.float32(TINY)
FACTORS = tuple(CLIPS)
# Sums of float64 may be in any order, which leaves what is compared the same to all digits that float32 has.
ANY_ORDER = {"reassoc"}


@njit(inline="always")
def _as_bfloat16(x: Any) -> Any:
    bits = np.float32(x).view(np.int32)
    return np.int32((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)).view(
        np.float32
    )


@njit(fastmath=ANY_ORDER, error_model="numpy")
def _squares(value_j: Any, step: Any, half: Any) -> Any:
    """Squared error of a group with that step."""
    total = np.float64(0.0)
    for j in range(len(value_j)):
        level = min(max(np.floor(value_j[j] / step), -half), half - np.float32(1.0))
        off = (level + np.float32(0.5)) * step - value_j[j]
        total += np.float64(off * off)
    return total


@njit(error_model="numpy")
def _round(value_j: Any, half: Any, level_j: Any) -> Any:
    """The step of a group, and its levels."""
    largest, none = np.float32(0.0), np.float32(0.0)
    for j in range(len(value_j)):
        largest = max(largest, abs(value_j[j]))
        none += value_j[j] * np.float32(0.0)
    if none != none:
        largest = none
    best, least = np.float32(0.0), np.float64(0.0)
    for i in range(len(FACTORS)):
        step = _as_bfloat16(largest * np.float32(FACTORS[i] / half))
        if step < SMALLEST:
            step = SMALLEST
        total = _squares(value_j, step, half)
        if i == 0 or total < least:
            best, least = step, total
    for j in range(len(value_j)):
        level_j[j] = min(max(np.floor(value_j[j] / best), -half), half - np.float32(1.0))
    return best


@njit(error_model="numpy")
def _rounding(frame: Any) -> None:
    rows, columns, group, half = frame[ROWS], frame[COLUMNS], frame[GROUP], np.float32(frame[HALF])
    groups = (columns + group - 1) // group
    w_nd = carray(floats(frame[TABLE]), (rows, columns))
    scale_d, weight_d = carray(floats(frame[SCALE]), columns), carray(floats(frame[WEIGHT]), columns)
    code = carray(bytes_(frame[CODE]), (2, rows, groups * group))
    step = carray(floats(frame[STEP]), (2, rows, groups))
    wanted = frame[NUMBERS] != 0
    numbers = carray(floats(frame[NUMBERS]), (2, rows, columns))
    error = carray(floats(frame[ERROR]), (2, rows))
    value_j, level_j = np.empty(group, np.float32), np.empty(group, np.float32)
    found_j = np.empty(group, np.float32)
    while True:
        n = take(after(frame, NEXT))
        if n >= rows:
            break
        error[0, n] = np.float32(0.0)
        error[1, n] = np.float32(0.0)
        for g in range(groups):
            first = g * group
            here = min(group, columns - first)
            for j in range(group):
                found_j[j] = np.float32(0.0)
                value_j[j] = w_nd[n, first + j] * scale_d[first + j] if j < here else np.float32(0.0)
            for copy in range(2):
                size = _round(value_j, half, level_j)
                step[copy, n, g] = size
                for j in range(group):
                    code[copy, n, first + j] = np.uint8(level_j[j] + half)
                total = error[copy, n]
                for j in range(here):
                    found_j[j] += (level_j[j] + np.float32(0.5)) * size / scale_d[first + j]
                    off = found_j[j] - w_nd[n, first + j]
                    value_j[j] = -off * scale_d[first + j]
                    off *= weight_d[first + j]
                    total += off * off
                error[copy, n] = total
                if wanted:
                    for j in range(here):
                        numbers[copy, n, first + j] = found_j[j]


@njit(fastmath=FAST)
def _choice(frame: Any) -> None:
    tokens, experts, kind = frame[TOKENS], frame[EXPERTS], frame[KIND]
    blocks = (experts + BLOCK - 1) // BLOCK
    price_3, omitted_t = carray(floats(frame[PRICE]), 3), carray(floats(frame[OMITTED]), tokens)
    stat_8n, bias_2n = carray(floats(frame[STAT]), (8, blocks * BLOCK)), np.zeros((2, blocks * BLOCK), np.float32)
    gate_tn, u_tn = carray(floats(frame[GATE_Z]), (tokens, experts)), carray(floats(frame[UP_Z]), (tokens, experts))
    tier_tn = carray(bytes_(frame[TIER]), (tokens, experts))
    coarse_tn = carray(floats(frame[COARSE_A]), (tokens, experts))
    z_2b, a_4b, tier_b = np.zeros((2, BLOCK), np.float32), np.empty((4, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    while True:
        t = take(after(frame, NEXT))
        if t >= tokens:
            break
        for k in range(blocks):
            first = k * BLOCK
            here = min(BLOCK, experts - first)
            for b in range(here):
                z_2b[0, b] = gate_tn[t, first + b]
                z_2b[1, b] = u_tn[t, first + b]
            decide(z_2b, stat_8n, bias_2n, first, omitted_t[t], price_3, kind, a_4b, tier_b)
            for b in range(here):
                tier_tn[t, first + b] = tier_b[b]
                coarse_tn[t, first + b] = a_4b[3, b] if tier_b[b] == COARSE else np.float32(0.0)


@njit(fastmath=FAST)
def _settle(frame: Any, gate: Any, up: Any, out: Any) -> None:
    tokens, experts, d_model, kind = frame[TOKENS], frame[EXPERTS], frame[D_MODEL], frame[KIND]
    gate_tn, u_tn = carray(floats(frame[GATE_Z]), (tokens, experts)), carray(floats(frame[UP_Z]), (tokens, experts))
    fine_gate_tn = carray(floats(frame[FINE_GATE_Z]), (tokens, experts))
    fine_u_tn = carray(floats(frame[FINE_UP_Z]), (tokens, experts))
    tier_tn = carray(bytes_(frame[TIER]), (tokens, experts))
    coarse_tn = carray(floats(frame[COARSE_A]), (tokens, experts))
    fine_tn, all_tn = carray(floats(frame[FINE_A]), (tokens, experts)), carray(floats(frame[ALL_A]), (tokens, experts))
    bias_2n = carray(floats(frame[BIAS]), (2, experts))
    fine, everything = frame[FINE_GATE_Z] != 0, frame[ALL_A] != 0
    row_1n, one_11 = np.empty((1, experts), np.float32), np.empty((1, 1), np.float32)
    x, y = floats(frame[X]), floats(frame[Y])
    while True:
        t = take(after(frame, NEXT))
        if t >= tokens:
            break
        if fine:
            row_1n[0] = fine_gate_tn[t]
            activate(row_1n, 0, experts, kind)
            for n in range(experts):
                fine_tn[t, n] = row_1n[0, n] * fine_u_tn[t, n] if tier_tn[t, n] == FINE else np.float32(0.0)
        if everything:
            for n in range(experts):
                all_tn[t, n] = coarse_tn[t, n]
            if fine:
                for n in range(experts):
                    is_fine = tier_tn[t, n] == FINE
                    all_tn[t, n] += fine_tn[t, n]
                    gate_tn[t, n] = fine_gate_tn[t, n] if is_fine else gate_tn[t, n]
                    u_tn[t, n] = fine_u_tn[t, n] if is_fine else u_tn[t, n]
        for n in range(experts):
            if tier_tn[t, n] == FULL:
                z_gate, z_u = full_dots(
                    after(gate, n * d_model), after(up, n * d_model), after(x, t * d_model), d_model
                )
                z_gate += bias_2n[0, n]
                z_u += bias_2n[1, n]
                one_11[0, 0] = z_gate
                activate(one_11, 0, 1, kind)
                a = one_11[0, 0] * z_u
                add_full(after(out, n * d_model), after(y, t * d_model), a, d_model)
                if everything:
                    gate_tn[t, n] = z_gate
                    u_tn[t, n] = z_u
                    all_tn[t, n] = a


def _float32(frame: Any) -> None:
    _settle(frame, floats(frame[GATE]), floats(frame[UP]), floats(frame[OUT]))


def _bfloat16(frame: Any) -> None:
    _settle(frame, words(frame[GATE]), words(frame[UP]), words(frame[OUT]))


def _float16(frame: Any) -> None:
    _settle(frame, halves(frame[GATE]), halves(frame[UP]), halves(frame[OUT]))


def _round_all(frame: Any) -> None:
    _rounding(frame)


def _choose_all(frame: Any) -> None:
    _choice(frame)


def compiled(name: str) -> Any:
    """The kernel of that name, as a C function of the address of the frame."""
    work = {
        "rounding": _round_all, "choice": _choose_all, "float32": _float32, "bfloat16": _bfloat16, "float16": _float16,
    }[name]  # fmt: skip
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
