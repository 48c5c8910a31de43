# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Vector code for the loops of peer_cpu_kernel.py over codes and weights, in LLVM's own language by way of numba.

LLVM's search for vectors in loops that numba compiles finds half of this speed or less. A vector has 16 numbers,
whatever the machine's have: LLVM cuts them. Everything here takes pointers: an array that is passed counts its
references, in all threads at once.

Shape suffixes: d d_model, g groups, b experts of a block.
"""

from __future__ import annotations

from typing import Any

try:  # transformers refuses code that imports what is not installed, unless it stands in such a block
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError:
    raise

from .peer_cpu import BLOCK

LANES = 16
TOGETHER = 4  # output vectors that are added in one pass over the sum
MIDDLE = 7.5  # of 16 codes
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
VECTOR, CODES, WHOLE = (ir.VectorType(kind, LANES) for kind in (F32, I8, I32))


def _splat(b: Any, value: Any) -> Any:
    first = b.insert_element(ir.Constant(VECTOR, ir.Undefined), value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, ir.Constant(VECTOR, ir.Undefined), ir.Constant(WHOLE, [0] * LANES))


def _load(b: Any, pointer: Any, place: Any, kind: Any) -> Any:
    return b.load(b.bitcast(b.gep(pointer, [place]), ir.PointerType(kind)), align=1)


def _store(b: Any, value: Any, pointer: Any, place: Any) -> None:
    b.store(value, b.bitcast(b.gep(pointer, [place]), ir.PointerType(VECTOR)), align=1)


def _fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    kind = ir.FunctionType(VECTOR, [VECTOR] * 3)
    return b.call(cgutils.get_or_insert_function(b.module, kind, f"llvm.fma.v{LANES}f32"), [x, y, z])


def _sum(b: Any, vector: Any) -> Any:
    kind = ir.FunctionType(F32, [F32, VECTOR])
    add = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{LANES}f32")
    return b.call(add, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))


def _halves(b: Any, codes: Any) -> tuple[Any, Any]:
    """The low and the high halves of bytes, as numbers."""
    whole = b.zext(codes, WHOLE)
    low, high = b.and_(whole, ir.Constant(WHOLE, [15] * LANES)), b.lshr(whole, ir.Constant(WHOLE, [4] * LANES))
    return b.uitofp(low, VECTOR), b.uitofp(high, VECTOR)


def _sums(b: Any, count: int) -> list[Any]:
    return [cgutils.alloca_once_value(b, ir.Constant(VECTOR, [0.0] * LANES)) for _ in range(count)]


def _clear(b: Any, sums: list[Any]) -> None:
    for each in sums:
        b.store(ir.Constant(VECTOR, [0.0] * LANES), each)


def _add_to(b: Any, total: Any, x: Any, y: Any) -> None:
    b.store(_fma(b, x, y, b.load(total)), total)


def _number(b: Any, kind: Any, pointer: Any, place: Any) -> Any:
    """Sixteen float32 from float32, from bfloat16 whose bits are given as uint16, or from float16 as int16."""
    if kind == types.float32:
        return _load(b, pointer, place, VECTOR)
    bits = _load(b, pointer, place, ir.VectorType(I16, LANES))
    if kind == types.int16:
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return b.bitcast(b.shl(b.zext(bits, WHOLE), ir.Constant(WHOLE, [16] * LANES)), VECTOR)


def _steps(b: Any, start: int, end: Any) -> Any:
    return cgutils.for_range_slice(b, ir.Constant(I64, start), end, ir.Constant(I64, LANES), I64)


@intrinsic
def at(_: Any, array: Any, __: Any) -> Any:
    """Pointer to a number of a contiguous array."""

    def build(context: Any, b: Any, signature: Any, values: Any) -> Any:
        return b.gep(context.make_array(signature.args[0])(context, b, values[0]).data, [values[1]])

    return types.CPointer(array.dtype)(array, types.int64), build


@intrinsic
def after(_: Any, pointer: Any, __: Any) -> Any:
    """Pointer so many numbers further on."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        return b.gep(values[0], [values[1]])

    return pointer(pointer, types.int64), build


@intrinsic
def address(_: Any, pointer: Any) -> Any:
    """The pointer as a number."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        return b.ptrtoint(values[0], I64)

    return types.int64(pointer), build


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(_: Any, __: Any) -> Any:
        """An address as a pointer."""

        def build(context: Any, b: Any, signature: Any, values: Any) -> Any:
            return b.inttoptr(values[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), build

    return pointer


floats, bytes_, words, halves = map(_pointer, (types.float32, types.uint8, types.uint16, types.int16))


@intrinsic
def take(_: Any, counter: Any) -> Any:
    """What the counter was before this thread, and none beside it, raised it by one."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        return b.atomic_rmw("add", values[0], ir.Constant(I64, 1), "acq_rel")

    return types.int64(counter), build


