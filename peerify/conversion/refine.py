"""Train one layer's router and experts by gradient, on that layer's calibration data alone.

The closed-form fit (router.py) predicts how much each expert contributes, but only the order of the predictions counts.
A hard top-k passes no gradient to scores. The router's selection is therefore relaxed: expert i is selected with
probability m_i = sigmoid((s_i - tau) / T), where tau is such that the m_i sum to k. The router's loss is the energy of
the experts left out, sum (1 - m_i) |a_i|^2 ||v_i||^2. At the same time the experts are trained on the squared error of
the layer's output, with the hard selection. Both losses are relative to each token's total, because in many models a
few tokens have activations a hundred times as large as all others.

Suffixes: t tokens, d d_model, n experts (scores: routed ones only), h heads, m rows + columns.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peerify.conversion.precision import fast_products
from peerify.modeling.peer_keys import ProductKeys
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_selection import at_least, cell_scores, threshold

BATCH = 512  # tokens
PASSES = 2  # over the calibration text, unless the number of steps is given
RATE = 6e-3  # of Adam, for biases in units of the scores' standard deviation; for queries, of their elements'
KEY_RATE = 0.15  # for sub-keys, in units of their elements' standard deviation
EXPERT_RATE = 0.01  # for the experts' vectors, likewise
WARM_UP = 10  # steps; then the rate falls to 0 in a straight line
TEMPERATURE = 0.3  # T, in units of the scores' standard deviation
NEWTON_STEPS, ENOUGH = 8, 1e-2  # at most; after a step below ENOUGH temperatures, about its square is left


def refine(layer: PEER, x_td: Tensor, target_td: Tensor, *, steps: int | None, seed: int) -> None:
    """Train router and experts of `layer`, in place.

    Layers without one joint selection stay as they are: those whose heads share a pool or have budgets of their own,
    with a query norm, with gates other than unit, and those that keep every expert.

    Args:
        x_td: calibration input of the layer.
        target_td: what its output should be.
        steps: of BATCH tokens each; None: PASSES over `x_td`.
    """
    routed = layer.num_experts - layer.num_shared
    one_choice = not layer.share_pool and (layer.joint_topk or layer.num_heads == 1)
    if not one_choice or layer.gates != "unit" or layer.keys.query_norm is not None or layer.topk >= routed:
        return
    steps = max(1, PASSES * len(x_td) // BATCH) if steps is None else steps
    if steps == 0:
        return
    with torch.enable_grad():
        _train(layer, x_td, target_td, steps, seed)
    layer.zero_grad(set_to_none=True)


def _train(layer: PEER, x_td: Tensor, target_td: Tensor, steps: int, seed: int) -> None:
    router = _Router(layer, x_td)
    pool = layer.pool
    tables = [pool.u, pool.v, pool.gate, pool.u_bias, pool.gate_bias, layer.bias]
    learned = router.learned() + [(table, EXPERT_RATE * _deviation(table)) for table in tables if table is not None]
    groups = [{"params": [tensor], "rate": rate} for tensor, rate in learned]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        if len(order) < BATCH:
            order += torch.randperm(len(x_td), generator=generator).tolist()
        batch, order = order[:BATCH], order[BATCH:]
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / WARM_UP) * (1 - step / steps)
        optimizer.zero_grad()
        with fast_products(x_td):
            loss = _loss(layer, router, x_td[batch], target_td[batch])
        loss.backward()
        optimizer.step()
    router.store(layer)


def _loss(layer: PEER, router: _Router, x_td: Tensor, target_td: Tensor) -> Tensor:
    """Energy that the router misses plus squared error of the output, each as a share of all, per token."""
    pool, shared, tiny = layer.pool, layer.num_shared, torch.finfo(x_td.dtype).tiny
    u_tn = F.linear(x_td, pool.u, pool.u_bias).to(x_td.dtype)
    gate_tn = None if pool.gate is None else F.linear(x_td, pool.gate, pool.gate_bias).to(x_td.dtype)
    a_tn = pool.activate(u_tn, gate_tn)
    score_tn = router.scores(x_td)
    with torch.no_grad():
        size_tn = a_tn[:, shared:].abs() * pool.v[shared:].norm(dim=1)
        total_t1 = size_tn.square().sum(1, keepdim=True).clamp_min(tiny)
    level_t1 = threshold(score_tn, layer.topk)
    kept_tn = at_least(score_tn, level_t1)
    missed_tn = 1 - SoftTopK.apply(score_tn, layer.topk, level_t1)
    weight_tn = torch.cat([kept_tn.new_ones(len(x_td), shared), kept_tn], dim=1)
    y_td = ((a_tn * weight_tn) @ pool.v).to(x_td.dtype)
    error_t = (y_td + (0.0 if layer.bias is None else layer.bias) - target_td).square().sum(1)
    error_t = error_t / target_td.square().sum(1).clamp_min(tiny)
    return (missed_tn * (size_tn.square() / total_t1)).sum(1).mean() + error_t.mean()


class _Router:
    """A layer's router in coordinates that suit Adam: standardised input, and scores with standard deviation 1."""

    def __init__(self, layer: PEER, x_td: Tensor) -> None:
        keys = copy.deepcopy(layer.keys)
        self.keys = keys
        self.scale_d = x_td.std(0, correction=0).clamp_min(1e-6 * float(x_td.std(correction=0)) + 1e-30)
        # Without biases nothing could take over what centring moves.
        self.mean_d = torch.zeros_like(x_td[0]) if keys.sub_key_bias is None else x_td.mean(0)
        with torch.no_grad():
            bias_hm = self._at_mean(keys)
            _meets_input(keys).mul_(self.scale_d)
            if keys.sub_key_bias is not None:
                keys.sub_key_bias.copy_(bias_hm)
            deviation = float(self.scores(x_td[: 4 * BATCH]).std().clamp_min(1e-30))
            keys.sub_keys.div_(deviation)
            if keys.sub_key_bias is not None:
                keys.sub_key_bias.div_(deviation)

    def learned(self) -> list[tuple[Tensor, float]]:
        """The tensors that learn, and the rates they learn at."""
        keys = self.keys
        found: list[tuple[Tensor, float]] = [(keys.sub_keys, KEY_RATE * _deviation(keys.sub_keys))]
        if keys.query_proj is not None:
            found.append((keys.query_proj.weight, RATE * _deviation(keys.query_proj.weight)))
        if keys.sub_key_bias is not None:
            found.append((keys.sub_key_bias, RATE))
        return found

    def scores(self, x_td: Tensor) -> Tensor:
        """(t, n), those of the layer but for a factor."""
        return cell_scores(self.keys, *self.keys.sub_scores((x_td - self.mean_d) / self.scale_d))[:, 0]

    def _at_mean(self, keys: ProductKeys) -> Tensor:
        """Products with the mean input, (h, m): what the bias takes over when the input is centred."""
        return keys.products(self.mean_d[None])[0]

    @torch.no_grad()
    def store(self, layer: PEER) -> None:
        """Into the layer's own parameters."""
        keys = copy.deepcopy(self.keys)
        _meets_input(keys).div_(self.scale_d)
        if keys.sub_key_bias is not None:
            bias_hm = keys.sub_key_bias.clone()
            keys.sub_key_bias.zero_()
            keys.sub_key_bias.copy_(bias_hm - self._at_mean(keys))
        layer.keys.load_state_dict(keys.state_dict())


