# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""Product-key retrieval: which experts of a PEER layer a token's query finds.

Shape suffixes: t tokens, d d_model, n experts, h heads, a grid rows, b grid columns, m rows + columns,
c cells that may be retrieved, k retrieved experts.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .peer_selection import cell_scores, sorted_topk, topk_indices
from .peer_topk import MOST, Picked, cells, searches


class ProductKeys(nn.Module):
    """Product-key retrieval: each head finds the cells of a grid with the largest scores.

    Heads that share the pool (the paper) all search the same `grid`; otherwise head h owns the experts
    h*a*b ... (h+1)*a*b - 1. The last grid may have spare cells at its end, which are never retrieved.

    The query is x itself (`query_dim=None`), with sub-keys of d_model, or a projection of x for each head, whose halves
    are compared with row and column keys (the paper).
    """

    def __init__(
        self,
        d_model: int,
        num_keys: int,
        grid: tuple[int, int],
        num_heads: int,
        *,
        share_pool: bool,
        share_keys: bool,
        query_dim: int | None,
        query_norm: bool,
        key_bias: bool,
        query_bias: bool = False,
    ) -> None:
        super().__init__()
        self.num_keys, self.grid, self.num_heads = num_keys, tuple(grid), num_heads
        self.share_pool = share_pool
        rows, columns = self.grid
        spare = (1 if share_pool else num_heads) * rows * columns - num_keys
        if not 0 <= spare < rows * columns:
            raise ValueError(
                f"grid {rows}x{columns} with {num_heads} heads (share_pool={share_pool}) does not fit "
                f"{num_keys} experts: it leaves {spare} spare cells, and 0 to {rows * columns - 1} are allowed"
            )
        # Cells fill row by row, so only the last grid has rows that are empty or partly filled.
        self.full_rows, self.tail = divmod(rows * columns - spare, columns)
        if share_keys and num_heads > 1 and query_dim is None:
            raise ValueError("share_keys needs a query of its own for each head: give query_dim")
        self.query_proj: nn.Linear | None = None
        self.query_norm: nn.BatchNorm1d | None = None
        key_dim = d_model
        if query_dim is not None:
            if query_dim % 2:
                raise ValueError(f"query_dim {query_dim} must be even: its halves meet row and column keys")
            self.query_proj = nn.Linear(d_model, query_dim * num_heads, bias=query_bias)
            key_dim = query_dim // 2
            self.query_norm = nn.BatchNorm1d(query_dim * num_heads) if query_norm else None
        elif query_norm:
            raise ValueError("query_norm is for projected queries: give query_dim as well")
        key_heads = 1 if share_keys else num_heads
        self.sub_keys = nn.Parameter(torch.empty(key_heads, rows + columns, key_dim))
        self.sub_key_bias = nn.Parameter(torch.empty(key_heads, rows + columns)) if key_bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random initialisation; leaves weights alone that transformers has already loaded.

        query_proj and query_norm are modules of torch, which initialise themselves.
        """
        init.normal_(self.sub_keys, std=self.sub_keys.shape[-1] ** -0.5)
        if self.sub_key_bias is not None:
            init.zeros_(self.sub_key_bias)

    def sub_scores(self, x_td: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the row keys (t, h, a) and of the column keys (t, h, b): sub-keys times queries, with biases."""
        tokens, heads = x_td.shape[0], self.num_heads
        query = x_td if self.query_proj is None else self.query_proj(x_td)
        if self.query_norm is not None:
            # Batch statistics of a single token do not exist: use the running ones, as in evaluation.
            if self.training and tokens == 1:
                norm = self.query_norm
                query = F.batch_norm(query, norm.running_mean, norm.running_var, norm.weight, norm.bias)
            else:
                query = self.query_norm(query)
        if self.query_proj is None:
            score_thm = (query @ self.sub_keys.flatten(0, 1).T).view(tokens, len(self.sub_keys), sum(self.grid))
            scores = score_thm.split(self.grid, dim=-1)
        else:
            half_th2r = query.view(tokens, heads, 2, self.sub_keys.shape[-1])
            pairs = zip(half_th2r.unbind(2), self.sub_keys.split(self.grid, dim=1), strict=True)
            # Keys that heads share meet all of their queries in one product.
            scores = tuple(
                half_thr @ key_har[0].T if len(key_har) == 1 else torch.einsum("thr,har->tha", half_thr, key_har)
                for half_thr, key_har in pairs
            )
        if self.sub_key_bias is not None:
            scores = tuple(s + bias for s, bias in zip(scores, self.sub_key_bias.split(self.grid, dim=1), strict=True))
        # Sums of two half-precision scores tie far too often for a sharp top-k.
        row_tha, column_thb = (score if score.dtype == torch.float64 else score.float() for score in scores)
        return row_tha, column_thb

    def products(self, x_td: torch.Tensor) -> torch.Tensor:
        """The scores of row and column keys beside each other: (t, h, m)."""
        return torch.cat(self.sub_scores(x_td), dim=-1)

    def forward(
        self, x_td: torch.Tensor, topk: int | None, joint: bool = False
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The experts with the largest scores for each token, or the scores of all.

        Args:
            x_td: tokens (t, d_model).
            topk: experts for each head, or for all heads together where `joint`; None: all, in their order.
            joint: one budget shared by all heads (the heads then search grids of their own).

        Returns:
            (index, score), each (t, h, topk), or (t, 1, topk) where `joint`. Where a head has fewer experts than
            `topk`, the rest has score -inf. Without `topk` (None, score), with the scores of `cell_scores`.
        """
        if topk is None:
            return None, cell_scores(self, *self.sub_scores(x_td))
        row_tha, column_thb = self.sub_scores(x_td)
        if self._searches(row_tha, column_thb, topk, joint):
            row_thk, column_thk = cells(row_tha, column_thb, topk)
            score_thk = Picked.apply(row_tha, row_thk) + Picked.apply(column_thb, column_thk)
            return row_thk * self.grid[1] + column_thk + self._grids(x_td.device), score_thk
        index_thc, score_thc = self._candidates(row_tha, column_thb, topk)
        if joint:
            index_thc, score_thc = index_thc.flatten(1)[:, None], score_thc.flatten(1)[:, None]
        if score_thc.shape[-1] > topk:
            kept_thc = topk_indices(score_thc, topk)
            score_thc, index_thc = score_thc.gather(-1, kept_thc), index_thc.gather(-1, kept_thc)
        return index_thc, score_thc

    def _searches(self, row_tha: torch.Tensor, column_thb: torch.Tensor, topk: int, joint: bool) -> bool:
        """Whether the cells of each head can be searched by a kernel: of whole grids, one at a time."""
        sides = [(row_tha, min(topk, self.grid[0])), (column_thb, min(topk, self.grid[1]))]
        rows, columns = self.grid
        whole = self.full_rows == rows and not joint
        return whole and topk <= min(MOST, rows * columns) and all(searches(*side) for side in sides)

    def _grids(self, device: torch.device) -> torch.Tensor:
        """The first expert of each head's grid, (h, 1)."""
        cells_each = 0 if self.share_pool else self.grid[0] * self.grid[1]
        return torch.arange(self.num_heads, device=device)[:, None] * cells_each

    def _candidates(
        self, row_tha: torch.Tensor, column_thb: torch.Tensor, topk: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cells among which the `topk` best of each head surely are, with their scores."""
        rows, columns = self.grid
        device, tail_thb = row_tha.device, None
        grids = self._grids(device)
        if self.full_rows < rows:  # spare cells: drop the incomplete rows of the last grid, look at its tail apart
            is_last = torch.ones(self.num_heads, dtype=torch.bool, device=device)
            is_last[:-1] = self.share_pool
            incomplete_ha = is_last[:, None] & (torch.arange(rows, device=device) >= self.full_rows)
            if self.tail:
                filled_hb = is_last[:, None] & (torch.arange(columns, device=device) < self.tail)
                tail_thb = row_tha[..., self.full_rows, None] + column_thb
                tail_thb = tail_thb.masked_fill(~filled_hb, -math.inf)
            row_tha = row_tha.masked_fill(incomplete_ha, -math.inf)

        if topk * topk < rows * columns:
            # With rows and columns sorted, (i+1)(j+1) cells are at least as good as cell (i, j): only those pairs
            # with (i+1)(j+1) <= topk can be among the best, about k ln k instead of k^2.
            row_tha, row_index = sorted_topk(row_tha, min(topk, rows))
            column_thb, column_index = sorted_topk(column_thb, min(topk, columns))
            pairs = [
                (i, j) for i in range(row_tha.shape[-1]) for j in range(min(topk // (i + 1), column_thb.shape[-1]))
            ]
            i, j = torch.tensor(pairs, device=device).unbind(1)
            score_thc = row_tha[..., i] + column_thb[..., j]
            index_thc = row_index[..., i] * columns + column_index[..., j] + grids
        else:
            score_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
            index_thc = (torch.arange(rows * columns, device=device) + grids).expand_as(score_thc)
        if tail_thb is not None:
            tail_index = grids + self.full_rows * columns + torch.arange(columns, device=device)
            score_thc = torch.cat([score_thc, tail_thb], dim=-1)
            index_thc = torch.cat([index_thc, tail_index.expand_as(tail_thb)], dim=-1)
        return index_thc, score_thc


class Retrieved(NamedTuple):
    """What product keys found for each token."""

    index_tk: torch.Tensor
    """Experts, those of all heads."""
    weight_tk: torch.Tensor
    """Their gate values; 0 leaves an expert out."""

    def split(self, tokens: int) -> list[Retrieved]:
        """The same for so many tokens at a time."""
        parts = zip(self.index_tk.split(tokens), self.weight_tk.split(tokens), strict=True)
        return [Retrieved(*part) for part in parts]
