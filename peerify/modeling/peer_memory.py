# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""A memory beside the experts of a layer: many more of them, found by product keys.

    y = layer(x) + sum over heads h and the k best experts i of head h of softmax(s_h(x))_i e_i(x)

This is the layer of "Mixture of A Million Experts" (2407.04153, section 2 and Algorithm 1): h queries, one set of
sub-keys and one pool for all of them, softmax gates over what a head retrieved. Experts are single neurons of the
layer's own form, without biases. Their output vectors are zero until they are trained, so a layer that is given a
memory computes what it did before, to the bit.

The paper normalises queries over the batch, so that all experts are found. Here queries have weights and a bias that
whiten them on calibration text from the start: what the batch norm would do, and correlations besides, by numbers that
do not depend on the batch.

Shape suffixes: t tokens, d d_model, h heads, k experts that a head adds up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .peer_experts import ExpertPool
from .peer_keys import ProductKeys, Retrieved

FORM = ("d_model", "activation", "gated", "clamp")  # what a memory has of the layer that it is in


class Memory(nn.Module):
    """Experts that product keys find, with output vectors that are zero at the start.

    Args:
        d_model: width of input and output.
        num_experts: experts in the pool; all cells of the grid have one.
        grid: rows x columns of sub-keys.
        num_heads: queries h.
        topk: experts that each of them adds up, k.
        query_dim: length of a query, whose halves meet the row and the column keys.
        activation, gated, clamp: the form of the experts, as of `PEER`.
        pool_of: path of the layer whose memory has the pool that this one retrieves from; None: its own. `share` puts
            it here.

    Raises:
        ValueError: a grid of other cells than experts, or more retrieved than there are.
    """

    pool: ExpertPool

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        grid: tuple[int, int],
        num_heads: int,
        topk: int,
        *,
        query_dim: int,
        activation: str = "gelu",
        gated: bool = False,
        clamp: dict[str, float] | None = None,
        pool_of: str | None = None,
    ) -> None:
        super().__init__()
        rows, columns = grid
        if rows * columns != num_experts:
            raise ValueError(f"a memory of {num_experts} experts has a cell for each, and its grid is {rows}x{columns}")
        if not 1 <= topk <= num_experts:
            raise ValueError(f"topk must be 1 to {num_experts}, not {topk}")
        self.d_model, self.num_experts, self.num_heads, self.topk = d_model, num_experts, num_heads, topk
        self.vectors, self.pool_of = 3 if gated else 2, pool_of
        self.keys = ProductKeys(
            d_model, num_experts, grid, num_heads,
            share_pool=True, share_keys=True, query_dim=query_dim, query_norm=False, key_bias=False, query_bias=True,
        )  # fmt: skip
        if pool_of is None:
            self.pool = ExpertPool(
                d_model, num_experts, activation=activation, gated=gated, clamp=clamp,
                expert_bias=False, gate_bias=False, num_shared=0,
            )  # fmt: skip
            init.zeros_(self.pool.v)

    def reset_parameters(self) -> None:
        """Random initialisation but for v = 0; leaves weights alone that transformers has already loaded."""
        self.keys.reset_parameters()
        if self.pool_of is None:
            init.zeros_(self.pool.v)
            self.pool.reset_parameters(outputs=False)

    def share(self, pool: ExpertPool) -> None:
        """Retrieve from the pool of another layer's memory from now on: the same module, saved once."""
        self.pool = pool
        # Under these names transformers leaves the tables out of what it saves.
        self._tied_weights_keys = {f"pool.{name}": f"pool.{name}" for name, _ in pool.named_parameters()}

    def forward(self, x_td: torch.Tensor) -> torch.Tensor:
        """What the retrieved experts add to each token, (t, d)."""
        return self.pool(x_td, self.retrieve(x_td))  # type: ignore[no-any-return]

    def retrieve(self, x_td: torch.Tensor) -> Retrieved:
        """The experts that the heads find for each token, (t, h * k), with their gates."""
        index_thk, score_thk = self.keys(x_td, self.topk)
        return Retrieved(index_thk.flatten(1), score_thk.softmax(dim=-1).flatten(1))

    def cost(self) -> tuple[float, float]:
        """Bytes and multiply-adds of a token, over those of one expert: retrieved ones, queries and sub-keys."""
        retrieved, keys = self.num_heads * self.topk, self.keys.sub_keys
        assert self.keys.query_proj is not None
        query, expert = self.keys.query_proj.weight.numel(), self.vectors * self.d_model
        products = self.num_heads * keys.numel()  # all heads meet the one set of sub-keys
        return retrieved + (query + keys.numel()) / expert, retrieved + (query + products) / expert

    def extra_repr(self) -> str:
        rows, columns = self.keys.grid
        shared = "" if self.pool_of is None else f", pool_of={self.pool_of!r}"
        return (
            f"num_experts={self.num_experts}, grid={rows}x{columns}, num_heads={self.num_heads}, "
            f"topk={self.topk}{shared}"
        )


def make_memory(options: dict[str, Any]) -> Memory | None:
    """The memory that a layer with these options of config.json has, None without "memory"."""
    own = options.get("memory")
    return Memory(**{name: options[name] for name in FORM if name in options}, **own) if own else None


def memory_cost(layer: Any) -> tuple[float, float]:
    """What the memory of `layer` takes for a token: bytes and multiply-adds, over the dense layer's; 0 without one."""
    if layer.memory is None:
        return 0.0, 0.0
    read, done = layer.memory.cost()
    return read / layer.d_ff, done / layer.d_ff


def shared_pools(model: nn.Module) -> dict[str, str]:
    """Parameters of pools that several memories have: name -> name of the same one in the layer that holds it."""
    memories = {path: module for path, module in model.named_modules() if isinstance(module, Memory)}
    owner = {id(memory.pool): path for path, memory in memories.items() if memory.pool_of is None}
    return {
        f"{path}.pool.{name}": f"{owner[id(memory.pool)]}.pool.{name}"
        for path, memory in memories.items()
        if memory.pool_of is not None and id(memory.pool) in owner
        for name, _ in memory.pool.named_parameters()
    }
