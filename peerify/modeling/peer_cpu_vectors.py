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
    I16,
    I32,
    I64,
    LANES,
    VECTOR,
    WHOLE,
    add_to,
    along,
    clear,
    fma,
    instructions,
    load,
    places,
    products_of_pairs,
    splat,
    store,
    sum_of,
    widened,
    zeros,
)

TOGETHER = 4  # output vectors that are added in one pass over the sum
MIDDLE = 7.5  # of 16 codes
BASE = 256  # of the digits of inputs, which are -128 to 127
PAIRS_AT_ONCE = 8  # of inputs whose products with one digit are summed in 16 bits: at most 8 * 2 * 15 * 128
PART = 32  # experts of a block whose sums are made at once: as many as there are registers for
SHORTS = ir.VectorType(I16, PART)


def _halves(b: Any, codes: Any) -> tuple[Any, Any]:
    """The low and the high halves of bytes, as numbers."""
    whole = b.zext(codes, WHOLE)
    low, high = b.and_(whole, ir.Constant(WHOLE, [15] * LANES)), b.lshr(whole, ir.Constant(WHOLE, [4] * LANES))
    return b.uitofp(low, VECTOR), b.uitofp(high, VECTOR)


def digits_of(table: Any) -> int:
    """In how many digits of base 256 an input is met: as many as are finer than the numbers of the model."""
    return 3 if table.dtype == types.float32 else 2


def _add(b: Any, total: Any, x: Any) -> None:
    b.store(b.add(b.load(total), x), total)


def _nibbles(b: Any, codes: Any) -> tuple[Any, Any]:
    """The low and the high halves of bytes, as bytes."""
    fifteen, four = (ir.Constant(codes.type, [number] * codes.type.count) for number in (15, 4))
    return b.and_(codes, fifteen), b.lshr(codes, four)


def _as_numbers(b: Any, wholes: list[Any], sizes: list[Any]) -> Any:
    """Sum of vectors of whole numbers, each times its size."""
    total = ir.Constant(ir.VectorType(F32, wholes[0].type.count), None)
    for whole, size in zip(wholes, sizes, strict=True):
        total = fma(b, b.sitofp(whole, total.type), size, total)
    return total


def _sizes(b: Any, size: Any, group: Any, digits: int, count: int) -> list[Any]:
    """Steps of the first two digits together and of the third, so many times."""
    twice = b.mul(group, ir.Constant(I64, 2))
    places = [b.add(twice, ir.Constant(I64, i)) for i in range(digits - 1)]
    return [splat(b, b.load(b.gep(size, [place])), count) for place in places]


