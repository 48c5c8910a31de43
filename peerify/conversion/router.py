"""Fit queries and sub-keys so that the neurons that matter are retrieved: in closed form, from second moments.

How much neuron i matters for a token is the size of what it adds, I_i(x) = |a_i(x)| ||v_i||, a_i being what enters the
down projection. A ridge regression of I on the layer's input gives a linear score for every neuron at once; the neurons
are then arranged in grids (clustering.py) and each grid's scores replaced by their best row + column approximation.

Suffixes: t tokens, d d_model, f neurons, n experts, h heads, a rows, b columns, m rows + columns, r half a query,
z coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from peerify.conversion.clustering import two_way
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.precision import fast_products
from peerify.modeling.peer_keys import ProductKeys

CHUNK = 2048  # tokens at a time: bounds the (tokens, d_ff) activations in memory
# Coordinates of neurons to be clustered: more are projected on so many random directions. Distances then change by a
# few percent, what grids leave over by less (by 1 % from 577 to 288, SmolLM2-135M), and the time by a lot.
DIMENSIONS = 1024
RIDGE = 0.1  # of the variance of an input; with more, rare tokens are served worse


@dataclass(frozen=True, kw_only=True)
class RouterFit:
    """A linear score for every neuron, and what is needed to compare scores."""

    key_fd: Tensor
    """score_f(x) = key_fd @ x + bias_f predicts the importance of neuron f."""
    bias_f: Tensor
    mean_score_f: Tensor
    """Mean importance."""
    peak_f: Tensor
    """Largest importance, in units of the importance of all neurons together for a typical token: the median over
    tokens of the root of their summed squares."""
    mean_d: Tensor
    """Mean input."""
    factor_dd: Tensor
    """L with L L^T = covariance of the input: key @ L measures scores by how much they vary over the data."""


def fit_router(ff: FeedForward, x_td: Tensor) -> RouterFit:
    """Ridge regression of importances on inputs, streamed over tokens in chunks."""
    d_model, d_ff = ff.u_fd.shape[1], ff.u_fd.shape[0]
    norm_f = ff.v_fd.norm(dim=1)
    mean_d = x_td.mean(0)
    second_dd, cross_df = x_td.new_zeros(d_model, d_model), x_td.new_zeros(d_model, d_ff)
    importance_f, peak_f = x_td.new_zeros(d_ff), x_td.new_zeros(d_ff)
    sizes_t: list[Tensor] = []
    for x in x_td.split(CHUNK):
        centred = x - mean_d
        second_dd.addmm_(centred.T, centred)  # to be inverted
        with fast_products(x):
            up_tf, act_tf = ff.factors(x)
            importance_tf = (up_tf if act_tf is None else up_tf * act_tf).to(x.dtype).abs_().mul_(norm_f)
            cross_df += centred.T @ importance_tf
        importance_f += importance_tf.sum(0)
        peak_f = torch.maximum(peak_f, importance_tf.amax(0))
        sizes_t.append(importance_tf.norm(dim=1))
    tokens = len(x_td)
    covariance_dd, cross_df = second_dd / tokens, cross_df / tokens
    # Standardising the input and adding RIDGE to its correlation matrix, written on the covariance itself.
    variance_d = covariance_dd.diagonal()
    floor = variance_d.mean() * 1e-6 + torch.finfo(x_td.dtype).tiny  # inputs that never vary
    factor_ridge = torch.linalg.cholesky(covariance_dd + torch.diag(RIDGE * variance_d + floor))
    key_fd = torch.cholesky_solve(cross_df, factor_ridge).T
    factor_dd = torch.linalg.cholesky(covariance_dd + torch.diag(1e-4 * variance_d + floor))
    mean_score_f = importance_f / tokens
    return RouterFit(
        key_fd=key_fd,
        bias_f=mean_score_f - key_fd @ mean_d,
        mean_score_f=mean_score_f,
        peak_f=peak_f / torch.cat(sizes_t).median().clamp_min(torch.finfo(x_td.dtype).tiny),
        mean_d=mean_d,
        factor_dd=factor_dd,
    )


def points(fit: RouterFit, seed: int = 0) -> Tensor:
    """Coordinates of the neurons in prediction space, where distance is the mean squared difference of scores.

    Exact for a d_model of at most DIMENSIONS, else up to a random projection.
    """
    factor_dz = fit.factor_dd
    if len(factor_dz) > DIMENSIONS:
        generator = torch.Generator().manual_seed(seed)
        directions_dz = torch.randn(len(factor_dz), DIMENSIONS, generator=generator) / DIMENSIONS**0.5
        factor_dz = factor_dz @ directions_dz.to(factor_dz)  # before the keys, which are many more
    return torch.cat([fit.key_fd @ factor_dz, fit.mean_score_f[:, None]], dim=1)


def fill_keys(keys: ProductKeys, fit: RouterFit, neuron_n: Tensor, weight_hn: Tensor) -> None:
    """Set queries and sub-keys so that head h scores the expert in cell i as weight_hn[h, i] * score of its neuron.

    Args:
        keys: to be filled, in place.
        neuron_n: neuron of the expert in each cell, cells in order.
        weight_hn: what each head makes of each expert's importance. Where heads own parts of the pool, only a head's
            own cells are read.
    """
    rows, columns = keys.grid
    cells, heads = rows * columns, keys.num_heads
    padded = torch.full((heads if not keys.share_pool else 1, cells), -1)
    padded.view(-1)[: len(neuron_n)] = neuron_n
    filled_hab = (padded >= 0).view(-1, rows, columns).expand(heads, -1, -1)
    neuron_hc = padded.clamp_min(0).expand(heads, -1)
    weight_hc = fit.key_fd.new_ones(heads, cells)
    if keys.share_pool:
        weight_hc[:, : len(neuron_n)] = weight_hn
    score_dim = fit.key_fd.shape[1]
    bias_f = fit.mean_score_f[:, None]  # at the mean input; moved to the origin below
    joined_fz = torch.cat([fit.key_fd, bias_f], dim=1)
    cells_hcz = joined_fz[neuron_hc] * weight_hc[..., None]
    row_haz, column_hbz = two_way(cells_hcz.view(heads, rows, columns, -1), filled_hab)
    target_hmz = torch.cat([row_haz, column_hbz], dim=1)
    key_hmd, at_mean_hm = target_hmz[..., :score_dim], target_hmz[..., score_dim]

    if keys.query_proj is None:
        keys.sub_keys.data.copy_(key_hmd)
        bias_hm = at_mean_hm - key_hmd @ fit.mean_d
    else:
        bias_hm = _project_queries(keys, fit, key_hmd, at_mean_hm)
    if keys.sub_key_bias is not None:
        keys.sub_key_bias.data.copy_(bias_hm if len(keys.sub_keys) == heads else bias_hm.mean(0, keepdim=True))


def _project_queries(keys: ProductKeys, fit: RouterFit, key_hmd: Tensor, at_mean_hm: Tensor) -> Tensor:
    """A query per head, whose halves meet row and column keys; sub-keys per head or common to all heads.

    With common keys K, head h's sub-keys K Q_h approximate its own targets T_h: the best K and Q are the truncated
    SVD of the T_h side by side. Where a batch norm follows, its bias plays the part of a key bias, so the score at
    the mean input is one more coordinate.
    """
    assert keys.query_proj is not None
    heads, rows = keys.num_heads, keys.grid[0]
    half = keys.sub_keys.shape[-1]
    query_hsrd = key_hmd.new_zeros(heads, 2, half, key_hmd.shape[-1])
    bias_hsr = key_hmd.new_zeros(heads, 2, half)
    groups = [range(heads)] if len(keys.sub_keys) == 1 else [[head] for head in range(heads)]
    for side, part in enumerate((slice(0, rows), slice(rows, None))):
        for group, members in enumerate(groups):
            whitened = [
                torch.cat([key_hmd[h, part] @ fit.factor_dd, at_mean_hm[h, part, None]], dim=1) for h in members
            ]
            u, s, vt = torch.linalg.svd(torch.cat(whitened, dim=1), full_matrices=False)
            rank = min(half, len(s))
            root = s[:rank].sqrt()
            side_keys = key_hmd.new_zeros(u.shape[0], half)
            side_keys[:, :rank] = u[:, :rank] * root
            keys.sub_keys.data[group, part] = side_keys
            for h, block in zip(members, (root[:, None] * vt[:rank]).chunk(len(members), dim=1), strict=True):
                query_hsrd[h, side, :rank] = torch.linalg.solve_triangular(
                    fit.factor_dd, block[:, :-1], upper=False, left=False
                )
                bias_hsr[h, side, :rank] = block[:, -1]
    keys.query_proj.weight.data.copy_(query_hsrd.view(-1, key_hmd.shape[-1]))
    if (norm := keys.query_norm) is not None:
        # The norm passes the projected query on, moved so that it is `bias_hsr` at the mean input.
        weight_qd = keys.query_proj.weight.data
        variance_q = (weight_qd @ fit.factor_dd).pow(2).sum(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.copy_(weight_qd @ fit.mean_d)
        norm.running_var.copy_(variance_q)
        norm.weight.data.copy_((variance_q + norm.eps).sqrt())
        norm.bias.data.copy_(bias_hsr.flatten())
        return torch.zeros_like(at_mean_hm)
    at_mean_hsr = bias_hsr - (keys.query_proj.weight.data @ fit.mean_d).view_as(bias_hsr)
    key_hmr = keys.sub_keys.data.expand(heads, -1, -1)
    row = torch.einsum("har,hr->ha", key_hmr[:, :rows], at_mean_hsr[:, 0])
    column = torch.einsum("hbr,hr->hb", key_hmr[:, rows:], at_mean_hsr[:, 1])
    return torch.cat([row, column], dim=1)
