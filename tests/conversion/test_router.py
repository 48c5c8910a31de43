"""The closed-form router: what it regresses, and that keys of every form carry its scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peerify.conversion import router
from peerify.conversion.clustering import arrange, two_way
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.router import RouterFit, fill_keys, fit_router, points
from peerify.modeling.peer_keys import ProductKeys


def feedforward(
    u_fd: Tensor, v_fd: Tensor, gate_fd: Tensor | None = None, u_bias_f: Tensor | None = None, activation: str = "relu"
) -> FeedForward:
    return FeedForward(
        u_fd=u_fd, gate_fd=gate_fd, v_fd=v_fd, u_bias_f=u_bias_f, gate_bias_f=None, bias_d=None, activation=activation
    )


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def random_fit(d_ff: int = 60, d_model: int = 10, tokens: int = 500) -> tuple[RouterFit, Tensor]:
    ff = feedforward(normals(d_ff, d_model), normals(d_ff, d_model), normals(d_ff, d_model), activation="silu")
    x_td = normals(tokens, d_model) @ normals(d_model, d_model) + normals(d_model)
    return fit_router(ff, x_td), x_td


def keys_like(num_keys: int, grid: tuple[int, int], num_heads: int, d_model: int = 10, **options: Any) -> ProductKeys:
    form = {"share_pool": False, "share_keys": False, "query_dim": None, "query_norm": False, "key_bias": True}
    return ProductKeys(d_model, num_keys, grid, num_heads, **form | options).double().eval()


def test_fit_is_ridge_regression() -> None:
    """Against the textbook formula on standardised inputs, and streamed in any number of chunks."""
    d_ff, d_model, tokens = 7, 5, 5000
    ff = feedforward(
        normals(d_ff, d_model), normals(d_ff, d_model), normals(d_ff, d_model), normals(d_ff), activation="gelu"
    )
    x_td = normals(tokens, d_model) @ normals(d_model, d_model) + 3
    fit = fit_router(ff, x_td)
    act = torch.nn.functional.gelu(x_td @ ff.gate_fd.T)
    up = x_td @ ff.u_fd.T + ff.u_bias_f
    importance = (act * up).abs() * ff.v_fd.norm(dim=1)
    std = x_td.std(0, correction=0)
    z = (x_td - x_td.mean(0)) / std
    ridge = torch.linalg.solve(z.T @ z / tokens + 0.1 * torch.eye(d_model), z.T @ importance / tokens)
    predicted = z @ ridge + importance.mean(0)
    torch.testing.assert_close(
        x_td @ fit.key_fd.T + fit.bias_f, predicted, rtol=1e-3, atol=1e-4 * float(importance.std())
    )
    torch.testing.assert_close(fit.mean_score_f, importance.mean(0))
    covariance = (x_td - fit.mean_d).T @ (x_td - fit.mean_d) / tokens
    torch.testing.assert_close(fit.factor_dd @ fit.factor_dd.T, covariance, rtol=1e-3, atol=1e-3)


def test_inputs_that_never_vary() -> None:
    """A dead input, and fewer tokens than inputs, still have a finite answer."""
    ff = feedforward(normals(9, 12), normals(9, 12))
    x_td = normals(6, 12)
    x_td[:, 3] = 1.5
    fit = fit_router(ff, x_td)
    assert all(value.isfinite().all() for value in (fit.key_fd, fit.bias_f, fit.factor_dd, points(fit)))


def test_distance_of_points_is_difference_of_scores() -> None:
    fit, x_td = random_fit()
    score_tf = x_td @ fit.key_fd.T + fit.bias_f
    measured = (score_tf[:, 3] - score_tf[:, 8]).pow(2).mean()
    z_fz = points(fit)
    torch.testing.assert_close((z_fz[3] - z_fz[8]).pow(2).sum(), measured, rtol=1e-2, atol=1e-6)


def test_many_coordinates_are_projected_and_distances_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, _ = random_fit(d_ff=80, d_model=300, tokens=900)
    exact = torch.pdist(points(fit))
    monkeypatch.setattr(router, "DIMENSIONS", 200)
    z_fz = points(fit, seed=1)
    assert z_fz.shape == (80, 201)
    ratio = torch.pdist(z_fz) / exact
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 0.1
    assert torch.equal(points(fit, seed=1), z_fz)
    assert not torch.equal(points(fit, seed=2), z_fz)


def test_linear_importances_are_retrieved() -> None:
    """Neurons that are row + column, with values so large that relu passes all: importance is linear in x, and the
    retrieved are the most important, token by token."""
    rows, columns, d_model, heads = 6, 7, 8, 3
    u_fd = (normals(heads, rows, 1, d_model) + normals(heads, 1, columns, d_model)).flatten(0, 2)
    v_fd = torch.nn.functional.normalize(normals(len(u_fd), d_model))
    ff = feedforward(u_fd, v_fd, u_bias_f=torch.full((len(u_fd),), 50.0, dtype=torch.float64))
    # White inputs, on which ridge shrinks every direction alike.
    x_td = torch.linalg.qr(normals(400, d_model) - normals(400, d_model).mean(0)).Q
    x_td = torch.linalg.qr(x_td - x_td.mean(0)).Q * 20
    keys = keys_like(len(u_fd), (rows, columns), heads, d_model)
    fill_keys(keys, fit_router(ff, x_td), torch.arange(len(u_fd)), torch.ones(heads, len(u_fd)))
    found_tk = keys(x_td, 20, True)[0][:, 0]
    expected_tk = (x_td @ u_fd.T).topk(20).indices
    common = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(found_tk, expected_tk, strict=True)])
    assert common.mean() > 0.999


def test_arranged_neurons_are_better_retrieved_than_shuffled_ones(seed: int) -> None:
    fit, x_td = random_fit(d_ff=240, d_model=6)
    score_tf = x_td @ fit.key_fd.T + fit.bias_f
    expected_tk = score_tf.topk(60).indices

    def recall(neuron_n: Tensor) -> float:
        keys = keys_like(240, (6, 8), 5, 6)
        fill_keys(keys, fit, neuron_n, torch.ones(5, 240))
        found_tk = neuron_n[keys(x_td, 60, True)[0][:, 0]]
        hits = [torch.isin(a, b).double().mean() for a, b in zip(found_tk, expected_tk, strict=True)]
        return float(torch.stack(hits).mean())

    arranged = recall(arrange(points(fit), 5, (6, 8), seed))
    assert arranged > recall(torch.randperm(240)) + 0.03
    assert arranged > 0.6


def projected_scores(fit: RouterFit, x_td: Tensor, keys: ProductKeys, neuron_n: Tensor, weight_hn: Tensor) -> Tensor:
    """(t, h, cells): each token's scores, laid out in the grids, projected to row + column token by token."""
    rows, columns = keys.grid
    cells = rows * columns
    score_tn = (x_td @ fit.key_fd.T + fit.bias_f)[:, neuron_n]
    out = []
    for h in range(keys.num_heads):
        own = slice(None) if keys.share_pool else slice(h * cells, (h + 1) * cells)
        weight_n = weight_hn[h, own] if keys.share_pool else 1
        own_tn = score_tn[:, own] * weight_n
        filled = torch.arange(cells) < own_tn.shape[1]
        padded = torch.nn.functional.pad(own_tn, (0, cells - own_tn.shape[1]))
        row, column = two_way(padded.T.reshape(1, rows, columns, -1), filled.view(1, rows, columns))
        additive = (row[0, :, None] + column[0, None]).flatten(0, 1).T
        out.append(additive)
    return torch.stack(out, dim=1)


