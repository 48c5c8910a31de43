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
    THREADS,
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
from .peer_inputs_kernel import digits, largest_inputs, pair_inputs
from .peer_vectors import FAST, address, after, at, bytes_, fetch, floats, halves, take, words

try:  # see peer_vectors.py
    from numba import carray, cfunc, njit, types
except ImportError:
    raise


@njit(fastmath=set(FAST))
def _fetch(frame: Any, u: Any, gate: Any, v: Any, n: int, size: int, tier: int) -> None:
    """Have read ahead what a token reads of an expert; `size`: bytes of a number of the experts."""
    padded, d_model = frame[PADDED], frame[D_MODEL]
    groups, code, step = padded // frame[GROUP], bytes_(frame[CODE]), floats(frame[STEP])
    if tier == 1:
        fetch(after(code, n * 2 * padded + padded), padded // 2)
        fetch(after(step, (n * 4 + 2) * groups), 4 * groups)
    elif tier == 2:
        fetch(after(code, n * 2 * padded), 2 * padded)
        fetch(after(step, n * 4 * groups), 16 * groups)
        if frame[INPUTS] < d_model:
            fetch(after(bytes_(frame[KEY_N]), n * padded), padded)
            fetch(after(floats(frame[KEY_STEP_N]), n * 2 * groups), 8 * groups)
    elif tier == 3:
        fetch(after(gate, n * d_model), size * d_model)
        fetch(after(u, n * d_model), size * d_model)
        fetch(after(v, n * d_model), size * d_model)


@njit(fastmath=set(FAST))
def _fetch_keys(frame: Any, k: int, part: int, rows: Any, pairs: int) -> None:
    """Have one of BLOCK parts of the keys of a block read ahead, for the inputs in `rows` (pairs, 2)."""
    key = after(bytes_(frame[KEY]), k * frame[PADDED] * BLOCK)
    for j in range(part * pairs // BLOCK, (part + 1) * pairs // BLOCK):
        fetch(after(key, rows[2 * j] * BLOCK), 1)  # a line of memory
        fetch(after(key, rows[2 * j + 1] * BLOCK), 1)


@njit(fastmath=set(FAST), error_model="numpy")
def _read(
    frame: Any, u: Any, gate: Any, v: Any, k: int, x: Any, meet: Any, z: Any, a: Any, tier: Any, y: Any, shift: Any,
    source: Any, weights: Any, then: int, tier_then: Any, size: int, then_keys: int, rows: Any, pairs: int,
) -> None:  # fmt: skip
    """Add to `y` what a token reads of a block, less the middle of codes, whose weights go into `shift` (g,).

    Args:
        x: inputs (d,); `meet`: what meets codes, see `dots`.
        z, a, tier: as of `decide`.
        source, weights: room for output vectors to be added, (e,) and (e, g).
        then, tier_then: the block that is read next, and how, or -1. Its experts are read ahead, one for each of this
            block's, since memory takes so many requests at once and no more. `size`: see `_fetch`.
        then_keys, rows, pairs: likewise the block whose keys come next; see `_fetch_keys`.
    """
    d_model, padded, group, experts = frame[D_MODEL], frame[PADDED], frame[GROUP], frame[EXPERTS]
    groups, kind, bias, stride = padded // group, frame[KIND], floats(frame[BIAS]), frame[BLOCKS] * BLOCK
    code, step, found = bytes_(frame[CODE]), floats(frame[STEP]), 0
    digit_id, step_g2, middle_g = meet
    for b in range(min(BLOCK, experts - k * BLOCK)):
        read, n = tier[b], k * BLOCK + b
        if then_keys >= 0:
            _fetch_keys(frame, then_keys, b, rows, pairs)
        if then >= 0 and then * BLOCK + b < experts:
            _fetch(frame, u, gate, v, then * BLOCK + b, size, tier_then[b])
        if read == 0:
            continue
        if read == 3:
            z_gate, z_u = full_dots(after(gate, n * d_model), after(u, n * d_model), x, d_model)
            activation = activated(z_gate + bias[n], kind) * (z_u + bias[stride + n])
            add_full(after(v, n * d_model), y, activation, d_model)
            continue
        activation = a[b]
        if read == 2:
            z_gate, z_u = z[b], z[BLOCK + b]
            if frame[INPUTS] < d_model:
                key, key_step = after(bytes_(frame[KEY_N]), n * padded), floats(frame[KEY_STEP_N])
                key_step = after(key_step, n * 2 * groups)
                z_gate, z_u = dots(key, key_step, digit_id, step_g2, middle_g, groups, group, u)
                z_gate += bias[n]
                z_u += bias[stride + n]
            more_gate, more_u = dots(
                after(code, n * 2 * padded), after(step, n * 4 * groups), digit_id, step_g2, middle_g, groups, group, u,
            )  # fmt: skip
            activation = activated(z_gate + more_gate, kind) * (z_u + more_u)
        for copy in range(read):  # the coarse copy of the output vector, and what the fine one adds to it
            source[found] = address(after(code, n * 2 * padded + padded + copy * padded // 2))
            for g in range(groups):
                weight = activation * step[(n * 4 + 2 + copy) * groups + g]
                weights[found * groups + g] = weight
                shift[g] += weight
            found += 1
    while found % TOGETHER:  # with nothing of what is there anyway
        source[found] = source[found - 1]
        for g in range(groups):
            weights[found * groups + g] = np.float32(0.0)
        found += 1
    for e in range(0, found, TOGETHER):
        add_codes(after(source, e), after(weights, e * groups), y, groups, group // 2, groups)


@njit(fastmath=set(FAST), error_model="numpy")
def _work(frame: Any, u: Any, gate: Any, v: Any, size: int) -> None:
    """What one thread does: a token's keys of one block, while memory gives what was chosen in the block before."""
    tokens, d_model, padded, group = frame[TOKENS], frame[D_MODEL], frame[PADDED], frame[GROUP]
    blocks, chunks, inputs, kind = frame[BLOCKS], frame[CHUNKS], frame[INPUTS], frame[KIND]
    groups, blocks_each, stride = padded // group, (blocks + chunks - 1) // chunks, blocks * BLOCK
    x_td = carray(floats(frame[X]), (tokens, d_model))
    parts_ctd = carray(floats(frame[PARTS]), (chunks, tokens, padded))
    stat, bias, price = floats(frame[STAT]), floats(frame[BIAS]), floats(frame[PRICE])
    scale_d, reach_d = carray(floats(frame[SCALE]), d_model), carray(floats(frame[REACH]), d_model)
    key, key_step = bytes_(frame[KEY]), floats(frame[KEY_STEP])
    bits_d, read_d, scaled_d = np.empty(d_model, np.int32), np.empty(d_model, np.int64), np.zeros(padded, np.float32)
    count_of = 3 if size == 4 else 2  # as `digits_of` the experts
    digit_tid = np.zeros((tokens, count_of, padded), np.int8)
    step_tg2, middle_tg = np.empty((tokens, groups, 2), np.float32), np.empty((tokens, groups), np.float32)
    # What is read, in pairs; see `pair_inputs`.
    pairs = (d_model + groups + 1) // 2
    row_tp2, number_tp4 = np.empty((tokens, pairs, 2), np.int32), np.empty((tokens, pairs, 4), np.int16)
    start_tg, read_middle_tg = np.empty((tokens, groups + 1), np.int64), np.empty((tokens, groups), np.float32)
    omitted_t, shift_tg = np.empty(tokens, np.float32), np.zeros((tokens, groups), np.float32)
    # Of this block, and of the one before.
    z_2b, a_2b, tier_2b = (
        np.empty(4 * BLOCK, np.float32),
        np.empty(2 * BLOCK, np.float32),
        np.empty(2 * BLOCK, np.uint8),
    )
    node_3b = np.empty(3 * BLOCK, np.float32)
    source_e, weight_eg = np.empty(2 * BLOCK + TOGETHER, np.int64), np.empty((2 * BLOCK + TOGETHER, groups), np.float32)
    for t in range(tokens):
        for g in range(groups):
            digits(
                at(x_td, t * d_model), at(scale_d, 0), g * group, min(d_model, (g + 1) * group), padded,
                at(scaled_d, 0), at(digit_tid, t * count_of * padded), at(step_tg2, (t * groups + g) * 2),
                at(middle_tg, t * groups + g), u,
            )  # fmt: skip
        count, omitted_t[t] = largest_inputs(x_td, t, reach_d, inputs, bits_d, read_d)
        out = row_tp2[t], number_tp4[t], start_tg[t], read_middle_tg[t]
        pair_inputs(read_d, count, group, scaled_d, digit_tid[t], out)
    chunk, k, t, end, slot = 0, 0, 0, 0, 0
    chunk_before, k_before, t_before = -1, -1, -1
    while True:
        if k == end:
            chunk = take(after(frame, NEXT))
            k, end = chunk * blocks_each, min(blocks, (chunk + 1) * blocks_each)
            if chunk < chunks:
                parts_ctd[chunk] = np.float32(0.0)
        if chunk < chunks:
            z, tier = at(z_2b, 2 * BLOCK * slot), at(tier_2b, BLOCK * slot)
            key_products(
                after(key, k * padded * BLOCK), after(key_step, k * groups * 2 * BLOCK), at(row_tp2, t * pairs * 2),
                at(number_tp4, t * pairs * 4), at(start_tg, t * (groups + 1)), at(step_tg2, t * groups * 2),
                at(read_middle_tg, t * groups), groups, z, u,
            )  # fmt: skip
            decide(
                z, after(z, BLOCK), after(stat, k * BLOCK), after(bias, k * BLOCK), stride, omitted_t[t], price, kind,
                at(node_3b, 0), at(a_2b, BLOCK * slot), tier,
            )  # fmt: skip
        slot = 1 - slot
        # The block after this one: that of the chunk, or of the chunk that is likely to be this thread's next.
        coming = k + 1 if k + 1 < end else (chunk + frame[THREADS]) * blocks_each
        coming = coming if coming < blocks else -1
        if k_before >= 0:
            _read(
                frame, u, gate, v, k_before, at(x_td, t_before * d_model),
                (
                    at(digit_tid, t_before * count_of * padded), at(step_tg2, t_before * groups * 2),
                    at(middle_tg, t_before * groups),
                ), at(z_2b, 2 * BLOCK * slot), at(a_2b, BLOCK * slot),
                at(tier_2b, BLOCK * slot), at(parts_ctd, (chunk_before * tokens + t_before) * padded),
                at(shift_tg, t_before * groups), at(source_e, 0), at(weight_eg, 0),
                k if chunk < chunks else -1, at(tier_2b, BLOCK * (1 - slot)), size,
                coming if t == tokens - 1 else -1, at(row_tp2, t * pairs * 2), start_tg[t, groups],
            )  # fmt: skip
            if chunk != chunk_before:  # it was the last of its chunk
                for j in range(tokens):
                    for g in range(groups):
                        middle = np.float32(MIDDLE) * shift_tg[j, g]
                        for d in range(g * group, (g + 1) * group):
                            parts_ctd[chunk_before, j, d] -= middle
                shift_tg[:] = np.float32(0.0)
                if take(after(frame, DONE)) + 1 == chunks:
                    _add_up(frame)
        if chunk >= chunks:
            break
        chunk_before, k_before, t_before = chunk, k, t
        t += 1
        if t == tokens:
            k, t = k + 1, 0


@njit(fastmath=set(FAST))
def _add_up(frame: Any) -> None:
    """The sums of all chunks, in their order."""
    tokens, d_model, padded, chunks = frame[TOKENS], frame[D_MODEL], frame[PADDED], frame[CHUNKS]
    y, parts = floats(frame[Y]), floats(frame[PARTS])
    for t in range(tokens):
        for d in range(d_model):
            y[t * d_model + d] = parts[t * padded + d]
        for c in range(1, chunks):
            for d in range(d_model):
                y[t * d_model + d] += parts[(c * tokens + t) * padded + d]


def _float32(frame: Any) -> None:
    _work(frame, floats(frame[U]), floats(frame[GATE]), floats(frame[V]), 4)


def _bfloat16(frame: Any) -> None:
    _work(frame, words(frame[U]), words(frame[GATE]), words(frame[V]), 2)


def _float16(frame: Any) -> None:
    _work(frame, halves(frame[U]), halves(frame[GATE]), halves(frame[V]), 2)


def compiled(dtype: str) -> Any:
    """The work of a thread, for experts of that number type, as a C function of the address of the frame."""
    work = {"float32": _float32, "bfloat16": _bfloat16, "float16": _float16}[dtype]
    return cfunc(types.void(types.CPointer(types.int64)), cache=True)(work)
