# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Vector code for the loops of kernels, in LLVM's own language by way of numba.

LLVM's search for vectors in loops that numba compiles finds half of this speed or less. A vector has 16 numbers,
whatever the machine's have: LLVM cuts them. Everything here takes pointers: an array that is passed counts its
references, in all threads at once.
"""

from __future__ import annotations

from typing import Any

try:  # transformers refuses code that imports what is not installed, unless it stands in such a block
    from llvmlite import ir
    from numba import types
    from numba.core import cgutils
    from numba.core.registry import cpu_target
    from numba.extending import intrinsic
except ImportError:
    raise

LANES = 16
F32, I8, I16, I32, I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FAST = ("contract", "reassoc", "nsz", "arcp", "afn")  # of fast arithmetic what leaves numbers that are none as they are
VECTOR, CODES, WHOLE = (ir.VectorType(kind, LANES) for kind in (F32, I8, I32))
OF_PAIRS = (  # what an instruction needs, bits of a number and of a vector, and its name
    ("+avx512bw", 8, 512, "llvm.x86.avx512.pmaddubs.w.512"),
    ("+avx512bw", 16, 512, "llvm.x86.avx512.pmaddw.d.512"),
    ("+avx2", 8, 256, "llvm.x86.avx2.pmadd.ub.sw"),
    ("+avx2", 16, 256, "llvm.x86.avx2.pmadd.wd"),
)


def instructions() -> str:
    """What the processor can do that code is made for, as LLVM lists it: "+avx2,+avx512bw,-amx-tile"."""
    return str(cpu_target.target_context.codegen()._tm_features)


def splat(b: Any, value: Any, count: int = LANES) -> Any:
    nothing = ir.Constant(ir.VectorType(value.type, count), ir.Undefined)
    first = b.insert_element(nothing, value, ir.Constant(I32, 0))
    return b.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(I32, count), [0] * count))


def load(b: Any, pointer: Any, place: Any, kind: Any) -> Any:
    return b.load(b.bitcast(b.gep(pointer, [place]), ir.PointerType(kind)), align=1)


def store(b: Any, value: Any, pointer: Any, place: Any) -> None:
    b.store(value, b.bitcast(b.gep(pointer, [place]), ir.PointerType(VECTOR)), align=1)


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    return _call(b, f"llvm.fma.v{x.type.count}f32", x.type, x, y, z)


def products_of_pairs(b: Any, x: Any, y: Any, has: str) -> Any:
    """x0 y0 + x1 y1, x2 y2 + x3 y3, ... of whole numbers of 8 or 16 bits, in twice as many.

    Processors do it in one instruction, which LLVM does not always find. Of 8 bits x has no signs, and sums must fit.
    Args: has: see `instructions`.
    """
    bits, count = x.type.element.width, x.type.count
    instruction = next((name for need, *for_, name in OF_PAIRS if for_ == [bits, bits * count] and need in has), None)
    twice = ir.IntType(2 * bits)
    if instruction is not None:
        return _call(b, instruction, ir.VectorType(twice, count // 2), x, y)
    if bits * count > 256 and "+avx2" in has:
        halves = [products_of_pairs(b, *(part(b, each, at, count // 2) for each in (x, y)), has) for at in (0, 1)]
        return b.shuffle_vector(*halves, places(range(count // 2)))
    wide = ir.VectorType(twice, count)
    product = b.mul((b.zext if bits == 8 else b.sext)(x, wide), b.sext(y, wide))
    even, odd = (b.shuffle_vector(product, product, places(range(at, count, 2))) for at in (0, 1))
    return b.add(even, odd)


def places(order: Any) -> Any:
    """The places of a vector, or of two after one another, as a mask for `shuffle_vector`."""
    order = list(order)
    return ir.Constant(ir.VectorType(I32, len(order)), order)


def part(b: Any, vector: Any, which: int, count: int) -> Any:
    """So many numbers of a vector: the first, the second, ... of its parts."""
    return b.shuffle_vector(vector, vector, places(range(which * count, (which + 1) * count)))


def _call(b: Any, name: str, result: Any, *arguments: Any) -> Any:
    kind = ir.FunctionType(result, [each.type for each in arguments])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), arguments)


def maximum_of(b: Any, vector: Any) -> Any:
    return _call(b, f"llvm.vector.reduce.fmax.v{LANES}f32", F32, vector)


def sum_of(b: Any, vector: Any) -> Any:
    kind = ir.FunctionType(F32, [F32, vector.type])
    add = cgutils.get_or_insert_function(b.module, kind, f"llvm.vector.reduce.fadd.v{vector.type.count}f32")
    return b.call(add, [ir.Constant(F32, 0.0), vector], fastmath=("reassoc",))


def zeros(b: Any, count: int, kind: Any = VECTOR) -> list[Any]:
    return [cgutils.alloca_once_value(b, ir.Constant(kind, None)) for _ in range(count)]


def clear(b: Any, totals: list[Any]) -> None:
    for each in totals:
        b.store(ir.Constant(each.type.pointee, None), each)


def add_to(b: Any, total: Any, x: Any, y: Any) -> None:
    b.store(fma(b, x, y, b.load(total)), total)


def widened(b: Any, kind: Any, pointer: Any, place: Any) -> Any:
    """Sixteen float32 from float32, from bfloat16 whose bits are given as uint16, or from float16 as int16."""
    if kind == types.float32:
        return load(b, pointer, place, VECTOR)
    bits = load(b, pointer, place, ir.VectorType(I16, LANES))
    if kind == types.int16:
        return b.fpext(b.bitcast(bits, ir.VectorType(ir.HalfType(), LANES)), VECTOR)
    return b.bitcast(b.shl(b.zext(bits, WHOLE), ir.Constant(WHOLE, [16] * LANES)), VECTOR)


def along(b: Any, start: Any, end: Any) -> Any:
    start = ir.Constant(I64, start) if isinstance(start, int) else start
    return cgutils.for_range_slice(b, start, end, ir.Constant(I64, LANES), I64)


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


floats, bytes_, words, halves, longs = map(
    _pointer, (types.float32, types.uint8, types.uint16, types.int16, types.int64)
)


@intrinsic
def take(_: Any, counter: Any) -> Any:
    """What the counter was before this thread, and none beside it, raised it by one."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        return b.atomic_rmw("add", values[0], ir.Constant(I64, 1), "acq_rel")

    return types.int64(counter), build


@intrinsic
def fetch(_: Any, pointer: Any, __: Any) -> Any:
    """Have so many bytes read ahead, into the cache of the second level."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        pointer, count = values
        kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(I8), I32, I32, I32])
        ahead = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0i8")
        first, one = b.bitcast(pointer, ir.PointerType(I8)), ir.Constant(I32, 1)
        with cgutils.for_range_slice(b, ir.Constant(I64, 0), count, ir.Constant(I64, 64), I64) as (j, _):
            b.call(ahead, [b.gep(first, [j]), ir.Constant(I32, 0), ir.Constant(I32, 2), one])

    return types.void(pointer, types.int64), build
