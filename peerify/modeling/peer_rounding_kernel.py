# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Tables rounded to few bits, as peer_copies.py has it to the bit; compiled by numba for peer_many.py.

Each thread takes rows of a table until none is left.

Shape suffixes: j numbers of a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_copies import CLIPS, TINY
from .peer_lanes import Lanes, first
from .peer_many import CODE, COLUMNS, ERROR, GROUP, HALF, NEXT, NUMBERS, ROWS, SCALE, STEP, TABLE, WEIGHT
from .peer_vectors import F32, LANES, VECTOR, after, along, at, bytes_, floats, sum_of, take

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

SMALLEST = np.float32(TINY)
FACTORS = tuple(CLIPS)
EXACT: tuple[str, ...] = ()  # each operation is rounded, so that codes are those of PyTorch


@njit(inline="always")
def _as_bfloat16(x: Any) -> Any:
    bits = np.float32(x).view(np.int32)
    return np.int32((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) & np.int32(-65536)).view(
        np.float32
    )


@intrinsic
def _extent(_: Any, value: Any, __: Any) -> Any:
    """The largest of the sizes of so many numbers; no number, if one of them is none."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        pointer, count = values
        zero = Lanes(b, ir.Constant(VECTOR, [0.0] * LANES), EXACT)
        largest, none = (cgutils.alloca_once_value(b, zero.value) for _ in range(2))
        with along(b, 0, count) as (j, _):
            value = first(b, b.sub(count, j)).choose(Lanes.loaded(b, pointer, j, EXACT), zero)
            b.store(Lanes(b, value.value, EXACT).size().or_least(Lanes(b, b.load(largest))).value, largest)
            b.store((Lanes(b, value.value, EXACT) * 0.0 + Lanes(b, b.load(none))).value, none)
        kind = ir.FunctionType(F32, [VECTOR])
        most = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fmax.v{LANES}f32")
        return b.fadd(b.call(most, [b.load(largest)]), sum_of(b, b.load(none)))

    return types.float32(value, types.int64), build


def _level(value: Lanes, step: Any, half: Any) -> Lanes:
    b = value.b
    below = b.fsub(half, ir.Constant(F32, 1.0))
    return (value / step).floor().or_least(b.fneg(half)).at_most(below)


@intrinsic
def _squares(_: Any, value: Any, __: Any, ___: Any, ____: Any) -> Any:
    """Squared error of so many numbers with that step, in float64 of products in float32."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        pointer, count, step, half = values
        wide = ir.VectorType(ir.DoubleType(), LANES)
        total, zero = cgutils.alloca_once_value(b, ir.Constant(wide, [0.0] * LANES)), ir.Constant(VECTOR, [0.0] * LANES)
        with along(b, 0, count) as (j, _):
            value = Lanes.loaded(b, pointer, j, EXACT)
            off = (_level(value, step, half) + 0.5) * step - value
            square = first(b, b.sub(count, j)).choose(off * off, Lanes(b, zero))
            b.store(b.fadd(b.load(total), b.fpext(square.value, wide)), total)
        kind = ir.FunctionType(ir.DoubleType(), [ir.DoubleType(), wide])
        add = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f64")
        return b.call(add, [ir.Constant(ir.DoubleType(), 0.0), b.load(total)], fastmath=("reassoc",))

    return types.float64(value, types.int64, types.float32, types.float32), build


@intrinsic
def _levels(_: Any, value: Any, __: Any, ___: Any, ____: Any, level: Any) -> Any:
    """The levels of so many numbers, and of what fills them up to whole vectors."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        pointer, count, step, half, level = values
        with along(b, 0, count) as (j, _):
            _level(Lanes.loaded(b, pointer, j, EXACT), step, half).store(level, j)

    return types.void(value, types.int64, types.float32, types.float32, level), build


@njit(error_model="numpy")
def _round(value: Any, count: int, half: Any, level: Any) -> Any:
    """The step of a group, and its levels."""
    largest = _extent(value, count)
    best, least = np.float32(0.0), np.float64(0.0)
    for i in range(len(FACTORS)):
        step = _as_bfloat16(largest * np.float32(FACTORS[i] / half))
        if step < SMALLEST:
            step = SMALLEST
        total = _squares(value, count, step, half)
        if i == 0 or total < least:
            best, least = step, total
    _levels(value, count, best, half, level)
    return best


@njit(error_model="numpy")
def _note(
    level: Any, half: Any, size: Any, w: Any, scale: Any, weight: Any, here: int, group: int, found: Any, value: Any,
    code: Any,
) -> Any:  # fmt: skip
    """Codes of a group, the numbers found so far, and what these leave; the sum of the weighted squared errors."""
    for j in range(group):
        code[j] = np.uint8(level[j] + half)
    total = np.float32(0.0)
    for j in range(here):
        number = found[j] + (level[j] + np.float32(0.5)) * size / scale[j]
        found[j] = number
        off = number - w[j]
        value[j] = -off * scale[j]
        off *= weight[j]
        total += off * off
    return total


@njit(error_model="numpy")
def rounding(frame: Any) -> None:
    rows, columns, group, half = frame[ROWS], frame[COLUMNS], frame[GROUP], np.float32(frame[HALF])
    groups = (columns + group - 1) // group
    scale, weight = floats(frame[SCALE]), floats(frame[WEIGHT])
    wanted, numbers, error = frame[NUMBERS] != 0, floats(frame[NUMBERS]), floats(frame[ERROR])
    room = np.zeros((3, group + LANES), np.float32)
    value, level, found = at(room, 0), at(room, group + LANES), at(room, 2 * (group + LANES))
    while True:
        n = take(after(frame, NEXT))
        if n >= rows:
            break
        error[n] = np.float32(0.0)
        error[rows + n] = np.float32(0.0)
        for g in range(groups):
            start = g * group
            here = min(group, columns - start)
            w = after(floats(frame[TABLE]), n * columns + start)
            for j in range(group):
                found[j] = np.float32(0.0)
                value[j] = np.float32(0.0)
            for j in range(here):
                value[j] = w[j] * scale[start + j]
            for copy in range(2):
                row = copy * rows + n
                size = _round(value, group, half, level)
                floats(frame[STEP])[row * groups + g] = size
                error[row] += _note(
                    level, half, size, w, after(scale, start), after(weight, start), here, group, found, value,
                    after(bytes_(frame[CODE]), (row * groups + g) * group),
                )  # fmt: skip
                if wanted:
                    to = after(numbers, row * columns + start)
                    for j in range(here):
                        to[j] = found[j]
