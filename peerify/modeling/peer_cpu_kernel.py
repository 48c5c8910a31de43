# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""An elastic layer for few tokens, compiled by numba; peer_cpu.py packs what it reads, and starts it in threads.

Every thread takes chunks of blocks of experts until none is left. For each block and token it multiplies the inputs
that are read with the keys, decides how each expert is read, and adds what it reads to the sum of the chunk. The thread
that ends the last chunk adds up these sums in their order, so results do not depend on which thread did what.

Shape suffixes: t tokens, d d_model (filled up to whole groups where codes are met), n experts, k blocks, b experts of a
block, c chunks of blocks, g groups, e output vectors to be added.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .peer_choice_kernel import activated, decide
from .peer_cpu import (
    BIAS,
    BLOCK,
    BLOCKS,
    CHUNKS,
    CODE,
    D_MODEL,
    DONE,
    EXPERTS,
    GATE,
    GROUP,
    INPUTS,
    KEY,
    KEY_N,
    KEY_STEP,
    KEY_STEP_N,
    KIND,
    NEXT,
    PADDED,
    PARTS,
    PRICE,
    REACH,
    SCALE,
    STAT,
    STEP,
    TOKENS,
    U,
    V,
    X,
    Y,
)
from .peer_cpu_vectors import (
    MIDDLE,
    TOGETHER,
    add_codes,
    add_full,
    dots,
    full_dots,
    key_products,
)
from .peer_vectors import FAST, address, after, at, bytes_, fetch, floats, halves, take, words

try:  # see peer_vectors.py
    from numba import carray, cfunc, njit, types
except ImportError:
    raise


@njit(fastmath=set(FAST))
def _largest(x_td: Any, t: int, reach_d: Any, count: int, bits_d: Any, read_td: Any) -> tuple[int, Any]:
    """Put the inputs of a token that matter most into read_td, in order: how many, and the others' squared norm."""
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
            read_td[t, found] = d
            found += 1
        else:
            omitted += x_td[t, d] * x_td[t, d]
    return found, omitted


