# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""An elastic layer for few tokens on a GPU, in three kernels that read what each token needs; needs triton.

The kernels are in peer_gpu_kernel.py; peer_triton.py says whether they can be used.

On paper: decoding one token is bound by the bytes of weights. A layer of 4096 inputs and 14336 experts has 352 MB in
bfloat16, which an H100 (3.35 TB/s) reads in 105 us. Half the bytes take 53 us and a quarter 26 us. Three launches add
some 15 us where each is made from Python, so that 1.6 and 2.5 times the dense layer's speed are the most to hope for
there; in a CUDA graph they add some 5 us. The sums of chunks add 4 % of the bytes of a quarter.

Grids depend on shapes alone, and nothing waits for the GPU: calls can be captured in a CUDA graph. Under torch.compile
they are an operator of their own. What it reads is packed in the first pass that is not compiled, whatever its length.

Packed codes lie as in peer_cpu.py, with other sizes of blocks. A byte of an output vector holds a number of the first
half of its groups and one of the second, and there is no second table of keys.

Shape suffixes: t tokens, d d_model filled up to whole groups, n experts, k blocks, b experts of a block, c chunks of
blocks, g groups, h groups of half an output vector.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .peer_copies import Rounded, largest_inputs, make_codes, make_copies
from .peer_cpu import ACTIVATIONS
from .peer_triton import DTYPES, broken, obstacle, on_device, reaches

AT_MOST = 64  # tokens that the kernels are used for
BLOCK = 32  # experts: a sector of memory holds what one input meets
GROUP = 128  # numbers, the most that are handled at a time; larger groups are cut
TOGETHER = 8  # output vectors that a program adds at a time
OUTPUTS = 256  # of each half of the output, that a program of `add_experts` sums
PROGRAMS = 1024  # of `add_experts`, about: a few for each multiprocessor


class PackedForGPU(NamedTuple):
    """What the kernels read of a layer."""

    tables: list[torch.Tensor]
    """In the order of `_launch`."""
    experts: list[torch.Tensor]
    """The experts themselves: u, gate and v, in their own number type."""
    reach_d: torch.Tensor
    """Norm of what each input is multiplied with."""
    group: int
    kind: int
    costs: Callable[[float], tuple[float, float, float]]
    """As of `ElasticPool`."""


# --- Whether it can be used ---------------------------------------------------------------------------------------


def packs_for_gpu(pool: Any, x_td: torch.Tensor) -> bool:
    """Whether the kernels can compute what tokens like these ask of `pool`, if they are not too many."""
    u_nd = pool.u
    return (
        pool.gpu_misfit is None
        and type(x_td) is torch.Tensor  # no tensor of a tracer
        and reaches(x_td)
        and x_td.dtype == u_nd.dtype
        and x_td.device == u_nd.device
        and x_td.dtype in DTYPES
        and not (torch.is_grad_enabled() and (x_td.requires_grad or u_nd.requires_grad))
        # Tables that change unseen, or come and go, would be packed for every token.
        and not u_nd.is_inference()
        and pool._parameters.keys() >= {"u", "gate", "v"}  # none is computed from adapters
        and not hasattr(pool, "_hf_hook")
        and obstacle() is None
    )


