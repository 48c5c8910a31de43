"""Neurons into cells: nothing lost, structure that is there is found, the same seed gives the same arrangement."""

from __future__ import annotations

import time

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peerify.conversion.clustering import arrange, two_way


def residual(points_nz: Tensor, order: Tensor, num_heads: int, grid: tuple[int, int]) -> float:
    """Share of the variance that row + column leaves over; full grids only."""
    cells = points_nz[order].view(num_heads, *grid, -1)
    row, column = two_way(cells, torch.ones(num_heads, *grid, dtype=torch.bool))
    rest = cells - row[:, :, None] - column[:, None]
    return float(rest.pow(2).sum() / (points_nz - points_nz.mean(0)).pow(2).sum())


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 5), rows=st.integers(1, 7), columns=st.integers(1, 7), width=st.integers(1, 5),
    seed=st.integers(0, 2**31), kind=st.sampled_from(["normal", "equal", "few"]), data=st.data(),
)  # fmt: skip
def test_every_point_has_one_cell(
    heads: int, rows: int, columns: int, width: int, seed: int, kind: str, data: st.DataObject
) -> None:
    count = heads * rows * columns - data.draw(st.integers(0, rows * columns - 1))
    points = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
    if kind == "equal":
        points = torch.ones_like(points)
    elif kind == "few":  # many points alike
        points = points.round()
    order = arrange(points, heads, (rows, columns), seed)
    assert order.sort().values.tolist() == list(range(count))
    assert torch.equal(order, arrange(points.clone(), heads, (rows, columns), seed))


def planted(row: Tensor, columns: int, noise: float) -> tuple[Tensor, float, float]:
    """row_a + column_b + noise, shuffled; what is left over in the planted arrangement, and in the shuffled one."""
    column = torch.randn(1, columns, row.shape[-1])
    points = (row[:, None] + column + noise * torch.randn(len(row), columns, row.shape[-1])).flatten(0, 1)
    shuffled = points[torch.randperm(len(points))]
    in_order = torch.arange(len(points))
    grid = (len(row), columns)
    return shuffled, residual(points, in_order, 1, grid), residual(shuffled, in_order, 1, grid)


def test_planted_rows_and_columns_are_found(seed: int) -> None:
    """Rows that stand apart, as the corners of a box: what is left over is the noise."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]) * side for side in (400, 100, 25)])
    points, noise, shuffled = planted(corners @ torch.linalg.qr(torch.randn(24, 3)).Q.T, 16, noise=0.02)
    found = residual(points, arrange(points, 1, (8, 16), seed), 1, (8, 16))
    assert noise < 1e-3 * shuffled
    assert found < 1.001 * noise


def test_rows_no_larger_than_columns_help_too(seed: int) -> None:
    points, noise, shuffled = planted(torch.randn(12, 24), 16, noise=0.02)
    found = residual(points, arrange(points, 1, (12, 16), seed), 1, (12, 16))
    assert noise < 0.01 * shuffled
    assert found < 0.6 * shuffled


def test_heads_hold_clusters(seed: int) -> None:
    """Points around four far centres, the corners of an oblong: each centre's points share a head."""
    corners = torch.cartesian_prod(torch.tensor([-1.0, 1.0]) * 60, torch.tensor([-1.0, 1.0]) * 20)
    centres = corners @ torch.linalg.qr(torch.randn(10, 2)).Q.T
    label = torch.arange(4).repeat_interleave(30)[torch.randperm(120)]
    points = centres[label] + 0.1 * torch.randn(120, 10)
    order = arrange(points, 4, (5, 6), seed)
    assert all(len(set(head.tolist())) == 1 for head in label[order].view(4, 30))


def test_arrangement_beats_chance_on_unstructured_points(seed: int) -> None:
    points = torch.randn(384, 6)
    found = residual(points, arrange(points, 8, (6, 8), seed), 8, (6, 8))
    chance = residual(points, torch.randperm(384), 8, (6, 8))
    assert found < 0.6 * chance


def test_two_way_is_least_squares() -> None:
    cells = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    row, column = two_way(cells, torch.ones(2, 3, 4, dtype=torch.bool))
    design = torch.zeros(3, 4, 7, dtype=torch.float64)
    for a in range(3):
        for b in range(4):
            design[a, b, a] = design[a, b, 3 + b] = 1
    design = design.view(12, 7)
    for h in range(2):
        fitted = design @ torch.linalg.lstsq(design, cells[h].view(12, 5), driver="gelsd").solution
        additive = row[h, :, None] + column[h, None]
        torch.testing.assert_close(additive.view(12, 5), fitted, rtol=1e-10, atol=1e-10)


def test_empty_cells_do_not_count() -> None:
    """What lies in an empty cell is of no consequence, and an additive table is reproduced around it."""
    filled = torch.ones(1, 3, 4, dtype=torch.bool)
    filled[0, 2, 1:] = False
    cells = torch.randn(1, 3, 4, 2)
    row, column = two_way(cells, filled)
    other = two_way(torch.where(filled[..., None], cells, torch.full_like(cells, 1e3)), filled)
    torch.testing.assert_close((row, column), other)
    constant, _ = two_way(torch.full((1, 3, 4, 2), 2.5), filled)
    torch.testing.assert_close(constant, torch.full((1, 3, 2), 2.5))


def test_fits_a_large_layer(seed: int) -> None:
    """28,672 neurons (Llama-3-70B) in some seconds."""
    points = torch.randn(28_672, 64)
    start = time.process_time()
    order = arrange(points, 128, (14, 16), seed)
    seconds = time.process_time() - start
    assert order.sort().values.equal(torch.arange(28_672))
    assert seconds < 120