def _meets_input(keys: ProductKeys) -> Tensor:
    """The weights that are multiplied with a layer's input: queries where there are any, else sub-keys."""
    return (keys.sub_keys if keys.query_proj is None else keys.query_proj.weight).data


def _deviation(table: Tensor) -> float:
    return float(table.detach().std()) if table.numel() > 1 else 0.0


class SoftTopK(torch.autograd.Function):
    """m_i = sigmoid((s_i - tau) / T) with tau such that each row sums to k; gradients pass through tau as well."""

    @staticmethod
    def forward(ctx: Any, score_tn: Tensor, k: int, tau_t1: Tensor) -> Tensor:
        """(t, n) in and out; `tau_t1` is where to begin, the k-th largest score."""
        for _ in range(NEWTON_STEPS):
            m_tn = torch.sub(score_tn, tau_t1).div_(TEMPERATURE).sigmoid_()
            sum_t1 = m_tn.sum(1, keepdim=True)
            slope_t1 = (sum_t1 - m_tn.square_().sum(1, keepdim=True)) / TEMPERATURE
            step_t1 = ((sum_t1 - k) / slope_t1.clamp_min(1e-6)).clamp(-TEMPERATURE, TEMPERATURE)
            tau_t1 = tau_t1 + step_t1
            if float(step_t1.abs().max()) < ENOUGH * TEMPERATURE:
                break
        m_tn = torch.sub(score_tn, tau_t1).div_(TEMPERATURE).sigmoid_()
        ctx.save_for_backward(m_tn)
        return m_tn

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """d m_i / d s_j = w_i (delta_ij - w_j / sum w) / T with w = m (1 - m)."""
        (grad_tn,) = grads
        (m_tn,) = ctx.saved_tensors
        weight_tn = torch.addcmul(m_tn, m_tn, m_tn, value=-1)
        mean_t1 = (grad_tn * weight_tn).sum(1, keepdim=True) / weight_tn.sum(1, keepdim=True).clamp_min(1e-12)
        return (grad_tn - mean_t1).mul_(weight_tn).div_(TEMPERATURE), None, None