@intrinsic
def key_products(
    _: Any, key: Any, step: Any, rows: Any, x: Any, start: Any, size: Any, middle: Any, __: Any, z: Any, table: Any
) -> Any:
    """z (2, BLOCK): products of the inputs that are read with the coarse gate and up vectors of a block.

    Sums of products with a digit have 16 bits for PAIRS_AT_ONCE pairs of inputs. Then those of the first two digits
    become sums of 32 bits in one instruction, which multiplies and adds neighbours, and so do those of the third. What
    lies beside each other then is due to processors, which bring two vectors together in parts of 128 bits; experts lie
    in the order that makes up for it (`KEY_ORDER`).

    Args:
        key, step: codes (d, BLOCK) in `KEY_ORDER`, and steps (g, 2, BLOCK).
        rows: inputs that are read, in pairs of one group (p, 2).
        x: their digits, a pair in 16 bits (p, 4); the last of the four is not used.
        start: where the pairs of each group begin (g + 1,).
        size: what the first two digits count, and the third (g, 2).
        middle: what is to be added to the products of each group for the middle of codes (g,).
        table: the experts, whose number type tells how many digits inputs have.
    """
    has, digits = instructions(), digits_of(table)

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        key, step, rows, x, start, size, middle, groups, z, _ = values
        vectors = BLOCK // LANES
        totals = [zeros(b, vectors) for _ in range(2)]  # of gate and up
        wholes = [[zeros(b, digits - 1, WHOLE) for _ in range(vectors)] for _ in range(2)]
        shorts = [zeros(b, digits, SHORTS) for _ in range(2)]
        clear(b, [*totals[0], *totals[1]])
        with cgutils.for_range(b, groups) as group:
            clear(b, [each for of_one in wholes for vector in of_one for each in vector])
            first = b.load(b.gep(start, [group.index]))
            last = b.load(b.gep(start, [b.add(group.index, ir.Constant(I64, 1))]))
            with cgutils.for_range_slice(b, first, last, ir.Constant(I64, PAIRS_AT_ONCE), I64) as (begin, _):
                full = b.add(begin, ir.Constant(I64, PAIRS_AT_ONCE))
                end = b.select(b.icmp_signed("<", full, last), full, last)
                for part in range(BLOCK // PART):
                    clear(b, [*shorts[0], *shorts[1]])
                    with cgutils.for_range_slice(b, begin, end, ir.Constant(I64, 1), I64) as (p, _):
                        codes = _codes_of_pair(b, key, rows, p, part * PART)
                        place = b.mul(p, ir.Constant(I64, 4))
                        for digit in range(digits):
                            pair = b.load(b.gep(x, [b.add(place, ir.Constant(I64, digit))]))
                            number = b.bitcast(splat(b, pair, PART), codes[0].type)
                            for half, short in zip(codes, shorts, strict=True):
                                _add(b, short[digit], products_of_pairs(b, half, number, has))
                    for short, of_one in zip(shorts, wholes, strict=True):
                        two = of_one[2 * part : 2 * part + 2]
                        _widen(b, [b.load(each) for each in short[:2]], [vector[0] for vector in two], has)
                        if digits == 3:
                            _widen(b, [b.load(short[2])], [vector[1] for vector in two], has)
            sizes = _sizes(b, size, group.index, digits, LANES)
            correction = splat(b, b.load(b.gep(middle, [group.index])))
            for which in range(2):
                for vector in range(vectors):
                    place = b.mul(group.index, ir.Constant(I64, 2 * BLOCK))
                    place = b.add(place, ir.Constant(I64, which * BLOCK + vector * LANES))
                    product = _as_numbers(b, [b.load(each) for each in wholes[which][vector]], sizes)
                    add_to(b, totals[which][vector], load(b, step, place, VECTOR), b.fadd(product, correction))
        for which in range(2):
            for vector in range(vectors):
                store(b, b.load(totals[which][vector]), z, ir.Constant(I64, which * BLOCK + vector * LANES))

    arguments = key, step, rows, x, start, size, middle, types.int64, z, table
    return types.void(*arguments), build


def _codes_of_pair(b: Any, key: Any, rows: Any, p: Any, start: int) -> tuple[Any, Any]:
    """Gate and up codes of two inputs, beside each other for every expert of a part of a block."""
    twice, kind, loaded = b.mul(p, ir.Constant(I64, 2)), ir.VectorType(I8, PART), []
    for i in range(2):
        row = b.sext(b.load(b.gep(rows, [b.add(twice, ir.Constant(I64, i))])), I64)
        place = b.add(b.mul(row, ir.Constant(I64, BLOCK)), ir.Constant(I64, start))
        loaded.append(load(b, key, place, kind))
    lanes = [16 * lane + 8 * half + i for half in (0, 1) for lane in (0, 1) for i in range(8)]
    order = [two * PART + i for i in lanes for two in (0, 1)]
    return _nibbles(b, b.shuffle_vector(*loaded, places(order)))


def _widen(b: Any, shorts: list[Any], totals: list[Any], has: str) -> None:
    """Add sums of 16 bits of one digit, or of one and the next, to sums of 32 bits of sixteen experts each."""
    weights = ir.Constant(SHORTS, ([1, BASE] if len(shorts) == 2 else [1, 0]) * LANES)
    for half, total in enumerate(totals):
        order = [two * PART + 8 * lane + 4 * half + i for lane in range(4) for i in range(4) for two in (0, 1)]
        _add(b, total, products_of_pairs(b, b.shuffle_vector(shorts[0], shorts[-1], places(order)), weights, has))


@intrinsic
def dots(_: Any, code: Any, step: Any, x: Any, size: Any, middle: Any, __: Any, ___: Any, table: Any) -> Any:
    """Products of one gate and one up vector with all inputs.

    Args:
        code, step: codes (d,) and steps (2, g).
        x: digits of inputs (3 or 2, d); `size`: what they count, see `key_products`.
        middle: what is to be added to the products of each group for the middle of codes (g,).
        The next two: how many groups, and of how many inputs.
        table: see `key_products`.
    """
    has, digits = instructions(), digits_of(table)
    eight, chunk = LANES // 2, 2 * LANES
    one, base = (ir.Constant(ir.VectorType(I16, LANES), [number] * LANES) for number in (1, BASE))

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        code, step, x, size, middle, groups, group_size, _ = values
        sums, shifts = zeros(b, 2, ir.VectorType(F32, eight)), zeros(b, 2, F32)
        wholes = [zeros(b, digits - 1, ir.VectorType(I32, eight)) for _ in range(2)]
        clear(b, [*sums, *shifts])
        bytes_, width = ir.VectorType(I8, chunk), b.mul(groups, group_size)
        with cgutils.for_range(b, groups) as group:
            clear(b, [*wholes[0], *wholes[1]])
            start = b.mul(group.index, group_size)
            with cgutils.for_range_slice(b, ir.Constant(I64, 0), group_size, ir.Constant(I64, chunk), I64) as (j, _):
                place = b.add(start, j)
                digit = [load(b, x, b.add(place, b.mul(width, ir.Constant(I64, i))), bytes_) for i in range(digits)]
                for totals, half in zip(wholes, _nibbles(b, load(b, code, place, bytes_)), strict=True):
                    short = [products_of_pairs(b, half, each, has) for each in digit]
                    _add(b, totals[0], products_of_pairs(b, short[0], one, has))
                    _add(b, totals[0], products_of_pairs(b, short[1], base, has))
                    if digits == 3:
                        _add(b, totals[1], products_of_pairs(b, short[2], one, has))
            sizes, correction = _sizes(b, size, group.index, digits, eight), b.load(b.gep(middle, [group.index]))
            for which in range(2):
                unit = b.load(b.gep(step, [b.add(group.index, groups) if which else group.index]))
                number = _as_numbers(b, [b.load(each) for each in wholes[which]], sizes)
                b.store(fma(b, splat(b, unit, eight), number, b.load(sums[which])), sums[which])
                b.store(b.fadd(b.fmul(unit, correction), b.load(shifts[which])), shifts[which])
        found = [b.fadd(sum_of(b, b.load(each)), b.load(shift)) for each, shift in zip(sums, shifts, strict=True)]
        return cgutils.pack_array(b, found)

    arguments = code, step, x, size, middle, types.int64, types.int64, table
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