@njit(fastmath=set(FAST), error_model="numpy")
def _work(frame: Any, u: Any, gate: Any, v: Any) -> None:
    """What one thread does."""
    tokens, d_model, padded, group = frame[TOKENS], frame[D_MODEL], frame[PADDED], frame[GROUP]
    experts, blocks, chunks = frame[EXPERTS], frame[BLOCKS], frame[CHUNKS]
    inputs, kind = frame[INPUTS], frame[KIND]
    groups, half, blocks_each = padded // group, group // 2, (blocks + chunks - 1) // chunks
    x_td = carray(floats(frame[X]), (tokens, d_model))
    parts_ctd = carray(floats(frame[PARTS]), (chunks, tokens, padded))
    stat, bias, price, stride = floats(frame[STAT]), floats(frame[BIAS]), floats(frame[PRICE]), blocks * BLOCK
    scale_d, reach_d = carray(floats(frame[SCALE]), d_model), carray(floats(frame[REACH]), d_model)
    key, key_step = bytes_(frame[KEY]), floats(frame[KEY_STEP])
    key_n, key_step_n = bytes_(frame[KEY_N]), floats(frame[KEY_STEP_N])
    code, step = bytes_(frame[CODE]), floats(frame[STEP])
    bits_d, read_td = np.empty(d_model, np.int32), np.empty((tokens, d_model), np.int64)
    start_tg, omitted_t = np.empty((tokens, groups + 1), np.int64), np.empty(tokens, np.float32)
    scaled_td, total_tg = np.zeros((tokens, padded), np.float32), np.zeros((tokens, groups), np.float32)
    shift_tg = np.empty((tokens, groups), np.float32)
    z_2b, a_4b, tier_b = np.empty((2, BLOCK), np.float32), np.empty((4, BLOCK), np.float32), np.empty(BLOCK, np.uint8)
    source_e, weight_eg = np.empty(2 * BLOCK + TOGETHER, np.int64), np.empty((2 * BLOCK + TOGETHER, groups), np.float32)
    for t in range(tokens):
        count, omitted_t[t] = _largest(x_td, t, reach_d, inputs, bits_d, read_td)
        j = 0
        for g in range(groups + 1):
            while j < count and read_td[t, j] < g * group:
                j += 1
            start_tg[t, g] = j
        for d in range(d_model):
            scaled_td[t, d] = x_td[t, d] / scale_d[d]
            total_tg[t, d // group] += scaled_td[t, d]
    while True:
        chunk = take(after(frame, NEXT))
        if chunk >= chunks:
            break
        parts_ctd[chunk] = np.float32(0.0)
        shift_tg[:] = np.float32(0.0)
        for k in range(chunk * blocks_each, min(blocks, (chunk + 1) * blocks_each)):
            for t in range(tokens):
                x, totals, y = (
                    at(scaled_td, t * padded), at(total_tg, t * groups), at(parts_ctd, (chunk * tokens + t) * padded)
                )  # fmt: skip
                key_products(
                    after(key, k * padded * BLOCK), after(key_step, k * groups * 2 * BLOCK), x,
                    at(read_td, t * d_model), at(start_tg, t * (groups + 1)), groups, at(z_2b, 0),
                )  # fmt: skip
                decide(
                    at(z_2b, 0), at(z_2b, BLOCK), after(stat, k * BLOCK), after(bias, k * BLOCK), stride, omitted_t[t],
                    price, kind, at(a_4b, 0), at(a_4b, 3 * BLOCK), at(tier_b, 0),
                )  # fmt: skip
                here = min(BLOCK, experts - k * BLOCK)
                for b in range(here):
                    n = k * BLOCK + b
                    if tier_b[b] == 1:
                        fetch(after(code, n * 2 * padded + padded), padded // 2)
                    elif tier_b[b] == 2:
                        fetch(after(code, n * 2 * padded), 2 * padded)
                found = 0
                for b in range(here):
                    tier, n = tier_b[b], k * BLOCK + b
                    if tier == 0:
                        continue
                    if tier == 3:
                        z_gate, z_u = full_dots(
                            after(gate, n * d_model), after(u, n * d_model), at(x_td, t * d_model), d_model
                        )
                        a = activated(z_gate + bias[n], kind) * (z_u + bias[stride + n])
                        add_full(after(v, n * d_model), y, a, d_model)
                        continue
                    activation = a_4b[3, b]
                    if tier == 2:
                        z_gate, z_u = z_2b[0, b], z_2b[1, b]
                        if inputs < d_model:
                            z_gate, z_u = dots(
                                after(key_n, n * padded), after(key_step_n, n * 2 * groups), x, totals, groups, group
                            )
                            z_gate += bias[n]
                            z_u += bias[stride + n]
                        more_gate, more_u = dots(
                            after(code, n * 2 * padded), after(step, n * 4 * groups), x, totals, groups, group
                        )
                        activation = activated(z_gate + more_gate, kind) * (z_u + more_u)
                    for copy in range(tier):  # the coarse copy of the output vector, and what the fine one adds to it
                        source_e[found] = address(after(code, n * 2 * padded + padded + copy * padded // 2))
                        for g in range(groups):
                            weight = activation * step[(n * 4 + 2 + copy) * groups + g]
                            weight_eg[found, g] = weight
                            shift_tg[t, g] += weight
                        found += 1
                while found % TOGETHER:  # with nothing of what is there anyway
                    source_e[found] = source_e[found - 1]
                    for g in range(groups):
                        weight_eg[found, g] = np.float32(0.0)
                    found += 1
                for e in range(0, found, TOGETHER):
                    add_codes(at(source_e, e), at(weight_eg, e * groups), y, groups, half, groups)
        for t in range(tokens):
            for d in range(padded):
                parts_ctd[chunk, t, d] -= np.float32(MIDDLE) * shift_tg[t, d // group]
        if take(after(frame, DONE)) + 1 == chunks:
            y_td = carray(floats(frame[Y]), (tokens, d_model))
            for t in range(tokens):
                for d in range(d_model):
                    total = np.float32(0.0)
                    for c in range(chunks):
                        total += parts_ctd[c, t, d]
                    y_td[t, d] = total


def _float32(frame: Any) -> None:
    _work(frame, floats(frame[U]), floats(frame[GATE]), floats(frame[V]))


def _bfloat16(frame: Any) -> None:
    _work(frame, words(frame[U]), words(frame[GATE]), words(frame[V]))


def _float16(frame: Any) -> None:
    _work(frame, halves(frame[U]), halves(frame[GATE]), halves(frame[V]))


def compiled(dtype: str) -> Any:
    """The work of a thread, for experts of that number type, as a C function of the address of the frame."""
    work = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}[dtype]
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
