# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Vector code for the loops of peer_cpu_kernel.py over codes and weights; see peer_vectors.py.

Shape suffixes: d d_model, g groups, b experts of a block.
"""

from __future__ import annotations

from typing import Any

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .peer_cpu import BLOCK
from .peer_vectors import (
    CODES,
    F32,
    I8,
    I64,
    LANES,
    VECTOR,
    WHOLE,
    add_to,
    along,
    clear,
    fma,
    load,
    splat,
    store,
    sum_of,
    widened,
    zeros,
)

TOGETHER = 4  # output vectors that are added in one pass over the sum
MIDDLE = 7.5  # of 16 codes


def _halves(b: Any, codes: Any) -> tuple[Any, Any]:
    """The low and the high halves of bytes, as numbers."""
    whole = b.zext(codes, WHOLE)
    low, high = b.and_(whole, ir.Constant(WHOLE, [15] * LANES)), b.lshr(whole, ir.Constant(WHOLE, [4] * LANES))
    return b.uitofp(low, VECTOR), b.uitofp(high, VECTOR)


@intrinsic
def key_products(_: Any, key: Any, step: Any, x: Any, read: Any, start: Any, __: Any, z: Any) -> Any:
    """z (2, BLOCK): products of the inputs `read` with the coarse gate and up vectors of a block.

    Args:
        key, step: codes (d, BLOCK) and steps (g, 2, BLOCK).
        x: inputs (d,).
        read: which of them are read, in order; `start` (g + 1,): where those of each group begin.
    """

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        key, step, x, read, start, groups, z = values
        parts = BLOCK // LANES
        totals, products = zeros(b, 2 * parts), zeros(b, 2 * parts)
        clear(b, totals)
        of_inputs = cgutils.alloca_once(b, F32)
        with cgutils.for_range(b, groups) as group:
            clear(b, products)
            b.store(ir.Constant(F32, 0.0), of_inputs)
            first = b.load(b.gep(start, [group.index]))
            last = b.load(b.gep(start, [b.add(group.index, ir.Constant(I64, 1))]))
            with cgutils.for_range_slice(b, first, last, ir.Constant(I64, 1), I64) as (j, _):
                d = b.load(b.gep(read, [j]))
                number = b.load(b.gep(x, [d]))
                b.store(b.fadd(number, b.load(of_inputs)), of_inputs)
                number, row = splat(b, number), b.mul(d, ir.Constant(I64, BLOCK))
                for part in range(parts):
                    codes = load(b, key, b.add(row, ir.Constant(I64, part * LANES)), CODES)
                    for which, half in enumerate(_halves(b, codes)):
                        add_to(b, products[2 * part + which], half, number)
            middle = splat(b, b.fmul(b.load(of_inputs), ir.Constant(F32, -MIDDLE)))
            for part in range(parts):
                for which in range(2):
                    place = b.mul(group.index, ir.Constant(I64, 2 * BLOCK))
                    place = b.add(place, ir.Constant(I64, which * BLOCK + part * LANES))
                    product = b.fadd(b.load(products[2 * part + which]), middle)
                    add_to(b, totals[2 * part + which], load(b, step, place, VECTOR), product)
        for part in range(parts):
            for which in range(2):
                place = ir.Constant(I64, which * BLOCK + part * LANES)
                store(b, b.load(totals[2 * part + which]), z, place)

    return types.void(key, step, x, read, start, types.int64, z), build


@intrinsic
def dots(_: Any, code: Any, step: Any, x: Any, total: Any, __: Any, ___: Any) -> Any:
    """Products of one gate and one up vector with all inputs.

    Args:
        code, step: codes (d,) and steps (2, g).
        x, total: inputs (d,), and the sums of their groups.
        The last two: how many groups, and of how many inputs.
    """

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        code, step, x, total, groups, group_size = values
        sums, products, shifts = zeros(b, 2), zeros(b, 2), [cgutils.alloca_once(b, F32) for _ in range(2)]
        clear(b, sums)
        for shift in shifts:
            b.store(ir.Constant(F32, 0.0), shift)
        with cgutils.for_range(b, groups) as group:
            clear(b, products)
            base = b.mul(group.index, group_size)
            with along(b, 0, group_size) as (j, _):
                place = b.add(base, j)
                numbers = load(b, x, place, VECTOR)
                for product, half in zip(products, _halves(b, load(b, code, place, CODES)), strict=True):
                    add_to(b, product, half, numbers)
            middle = b.fmul(b.load(b.gep(total, [group.index])), ir.Constant(F32, -MIDDLE))
            for which in range(2):
                size = b.load(b.gep(step, [b.add(group.index, groups) if which else group.index]))
                add_to(b, sums[which], splat(b, size), b.load(products[which]))
                b.store(b.fadd(b.fmul(size, middle), b.load(shifts[which])), shifts[which])
        found = [b.fadd(sum_of(b, b.load(each)), b.load(shift)) for each, shift in zip(sums, shifts, strict=True)]
        return cgutils.pack_array(b, found)

    return types.UniTuple(types.float32, 2)(code, step, x, total, types.int64, types.int64), build


@intrinsic
def add_codes(_: Any, code: Any, weight: Any, y: Any, __: Any, ___: Any, ____: Any) -> Any:
    """Add output vectors to y (d,), TOGETHER of them at a time, so that y is read and written less often.

    Args:
        code: addresses of their codes (d / 2,).
        weight: steps times activations: (TOGETHER, g).
        The last three: how many groups, half of a group's numbers, and from one row of `weight` to the next.
    """

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        code, weight, y, groups, half, stride = values
        pointers = [b.inttoptr(b.load(b.gep(code, [ir.Constant(I64, e)])), ir.PointerType(I8)) for e in range(TOGETHER)]
        with cgutils.for_range(b, groups) as group:
            sizes, place = [], group.index
            for _ in range(TOGETHER):
                sizes.append(splat(b, b.load(b.gep(weight, [place]))))
                place = b.add(place, stride)
            base = b.mul(group.index, half)
            with along(b, 0, half) as (j, _):
                here = b.add(b.mul(base, ir.Constant(I64, 2)), j)
                there = b.add(here, half)
                low, high = load(b, y, here, VECTOR), load(b, y, there, VECTOR)
                for pointer, size in zip(pointers, sizes, strict=True):
                    of_low, of_high = _halves(b, load(b, pointer, b.add(base, j), CODES))
                    low, high = fma(b, size, of_low, low), fma(b, size, of_high, high)
                store(b, low, y, here)
                store(b, high, y, there)

    return types.void(code, weight, y, types.int64, types.int64, types.int64), build


@intrinsic
def full_dots(_: Any, gate: Any, u: Any, x: Any, __: Any) -> Any:
    """Products of one gate and one up vector in full with the first inputs, as many as given."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        *tables, x, count = values
        sums = zeros(b, 2)
        clear(b, sums)
        with along(b, 0, count) as (d, _):
            for total, table in zip(sums, tables, strict=True):
                add_to(b, total, widened(b, signature.args[0].dtype, table, d), load(b, x, d, VECTOR))
        return cgutils.pack_array(b, [sum_of(b, b.load(total)) for total in sums])

    return types.UniTuple(types.float32, 2)(gate, u, x, types.int64), build


@intrinsic
def add_full(_: Any, v: Any, y: Any, __: Any, ___: Any) -> Any:
    """Add `a` times the first numbers of an output vector, as many as given."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        v, y, a, count = values
        weight = splat(b, a)
        with along(b, 0, count) as (d, _):
            number = widened(b, signature.args[0].dtype, v, d)
            store(b, fma(b, weight, number, load(b, y, d, VECTOR)), y, d)

    return types.void(v, y, types.float32, types.int64), build
