"""What layers are given to grow: many more experts beside their own, found by product keys."""

from __future__ import annotations

import math
from typing import Any

from pydantic import Field, field_validator, model_validator

from peerify.config.peer import Section


class GrowConfig(Section):
    """A memory for some PEER layers: new experts whose output is zero until they are trained."""

    num_experts: int = Field(ge=1, le=2**31)
    """New experts in each pool: a square number such as 1048576, or the cells of grid."""

    layers: str = Field(default="middle", min_length=1)
    """Which PEER layers: middle, all, first-last, indices (14 or 10-14, counted over the PEER layers), path globs."""

    share_pool: bool = False
    """One pool for all of these layers, saved once; each still has queries and sub-keys of its own."""

    num_heads: int = Field(default=8, ge=1, le=1024)
    """Queries h, all over one pool and one set of sub-keys."""

    topk: int = Field(default=16, ge=1, le=4096)
    """Experts added up per head (k)."""

    grid: tuple[int, int] | None = None
    """Rows and columns of sub-keys; by default a square."""

    query_dim: int | None = Field(default=None, ge=2, le=2**16, multiple_of=2)
    """Length of a query; its two halves meet the two sets of sub-keys. By default 64, or 128 where layers are wider
    than 1024."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Of the new experts and queries."""

    @field_validator("layers", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @model_validator(mode="after")
    def _check_together(self) -> GrowConfig:
        if self.grid is not None and (min(self.grid) < 1 or math.prod(self.grid) != self.num_experts):
            raise ValueError(
                f"a grid of {self.grid[0]} x {self.grid[1]} has {math.prod(self.grid):,} cells, and num_experts is "
                f"{self.num_experts:,}: give a cell to each expert"
            )
        root = math.isqrt(self.num_experts)
        if self.grid is None and root * root != self.num_experts:
            raise ValueError(
                f"num_experts {self.num_experts:,} is no square grid: give {root**2:,} or {(root + 1) ** 2:,}, or set "
                "grid to rows and columns"
            )
        if self.num_heads * self.topk > self.num_experts:
            raise ValueError(
                f"num_heads x topk asks for {self.num_heads * self.topk:,} experts per token, and num_experts is "
                f"{self.num_experts:,}"
            )
        return self

    @property
    def rows_and_columns(self) -> tuple[int, int]:
        """The grid of sub-keys."""
        root = math.isqrt(self.num_experts)
        return self.grid or (root, root)
