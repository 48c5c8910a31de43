# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Arithmetic with sixteen numbers at a time, written as expressions; see peer_vectors.py."""

from __future__ import annotations

from typing import Any

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba.core import cgutils
except ImportError:
    raise

from .peer_vectors import CODES, FAST, I32, LANES, VECTOR, WHOLE, load, splat, store


class Lanes:
    """Sixteen numbers of float32 in an expression, or sixteen truths; the other operand may be one number.

    Numbers that are none stay so: nothing here takes it that there are none.

    Args:
        flags: what LLVM may do to arithmetic; nothing: each operation is rounded as IEEE 754 has it.
    """

    def __init__(self, b: Any, value: Any, flags: tuple[str, ...] = FAST) -> None:
        self.b, self.value, self.flags = b, value, flags

    @classmethod
    def loaded(cls, b: Any, pointer: Any, place: Any, flags: tuple[str, ...] = FAST) -> Lanes:
        return cls(b, load(b, pointer, place, VECTOR), flags)

    def store(self, pointer: Any, place: Any) -> None:
        store(self.b, self.value, pointer, place)

    def like(self, number: Any) -> Lanes:
        """The same number sixteen times, from Python's or LLVM's."""
        if isinstance(number, Lanes):
            return number
        if isinstance(number, float):
            return self._of(ir.Constant(VECTOR, [number] * LANES))
        return self._of(splat(self.b, number))

    def _of(self, value: Any) -> Lanes:
        return Lanes(self.b, value, self.flags)

    def _with(self, operation: str, other: Any) -> Lanes:
        return self._of(getattr(self.b, operation)(self.value, self.like(other).value, flags=self.flags))

    def __add__(self, other: Any) -> Lanes:
        return self._with("fadd", other)

    def __sub__(self, other: Any) -> Lanes:
        return self._with("fsub", other)

    def __mul__(self, other: Any) -> Lanes:
        return self._with("fmul", other)

    def __truediv__(self, other: Any) -> Lanes:
        return self._with("fdiv", other)

    def __neg__(self) -> Lanes:
        return self.like(-0.0) - self

    def above(self, other: Any) -> Lanes:
        return self._of(self.b.fcmp_ordered(">", self.value, self.like(other).value))

    def below(self, other: Any) -> Lanes:
        return self._of(self.b.fcmp_ordered("<", self.value, self.like(other).value))

    def choose(self, yes: Any, no: Any) -> Lanes:
        """By truths, of which one of the two must know how to count."""
        return self._of(self.b.select(self.value, yes.value, no.value))

    def at_most(self, limit: Any) -> Lanes:
        """The limit also in place of what is no number."""
        return self.below(limit).choose(self, self.like(limit))

    def or_least(self, limit: Any) -> Lanes:
        """At least the limit, which also takes the place of what is no number."""
        return self.above(limit).choose(self, self.like(limit))

    def sqrt(self) -> Lanes:
        return self._called("sqrt")

    def floor(self) -> Lanes:
        return self._called("floor")

    def nearest(self) -> Lanes:
        """The nearest whole numbers."""
        return self._called("rint")

    def size(self) -> Lanes:
        return self._called("fabs")

    def _called(self, name: str) -> Lanes:
        kind = ir.FunctionType(VECTOR, [VECTOR])
        function = cgutils.get_or_insert_function(self.b.module, kind, f"llvm.{name}.v{LANES}f32")
        return self._of(self.b.call(function, [self.value], fastmath=self.flags))

    def power_of_two(self) -> Lanes:
        """2 to whole numbers from -126 to 127."""
        b, bias = self.b, ir.Constant(WHOLE, [127] * LANES)
        bits = b.shl(b.add(b.fptosi(self.value, WHOLE), bias), ir.Constant(WHOLE, [23] * LANES))
        return self._of(b.bitcast(bits, VECTOR))


def first(b: Any, count: Any) -> Lanes:
    """True of so many of sixteen."""
    counts = splat(b, b.trunc(count, I32))
    return Lanes(b, b.icmp_signed("<", ir.Constant(WHOLE, list(range(LANES))), counts))


def equal(b: Any, pointer: Any, place: Any, number: int) -> Lanes:
    """Which of sixteen bytes are that number."""
    return Lanes(b, b.icmp_unsigned("==", load(b, pointer, place, CODES), ir.Constant(CODES, [number] * LANES)))
