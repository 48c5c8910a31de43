# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""How each expert of a block is read, and activation functions, in vector code; see `peer_copies.estimate`.

Shape suffixes: b experts of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .peer_lanes import Lanes
from .peer_many import BLOCK
from .peer_vectors import FAST, I8, I64, LANES, WHOLE, along

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import njit, types
    from numba.extending import intrinsic
except ImportError:
    raise

LOG2_E = 1.4426950408889634
POWERS = (1.8775767e-3, 8.9893397e-3, 5.5826318e-2, 2.4015361e-1, 6.9315308e-1, 9.9999994e-1)  # of 2^x, x in [0, 1)
ERFC = (
    0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418, 0.37409196, 1.00002368,
    -1.26551223,
)  # fmt: skip
NODE = 1.7320508075688772  # see peer_copies.py
TINY = 1e-30


# --- Activation functions -----------------------------------------------------------------------------------------


def _exp(x: Lanes) -> Lanes:
    """e^x to 3e-6; of what is no number, almost 0."""
    power = x.at_most(88.0).or_least(-87.0) * LOG2_E
    whole = power.floor()
    part, p = power - whole, power.like(POWERS[0])
    for each in POWERS[1:]:
        p = p * part + each
    return p * whole.power_of_two()


def _silu(z: Lanes) -> Lanes:
    return z / (_exp(-z) + 1.0)


def _gelu(z: Lanes) -> Lanes:
    """By tanh."""
    return z / (_exp((z + z * z * z * 0.044715) * -1.5957691216057308) + 1.0)


def _exact_gelu(z: Lanes) -> Lanes:
    """By the complementary error function, to 1e-5 of itself even where it is small (Numerical Recipes, erfcc)."""
    x = z.size() * 0.7071067811865476
    t = z.like(1.0) / (x * 0.5 + 1.0)
    p = z.like(ERFC[0])
    for each in ERFC[1:]:
        p = p * t + each
    tail = t * _exp(p - x * x) * 0.5
    return z * z.below(0.0).choose(tail, z.like(1.0) - tail)


def _relu(z: Lanes) -> Lanes:
    return z.below(0.0).choose(z.like(0.0), z)


def _squared_relu(z: Lanes) -> Lanes:
    return _relu(z) * _relu(z)


def _in_place(function: Callable[[Lanes], Lanes]) -> Any:
    @intrinsic
    def apply(_: Any, z: Any, __: Any) -> Any:
        """The function of so many numbers, a multiple of LANES."""

        def build(_: Any, b: Any, __: Any, values: Any) -> Any:
            pointer, count = values
            with along(b, 0, count) as (j, _):
                function(Lanes.loaded(b, pointer, j)).store(pointer, j)

        return types.void(z, types.int64), build

    return apply


_all_silu, _all_exact_gelu, _all_gelu, _all_relu, _all_squared_relu = map(
    _in_place, (_silu, _exact_gelu, _gelu, _relu, _squared_relu)
)


@njit(fastmath=set(FAST))
def activate(z: Any, count: int, kind: int) -> None:
    """The first numbers after a pointer, in place; kinds as of `peer_many.ACTIVATIONS`."""
    whole = count - count % LANES
    if kind == 0:
        _all_silu(z, whole)
    elif kind == 1:
        _all_exact_gelu(z, whole)
    elif kind == 2:
        _all_gelu(z, whole)
    elif kind == 3:
        _all_relu(z, whole)
    else:
        _all_squared_relu(z, whole)
    for b in range(whole, count):
        z[b] = activated(z[b], kind)


@njit(fastmath=set(FAST))
def activated(z: Any, kind: int) -> Any:
    """The activation function of one number."""
    one, half = np.float32(1.0), np.float32(0.5)
    if kind == 0:
        return z / (one + np.exp(-z))
    if kind == 1:
        return z * (half + half * np.float32(math.erf(z * np.float32(0.7071067811865476))))
    if kind == 2:
        return z / (one + np.exp(np.float32(-1.5957691216057308) * (z + np.float32(0.044715) * z * z * z)))
    positive = np.float32(0.0) if z < np.float32(0.0) else z
    return positive if kind == 3 else positive * positive


# --- The choice ---------------------------------------------------------------------------------------------------


