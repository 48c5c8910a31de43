# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The products of peer_gathered.py, compiled by numba.

Each thread takes pieces of the work until none is left. Each number of a result is computed by one thread, in an order
that does not depend on threads, so results do not either.

Shape suffixes: t tokens, d d_model, n experts, k experts of a token, p pairs of a token and an expert, s experts that
any token has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_gathered import (
    COMBINE,
    COUNT,
    EACH,
    EXPERT,
    INDEX,
    NEXT,
    NUMBERS,
    ORDER,
    PRODUCT,
    PROJECT,
    ROW_BYTES,
    START,
    TABLE,
    VECTORS,
    WIDTH,
)
from .peer_vectors import (
    I16,
    I64,
    LANES,
    VECTOR,
    WHOLE,
    add_to,
    after,
    along,
    at,
    fetch,
    floats,
    fma,
    halves,
    load,
    longs,
    splat,
    store,
    sum_of,
    take,
    widened,
    words,
    zeros,
)

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import cfunc, njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

PIECE = 4  # tokens, or experts, that a thread takes at once
PAIRS = 64  # of a token and an expert
AHEAD = 3  # rows of a table that are asked for before they are met: memory takes about as long to answer


@intrinsic
def _dot(_: Any, row: Any, x: Any, __: Any) -> Any:
    """Product of a row with x, both of so many numbers, a multiple of LANES."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        row, x, count = values
        totals, turn = zeros(b, 4), ir.Constant(I64, 4 * LANES)  # several, since each waits for its last addition
        whole = b.mul(b.udiv(count, turn), turn)

        def add(total: Any, place: Any) -> None:
            add_to(b, total, widened(b, signature.args[0].dtype, row, place), load(b, x, place, VECTOR))

        with cgutils.for_range_slice(b, ir.Constant(I64, 0), whole, turn, I64) as (d, _):
            for i, total in enumerate(totals):
                add(total, b.add(d, ir.Constant(I64, i * LANES)))
        with cgutils.for_range_slice(b, whole, count, ir.Constant(I64, LANES), I64) as (d, _):
            add(totals[0], d)
        first, second, third, fourth = map(b.load, totals)
        return sum_of(b, b.fadd(b.fadd(first, second), b.fadd(third, fourth)))

    return types.float32(row, x, types.int64), build


@intrinsic
def _add(_: Any, row: Any, y: Any, __: Any, ___: Any) -> Any:
    """Add `a` times a row to y, both of so many numbers, a multiple of LANES."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        row, y, a, count = values
        weight = splat(b, a)
        with along(b, 0, count) as (d, _):
            numbers = widened(b, signature.args[0].dtype, row, d)
            store(b, fma(b, weight, numbers, load(b, y, d, VECTOR)), y, d)

    return types.void(row, y, types.float32, types.int64), build


@intrinsic
def _clear(_: Any, y: Any, __: Any) -> Any:
    """Set so many numbers to 0."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        y, count = values
        with along(b, 0, count) as (d, _):
            store(b, ir.Constant(VECTOR, [0.0] * LANES), y, d)

    return types.void(y, types.int64), build


@intrinsic
def _put(_: Any, y: Any, row: Any, __: Any) -> Any:
    """Write so many numbers of y to a row, rounded to its number type."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        y, row, count = values
        kind, short = signature.args[1].dtype, ir.VectorType(I16, LANES)

        def every(number: int) -> Any:
            return ir.Constant(WHOLE, [number] * LANES)

        with along(b, 0, count) as (d, _):
            numbers = load(b, y, d, VECTOR)
            if kind == types.float32:
                store(b, numbers, row, d)
            else:
                if kind == types.int16:
                    bits = b.bitcast(b.fptrunc(numbers, ir.VectorType(ir.HalfType(), LANES)), short)
                else:  # bfloat16 is the upper half, rounded to the nearest, of two equally near to the even one
                    whole = b.bitcast(numbers, WHOLE)
                    odd = b.and_(b.lshr(whole, every(16)), every(1))
                    rounded = b.lshr(b.add(b.add(whole, every(0x7FFF)), odd), every(16))
                    no_number = b.fcmp_unordered("uno", numbers, numbers)
                    bits = b.trunc(b.select(no_number, every(0x7FC0), rounded), short)
                b.store(bits, b.bitcast(b.gep(row, [d]), ir.PointerType(short)), align=1)

    return types.void(y, row, types.int64), build


@njit
def _project(frame: Any, table: Any) -> None:
    pairs, width, each, row_bytes = frame[COUNT] * frame[EACH], frame[WIDTH], frame[EACH], frame[ROW_BYTES]
    z, x, index, order = floats(frame[NUMBERS]), floats(frame[VECTORS]), longs(frame[INDEX]), longs(frame[ORDER])
    ordered = frame[ORDER] != 0
    while True:
        first = take(after(frame, NEXT)) * PAIRS
        if first >= pairs:
            break
        last = min(pairs, first + PAIRS)
        for j in range(first - AHEAD, last):
            if j + AHEAD < last:
                p = order[j + AHEAD] if ordered else j + AHEAD
                fetch(after(table, index[p] * width), row_bytes)
                if ordered:
                    fetch(after(x, p // each * width), 4 * width)
            if j >= first:
                p = order[j] if ordered else j
                z[p] = _dot(after(table, index[p] * width), after(x, p // each * width), width)


@njit
def _combine(frame: Any, table: Any) -> None:
    tokens, width, each, row_bytes = frame[COUNT], frame[WIDTH], frame[EACH], frame[ROW_BYTES]
    a, y, index = floats(frame[NUMBERS]), floats(frame[VECTORS]), longs(frame[INDEX])
    while True:
        first = take(after(frame, NEXT)) * PIECE
        if first >= tokens:
            break
        last = min(tokens, first + PIECE)
        for t in range(first, last):
            _clear(after(y, t * width), width)
        for p in range(first * each - AHEAD, last * each):
            if p + AHEAD < last * each:
                fetch(after(table, index[p + AHEAD] * width), row_bytes)
            if p >= first * each:
                _add(after(table, index[p] * width), after(y, p // each * width), a[p], width)


@njit
def _scatter(frame: Any, table: Any) -> None:
    experts, width, each = frame[COUNT], frame[WIDTH], frame[EACH]
    a, x = floats(frame[NUMBERS]), floats(frame[VECTORS])
    order, start, expert = longs(frame[ORDER]), longs(frame[START]), longs(frame[EXPERT])
    total_d = np.empty(width, np.float32)
    total = at(total_d, 0)
    while True:
        first = take(after(frame, NEXT)) * PIECE
        if first >= experts:
            break
        for s in range(first, min(experts, first + PIECE)):
            _clear(total, width)
            for j in range(start[s], start[s + 1]):
                p = order[j]
                _add(after(x, p // each * width), total, a[p], width)
            _put(total, after(table, expert[s] * width), width)


@njit
def _product(frame: Any, table: Any) -> None:
    if frame[PRODUCT] == PROJECT:
        _project(frame, table)
    elif frame[PRODUCT] == COMBINE:
        _combine(frame, table)
    else:
        _scatter(frame, table)


def _float32(frame: Any) -> None:
    _product(frame, floats(frame[TABLE]))


def _bfloat16(frame: Any) -> None:
    _product(frame, words(frame[TABLE]))


def _float16(frame: Any) -> None:
    _product(frame, halves(frame[TABLE]))


def compiled(dtype: str) -> Any:
    """The products with tables of that number type, as a C function of the address of the frame."""
    work = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}[dtype]
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
