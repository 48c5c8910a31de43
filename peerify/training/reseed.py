"""Dead experts begin anew as copies of busy ones.

Product keys find expert (a, b) where a query is near row key a and column key b, so its place alone decides whether it
is found. A row key that finds nothing is moved beside the busiest row key, as VQ-VAEs restart dead codes, and its
experts become copies of that row's; columns likewise. A single dead expert, whose row and column are found, stays: no
key is its own.

Both copies of an expert get half of its output vector, as in Net2Net (1511.05641), and nearly the same gates. This is
not exact: a head adds up k experts, so that copies push out those with the smallest gates, and take a larger part of
the softmax. Where the busy key is not found nothing changes, and the outputs of new memories are zero.

Suffixes: n experts, d d_model, a rows and b columns of the grid, s sub-keys of one side, m those of both, h sets of
them, r numbers of each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

EXPECTED = 20  # mean use of a sub-key, below which one that finds nothing may only have had no chance
JITTER = 0.01  # of the size of keys, input and gate vectors: equal copies would learn the same for ever


@torch.no_grad()
def reseed(memories: list[Any], count_n: Tensor, optimizer: torch.optim.Optimizer, seed: int) -> int:
    """Re-seed the dead rows and columns of one pool, with the state that the optimizer has of them.

    Args:
        memories: all that retrieve from the pool.
        count_n: how often each expert was found.
        seed: of the jitter; every process must give the same.

    Returns:
        How many experts became copies.
    """
    pool, grid = memories[0].pool, memories[0].keys.grid
    generator = torch.Generator().manual_seed(seed)
    changed_ab = torch.zeros(grid, dtype=torch.bool)
    for side in range(2):
        use_s = count_n.view(grid).sum(1 - side)
        busy = int((use_s > 0).sum())
        dead_s = (use_s == 0).nonzero().flatten()[:busy]
        if use_s.mean() < EXPECTED or not len(dead_s):
            continue
        busy_s = use_s.argsort(descending=True, stable=True)[: len(dead_s)]
        changed_ab.index_fill_(side, dead_s.cpu(), True)
        for table_nd in (pool.u, pool.gate, pool.v):
            if table_nd is None:
                continue
            table_abd = table_nd.view(*grid, -1)
            if table_nd is pool.v:
                table_abd.index_copy_(side, busy_s, table_abd.index_select(side, busy_s) / 2)
            copies = table_abd.index_select(side, busy_s)
            if table_nd is not pool.v:
                copies = _jittered(copies, generator)
            table_abd.index_copy_(side, dead_s, copies)
            for state in optimizer.state.get(table_nd, {}).values():
                if isinstance(state, Tensor) and state.shape[:1] == table_nd.shape[:1]:
                    state_ab = state.view(*grid, *state.shape[1:])
                    state_ab.index_copy_(side, dead_s, state_ab.index_select(side, busy_s))
        first = grid[0] if side else 0  # column keys come after row keys
        for memory in memories:
            key_hmr = memory.keys.sub_keys
            key_hmr.index_copy_(1, first + dead_s, _jittered(key_hmr.index_select(1, first + busy_s), generator))
            for state in optimizer.state.get(key_hmr, {}).values():
                if isinstance(state, Tensor) and state.shape == key_hmr.shape:
                    state.index_copy_(1, first + dead_s, state.index_select(1, first + busy_s))
    return int(changed_ab.sum())


def _jittered(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """The same vectors, each moved by `JITTER` of its length."""
    noise = torch.randn(vectors.shape, generator=generator).to(vectors)
    size = vectors.norm(dim=-1, keepdim=True) * vectors.shape[-1] ** -0.5
    return vectors + JITTER * size * noise