@intrinsic
def _nodes(_: Any, gate: Any, u: Any, stat: Any, bias: Any, ___: Any, ____: Any, a_3b: Any) -> Any:
    """Add biases to both projections (b,), and put the gate's where the quadrature asks for them into a_3b."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        gate, u, stat, bias, stride, omitted, a_3b = values
        for part in range(0, BLOCK, LANES):
            place = ir.Constant(I64, part)
            spread = _variance(b, stat, stride, part, omitted, 3, 1).sqrt() * NODE
            z = Lanes.loaded(b, gate, place) + Lanes.loaded(b, bias, place)
            z.store(gate, place)
            up = Lanes.loaded(b, u, place) + Lanes.loaded(b, bias, b.add(place, stride))
            up.store(u, place)
            for row, node in enumerate((z - spread, z, z + spread)):
                node.store(a_3b, ir.Constant(I64, row * BLOCK + part))

    return types.void(gate, u, stat, bias, types.int64, types.float32, a_3b), build


def _variance(b: Any, stat: Any, stride: Any, part: int, omitted: Any, size: int, error: int) -> Lanes:
    """That of products with a key, from the rows of `stat` with its sizes and with its errors."""
    size_b, error_b = (_statistic(b, stat, stride, part, row) for row in (size, error))
    return error_b * error_b + size_b * size_b * omitted


def _statistic(b: Any, stat: Any, stride: Any, part: int, row: int) -> Lanes:
    return Lanes.loaded(b, stat, b.add(b.mul(stride, ir.Constant(I64, row)), ir.Constant(I64, part)))


@intrinsic
def _least(_: Any, u: Any, stat: Any, __: Any, ___: Any, price: Any, a_3b: Any, coarse: Any, tier: Any) -> Any:
    """From the activated nodes: how each expert is read, and the activations of those read by coarse copies."""

    def build(_: Any, b: Any, __: Any, values: Any) -> Any:
        u, stat, stride, omitted, price_3, a_3b, coarse, tier = values
        price, share, finer_share = (b.load(b.gep(price_3, [ir.Constant(I64, i)])) for i in range(3))
        of_coarse, of_fine = b.fmul(price, share), b.fmul(price, finer_share)
        for part in range(0, BLOCK, LANES):
            low, middle, high = (Lanes.loaded(b, a_3b, ir.Constant(I64, row * BLOCK + part)) for row in range(3))
            place = ir.Constant(I64, part)
            up = Lanes.loaded(b, u, place)
            energy, of_v, finer, of_fine_v = (_statistic(b, stat, stride, part, row) for row in (4, 5, 6, 7))
            mean = (low + high + middle * 4.0) * (1 / 6)
            square = (low * low + high * high + middle * middle * 4.0) * (1 / 6)
            noise = square * _variance(b, stat, stride, part, omitted, 2, 0)
            spread = ((square - mean * mean) * up * up + noise).or_least(0.0) * energy
            square = square * up * up + noise
            finer = finer * finer / _variance(b, stat, stride, part, omitted, 3, 1).or_least(TINY)
            least, tier_b = square * energy, ir.Constant(WHOLE, [0] * LANES)
            for number, loss in (
                (1, spread + square * of_v + of_coarse),
                (2, spread * finer + square * of_fine_v + of_fine),
                (3, up.like(price)),
            ):
                stays = loss.above(least)  # not so of numbers that are none: those are not hidden
                tier_b = b.select(stays.value, tier_b, ir.Constant(WHOLE, [number] * LANES))
                least = stays.choose(least, loss)
            is_coarse = b.icmp_signed("==", tier_b, ir.Constant(WHOLE, [1] * LANES))
            Lanes(b, is_coarse).choose(mean * up, up.like(0.0)).store(coarse, place)
            codes = b.trunc(tier_b, ir.VectorType(I8, LANES))
            b.store(codes, b.bitcast(b.gep(tier, [place]), ir.PointerType(codes.type)), align=1)

    return types.void(u, stat, types.int64, types.float32, price, a_3b, coarse, tier), build


@njit
def decide(
    gate: Any, u: Any, stat: Any, bias: Any, stride: int, omitted: Any, price: Any, kind: int, a_3b: Any, coarse: Any,
    tier: Any,
) -> None:  # fmt: skip
    """How each expert of a block is read; see `ElasticPool.tiers`. All are pointers but numbers.

    Args:
        gate, u: products with the keys (b,), which are given their biases.
        stat, bias: at the block's first expert in (8, n) and (2, n), n = `stride`.
        omitted: squared norm of the inputs that were not read.
        price: and the costs of a coarse and of a fine copy, (3,).
        a_3b: room.
        coarse, tier: the results: activations of what is read by coarse copies, 0 of others, and how it is read.
    """
    _nodes(gate, u, stat, bias, stride, omitted, a_3b)
    activate(a_3b, 3 * BLOCK, kind)
    _least(u, stat, stride, omitted, price, a_3b, coarse, tier)
