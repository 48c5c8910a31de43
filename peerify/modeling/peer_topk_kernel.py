# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The searches of peer_topk.py, compiled by numba.

Each thread takes pieces of the work until none is left. The best of a row so far are kept in order. Most scores are
below the last of them, and are passed over sixteen at a time.

Shape suffixes: r rows of scores, m scores of a row, k best of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_topk import COLUMN_INDEX, EACH, INDEX, NEXT, OTHER_SCORES, OTHER_WIDTH, ROWS, SCORES, WIDTH
from .peer_vectors import I16, I32, I64, LANES, VECTOR, after, at, floats, load, longs, splat, take

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import cfunc, njit, types
    from numba.extending import intrinsic
except ImportError:
    raise

PIECE = 4  # rows of scores that a thread takes at once


@intrinsic
def _above(_: Any, score: Any, __: Any) -> Any:
    """Which of LANES scores are above a level or are no numbers, as bits."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        score, level = values
        above = b.fcmp_unordered("ugt", load(b, score, ir.Constant(I64, 0), VECTOR), splat(b, level))
        return b.zext(b.bitcast(above, I16), I32)

    return types.int32(score, types.float32), build


@intrinsic
def _lowest(_: Any, __: Any) -> Any:
    """The place of the lowest bit that is set."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        return b.zext(b.cttz(values[0], ir.Constant(ir.IntType(1), 1)), I64)

    return types.int64(types.int32), build


@njit
def _insert(score: Any, place: int, best_k: Any, index: Any, found: int) -> None:
    """Put a score where it belongs among the `found` best, in falling order; the last of these makes room."""
    value = score if score == score else np.float32(np.inf)  # what is no number is to be seen
    j = found
    while j > 0 and best_k[j - 1] < value:
        best_k[j], index[j] = best_k[j - 1], index[j - 1]
        j -= 1
    best_k[j], index[j] = value, place


@njit
def _search(score: Any, width: int, each: int, best: Any, index: Any) -> None:
    """The best of a row and their places, in falling order."""
    for m in range(each):
        _insert(score[m], m, best, index, m)
    m = each
    while m + LANES <= width:
        above = _above(after(score, m), best[each - 1])
        while above:
            place = m + _lowest(above)
            if not score[place] <= best[each - 1]:
                _insert(score[place], place, best, index, each - 1)
            above &= above - np.int32(1)
        m += LANES
    for place in range(m, width):
        if not score[place] <= best[each - 1]:
            _insert(score[place], place, best, index, each - 1)


def _largest(frame: Any) -> None:
    rows, width, each = frame[ROWS], frame[WIDTH], frame[EACH]
    best_k = np.empty(each, np.float32)
    while True:
        first = take(after(frame, NEXT)) * PIECE
        if first >= rows:
            break
        for r in range(first, min(rows, first + PIECE)):
            score, index = after(floats(frame[SCORES]), r * width), after(longs(frame[INDEX]), r * each)
            _search(score, width, each, at(best_k, 0), index)


def _cells(frame: Any) -> None:
    rows, each = frame[ROWS], frame[EACH]
    height, width = min(each, frame[WIDTH]), min(each, frame[OTHER_WIDTH])
    best_3k, index_3k = np.empty((3, each), np.float32), np.empty((3, each), np.int64)
    best_row, best_column, best = at(best_3k, 0), at(best_3k, each), at(best_3k, 2 * each)
    of_row, of_column, cell = at(index_3k, 0), at(index_3k, each), at(index_3k, 2 * each)
    while True:
        first = take(after(frame, NEXT)) * PIECE
        if first >= rows:
            break
        for r in range(first, min(rows, first + PIECE)):
            _search(after(floats(frame[SCORES]), r * frame[WIDTH]), frame[WIDTH], height, best_row, of_row)
            other = after(floats(frame[OTHER_SCORES]), r * frame[OTHER_WIDTH])
            _search(other, frame[OTHER_WIDTH], width, best_column, of_column)
            found = 0
            for i in range(height):
                for j in range(width):
                    # (i + 1)(j + 1) cells, this one among them, are at least as good.
                    if (i + 1) * (j + 1) > each and found == each:
                        break
                    score = best_row[i] + best_column[j]
                    if found < each:
                        _insert(score, i * width + j, best, cell, found)
                        found += 1
                    elif not score <= best[each - 1]:
                        _insert(score, i * width + j, best, cell, each - 1)
                    else:
                        break
            for k in range(each):
                longs(frame[INDEX])[r * each + k] = of_row[cell[k] // width]
                longs(frame[COLUMN_INDEX])[r * each + k] = of_column[cell[k] % width]


def compiled(what: str) -> Any:
    """One of the searches, as a C function of the address of the frame."""
    work = {"largest": _largest, "cells": _cells}[what]
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
