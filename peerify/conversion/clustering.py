"""Neurons into the cells of product-key grids.

A product key scores the neuron in cell (a, b) as row(a) + column(b). The best such approximation of given vectors
z_ab is their two-way projection, row means plus column means of the rest; so the right arrangement is the one that
minimises sum |z_ab - row_a - column_b|^2: alike neurons share a row, and what a row leaves over repeats in columns.

Suffixes: n points, z their coordinates, h heads (one grid each), a rows, b columns.
"""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

POWER_STEPS = 8  # of the power iteration that finds the direction of a cut; the cut needs no more precision
COLUMN_ROUNDS = 3  # assignments of cells to columns; later rounds change next to nothing


def arrange(points_nz: Tensor, num_heads: int, grid: tuple[int, int], seed: int) -> Tensor:
    """Which point belongs in which cell.

    Cells are filled in order (head, row, column); where there are fewer points than cells, the last ones stay empty.
    Rows come from balanced bisection along principal directions, O(n z log n) in time and O(n z) in memory; columns
    from optimal assignment, row by row.

    Returns:
        order (n,): the point in cell i is ``points_nz[order[i]]``.
    """
    count, (rows, columns) = len(points_nz), grid
    if rows == 1 and num_heads == 1:
        return torch.arange(count)  # a key for each: the order is free
    capacities = [min(columns, max(0, count - start)) for start in range(0, num_heads * rows * columns, columns)]
    generator = torch.Generator().manual_seed(seed)
    order = _bisect(points_nz, torch.arange(count), [c for c in capacities if c], generator)
    for start in range(0, count, rows * columns):
        order[start : start + rows * columns] = _align(points_nz, order[start : start + rows * columns], columns)
    return order


def balanced_clusters(points_nz: Tensor, count: int, seed: int) -> list[Tensor]:
    """Numbers of the points in each of `count` clusters of equal size, by bisection as for the rows of a grid.

    Where there are fewer points than clusters, some clusters have the same point.
    """
    points = len(points_nz)
    index = torch.arange(max(points, count)) % points
    capacities = [len(index) * (i + 1) // count - len(index) * i // count for i in range(count)]
    generator = torch.Generator().manual_seed(seed)
    return list(_bisect(points_nz, index, capacities, generator).split(capacities))


def two_way(cells_habz: Tensor, filled_hab: Tensor) -> tuple[Tensor, Tensor]:
    """Row part (h, a, z) and column part (h, b, z) of the least-squares additive approximation.

    Exact where all cells are filled; empty cells, at most the end of one grid, are left out of the means.
    """
    weight = filled_hab[..., None].to(cells_habz.dtype)
    row_haz = (cells_habz * weight).sum(2) / weight.sum(2).clamp_min(1)
    rest = (cells_habz - row_haz[:, :, None]) * weight
    return row_haz, rest.sum(1) / weight.sum(1).clamp_min(1)


def _bisect(points_nz: Tensor, index: Tensor, capacities: list[int], generator: torch.Generator) -> Tensor:
    """`index` reordered so that consecutive runs of the given lengths are balanced clusters."""
    if len(capacities) == 1:
        return index
    half = len(capacities) // 2
    size = sum(capacities[:half])
    centred = points_nz[index] - points_nz[index].mean(0)
    direction = torch.randn(centred.shape[1], generator=generator, dtype=centred.dtype)
    for _ in range(POWER_STEPS):
        direction = centred.T @ (centred @ direction)
        direction = direction / direction.norm().clamp_min(torch.finfo(centred.dtype).tiny)
    index = index[(centred @ direction).argsort(stable=True)]
    return torch.cat(
        [
            _bisect(points_nz, index[:size], capacities[:half], generator),
            _bisect(points_nz, index[size:], capacities[half:], generator),
        ]
    )


def _align(points_nz: Tensor, cells: Tensor, columns: int) -> Tensor:
    """The cells of one grid with every row's members permuted so that columns are as alike as possible."""
    full = len(cells) // columns * columns
    rows_ab, tail = cells[:full].view(-1, columns), cells[full:]
    if not len(rows_ab):
        return cells
    rest_abz = points_nz[rows_ab] - points_nz[rows_ab].mean(1, keepdim=True)
    column_bz = rest_abz[0]  # one row's own members: the mean of rows in arbitrary order would say nothing yet
    for _ in range(COLUMN_ROUNDS):
        place_ab = _assign(rest_abz, column_bz)
        rows_ab = rows_ab.gather(1, place_ab)
        rest_abz = rest_abz.gather(1, place_ab[..., None].expand_as(rest_abz))
        column_bz = rest_abz.mean(0)
    if len(tail):  # it fills the first columns of a row of its own
        tail_z = points_nz[tail] - points_nz[tail].mean(0)
        tail = tail[_assign(tail_z[None], column_bz[: len(tail)])[0]]
    return torch.cat([rows_ab.flatten(), tail])


def _assign(rest_abz: Tensor, column_bz: Tensor) -> Tensor:
    """For each row, which of its members belongs in which column: (a, b)."""
    # |rest - column|^2 without the terms that no permutation of a row changes.
    gain_abc = (rest_abz @ column_bz.T).numpy()
    return torch.stack([torch.from_numpy(linear_sum_assignment(gain.T, maximize=True)[1]) for gain in gain_abc])
