# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""What codes are multiplied with in peer_cpu_kernel.py: inputs of a token as whole numbers of 16 bits.

Processors multiply and add whole numbers of 16 bits twice as fast as float32, and codes need not be made numbers first.
Each group of inputs has a step of its own. Rounded to its multiples, an input of a 16-bit model loses much less than
that model's own numbers do; for float32 what is left over is a second whole number, of a smaller step.

Shape suffixes: t tokens, d d_model (filled up to whole groups), g groups, p pairs of inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_cpu_vectors import MIDDLE
from .peer_lanes import Lanes
from .peer_vectors import F32, FAST, I16, I64, LANES, VECTOR, WHOLE, along, maximum_of, sum_of

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

LARGEST = 32767.0  # of whole numbers of 16 bits
FINER = 65534.0  # steps of what is left over in a step of whole numbers
TINY = 1e-30


@njit(fastmath=set(FAST))
def largest_inputs(x_td: Any, t: int, reach_d: Any, count: int, bits_d: Any, read_d: Any) -> tuple[int, Any]:
    """Put the inputs of a token that matter most into read_d, in order: how many, and the others' squared norm."""
    inputs, omitted, found = len(reach_d), np.float32(0.0), 0
    level = np.int32(0)
    if count < inputs:
        for d in range(inputs):
            bits_d[d] = np.float32(abs(x_td[t, d]) * reach_d[d]).view(np.int32)  # in the order of the numbers
        for bit in range(30, -1, -1):  # the largest level that so many reach
            higher, reached = np.int32(level | (1 << bit)), np.int32(0)
            for d in range(inputs):
                reached += np.int32(bits_d[d] >= higher)
            if reached >= count:
                level = higher
    for d in range(inputs):
        if count == inputs or bits_d[d] >= level:
            read_d[found] = d
            found += 1
        else:
            omitted += x_td[t, d] * x_td[t, d]
    return found, omitted


@intrinsic
def whole_numbers(
    _: Any, x: Any, scale: Any, __: Any, ___: Any, scaled: Any, whole: Any, rest: Any, step: Any, middle: Any
) -> Any:
    """A group of inputs as multiples of a step, and what is left over as multiples of a smaller one.

    An input that is no number makes the steps none, and these the products. The operations are written out: of loops
    LLVM makes two versions that round in different ways, and where arrays lie in memory decides which one runs.

    Args:
        x, scale: all inputs, and what they are divided by (d,). The two numbers say which of them: a multiple of LANES.
        scaled, whole, rest: the results (d,).
        step: of whole numbers and of what is left over (2,).
        middle: what the middle of codes adds to products of the group (1,).
    """

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        x, scale, start, end, scaled, whole, rest, step, middle = values
        largest, total = (cgutils.alloca_once_value(b, ir.Constant(VECTOR, None)) for _ in range(2))
        b.store(ir.Constant(VECTOR, None), largest)
        b.store(ir.Constant(VECTOR, None), total)
        with along(b, start, end) as (d, _):
            z = Lanes.loaded(b, x, d) / Lanes.loaded(b, scale, d)
            z.store(scaled, d)
            b.store(z.size().or_least(Lanes(b, b.load(largest))).value, largest)
            b.store((Lanes(b, b.load(total)) + Lanes(b, z.value)).value, total)
        sum_ = sum_of(b, b.load(total))
        most = b.fadd(maximum_of(b, b.load(largest)), ir.Constant(F32, TINY))
        of_whole = b.fdiv(most, ir.Constant(F32, LARGEST))
        per = b.fdiv(ir.Constant(F32, LARGEST), most)
        none = b.fsub(sum_, sum_)  # 0, or no number
        for place, size in enumerate((of_whole, b.fdiv(of_whole, ir.Constant(F32, FINER)))):
            b.store(b.fadd(size, none), b.gep(step, [ir.Constant(I64, place)]))
        b.store(b.fmul(sum_, ir.Constant(F32, -MIDDLE)), middle)
        with along(b, start, end) as (d, _):
            ratio = Lanes.loaded(b, scaled, d, ()) * per
            nearest = ratio.nearest()
            counts = nearest.size().below(LARGEST + 1)  # not so of what is no number
            nearest, ratio = (counts.choose(each, each.like(0.0)) for each in (nearest, ratio))
            for value, pointer in ((nearest, whole), (((ratio - nearest) * FINER).nearest(), rest)):
                short = b.trunc(b.fptosi(value.value, WHOLE), ir.VectorType(I16, LANES))
                b.store(short, b.bitcast(b.gep(pointer, [d]), ir.PointerType(short.type)), align=1)

    arguments = x, scale, types.int64, types.int64, scaled, whole, rest, step, middle
    return types.void(*arguments), build


@njit(fastmath=set(FAST))
def pair_inputs(read_d: Any, count: int, group: int, scaled_d: Any, x_d: Any, rest_d: Any, out: Any) -> None:
    """Put inputs that are read together by two of a group; what `key_products` takes.

    Args:
        read_d, count: inputs in order, and how many.
        out: rows (p, 2), numbers (p, 2), start (g + 1,), middle (g,), to be written.
    """
    row_p2, number_p2, start_g, middle_g = out
    j, p = 0, 0
    for g in range(len(middle_g)):
        start_g[g] = p
        total = np.float32(0.0)
        while j < count and read_d[j] < (g + 1) * group:
            d = read_d[j]
            alone = j + 1 == count or read_d[j + 1] >= (g + 1) * group
            other = d if alone else read_d[j + 1]
            row_p2[p, 0], row_p2[p, 1] = d, other
            total += scaled_d[d]
            if alone:
                number_p2[p, 0], number_p2[p, 1] = np.int32(x_d[d]) & 0xFFFF, np.int32(rest_d[d]) & 0xFFFF
            else:
                total += scaled_d[other]
                number_p2[p, 0] = np.int32(x_d[d]) & 0xFFFF | np.int32(x_d[other]) << 16
                number_p2[p, 1] = np.int32(rest_d[d]) & 0xFFFF | np.int32(rest_d[other]) << 16
            j, p = j + (1 if alone else 2), p + 1
        middle_g[g] = np.float32(-MIDDLE) * total
    start_g[len(middle_g)] = p