@intrinsic
def fetch(_: Any, pointer: Any, __: Any) -> Any:
    """Have so many bytes read ahead."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        pointer, count = values
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
        ahead = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
        first, one = b.bitcast(pointer, ir.PointerType(I8)), ir.Constant(I32, 1)
        with cgutils.for_range_slice(b, ir.Constant(I64, 0), count, ir.Constant(I64, 64), I64) as (j, _):
            b.call(ahead, [b.gep(first, [j]), ir.Constant(I32, 0), ir.Constant(I32, 3), one])

    return types.void(pointer, types.int64), build


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
        totals, products = _sums(b, 2 * parts), _sums(b, 2 * parts)
        _clear(b, totals)
        of_inputs = cgutils.alloca_once(b, F32)
        with cgutils.for_range(b, groups) as group:
            _clear(b, products)
            b.store(ir.Constant(F32, 0.0), of_inputs)
            first = b.load(b.gep(start, [group.index]))
            last = b.load(b.gep(start, [b.add(group.index, ir.Constant(I64, 1))]))
            with cgutils.for_range_slice(b, first, last, ir.Constant(I64, 1), I64) as (j, _):
                d = b.load(b.gep(read, [j]))
                number = b.load(b.gep(x, [d]))
                b.store(b.fadd(number, b.load(of_inputs)), of_inputs)
                number, row = _splat(b, number), b.mul(d, ir.Constant(I64, BLOCK))
                for part in range(parts):
                    codes = _load(b, key, b.add(row, ir.Constant(I64, part * LANES)), CODES)
                    for which, half in enumerate(_halves(b, codes)):
                        _add_to(b, products[2 * part + which], half, number)
            middle = _splat(b, b.fmul(b.load(of_inputs), ir.Constant(F32, -MIDDLE)))
            for part in range(parts):
                for which in range(2):
                    place = b.mul(group.index, ir.Constant(I64, 2 * BLOCK))
                    place = b.add(place, ir.Constant(I64, which * BLOCK + part * LANES))
                    product = b.fadd(b.load(products[2 * part + which]), middle)
                    _add_to(b, totals[2 * part + which], _load(b, step, place, VECTOR), product)
        for part in range(parts):
            for which in range(2):
                place = ir.Constant(I64, which * BLOCK + part * LANES)
                _store(b, b.load(totals[2 * part + which]), z, place)

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
        sums, products, shifts = _sums(b, 2), _sums(b, 2), [cgutils.alloca_once(b, F32) for _ in range(2)]
        _clear(b, sums)
        for shift in shifts:
            b.store(ir.Constant(F32, 0.0), shift)
        with cgutils.for_range(b, groups) as group:
            _clear(b, products)
            base = b.mul(group.index, group_size)
            with _steps(b, 0, group_size) as (j, _):
                place = b.add(base, j)
                numbers = _load(b, x, place, VECTOR)
                for product, half in zip(products, _halves(b, _load(b, code, place, CODES)), strict=True):
                    _add_to(b, product, half, numbers)
            middle = b.fmul(b.load(b.gep(total, [group.index])), ir.Constant(F32, -MIDDLE))
            for which in range(2):
                size = b.load(b.gep(step, [b.add(group.index, groups) if which else group.index]))
                _add_to(b, sums[which], _splat(b, size), b.load(products[which]))
                b.store(b.fadd(b.fmul(size, middle), b.load(shifts[which])), shifts[which])
        found = [b.fadd(_sum(b, b.load(each)), b.load(shift)) for each, shift in zip(sums, shifts, strict=True)]
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
                sizes.append(_splat(b, b.load(b.gep(weight, [place]))))
                place = b.add(place, stride)
            base = b.mul(group.index, half)
            with _steps(b, 0, half) as (j, _):
                here = b.add(b.mul(base, ir.Constant(I64, 2)), j)
                there = b.add(here, half)
                low, high = _load(b, y, here, VECTOR), _load(b, y, there, VECTOR)
                for pointer, size in zip(pointers, sizes, strict=True):
                    of_low, of_high = _halves(b, _load(b, pointer, b.add(base, j), CODES))
                    low, high = _fma(b, size, of_low, low), _fma(b, size, of_high, high)
                _store(b, low, y, here)
                _store(b, high, y, there)

    return types.void(code, weight, y, types.int64, types.int64, types.int64), build


@intrinsic
def full_dots(_: Any, gate: Any, u: Any, x: Any, __: Any) -> Any:
    """Products of one gate and one up vector in full with the first inputs, as many as given."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        *tables, x, count = values
        sums = _sums(b, 2)
        _clear(b, sums)
        with _steps(b, 0, count) as (d, _):
            for total, table in zip(sums, tables, strict=True):
                _add_to(b, total, _number(b, signature.args[0].dtype, table, d), _load(b, x, d, VECTOR))
        return cgutils.pack_array(b, [_sum(b, b.load(total)) for total in sums])

    return types.UniTuple(types.float32, 2)(gate, u, x, types.int64), build


@intrinsic
def add_full(_: Any, v: Any, y: Any, __: Any, ___: Any) -> Any:
    """Add `a` times the first numbers of an output vector, as many as given."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        v, y, a, count = values
        weight = _splat(b, a)
        with _steps(b, 0, count) as (d, _):
            number = _number(b, signature.args[0].dtype, v, d)
            _store(b, _fma(b, weight, number, _load(b, y, d, VECTOR)), y, d)

    return types.void(v, y, types.float32, types.int64), build
