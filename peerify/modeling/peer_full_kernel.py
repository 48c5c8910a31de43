# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""All experts in full, for few tokens, compiled by numba; peer_full.py starts it in threads.

Every thread takes chunks of experts until none is left. The one that ends the last chunk adds up the chunks' sums in
their order, so results do not depend on which thread did what.

Shape suffixes: t tokens, d d_model, n experts, b experts of a block, c chunks.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_choice_kernel import activate
from .peer_cpu_vectors import add_full, full_dots
from .peer_full import (
    BIAS,
    CHUNKS,
    D_MODEL,
    DONE,
    EACH,
    EXPERTS,
    GATE,
    GATED,
    KIND,
    NEXT,
    PARTS,
    TOKENS,
    U,
    V,
    X,
    Y,
)
from .peer_vectors import (
    FAST,
    I64,
    VECTOR,
    add_to,
    after,
    along,
    at,
    clear,
    floats,
    fma,
    halves,
    load,
    splat,
    store,
    sum_of,
    take,
    widened,
    words,
    zeros,
)

try:  # see peer_vectors.py
    from llvmlite import ir
    from numba import cfunc, njit, types
    from numba.extending import intrinsic
except ImportError:
    raise

BLOCK = 16  # experts whose activations are found together
TOGETHER = 4  # tokens that meet a row while it is in registers


@intrinsic
def _dots(_: Any, gate: Any, u: Any, x: Any, __: Any, z: Any) -> Any:
    """`full_dots` of TOGETHER tokens (t, d): those with the gate to every BLOCKth number of z, with u further on."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        *tables, x, count, z = values
        sums = zeros(b, 2 * TOGETHER)
        clear(b, sums)
        with along(b, 0, count) as (d, _):
            rows = [widened(b, signature.args[0].dtype, table, d) for table in tables]
            for t in range(TOGETHER):
                numbers = load(b, x, b.add(b.mul(count, ir.Constant(I64, t)), d), VECTOR)
                for which, row in enumerate(rows):
                    add_to(b, sums[which * TOGETHER + t], row, numbers)
        for which in range(2):
            for t in range(TOGETHER):
                place = ir.Constant(I64, (which * TOGETHER + t) * BLOCK)
                b.store(sum_of(b, b.load(sums[which * TOGETHER + t])), b.gep(z, [place]))

    return types.void(gate, u, x, types.int64, z), build


@intrinsic
def _add(_: Any, v: Any, y: Any, a: Any, __: Any) -> Any:
    """Add to TOGETHER sums (t, d) an output vector, times every BLOCKth number of `a`."""

    def build(_: Any, b: Any, signature: Any, values: Any) -> Any:
        v, y, a, count = values
        weights = [splat(b, b.load(b.gep(a, [ir.Constant(I64, t * BLOCK)]))) for t in range(TOGETHER)]
        with along(b, 0, count) as (d, _):
            row = widened(b, signature.args[0].dtype, v, d)
            for t, weight in enumerate(weights):
                place = b.add(b.mul(count, ir.Constant(I64, t)), d)
                store(b, fma(b, weight, row, load(b, y, place, VECTOR)), y, place)

    return types.void(v, y, a, types.int64), build


@njit(fastmath=set(FAST))
def _work(frame: Any, u: Any, gate: Any, v: Any) -> None:
    tokens, d_model, experts, kind = frame[TOKENS], frame[D_MODEL], frame[EXPERTS], frame[KIND]
    chunks, gated, biased = frame[CHUNKS], frame[GATED] != 0, frame[BIAS] != 0
    x, bias = floats(frame[X]), floats(frame[BIAS])
    room = np.zeros((2 * TOGETHER, BLOCK), np.float32)  # of each token the gate's projections, then the others
    z = at(room, 0)
    while True:
        chunk = take(after(frame, NEXT))
        if chunk >= chunks:
            break
        parts = after(floats(frame[PARTS]), chunk * tokens * d_model)
        for i in range(tokens * d_model):
            parts[i] = np.float32(0.0)
        end = min(experts, (chunk + 1) * frame[EACH])
        for first in range(chunk * frame[EACH], end, BLOCK):
            here = min(BLOCK, end - first)
            t = 0
            while t < tokens:
                count = TOGETHER if t + TOGETHER <= tokens else 1
                for b in range(here):
                    row = (first + b) * d_model
                    if count == TOGETHER:
                        _dots(after(gate, row), after(u, row), after(x, t * d_model), d_model, after(z, b))
                    else:
                        z[b], z[TOGETHER * BLOCK + b] = full_dots(
                            after(gate, row), after(u, row), after(x, t * d_model), d_model
                        )
                for i in range(count):
                    of_gate, of_u = after(z, i * BLOCK), after(z, (TOGETHER + i) * BLOCK)
                    if biased:
                        for b in range(here):
                            of_gate[b] += bias[first + b] if gated else bias[experts + first + b]
                            of_u[b] += bias[experts + first + b]
                    activate(of_gate, BLOCK, kind)
                    if gated:
                        for b in range(BLOCK):
                            of_gate[b] *= of_u[b]
                for b in range(here):
                    row = (first + b) * d_model
                    if count == TOGETHER:
                        _add(after(v, row), after(parts, t * d_model), after(z, b), d_model)
                    else:
                        add_full(after(v, row), after(parts, t * d_model), z[b], d_model)
                t += count
        if take(after(frame, DONE)) + 1 == chunks:
            y, parts = floats(frame[Y]), floats(frame[PARTS])
            for i in range(tokens * d_model):
                total = np.float32(0.0)
                for c in range(chunks):
                    total += parts[c * tokens * d_model + i]
                y[i] = total


def _float32(frame: Any) -> None:
    _work(frame, floats(frame[U]), floats(frame[GATE]), floats(frame[V]))


def _bfloat16(frame: Any) -> None:
    _work(frame, words(frame[U]), words(frame[GATE]), words(frame[V]))


def _float16(frame: Any) -> None:
    _work(frame, halves(frame[U]), halves(frame[GATE]), halves(frame[V]))


def compiled(name: str) -> Any:
    """The kernel for that number type, as a C function of the address of the frame."""
    work = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}[name]
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
