# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""What codes are multiplied with in peer_cpu_kernel.py: inputs of a token as digits of base 256, from -128 to 127.

Processors multiply and add whole numbers of 8 bits four times as fast as float32, and codes need not be made numbers
first. Each group of inputs has a step of its own. Rounded to its multiples of at most two digits, an input of a 16-bit
model loses much less than that model's own numbers do; for float32 there are three.

Shape suffixes: t tokens, d d_model (filled up to whole groups), g groups, p pairs of inputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_cpu_vectors import BASE, MIDDLE, digits_of
from .peer_lanes import Lanes
from .peer_vectors import CODES, F32, FAST, I64, LANES, VECTOR, WHOLE, along, maximum_of, sum_of

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import njit, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

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
def digits(
    _: Any,
    x: Any,
    scale: Any,
    __: Any,
    ___: Any,
    ____: Any,
    scaled: Any,
    digit: Any,
    step: Any,
    middle: Any,
    table: Any,
) -> Any:
    """A group of inputs as multiples of a step, by their digits.

    An input that is no number makes the steps none, and these the products. The operations are written out: of loops
    LLVM makes two versions that round in different ways, and where arrays lie in memory decides which one runs.

    Args:
        x, scale: all inputs, and what they are divided by (d,). The next two numbers say which of them: multiples of
            LANES. The third is d.
        scaled: the quotients (d,), to be written.
        digit: of all inputs, the lowest first (3 or 2, d), to be written.
        step: what the first two digits count, and the third (2,), to be written.
        middle: what the middle of codes adds to products of the group (1,), to be written.
        table: the experts, whose number type tells how many digits there are.
    """
    count = digits_of(table)
    most_whole = float(127 * BASE ** (count - 1))  # 128 more have as many digits, too: a rounding may go beyond

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        x, scale, start, end, width, scaled, digit, step, middle, _ = values
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
        one = b.fdiv(most, ir.Constant(F32, most_whole))
        per = b.fdiv(ir.Constant(F32, most_whole), most)
        none = b.fsub(sum_, sum_)  # 0, or no number
        for place, size in enumerate((one, b.fmul(one, ir.Constant(F32, float(BASE**2))))):
            b.store(b.fadd(size, none), b.gep(step, [ir.Constant(I64, place)]))
        b.store(b.fmul(sum_, ir.Constant(F32, -MIDDLE)), middle)
        with along(b, start, end) as (d, _):
            nearest = (Lanes.loaded(b, scaled, d, ()) * per).nearest()
            counts = nearest.size().below(most_whole * 1.001)  # not so of what is no number
            left = b.fptosi(counts.choose(nearest, nearest.like(0.0)).value, WHOLE)
            for i in range(count):
                short = b.trunc(left, CODES)
                b.store(
                    short,
                    b.bitcast(b.gep(digit, [b.add(d, b.mul(width, ir.Constant(I64, i)))]), short.type.as_pointer()),
                    align=1,
                )
                left = b.ashr(b.sub(left, b.sext(short, WHOLE)), ir.Constant(WHOLE, [8] * LANES))

    arguments = x, scale, types.int64, types.int64, types.int64, scaled, digit, step, middle, table
    return types.void(*arguments), build


@njit(fastmath=set(FAST))
def pair_inputs(read_d: Any, count: int, group: int, scaled_d: Any, digit_id: Any, out: Any) -> None:
    """Put inputs that are read together by two of a group; what `key_products` takes.

    Args:
        read_d, count: inputs in order, and how many.
        digit_id: their digits, the lowest first.
        out: rows (p, 2), numbers (p, 4), start (g + 1,), middle (g,), to be written.
    """
    row_p2, number_p4, start_g, middle_g = out
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
            if not alone:
                total += scaled_d[other]
            for i in range(len(digit_id)):
                second = np.int16(0) if alone else np.int16(digit_id[i, other])
                number_p4[p, i] = np.int16(digit_id[i, d]) & np.int16(0xFF) | second << np.int16(8)
            j, p = j + (1 if alone else 2), p + 1
        middle_g[g] = np.float32(-MIDDLE) * total
    start_g[len(middle_g)] = p
