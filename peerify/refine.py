"""Refine a router by gradient: let it miss as little as possible of what its experts have to say.

The closed-form fit (router.py) predicts how much each expert matters; what counts in the end is which ones come first.
With hard top-k there is no gradient, so here the choice is relaxed: expert i is in with probability
m_i = sigmoid((s_i - tau) / T), tau such that the m_i sum to k. The loss is the energy of what is left out,
sum (1 - m_i) |a_i|^2 ||v_i||^2, once for the retrieval of candidates and once for their re-ranking. Only the router
learns, a layer at a time: the experts stay what they are.

Suffixes: t tokens, d d_model, n routed experts, h heads, m rows + columns, r query.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from peerify.modeling_peer import PEER

BATCH = 512  # tokens
RATE = 6e-3  # of Adam, for biases in units of the spread of the scores, for queries in that of their elements
KEY_RATE = 0.15  # for sub-keys, in units of the spread of their elements
WARM_UP = 10  # steps; then the rate falls to 0 in a straight line
TEMPERATURE = 0.3  # in units of the spread of the scores
SLOPE = 0.3  # of the score in the re-ranking, to start from
NEWTON_STEPS = 8


def refine_router(layer: PEER, x_td: Tensor, *, steps: int | None, seed: int) -> None:
    """Train queries, sub-keys and re-ranking of `layer` on its input, in place.

    Does nothing where the relaxation does not speak of one choice: heads that search one pool or spend budgets of their
    own, queries with a norm, gates other than unit, and layers that retrieve everything.

    Args:
        x_td: calibration input of the layer.
        steps: of BATCH tokens each; None: one pass over `x_td`.
    """
    routed = layer.num_experts - layer.num_shared
    one_choice = not layer.share_pool and (layer.joint_topk or layer.num_heads == 1)
    if not one_choice or layer.gates != "unit" or layer.keys.query_norm is not None or layer.topk >= routed:
        return
    steps = max(1, len(x_td) // BATCH) if steps is None else steps
    if steps == 0 or layer.candidates >= routed:
        return
    with torch.enable_grad():
        _train(layer, x_td, steps, seed)


def _train(layer: PEER, x_td: Tensor, steps: int, seed: int) -> None:
    router = _Router(layer, x_td)
    groups = [{"params": [tensor], "rate": rate} for tensor, rate in router.learned()]
    optimizer = torch.optim.Adam(groups, lr=RATE, betas=(0.9, 0.99))
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(x_td), generator=generator).tolist()
        batch, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        optimizer.zero_grad()
        router.loss(x_td[batch]).backward()
        optimizer.step()
    router.store()


class _Router:
    """A layer's router in coordinates that suit Adam: standardised input, scores of spread 1."""

    def __init__(self, layer: PEER, x_td: Tensor) -> None:
        keys, pool = layer.keys, layer.pool
        self.layer, self.scale_d = layer, x_td.std(0).clamp_min(1e-6 * float(x_td.std()) + 1e-30)
        # Without biases nothing could take over what centring moves.
        self.mean_d = torch.zeros_like(x_td[0]) if keys.sub_key_bias is None else x_td.mean(0)
        first = keys.sub_keys if keys.query_proj is None else keys.query_proj.weight
        self.first = (first.data * self.scale_d).requires_grad_()  # what meets the input: sub-keys, or queries
        self.second = None if keys.query_proj is None else keys.sub_keys.data.clone().requires_grad_()
        self.bias_hm = (self._at_mean() + (0.0 if keys.sub_key_bias is None else keys.sub_key_bias.data)).detach()
        with torch.no_grad():
            spread = float(self.scores(x_td[: 4 * BATCH]).std().clamp_min(1e-30))
            (self.first if self.second is None else self.second).div_(spread)
            self.bias_hm.div_(spread)
        self.bias_hm.requires_grad_(keys.sub_key_bias is not None)
        self.slope = torch.full_like(x_td[0, :1], SLOPE).requires_grad_()
        self.norm_n = pool.v.data[layer.num_shared :].norm(dim=1)
        scale_n = pool.rerank_scale
        self.log_scale_n = None
        if scale_n is not None:
            self.log_scale_n = scale_n.data[layer.num_shared :].clamp_min(1e-30).log().requires_grad_()

    def learned(self) -> list[tuple[Tensor, float]]:
        """The tensors that learn, and the rates they learn at."""
        keys = self.first if self.second is None else self.second
        found = [(keys, KEY_RATE * float(keys.detach().std()))]
        found += [] if self.second is None else [(self.first, RATE * float(self.first.detach().std()))]
        found += [(self.bias_hm, RATE)] if self.bias_hm.requires_grad else []
        return found + ([] if self.log_scale_n is None else [(self.slope, RATE / 2), (self.log_scale_n, RATE / 2)])

    def scores(self, x_td: Tensor) -> Tensor:
        """(t, n), by the same additions as the layer's."""
        keys = self.layer.keys
        return self._cells(self._sub_scores((x_td - self.mean_d) / self.scale_d) + self.bias_hm)[:, : keys.num_keys]

    def _sub_scores(self, x_td: Tensor) -> Tensor:
        keys = self.layer.keys
        if self.second is None:
            return torch.einsum("td,hmd->thm", x_td, self.first)
        query = x_td @ self.first.T
        if keys.share_query:
            return torch.einsum("tr,hmr->thm", query, self.second)
        half_th2r = query.view(len(x_td), keys.num_heads, 2, -1)
        rows = keys.grid[0]
        row_tha = torch.einsum("thr,har->tha", half_th2r[:, :, 0], self.second[:, :rows])
        return torch.cat([row_tha, torch.einsum("thr,hbr->thb", half_th2r[:, :, 1], self.second[:, rows:])], dim=-1)

    def _cells(self, score_thm: Tensor) -> Tensor:
        row_tha, column_thb = score_thm.split(self.layer.keys.grid, dim=-1)
        return (row_tha[..., None] + column_thb[..., None, :]).flatten(1)

    def _at_mean(self) -> Tensor:
        """Sub-scores of the mean input, (h, m): what the bias takes over when the input is centred."""
        with torch.no_grad():
            return self._sub_scores((self.mean_d / self.scale_d)[None])[0]

    def loss(self, x_td: Tensor) -> Tensor:
        """Energy missed, as a share of all."""
        layer, pool, shared = self.layer, self.layer.pool, self.layer.num_shared
        with torch.no_grad():
            u_tn = nn.functional.linear(x_td, pool.u, pool.u_bias)
            gate_tn = None if pool.gate is None else nn.functional.linear(x_td, pool.gate, pool.gate_bias)
            energy_tn = (pool._activate(u_tn, gate_tn)[:, shared:] * self.norm_n).square_()
            # Per token: a few tokens of many models have activations a hundred times the size of all others.
            energy_tn /= energy_tn.sum(1, keepdim=True).clamp_min(torch.finfo(x_td.dtype).tiny)
        score_tn = self.scores(x_td)
        chosen_tn = SoftTopK.apply(score_tn, layer.candidates, TEMPERATURE)
        if self.log_scale_n is None or layer.topk == layer.candidates:
            return ((1 - chosen_tn) * energy_tn).sum(1).mean()
        with torch.no_grad():
            probe_tn = (gate_tn if pool.rerank == "gate" else u_tn)[:, shared:]  # type: ignore[index]
            size_tn = pool._size(probe_tn).clamp_min(1e-30).log()
            candidate_tn = score_tn >= threshold(score_tn, layer.candidates)
        worth_tn = size_tn + self.log_scale_n + self.slope * score_tn
        among_tn = worth_tn.masked_fill(~candidate_tn, -1e4)
        least_t1 = threshold(among_tn.detach(), layer.topk)
        # Being a candidate pays for those that re-ranking would keep; being kept, for those that are candidates.
        missed_tn = (1 - chosen_tn) * (worth_tn.detach() >= least_t1)
        dropped_tn = (1 - SoftTopK.apply(among_tn, layer.topk, TEMPERATURE)) * candidate_tn
        return ((missed_tn + dropped_tn) * energy_tn).sum(1).mean()

    @torch.no_grad()
    def store(self) -> None:
        """Into the layer's own parameters."""
        keys, pool = self.layer.keys, self.layer.pool
        if keys.sub_key_bias is not None:
            keys.sub_key_bias.copy_(self.bias_hm - self._at_mean())
        first = self.first / self.scale_d
        if self.second is None:
            keys.sub_keys.copy_(first)
        else:
            keys.query_proj.weight.copy_(first)  # type: ignore[union-attr]
            keys.sub_keys.copy_(self.second)
        if self.log_scale_n is not None and pool.rerank_scale is not None and pool.rerank_slope is not None:
            pool.rerank_scale[self.layer.num_shared :] = self.log_scale_n.exp()
            pool.rerank_slope.copy_(self.slope)


