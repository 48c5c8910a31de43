# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""An elastic layer for few tokens on a GPU, in Triton; peer_gpu.py packs what it reads, and launches it.

`choose_experts` has one program for each block of experts. It multiplies the inputs of all tokens with the keys of its
experts, decides how each expert is read, finds the activations of those that are read by their fine copies or in full,
and writes a list of the experts that each token reads. `add_experts` has one program for each token, part of the
outputs and chunk of blocks: it adds up the output vectors of the listed experts. `add_chunks` adds up the chunks in
their order. No two programs write to the same place, so that results are the same every time.

Shape suffixes: t tokens (filled up to a power of two), j inputs or outputs of a group (filled up to a power of two),
b experts of a block, e listed experts, h groups of the low or the high half of an output vector.
"""

from __future__ import annotations

try:  # transformers refuses code that imports what is not installed, unless it stands in such a block
    import triton
    import triton.language as tl
except ImportError:
    raise

COARSE, FINE, FULL = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MIDDLE = tl.constexpr(7.5)  # of 16 codes
NODE = tl.constexpr(1.7320508075688772)  # see peer_copies.py
TINY = tl.constexpr(1e-30)
STAGES = tl.constexpr(4)  # groups of codes that are on their way at a time


@triton.jit
def _activate(z, KIND: tl.constexpr):
    """Kinds as of `peer_cpu.ACTIVATIONS`."""
    if KIND == 0:
        return z / (1.0 + tl.exp(-z))
    elif KIND == 1:
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    elif KIND == 2:
        return z / (1.0 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
    else:
        positive = tl.where(z < 0.0, 0.0, z)  # a number that is none stays
        return positive if KIND == 3 else positive * positive


@triton.jit
def _empty(T: tl.constexpr, J: tl.constexpr, B: tl.constexpr):
    """Sums of products before the first: (t, b), or (j, b) where there is one token."""
    return tl.zeros([J if T == 1 else T, B], tl.float32)


@triton.jit
def _products(sum_, x_tj, table_jb, step_b, EXACT: tl.constexpr, CODES: tl.constexpr, T: tl.constexpr):
    """`sum_` and the products of all tokens with one group of the vectors of a block.

    One token's products stay apart for each input until `_total`: adding them up would make threads wait for each
    other in every group. Tensor cores multiply the inputs of several tokens, as numbers of 11 bits, which codes and
    weights of 16 bits fit. Inputs that were scaled do not: they are taken in parts.
    """
    table_jb = table_jb.to(tl.float32)
    if T == 1:
        return sum_ + tl.trans(x_tj) * step_b[None, :] * table_jb
    elif EXACT:
        return sum_ + step_b[None, :] * tl.dot(x_tj, table_jb, input_precision="ieee")
    elif CODES:
        return sum_ + step_b[None, :] * tl.dot(x_tj, table_jb, input_precision="tf32x3")
    else:
        return sum_ + tl.dot(x_tj, table_jb, input_precision="tf32")


@triton.jit
def _total(sum_, T: tl.constexpr):
    if T == 1:
        return tl.sum(sum_, 0, keep_dims=True)
    else:
        return sum_


@triton.jit
def _inputs(x, scale, g, tokens, d_model, GROUP: tl.constexpr, J: tl.constexpr, T: tl.constexpr):
    """A group of the inputs of all tokens, as they meet codes: (t, j)."""
    t, j = tl.arange(0, T), tl.arange(0, J)
    d = g * GROUP + j
    here = (j < GROUP) & (d < d_model)
    x_tj = tl.load(x + t[:, None] * d_model + d[None, :], (t < tokens)[:, None] & here[None, :], 0.0).to(tl.float32)
    return x_tj / tl.load(scale + d, here, 1.0)[None, :]


@triton.jit
def _key_products(
    gate_sum, u_sum, x, scale, key, key_step, block, tokens, d_model, groups,
    GROUP: tl.constexpr, J: tl.constexpr, T: tl.constexpr, B: tl.constexpr, EXACT: tl.constexpr, ALL: tl.constexpr,
):  # fmt: skip
    """The sums and the products with the keys of a block. Unless `ALL`, keys of inputs that are 0 are not read."""
    j, b = tl.arange(0, J), tl.arange(0, B)
    for g in tl.range(0, groups, num_stages=STAGES):
        x_tj = _inputs(x, scale, g, tokens, d_model, GROUP, J, T)
        read_j = j < GROUP
        if not ALL:
            read_j = read_j & (tl.max((x_tj != 0.0).to(tl.int32), 0) > 0)
        row_j = (block * groups + g) * GROUP + j
        codes_jb = tl.load(key + row_j[:, None] * B + b[None, :], read_j[:, None], 0)
        step = key_step + ((block * groups + g) * 2) * B + b
        gate_jb, u_jb = (codes_jb & 15).to(tl.float32) - MIDDLE, (codes_jb >> 4).to(tl.float32) - MIDDLE
        gate_sum = _products(gate_sum, x_tj, gate_jb, tl.load(step).to(tl.float32), EXACT, True, T)
        u_sum = _products(u_sum, x_tj, u_jb, tl.load(step + B).to(tl.float32), EXACT, True, T)
    return gate_sum, u_sum


# Counts that vary from call to call are not compiled in.
@triton.jit(do_not_specialize=["tokens"])
def choose_experts(
    x,  # (t, d_model)
    read,  # likewise: the inputs that meet the keys, others 0
    unread,  # likewise: the others; both are `x` where all meet them
    omitted,  # (t,): the squared norm of those
    key,  # uint8 (k, d, b): gate codes in the low halves, up codes in the high ones
    key_step,  # bfloat16 (k, g, 2, b), of gate and up
    rest,  # uint8 (n, d): what the fine copy adds to the key
    rest_step,  # bfloat16 (n, 2, g)
    stat,  # (8, k b): see `peer_gpu.pack_for_gpu`
    bias,  # (2, k b), of gate and up
    scale,  # (d_model,): what inputs are divided by before they meet codes
    gate,  # (n, d_model)
    u,
    entry,  # int32 (t, k, b): of each expert that a token reads, 4 times its index plus how it is read
    activation,  # (t, k, b): of these
    count,  # int32 (t, k): how many these are
    tokens,
    d_model,
    experts,
    groups,
    price,
    of_coarse,  # price times cost
    of_fine,
    GROUP: tl.constexpr,
    J: tl.constexpr,
    T: tl.constexpr,
    B: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    ALL: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    blocks = tl.num_programs(0)
    t, j, b = tl.arange(0, T), tl.arange(0, J), tl.arange(0, B)
    n_b = block * B + b
    gate_sum, u_sum = _empty(T, J, B), _empty(T, J, B)
    gate_sum, u_sum = _key_products(
        gate_sum, u_sum, read, scale, key, key_step, block, tokens, d_model, groups, GROUP, J, T, B, EXACT, ALL
    )
    gate_bias_b, u_bias_b = tl.load(bias + n_b), tl.load(bias + blocks * B + n_b)
    gate_tb, u_tb = _total(gate_sum, T) + gate_bias_b[None, :], _total(u_sum, T) + u_bias_b[None, :]

    # How each expert is read: see `peer_copies.estimate` and `ElasticPool.tiers`.
    size = blocks.to(tl.int64) * B
    u_error_b, gate_error_b = tl.load(stat + n_b), tl.load(stat + size + n_b)
    u_rms_b, gate_rms_b = tl.load(stat + 2 * size + n_b), tl.load(stat + 3 * size + n_b)
    energy_b, coarse_v_b = tl.load(stat + 4 * size + n_b), tl.load(stat + 5 * size + n_b)
    fine_gate_b, fine_v_b = tl.load(stat + 6 * size + n_b), tl.load(stat + 7 * size + n_b)
    u_variance_tb = tl.zeros([T, B], tl.float32) + (u_error_b * u_error_b)[None, :]
    variance_tb = tl.zeros([T, B], tl.float32) + (gate_error_b * gate_error_b)[None, :]
    if not ALL:
        omitted_t = tl.load(omitted + t, t < tokens, 0.0)
        u_variance_tb += omitted_t[:, None] * (u_rms_b * u_rms_b)[None, :]
        variance_tb += omitted_t[:, None] * (gate_rms_b * gate_rms_b)[None, :]
    deviation_tb = tl.sqrt(variance_tb)
    middle_tb = _activate(gate_tb, KIND)
    low_tb, high_tb = _activate(gate_tb - NODE * deviation_tb, KIND), _activate(gate_tb + NODE * deviation_tb, KIND)
    mean_tb = (low_tb + high_tb + 4.0 * middle_tb) / 6.0
    square_tb = (low_tb * low_tb + high_tb * high_tb + 4.0 * middle_tb * middle_tb) / 6.0
    noise_tb, up2_tb = square_tb * u_variance_tb, u_tb * u_tb
    spread_tb = (square_tb - mean_tb * mean_tb) * up2_tb + noise_tb
    spread_tb = tl.where(spread_tb < 0.0, 0.0, spread_tb) * energy_b[None, :]
    square_tb = square_tb * up2_tb + noise_tb
    finer_tb = fine_gate_b[None, :] / tl.maximum(deviation_tb, TINY)
    finer_tb *= finer_tb
    a_tb = mean_tb * u_tb
    # Comparisons with a number that is none do not hold: such experts are read in full, so that it is not hidden.
    least_tb, tier_tb = square_tb * energy_b[None, :], tl.zeros([T, B], tl.int32)
    loss_tb = spread_tb + square_tb * coarse_v_b[None, :] + of_coarse
    keeps_tb = loss_tb > least_tb
    least_tb, tier_tb = tl.where(keeps_tb, least_tb, loss_tb), tl.where(keeps_tb, tier_tb, COARSE)
    loss_tb = spread_tb * finer_tb + square_tb * fine_v_b[None, :] + of_fine
    keeps_tb = loss_tb > least_tb
    least_tb, tier_tb = tl.where(keeps_tb, least_tb, loss_tb), tl.where(keeps_tb, tier_tb, FINE)
    tier_tb = tl.where(price > least_tb, tier_tb, FULL)
    tier_tb = tl.where((t < tokens)[:, None] & (n_b < experts)[None, :], tier_tb, 0)

    # Rows are read for all tokens together, where one of them needs them.
    fine_b, full_b = tl.max((tier_tb == FINE).to(tl.int32), 0) > 0, tl.max((tier_tb == FULL).to(tl.int32), 0) > 0
    if tl.max(fine_b.to(tl.int32), 0) > 0:
        gate_sum, u_sum = _empty(T, J, B), _empty(T, J, B)
        if not ALL:  # the fine copies meet all inputs
            gate_sum, u_sum = _key_products(
                gate_sum, u_sum, unread, scale, key, key_step, block, tokens, d_model, groups,
                GROUP, J, T, B, EXACT, ALL,
            )  # fmt: skip
        for g in range(groups):
            x_tj = _inputs(x, scale, g, tokens, d_model, GROUP, J, T)
            place_jb = n_b[None, :] * groups * GROUP + (g * GROUP + j)[:, None]
            codes_jb = tl.load(rest + place_jb, fine_b[None, :] & (j < GROUP)[:, None], 0)
            step = rest_step + n_b * 2 * groups + g
            gate_step_b = tl.load(step, fine_b, 0.0).to(tl.float32)
            u_step_b = tl.load(step + groups, fine_b, 0.0).to(tl.float32)
            gate_jb, u_jb = (codes_jb & 15).to(tl.float32) - MIDDLE, (codes_jb >> 4).to(tl.float32) - MIDDLE
            gate_sum = _products(gate_sum, x_tj, gate_jb, gate_step_b, EXACT, True, T)
            u_sum = _products(u_sum, x_tj, u_jb, u_step_b, EXACT, True, T)
        fine_tb = _activate(gate_tb + _total(gate_sum, T), KIND) * (u_tb + _total(u_sum, T))
        a_tb = tl.where(tier_tb == FINE, fine_tb, a_tb)
    if tl.max(full_b.to(tl.int32), 0) > 0:
        gate_sum, u_sum = _empty(T, J, B), _empty(T, J, B)
        one_b = tl.full([B], 1.0, tl.float32)
        for g in range(groups):
            d_j = g * GROUP + j
            here_j = (j < GROUP) & (d_j < d_model)
            x_tj = tl.load(
                x + t[:, None] * d_model + d_j[None, :], (t < tokens)[:, None] & here_j[None, :], 0.0
            ).to(tl.float32)  # fmt: skip
            place_jb, here_jb = n_b[None, :] * d_model + d_j[:, None], full_b[None, :] & here_j[:, None]
            gate_sum = _products(gate_sum, x_tj, tl.load(gate + place_jb, here_jb, 0.0), one_b, EXACT, False, T)
            u_sum = _products(u_sum, x_tj, tl.load(u + place_jb, here_jb, 0.0), one_b, EXACT, False, T)
        full_tb = _activate(_total(gate_sum, T) + gate_bias_b[None, :], KIND) * (_total(u_sum, T) + u_bias_b[None, :])
        a_tb = tl.where(tier_tb == FULL, full_tb, a_tb)

    chosen_tb = (tier_tb > 0).to(tl.int32)
    place_tb = (t[:, None] * blocks + block) * B + tl.cumsum(chosen_tb, 1) - 1
    tl.store(entry + place_tb, (n_b[None, :] * 4 + tier_tb).to(tl.int32), tier_tb > 0)
    tl.store(activation + place_tb, a_tb, tier_tb > 0)
    tl.store(count + t * blocks + block, tl.sum(chosen_tb, 1), t < tokens)


@triton.jit
def _add_codes(low_ehj, high_ehj, a_e, read_e, code, step_row, here_hj, h, halves):
    """The sums of both halves, and one copy of the output vectors that are read."""
    low_eh = tl.load(step_row[:, None] + h[None, :], read_e[:, None] & (h < halves)[None, :], 0.0).to(tl.float32)
    high_eh = tl.load(step_row[:, None] + halves + h[None, :], read_e[:, None] & (h < halves)[None, :], 0.0)
    a_e = tl.where(read_e, a_e, 0.0)
    low_eh, high_eh = a_e[:, None] * low_eh, a_e[:, None] * high_eh.to(tl.float32)
    codes_ehj = tl.load(code, read_e[:, None, None] & here_hj[None, :, :], 0)
    low_ehj += low_eh[:, :, None] * ((codes_ehj & 15).to(tl.float32) - MIDDLE)
    high_ehj += high_eh[:, :, None] * ((codes_ehj >> 4).to(tl.float32) - MIDDLE)
    return low_ehj, high_ehj


@triton.jit(do_not_specialize=["blocks", "blocks_each"])
def add_experts(
    entry,  # as of `choose_experts`
    activation,
    count,
    code,  # uint8 (n, 2, h j): coarse copies of output vectors, and what the fine ones add; numbers of both halves
    step,  # bfloat16 (n, 2, 2, h), of each copy the low and the high half
    v,  # (n, d_model)
    parts,  # (c, t, d_model)
    d_model,
    halves,  # groups of half an output vector
    blocks,
    blocks_each,
    GROUP: tl.constexpr,
    J: tl.constexpr,
    H: tl.constexpr,
    E: tl.constexpr,
    B: tl.constexpr,
):
    t, chunk = tl.program_id(0), tl.program_id(1)
    h, j, e = tl.program_id(2) * H + tl.arange(0, H), tl.arange(0, J), tl.arange(0, E)
    here_hj = (h < halves)[:, None] & (j < GROUP)[None, :]
    place_hj = h[:, None] * GROUP + j[None, :]
    half = halves * GROUP
    low_ehj, high_ehj = tl.zeros([E, H, J], tl.float32), tl.zeros([E, H, J], tl.float32)
    for k in range(chunk * blocks_each, tl.minimum((chunk + 1) * blocks_each, blocks)):
        listed = (t * blocks + k).to(tl.int64)
        found = tl.load(count + listed)
        for first in range(0, found, E):
            valid_e = first + e < found
            entry_e = tl.load(entry + listed * B + first + e, valid_e, 0)
            a_e = tl.load(activation + listed * B + first + e, valid_e, 0.0)
            tier_e, n_e = entry_e & 3, (entry_e >> 2).to(tl.int64)
            code_ehj = code + (n_e * 2 * half)[:, None, None] + place_hj[None, :, :]
            by_copy_e = (tier_e == COARSE) | (tier_e == FINE)
            step_e = step + n_e * 4 * halves
            low_ehj, high_ehj = _add_codes(
                low_ehj, high_ehj, a_e, by_copy_e, code_ehj, step_e, here_hj, h, halves
            )  # fmt: skip
            if tl.max(tier_e, 0) >= FINE:
                low_ehj, high_ehj = _add_codes(
                    low_ehj, high_ehj, a_e, tier_e == FINE, code_ehj + half, step_e + 2 * halves, here_hj, h, halves
                )  # fmt: skip
                full_e = tier_e == FULL
                full_a_e = tl.where(full_e, a_e, 0.0)
                row_ehj = v + (n_e * d_model)[:, None, None] + place_hj[None, :, :]
                low_hj, high_hj = here_hj & (place_hj < d_model), here_hj & (place_hj + half < d_model)
                v_ehj = tl.load(row_ehj, full_e[:, None, None] & low_hj[None, :, :], 0.0)
                low_ehj += full_a_e[:, None, None] * v_ehj.to(tl.float32)
                v_ehj = tl.load(row_ehj + half, full_e[:, None, None] & high_hj[None, :, :], 0.0)
                high_ehj += full_a_e[:, None, None] * v_ehj.to(tl.float32)
    row = parts + (chunk * tl.num_programs(0) + t).to(tl.int64) * d_model
    tl.store(row + place_hj, tl.sum(low_ehj, 0), here_hj & (place_hj < d_model))
    tl.store(row + half + place_hj, tl.sum(high_ehj, 0), here_hj & (place_hj + half < d_model))


@triton.jit(do_not_specialize=["numbers", "chunks"])
def add_chunks(parts, y, numbers, chunks, D: tl.constexpr):
    """`y` (t, d_model), of `numbers` numbers: the sum of the chunks, in their order."""
    i = tl.program_id(0).to(tl.int64) * D + tl.arange(0, D)
    total_d = tl.zeros([D], tl.float32)
    for c in range(chunks):
        total_d += tl.load(parts + c * numbers + i, i < numbers, 0.0)
    tl.store(y + i, total_d.to(y.dtype.element_ty), i < numbers)