@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("share_pool", [False, True])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"query_dim": 22},
        {"query_dim": 22, "query_norm": True, "key_bias": False},
        {"query_dim": 22, "share_keys": True, "query_norm": True, "key_bias": False},
        {"query_dim": 64, "query_norm": True, "key_bias": False},
    ],
)
def test_filled_keys_carry_the_projected_scores(form: dict[str, Any], share_pool: bool, spare: int) -> None:
    """Queries long enough for any target: shared keys need as many coordinates as a grid has rows or columns."""
    if form.get("share_keys") and not share_pool:
        form = form | {"share_keys": False}
    grid, heads = (5, 6), 3
    count = (1 if share_pool else heads) * 30 - spare
    fit, x_td = random_fit(d_ff=100)
    keys = keys_like(count, grid, heads, share_pool=share_pool, **form)
    neuron_n, weight_hn = torch.randperm(100)[:count], normals(heads, count).abs()
    fill_keys(keys, fit, neuron_n, weight_hn)
    row_tha, column_thb = keys.sub_scores(x_td[:20])
    actual_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
    expected_thc = projected_scores(fit, x_td[:20], keys, neuron_n, weight_hn)
    torch.testing.assert_close(actual_thc, expected_thc, rtol=1e-8, atol=1e-8)


def test_shared_keys_with_a_bias_follow_every_head_up_to_its_mean() -> None:
    """One bias for all heads cannot be each head's own; what varies with x is exact, the bias is the heads' mean."""
    fit, x_td = random_fit()
    keys = keys_like(30, (5, 6), 3, share_pool=True, share_keys=True, query_dim=12)
    neuron_n, weight_hn = torch.randperm(60)[:30], normals(3, 30).abs()
    fill_keys(keys, fit, neuron_n, weight_hn)
    row_tha, column_thb = keys.sub_scores(x_td[:20])
    actual_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
    expected_thc = projected_scores(fit, x_td[:20], keys, neuron_n, weight_hn)
    torch.testing.assert_close(actual_thc - actual_thc[:1], expected_thc - expected_thc[:1], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(actual_thc.mean(1), expected_thc.mean(1), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_short_queries_are_the_best_of_their_rank() -> None:
    """A truncated query loses something, more the shorter it is, and keeps most of what it can."""
    fit, x_td = random_fit(d_ff=100)
    neuron_n = torch.randperm(100)[:90]
    losses = []
    for query_dim in (2, 4, 8, 12):
        keys = keys_like(90, (5, 6), 3, query_dim=query_dim)
        fill_keys(keys, fit, neuron_n, torch.ones(3, 90))
        row_tha, column_thb = keys.sub_scores(x_td)
        expected_thc = projected_scores(fit, x_td, keys, neuron_n, torch.ones(3, 90))
        actual_thc = (row_tha[..., None] + column_thb[..., None, :]).flatten(2)
        spread = (expected_thc - expected_thc.mean(0)).pow(2).sum()
        losses.append(float((actual_thc - expected_thc).pow(2).sum() / spread))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] < 1
    assert losses[-1] < 1e-12
