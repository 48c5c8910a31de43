# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Copies of experts in a few bits, and what they tell of each expert for a token.

The coarse copy of an expert's input and gate vectors is its key: a token's products with it estimate how much the
expert would add to the output, and how far that estimate is off. Product keys (peer_keys.py) sum two sub-keys that many
experts share; here each expert has a key of its own, cheap because of its bits. The fine copy is the coarse one plus a
copy, of as many bits again, of what that leaves: who has read the coarse one reads only the rest.

Copies are made from the experts, so nothing is stored twice and training cannot leave them behind. Numbers of a vector
come in groups with a step each, and are rounded to the nearest of 2^bits levels, symmetric about zero. Inputs that are
large on calibration text are scaled up before rounding, so that they are rounded finer (Lin et al., AWQ, 2306.00978).

Shape suffixes: t tokens, d d_model, n experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .peer_many import both_copies, can_round
from .peer_products import linear

CLIPS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a group's largest number: the one with the least squared error is taken
EXPONENT = 0.5  # of the inputs' sizes, in the scaling before rounding
ROWS = 2**22  # numbers that are rounded at a time: bounds memory
NODE = 3**0.5  # of Gauss-Hermite quadrature with three points
TINY = 1e-30


class Copy(NamedTuple):
    """Experts in a few bits, as numbers, and how far they are off."""

    u_nd: torch.Tensor
    gate_nd: torch.Tensor | None
    v_nd: torch.Tensor
    u_error_n: torch.Tensor
    """Standard deviation of a product with `u_nd` from that with the expert's own vector, on calibration text."""
    gate_error_n: torch.Tensor | None
    v_error_n: torch.Tensor
    """|v_i - its copy|^2"""


class Copies(NamedTuple):
    """Both copies, and what is known of the experts themselves."""

    coarse: Copy
    fine: Copy
    u_rms_n: torch.Tensor
    """Root mean square of the numbers of an expert's vector: what an input that is not read may contribute."""
    gate_rms_n: torch.Tensor | None
    energy_n: torch.Tensor
    """|v_i|^2"""
    reach_d: torch.Tensor
    """Norm of what each input is multiplied with: it tells which inputs of a token matter."""


class Estimate(NamedTuple):
    """What the coarse copies tell of the experts of each token; E is over the error of the copies' products."""

    a_tn: torch.Tensor
    """E a_i, of the activation that multiplies the output vector."""
    left_out_tn: torch.Tensor
    """E |a_i v_i|^2: the squared error of an output that leaves the expert out."""
    coarse_tn: torch.Tensor
    """E |a_i v_i - a^_i v^_i|^2: that of an output that takes the coarse copy instead."""
    fine_tn: torch.Tensor
    """That of one that takes the fine copy."""


class Rounded(NamedTuple):
    """A table (n, d) in a few bits, in g groups of c numbers along d; the last group is filled up with zeros."""

    code_ngc: torch.Tensor
    """uint8; the number is (code - 2^bits / 2 + 1 / 2) step."""
    step_ng: torch.Tensor
    """float32 that bfloat16 can hold."""


