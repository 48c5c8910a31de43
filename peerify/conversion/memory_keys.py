"""Fit the queries and sub-keys of a memory to what its layer gets, so that all experts are found from the start.

Queries are random projections, whitened on calibration text: less their mean, times the inverse root of their
covariance. The paper's batch norm divides by standard deviations alone, and by those of the batch. A few directions of
a residual stream are far larger than all others, and every random projection holds them; whitening takes them out.

Sub-keys are the directions of balanced clusters of the half-queries, of which each has as many.

Suffixes: t tokens, d d_model, h heads, q query_dim, r half of it, n points, m sub-keys of one half.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from peerify.conversion.clustering import balanced_clusters
from peerify.modeling.peer_keys import ProductKeys

RIDGE = 1e-4  # of the mean variance of a query's numbers: directions with less than that are not blown up
POINTS = 2**17  # half-queries that are clustered, from all over the text


@torch.no_grad()
def fit_keys(keys: ProductKeys, x_td: Tensor, seed: int) -> None:
    """Set queries and sub-keys, in place.

    Args:
        keys: of heads that share one set of sub-keys.
        x_td: what the layer gets on calibration text, float32.
    """
    generator = torch.Generator().manual_seed(seed)
    query = keys.query_proj
    assert query is not None
    d_model, heads = x_td.shape[1], keys.num_heads
    mean_d = x_td.mean(0)
    random_hqd = torch.randn(heads, query.out_features // heads, d_model, generator=generator).to(x_td.device)
    weight_hqd = torch.stack([_whitened(random_qd, x_td - mean_d) for random_qd in random_hqd])
    weight = weight_hqd.flatten(0, 1)
    half_th2r = (x_td @ weight.T - weight @ mean_d).view(len(x_td), heads, 2, -1)
    halves = zip(half_th2r.unbind(2), keys.grid, strict=True)
    sub_keys = [_directions(half_thr.flatten(0, 1), count, seed) for half_thr, count in halves]
    query.weight.copy_(weight)
    query.bias.copy_(-(weight @ mean_d))
    keys.sub_keys.copy_(torch.cat(sub_keys)[None])


def _whitened(random_qd: Tensor, centred_td: Tensor) -> Tensor:
    """The projection whose numbers have variance 1 and no correlation, as near to the random one as can be."""
    query_tq = centred_td @ random_qd.T
    variance_q, axis_qq = torch.linalg.eigh(query_tq.T @ query_tq / len(query_tq))
    least = RIDGE * variance_q.mean() + torch.finfo(variance_q.dtype).tiny
    return (axis_qq * (variance_q.clamp_min(0) + least).rsqrt()) @ axis_qq.T @ random_qd


def _directions(half_nr: Tensor, count: int, seed: int) -> Tensor:
    """Unit vectors (m, r): the directions of `count` balanced clusters of the points."""
    point_nr = half_nr[:: -(-len(half_nr) // POINTS)].cpu()
    centre_mr = torch.stack([point_nr[members].mean(0) for members in balanced_clusters(point_nr, count, seed)])
    return F.normalize(centre_mr, dim=1).to(half_nr.device)