# --- Packing ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def pack_for_gpu(pool: Any) -> PackedForGPU:
    """The codes of a pool's experts as they are now, and what is known of their errors."""
    codes = make_codes(pool)
    copies = make_copies(pool, codes)
    assert codes.gate is not None
    n = len(pool.u)
    filling = -n % BLOCK  # with zeros
    group = next(size for size in range(min(pool.group, GROUP), 0, -1) if pool.group % size == 0)

    def cut(found: Rounded) -> Rounded:
        """The same numbers, in groups that the kernels handle."""
        steps_ng = found.step_ng.repeat_interleave(pool.group // group, 1)
        return Rounded(found.code_ngc.reshape(n, -1, group), steps_ng)

    def by_inputs(table: torch.Tensor) -> torch.Tensor:
        """(n, ...) -> (k, ..., b)."""
        padded = F.pad(table, (0, 0) * (table.dim() - 1) + (0, filling))
        return padded.unflatten(0, (-1, BLOCK)).movedim(1, -1)

    def paired(gate: Rounded, u: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, d) and steps (n, 2, g) of gate and up vectors."""
        gate, u = cut(gate), cut(u)
        return (gate.code_ngc | (u.code_ngc << 4)).flatten(1), torch.stack([gate.step_ng, u.step_ng], 1)

    def halved(v: Rounded) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (n, h c) and steps (n, 2, h)."""
        v = cut(v)
        odd = v.step_ng.shape[1] % 2
        low, high = F.pad(v.code_ngc, (0, 0, 0, odd)).chunk(2, 1)
        return (low | (high << 4)).flatten(1), F.pad(v.step_ng, (0, odd)).unflatten(1, (2, -1))

    (key, key_steps), (rest, rest_steps) = (paired(*pair) for pair in zip(codes.gate, codes.u, strict=True))
    v_codes, v_steps = zip(*map(halved, codes.v), strict=True)
    coarse, fine = copies.coarse, copies.fine
    stats = [
        coarse.u_error_n, coarse.gate_error_n, copies.u_rms_n, copies.gate_rms_n, copies.energy_n, coarse.v_error_n,
        fine.gate_error_n, fine.v_error_n,
    ]  # fmt: skip
    none = torch.zeros(n, device=pool.u.device)
    biases = [none if bias is None else bias.float() for bias in (pool.gate_bias, pool.u_bias)]
    tables = [
        by_inputs(key),
        by_inputs(key_steps.transpose(1, 2)).bfloat16(),  # steps are rounded to it anyway
        rest,
        rest_steps.bfloat16(),
        F.pad(torch.stack([stat.float() for stat in stats]), (0, filling)),  # type: ignore[union-attr]
        F.pad(torch.stack(biases), (0, filling)),
        codes.scale_d.float(),
        torch.stack(v_codes, 1),
        torch.stack(v_steps, 1).bfloat16(),
    ]
    experts = [table.detach().contiguous() for table in (pool.u, pool.gate, pool.v)]
    tables = [table.contiguous() for table in tables]
    return PackedForGPU(tables, experts, copies.reach_d.float(), group, ACTIVATIONS[pool.activation], pool.costs)


# --- Running ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def few_tokens_on_gpu(packed: PackedForGPU, x_td: torch.Tensor, budget: Any) -> torch.Tensor | None:
    """What the pool that was packed computes at a budget with a price, for up to AT_MOST tokens.

    None: the kernels failed, which a person has been told.
    """
    x_td = x_td.contiguous()
    read_td, omitted_t1 = largest_inputs(x_td, packed.reach_d, budget.inputs)
    _, coarse, fine = packed.costs(budget.inputs)
    numbers = packed.group, packed.kind, budget.price, budget.price * coarse, budget.price * fine
    if torch.compiler.is_compiling():
        return _operator(x_td, None if omitted_t1 is None else read_td, omitted_t1, *packed[:2], *numbers)  # type: ignore[no-any-return]
    try:
        return _launch(x_td, None if omitted_t1 is None else read_td, omitted_t1, *packed[:2], *numbers)
    except Exception as error:  # those of Triton, of the compilers under it and of drivers have no class in common
        broken(error)
        return None


def _launch(
    x_td: torch.Tensor,
    read_td: torch.Tensor | None,
    omitted_t1: torch.Tensor | None,
    tables: list[torch.Tensor],
    experts: list[torch.Tensor],
    group: int,
    kind: int,
    price: float,
    of_coarse: float,
    of_fine: float,
) -> torch.Tensor:
    """See `few_tokens_on_gpu`.

    Args:
        read_td, omitted_t1: as of `largest_inputs`; None: all inputs meet the keys.
        of_coarse, of_fine: price times the cost of these copies.
    """
    from .peer_gpu_kernel import add_chunks, add_experts, choose_experts

    key, key_step, rest, rest_step, stat, bias, scale_d, v_code, v_step = tables
    u_nd, gate_nd, v_nd = experts
    (tokens, d_model), blocks, groups, halves = x_td.shape, len(key), rest_step.shape[2], v_step.shape[3]
    wide = {"GROUP": group, "J": max(16, _power(group))}
    at_once = min(_power(halves), max(1, OUTPUTS // wide["J"]))  # groups of each half
    parts_of_output = math.ceil(halves / at_once)
    blocks_each = math.ceil(blocks / max(1, min(blocks, PROGRAMS // (tokens * parts_of_output))))
    chunks = math.ceil(blocks / blocks_each)
    entry = torch.empty(tokens * blocks * BLOCK, dtype=torch.int32, device=x_td.device)
    activation = torch.empty_like(entry, dtype=torch.float32)
    count = torch.empty(tokens * blocks, dtype=torch.int32, device=x_td.device)
    parts = torch.empty(chunks * x_td.numel(), dtype=torch.float32, device=x_td.device)
    y_td = torch.empty_like(x_td)
    whole = read_td is None or omitted_t1 is None
    inputs = (x_td, x_td, x_td) if read_td is None or omitted_t1 is None else (read_td, x_td - read_td, omitted_t1)
    # One token: so many registers that four programs fit a multiprocessor, and all blocks of a layer run at once.
    threads = {"num_warps": 4, "maxnreg": 128} if tokens == 1 else {"num_warps": 8}
    with on_device(x_td):
        choose_experts[(blocks,)](
            x_td, *inputs, key, key_step, rest, rest_step, stat, bias, scale_d, gate_nd, u_nd, entry, activation, count,
            tokens, d_model, len(u_nd), groups, price, of_coarse, of_fine,
            T=1 if tokens == 1 else max(16, _power(tokens)), B=BLOCK, KIND=kind, EXACT=x_td.dtype == torch.float32,
            ALL=whole, **wide, **threads,
        )  # fmt: skip
        add_experts[(tokens, chunks, parts_of_output)](
            entry, activation, count, v_code, v_step, v_nd, parts, d_model, halves, blocks, blocks_each,
            H=at_once, E=TOGETHER, B=BLOCK, **wide,
        )  # fmt: skip
        add_chunks[(math.ceil(x_td.numel() / OUTPUTS),)](parts, y_td, x_td.numel(), chunks, D=OUTPUTS)
    return y_td


def _power(count: int) -> int:
    """The next power of two."""
    return 1 << (count - 1).bit_length()


# Models bring this file along, each as a module of its own name: none may replace another's operator.
_NAME = f"peerify::few_tokens_{hashlib.sha256(__name__.encode()).hexdigest()[:16]}"
_operator: Any = torch.library.custom_op(
    _NAME,
    _launch,
    mutates_args=(),
    schema="(Tensor x, Tensor? read, Tensor? omitted, Tensor[] tables, Tensor[] experts, int group, int kind, "
    "float price, float of_coarse, float of_fine) -> Tensor",
)


@_operator.register_fake
def _(x_td: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(x_td)