def threshold(x: Tensor, k: int) -> Tensor:
    """The `k`-th largest value along the last dimension, kept as a dimension of size 1; of fewer, the least."""
    x, place = x.detach(), max(0, x.shape[-1] - k)
    # numpy's selection is many times as fast as torch's, but knows no half precision and cannot be compiled.
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return torch.from_numpy(np.partition(x.numpy(), place, axis=-1)[..., place : place + 1].copy())
    return x.kthvalue(place + 1, dim=-1, keepdim=True).values


class SoftTopK(torch.autograd.Function):
    """m_i = sigmoid((s_i - tau) / T) with tau such that each row sums to k; gradients pass through tau as well."""

    @staticmethod
    def forward(ctx: Any, score_tn: Tensor, k: int, temperature: float) -> Tensor:
        """(t, n) in and out."""
        tau_t1 = threshold(score_tn, k)
        for _ in range(NEWTON_STEPS):
            m_tn = torch.sigmoid((score_tn - tau_t1) / temperature)
            slope_t1 = (m_tn * (1 - m_tn)).sum(1, keepdim=True) / temperature
            step_t1 = (m_tn.sum(1, keepdim=True) - k) / slope_t1.clamp_min(1e-6)
            tau_t1 = tau_t1 + step_t1.clamp(-temperature, temperature)
        m_tn = torch.sigmoid((score_tn - tau_t1) / temperature)
        ctx.save_for_backward(m_tn)
        ctx.temperature = temperature
        return m_tn

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """d m_i / d s_j = w_i (delta_ij - w_j / sum w) / T with w = m (1 - m)."""
        (grad_tn,) = grads
        (m_tn,) = ctx.saved_tensors
        weight_tn = m_tn * (1 - m_tn)
        mean_t1 = (grad_tn * weight_tn).sum(1, keepdim=True) / weight_tn.sum(1, keepdim=True).clamp_min(1e-12)
        return (grad_tn - mean_t1) * weight_tn / ctx.temperature, None, None
