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
    PAIRS,
    VECTOR,
    WHOLE,
    add_to,
    along,
    clear,
    fma,
    instructions,
    load,
    products_of_pairs,
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


def _add_pairs(b: Any, total: Any, x: Any, y: Any, has: str) -> None:
    b.store(b.add(b.load(total), products_of_pairs(b, x, y, has)), total)


def _as_numbers(b: Any, parts: list[Any], sizes: list[Any]) -> Any:
    """Sum of vectors of whole numbers, each times its size."""
    total = ir.Constant(VECTOR, None)
    for part, size in zip(parts, sizes, strict=True):
        total = fma(b, b.sitofp(b.load(part), VECTOR), size, total)
    return total


def _parts(table: Any) -> int:
    """In how many whole numbers of 16 bits an input is met: one is finer than 16 bits of a float, two than 32."""
    return 2 if table.dtype == types.float32 else 1


@intrinsic
def key_products(
    _: Any, key: Any, step: Any, rows: Any, x: Any, start: Any, size: Any, middle: Any, __: Any, z: Any, table: Any
) -> Any:
    """z (2, BLOCK): products of the inputs that are read with the coarse gate and up vectors of a block.

    Args:
        key, step: codes (d, BLOCK) and steps (g, 2, BLOCK).
        rows: inputs that are read, in pairs of one group (p, 2).
        x: what they are, as whole numbers, a pair in 32 bits: (p, 2), the first of the two in full, then the rest.
        start: where the pairs of each group begin (g + 1,).
        size: steps of these whole numbers (g, 2).
        middle: what is to be added to the products of each group for the middle of codes (g,).
        table: the experts, whose number type tells how exactly inputs are met.
    """
    has, deep = instructions(), _parts(table)

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        key, step, rows, x, start, size, middle, groups, z, _ = values
        parts = BLOCK // LANES
        totals = zeros(b, 2 * parts)
        products = [zeros(b, deep, WHOLE) for _ in range(2 * parts)]
        low_halves, four = ir.Constant(WHOLE, [0x000F000F] * LANES), ir.Constant(WHOLE, [4] * LANES)
        clear(b, totals)
        with cgutils.for_range(b, groups) as group:
            for each in products:
                clear(b, each)
            first = b.load(b.gep(start, [group.index]))
            last = b.load(b.gep(start, [b.add(group.index, ir.Constant(I64, 1))]))
            with cgutils.for_range_slice(b, first, last, ir.Constant(I64, 1), I64) as (p, _):
                twice = b.mul(p, ir.Constant(I64, 2))
                places = [b.add(twice, ir.Constant(I64, i)) for i in range(2)]
                of_pair = [
                    b.mul(b.sext(b.load(b.gep(rows, [place])), I64), ir.Constant(I64, BLOCK)) for place in places
                ]
                numbers = [b.bitcast(splat(b, b.load(b.gep(x, [place]))), PAIRS) for place in places[:deep]]
                for part in range(parts):
                    one, other = (
                        b.zext(load(b, key, b.add(row, ir.Constant(I64, part * LANES)), CODES), WHOLE)
                        for row in of_pair
                    )
                    both = b.or_(one, b.shl(other, ir.Constant(WHOLE, [16] * LANES)))
                    for which, half in enumerate((both, b.lshr(both, four))):
                        codes = b.bitcast(b.and_(half, low_halves), PAIRS)
                        for total, number in zip(products[2 * part + which], numbers, strict=True):
                            _add_pairs(b, total, codes, number, has)
            sizes = _sizes(b, size, group.index, deep)
            correction = splat(b, b.load(b.gep(middle, [group.index])))
            for part in range(parts):
                for which in range(2):
                    place = b.mul(group.index, ir.Constant(I64, 2 * BLOCK))
                    place = b.add(place, ir.Constant(I64, which * BLOCK + part * LANES))
                    product = b.fadd(_as_numbers(b, products[2 * part + which], sizes), correction)
                    add_to(b, totals[2 * part + which], load(b, step, place, VECTOR), product)
        for part in range(parts):
            for which in range(2):
                place = ir.Constant(I64, which * BLOCK + part * LANES)
                store(b, b.load(totals[2 * part + which]), z, place)

    arguments = key, step, rows, x, start, size, middle, types.int64, z, table
    return types.void(*arguments), build


def _sizes(b: Any, size: Any, group: Any, deep: int) -> list[Any]:
    twice = b.mul(group, ir.Constant(I64, 2))
    return [splat(b, b.load(b.gep(size, [b.add(twice, ir.Constant(I64, i))]))) for i in range(deep)]


@intrinsic
def dots(_: Any, code: Any, step: Any, x: Any, rest: Any, size: Any, middle: Any, __: Any, ___: Any, table: Any) -> Any:
    """Products of one gate and one up vector with all inputs.

    Args:
        code, step: codes (d,) and steps (2, g).
        x, rest: inputs as whole numbers of 16 bits, and what these leave over (d,); `size`: the steps of both (g, 2).
        middle: what is to be added to the products of each group for the middle of codes (g,).
        The next two: how many groups, and of how many inputs.
        table: see `key_products`.
    """
    has, deep = instructions(), _parts(table)

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        code, step, *inputs, size, middle, groups, group_size, _ = values
        sums, products, shifts = zeros(b, 2), [zeros(b, deep, WHOLE) for _ in range(2)], zeros(b, 2, F32)
        clear(b, [*sums, *shifts])
        bytes_of_pairs, low_half = ir.VectorType(I8, 2 * LANES), ir.Constant(PAIRS, [15] * 2 * LANES)
        with cgutils.for_range(b, groups) as group:
            clear(b, [*products[0], *products[1]])
            base = b.mul(group.index, group_size)
            with cgutils.for_range_slice(
                b, ir.Constant(I64, 0), group_size, ir.Constant(I64, 2 * LANES), I64
            ) as (j, _):  # fmt: skip
                place = b.add(base, j)
                numbers = [load(b, each, place, PAIRS) for each in inputs[:deep]]
                both = b.zext(load(b, code, place, bytes_of_pairs), PAIRS)
                halves = b.and_(both, low_half), b.lshr(both, ir.Constant(PAIRS, [4] * 2 * LANES))
                for totals, half in zip(products, halves, strict=True):
                    for total, number in zip(totals, numbers, strict=True):
                        _add_pairs(b, total, half, number, has)
            sizes, correction = _sizes(b, size, group.index, deep), b.load(b.gep(middle, [group.index]))
            for which in range(2):
                unit = b.load(b.gep(step, [b.add(group.index, groups) if which else group.index]))
                add_to(b, sums[which], splat(b, unit), _as_numbers(b, products[which], sizes))
                b.store(b.fadd(b.fmul(unit, correction), b.load(shifts[which])), shifts[which])
        found = [b.fadd(sum_of(b, b.load(each)), b.load(shift)) for each, shift in zip(sums, shifts, strict=True)]
        return cgutils.pack_array(b, found)

    arguments = code, step, x, rest, size, middle, types.int64, types.int64, table
    return types.UniTuple(types.float32, 2)(*arguments), build


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