def rounded(w_nd: torch.Tensor, bits: int, group: int, scale_d: torch.Tensor | None = None) -> Rounded:
    """`w_nd` rounded to 2^bits levels in groups along d.

    Args:
        scale_d: what numbers are multiplied with before they are rounded.
    """
    columns = w_nd.shape[1]
    if len(w_nd) * columns > ROWS and len(w_nd) > 1:
        parts = [rounded(part, bits, group, scale_d) for part in w_nd.split(max(1, ROWS // columns))]
        return Rounded(*(torch.cat(each) for each in zip(*parts, strict=True)))
    scaled_nd = w_nd.float() if scale_d is None else w_nd.float() * scale_d
    grouped = F.pad(scaled_nd, (0, -columns % group)).unflatten(1, (-1, group))
    half = 2 ** (bits - 1)
    largest = grouped.abs().amax(-1, keepdim=True).clamp_min(TINY)
    found, least = None, None
    for clip in CLIPS:
        step = _as_bfloat16(largest * (clip / half)).clamp_min(TINY)  # as it is stored
        level = (grouped / step).floor_().clamp_(-half, half - 1)
        error = (level + 0.5).mul_(step).sub_(grouped).square_().sum(-1, keepdim=True, dtype=torch.float64)
        if found is None or least is None:
            found, least = (level, step), error
        else:
            better = error < least
            found = torch.where(better, level, found[0]), torch.where(better, step, found[1])
            least = torch.where(better, error, least)
    assert found is not None
    return Rounded((found[0] + half).to(torch.uint8), found[1][..., 0])


def numbers(found: Rounded, bits: int, columns: int, scale_d: torch.Tensor | None = None) -> torch.Tensor:
    """The table that was rounded, float32 (n, columns); arguments as of `rounded`."""
    level_ngc = found.code_ngc.float().add_(0.5 - 2 ** (bits - 1))
    result_nd = level_ngc.mul_(found.step_ng[..., None]).flatten(1)[:, :columns]
    return result_nd if scale_d is None else result_nd / scale_d


def in_few_bits(w_nd: torch.Tensor, bits: int, group: int, scale_d: torch.Tensor | None = None) -> torch.Tensor:
    """What `w_nd` becomes by `rounded`, as numbers of its own type; `scale_d` is divided by again."""
    return numbers(rounded(w_nd, bits, group, scale_d), bits, w_nd.shape[1], scale_d).to(w_nd.dtype)


def _as_bfloat16(x: torch.Tensor) -> torch.Tensor:
    """Finite float32 numbers rounded to bfloat16, by their bits: torch.compile leaves out a cast there and back."""
    bits = x.view(torch.int32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).view(torch.float32)


class Codes(NamedTuple):
    """The experts in codes: of each table the coarse copy, and what the fine one adds to it."""

    u: tuple[Rounded, Rounded]
    gate: tuple[Rounded, Rounded] | None
    v: tuple[Rounded, Rounded]
    scale_d: torch.Tensor
    """What `u` and `gate` were multiplied with before they were rounded."""


@torch.no_grad()
def make_codes(pool: Any) -> Codes:
    """The experts of `pool` as they are now, in codes.

    Raises:
        ValueError: its `input_rms` cannot be what was measured.
    """
    _, scale_d = _sizes(pool)

    def both(w_nd: torch.Tensor, scale_d: torch.Tensor) -> tuple[Rounded, Rounded]:
        if can_round(w_nd):
            found = both_copies(w_nd, pool.bits, pool.group, scale_d, torch.ones_like(scale_d), numbers=False)
            code = found.code.unflatten(-1, (-1, pool.group))
            return Rounded(code[0], found.step[0]), Rounded(code[1], found.step[1])
        w_nd = w_nd.float()
        coarse = rounded(w_nd, pool.bits, pool.group, scale_d)
        left_nd = w_nd - numbers(coarse, pool.bits, w_nd.shape[1], scale_d)
        return coarse, rounded(left_nd, pool.bits, pool.group, scale_d)

    gate = None if pool.gate is None else both(pool.gate, scale_d)
    return Codes(both(pool.u, scale_d), gate, both(pool.v, torch.ones_like(scale_d)), scale_d)


@torch.no_grad()
def make_copies(pool: Any, codes: Codes | None = None) -> Copies:
    """Copies of the experts of `pool` as they are now.

    Args:
        codes: of these experts, where they are at hand.

    Raises:
        ValueError: see `make_codes`.
    """
    rms_d, scale_d = _sizes(pool)
    ones_d = torch.ones_like(rms_d)
    by_kernel = codes is None and can_round(pool.u)
    codes = None if by_kernel else codes or make_codes(pool)

    def both(
        w_nd: torch.Tensor, pair: tuple[Rounded, Rounded] | None, scale_d: torch.Tensor, weight_d: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The coarse and the fine copy as numbers, and the norms of their weighted errors."""
        if pair is None:
            found = both_copies(w_nd, pool.bits, pool.group, scale_d, weight_d, numbers=True)
            assert found.numbers is not None
            return [(found.numbers[i].to(w_nd.dtype), found.error[i]) for i in range(2)]
        coarse_nd, rest_nd = (numbers(each, pool.bits, w_nd.shape[1], scale_d) for each in pair)
        # Errors of rounding do not depend on each other, so those of single inputs add up.
        return [
            (copy_nd.to(w_nd.dtype), ((copy_nd - w_nd.float()) * weight_d).norm(dim=1))
            for copy_nd in (coarse_nd, coarse_nd + rest_nd)
        ]

    def rms(w_nd: torch.Tensor) -> torch.Tensor:
        return w_nd.float().norm(dim=1) / w_nd.shape[1] ** 0.5

    reach = pool.u.float().square().sum(0)
    of_gate: list[Any] = [(None, None)] * 2
    if pool.gate is not None:
        of_gate = both(pool.gate, codes and codes.gate, scale_d, rms_d)
        reach += pool.gate.float().square().sum(0)
    of_u, of_v = both(pool.u, codes and codes.u, scale_d, rms_d), both(pool.v, codes and codes.v, ones_d, ones_d)
    coarse, fine = (
        Copy(u_nd, gate_nd, v_nd, u_error_n, gate_error_n, v_error_n.square())
        for (u_nd, u_error_n), (gate_nd, gate_error_n), (v_nd, v_error_n) in zip(of_u, of_gate, of_v, strict=True)
    )
    gate_rms_n = None if pool.gate is None else rms(pool.gate)
    return Copies(coarse, fine, rms(pool.u), gate_rms_n, pool.v.float().square().sum(1), reach.sqrt())


def _sizes(pool: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the inputs, both (d,): their sizes, and what scales them up where vectors that meet them are rounded."""
    rms_d = pool.input_rms.float()
    if not torch.compiler.is_compiling() and not bool((rms_d.isfinite() & (rms_d >= 0)).all()):
        raise ValueError(
            "input_rms of a PEER layer has numbers that are not finite or below 0: the weights are damaged; convert "
            "the model again"
        )
    return rms_d, (rms_d / rms_d.mean().clamp_min(TINY)).clamp_min(1e-4) ** EXPONENT


def largest_inputs(x_td: torch.Tensor, reach_d: torch.Tensor, share: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The inputs that matter most to each token, the others 0; and the squared norm of what was left out, (t, 1).

    Args:
        share: of the inputs that are read; 1: all, and nothing is left out.
    """
    d_model = x_td.shape[1]
    read = max(1, round(share * d_model))
    if read >= d_model:
        return x_td, None
    size_td = x_td.detach().float().abs() * reach_d
    level_t1 = size_td.kthvalue(d_model - read + 1, dim=1, keepdim=True).values
    mask_td = size_td >= level_t1
    omitted_t1 = x_td.detach().float().square().masked_fill(mask_td, 0.0).sum(1, keepdim=True)
    return x_td * mask_td.to(x_td.dtype), omitted_t1


class Keyed(NamedTuple):
    """Products with the keys."""

    gate_tn: torch.Tensor | None
    u_tn: torch.Tensor
    omitted_t1: torch.Tensor | None
    """Squared norm of the inputs that were not read; None: all were."""


def meet_keys(pool: Any, copies: Copies, x_td: torch.Tensor, inputs: float) -> Keyed:
    """Products of that share of each token's inputs with the keys."""
    read_td, omitted_t1 = largest_inputs(x_td, copies.reach_d, inputs)
    exact = torch.float64 if x_td.dtype == torch.float64 else torch.float32
    coarse = copies.coarse
    gate_tn = None if coarse.gate_nd is None else linear(read_td, coarse.gate_nd, pool.gate_bias).to(exact)
    return Keyed(gate_tn, linear(read_td, coarse.u_nd, pool.u_bias).to(exact), omitted_t1)


def estimate(pool: Any, copies: Copies, keyed: Keyed) -> Estimate:
    """What the copies tell of each expert for each token.

    The error of a product is taken as normal. Expectations of the activation function are by Gauss-Hermite quadrature
    with three points, exact for polynomials of degree 5.
    """

    def deviation(error_n: torch.Tensor, rms_n: torch.Tensor) -> torch.Tensor:
        if keyed.omitted_t1 is None:
            return error_n
        return (keyed.omitted_t1 * rms_n.square() + error_n.square()).sqrt()

    def activation(z_tn: torch.Tensor, deviation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """E act(z) and E act(z)^2."""
        act = pool.act_of if pool.gate is not None else pool.act
        middle_tn, low_tn, high_tn = act(z_tn), act(z_tn - NODE * deviation), act(z_tn + NODE * deviation)
        mean_tn = (low_tn + high_tn + 4 * middle_tn) / 6
        return mean_tn, (low_tn.square() + high_tn.square() + 4 * middle_tn.square()) / 6

    coarse, fine = copies.coarse, copies.fine
    of_u = deviation(coarse.u_error_n, copies.u_rms_n)
    if keyed.gate_tn is None:
        a_tn, square_tn = activation(keyed.u_tn, of_u)
        variance_tn = square_tn - a_tn.square()
        left = fine.u_error_n / of_u.clamp_min(TINY)
    else:
        assert coarse.gate_error_n is not None
        assert fine.gate_error_n is not None
        assert copies.gate_rms_n is not None
        of_gate = deviation(coarse.gate_error_n, copies.gate_rms_n)
        mean_tn, square_tn = activation(keyed.gate_tn, of_gate)
        up_tn = pool.up_of(keyed.u_tn)
        a_tn, up2_tn = mean_tn * up_tn, up_tn.square()
        noise_tn = square_tn * of_u.square()
        variance_tn = (square_tn - mean_tn.square()) * up2_tn + noise_tn
        square_tn = square_tn * up2_tn + noise_tn
        left = fine.gate_error_n / of_gate.clamp_min(TINY)
    # The fine copies' errors are so small that the activation is a line to them: their variance is in proportion.
    spread_tn = variance_tn.clamp_min(0) * copies.energy_n
    return Estimate(
        a_tn,
        square_tn * copies.energy_n,
        spread_tn + square_tn * coarse.v_error_n,
        spread_tn * left.square() + square_tn * fine.v_error_n,
    )
