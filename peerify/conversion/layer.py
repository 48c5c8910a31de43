"""One dense layer in, one PEER layer out.

Suffixes: t tokens, d d_model, f neurons of the dense layer, n experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from peerify.config.peer import PeerConfig
from peerify.conversion.calibration import SiteData
from peerify.conversion.clustering import arrange
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.refine import refine
from peerify.conversion.refit import fit_outputs, relative_error
from peerify.conversion.router import RouterFit, fill_estimates, fill_keys, fit_router, points, truncate
from peerify.conversion.sizing import RERANK_RANK, plan_layer, splits
from peerify.discovery.sites import Site
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER

# A neuron with a peak above this (RouterFit.peak_f) is always on: models keep a few whose rare, huge values hold up all
# of their attention, and a router that misses one of them once spoils a whole window. They are less than 1 %.
PEAK = 1.5
MOST_SHARED = 0.02  # of the neurons
PROBE_TOKENS = 2048  # enough to tell which projection re-ranks better


@torch.no_grad()
def convert_layer(ff: FeedForward, data: SiteData, config: PeerConfig) -> tuple[PEER, dict[str, Any], float]:
    """One dense layer as a PEER layer.

    Args:
        ff: the dense layer.
        data: what the layer sees on the calibration data.

    Returns:
        The layer, its keyword arguments, and its relative output error on the data.
        `data.converted_td` is set.
    """
    ff = ff.to(data.x_td.device, torch.float32)
    fit = fit_router(ff, data.x_td)
    if config.num_shared is None and config.active not in (None, 1.0) and not config.expanded().share_pool:
        count = min(int((fit.peak_f > PEAK).sum()), int(MOST_SHARED * data.site.d_ff))
        config = config.model_copy(update={"num_shared": count})
    plan = plan_for(ff, data.site, config)
    neuron_n, share_n = _experts(fit, plan, config.seed)
    layer = _build(ff, plan, fit, neuron_n, share_n)
    if plan["rerank"] is not None:
        plan = plan | _choose(layer, plan["rerank"], splits(config, plan), fit, neuron_n, data)
    target_td = data.y_td if data.correction_td is None else data.y_td + data.correction_td
    refine(layer, data.x_td, target_td, steps=config.refine_steps, seed=config.seed)
    inexact = layer.gates != "unit" or layer.topk < layer.num_experts - layer.num_shared
    data.converted_td = fit_outputs(layer, data.x_td, target_td, refit=config.refit is not False and inexact)
    return layer, plan, relative_error(data.converted_td, data.y_td)


def plan_for(ff: FeedForward, site: Site, config: PeerConfig) -> dict[str, Any]:
    """Keyword arguments of `PEER` for one dense layer, before any data are seen."""
    extra = {"clamp": ff.clamp} if ff.clamp else {}
    return extra | plan_layer(
        config,
        path=site.path,
        d_model=site.d_model,
        d_ff=site.d_ff,
        gated=ff.gate_fd is not None,
        activation=site.activation,
        expert_bias=ff.u_bias_f is not None,
        gate_bias=ff.gate_bias_f is not None,
        output_bias=ff.bias_d is not None,
        learned=ff.learned is not None,
    )


def _experts(fit: RouterFit, plan: dict[str, Any], seed: int) -> tuple[Tensor, Tensor]:
    """Which neuron each expert copies, shared ones first, and which share of the neuron's output it carries.

    Shared are those with peaks, then those of largest mean importance. Fewer experts than neurons: those of largest
    mean importance stay. More: the most important are split equally.
    """
    wanted, d_ff = plan["num_experts"], len(fit.mean_score_f)
    ranked = fit.mean_score_f.argsort(descending=True, stable=True)
    copies_f = torch.zeros(d_ff, dtype=torch.long)
    copies_f[ranked] = wanted // d_ff
    copies_f[ranked[: wanted % d_ff]] += 1
    neuron_n = ranked.repeat_interleave(copies_f[ranked])
    peaks_n = torch.where(fit.peak_f > PEAK, fit.peak_f, 0.0)[neuron_n]
    neuron_n = neuron_n[peaks_n.argsort(descending=True, stable=True)]
    shared, routed = neuron_n.split([plan["num_shared"], wanted - plan["num_shared"]])
    order = arrange(
        points(fit, seed)[routed].cpu(), 1 if plan["share_pool"] else plan["num_heads"], tuple(plan["grid"]), seed
    )
    neuron_n = torch.cat([shared, routed[order.to(routed.device)]])
    return neuron_n, 1.0 / copies_f[neuron_n]


def _build(ff: FeedForward, plan: dict[str, Any], fit: RouterFit, neuron_n: Tensor, share_n: Tensor) -> PEER:
    """A PEER layer whose experts are copies of neurons, with fitted queries and sub-keys."""
    with torch.random.fork_rng(devices=[]):  # the random initialisation is overwritten: leave no trace of it
        layer = PEER(**plan | {"rerank": "up" if plan["rerank"] == "auto" else plan["rerank"]}).to(ff.u_fd.device)
    copy_neurons(layer, ff, neuron_n)
    layer.pool.v.data.mul_(share_n[:, None])
    layer.pool.update_norm()
    routed = neuron_n[layer.num_shared :]
    if plan["estimate"]:
        fill_estimates(layer.keys, ff, fit, routed)
        if layer.pool.rerank_slope is not None:  # re-ranking takes them at their word
            layer.pool.rerank_slope.data.fill_(1.0 if layer.pool.gate is not None else 0.0)
    else:
        fill_keys(layer.keys, fit, routed, _head_weights(layer.pool.v.data[layer.num_shared :], layer.num_heads))
    return layer.eval()


def copy_neurons(layer: PEER | ElasticPEER, ff: FeedForward, neuron_n: Tensor) -> None:
    """Make expert n a copy of neuron `neuron_n[n]`, and the layer's bias that of the dense layer."""
    pool = layer.pool
    pool.u.data.copy_(ff.u_fd[neuron_n])
    pool.v.data.copy_(ff.v_fd[neuron_n])
    for table, source in ((pool.gate, ff.gate_fd), (pool.u_bias, ff.u_bias_f), (pool.gate_bias, ff.gate_bias_f)):
        if table is not None and source is not None:
            table.data.copy_(source[neuron_n])
    if layer.bias is not None and ff.bias_d is not None:
        layer.bias.data.copy_(ff.bias_d)
    if ff.learned is not None:
        pool.act.load_state_dict(ff.learned.state_dict())


def _head_weights(v_nd: Tensor, heads: int) -> Tensor:
    """How much of each expert's output head h looks at, (h, n): heads that search one pool with like keys would all
    retrieve the same experts, so each judges an expert by its own share of the output coordinates."""
    parts = [v_nd[:, head::heads].norm(dim=1) for head in range(heads)]
    return torch.stack(parts) / v_nd.norm(dim=1).clamp_min(torch.finfo(v_nd.dtype).tiny) * heads**0.5


def _choose(
    layer: PEER,
    rerank: str,
    splits: list[list[tuple[int, int, int]]],
    fit: RouterFit,
    neuron_n: Tensor,
    data: SiteData,
) -> dict[str, Any]:
    """Set the projection that re-ranks and the split of compute that give the smallest output error.

    Args:
        rerank: "gate", "up", or "auto" for the better one.
        splits: see `plan.splits`.

    Returns:
        The choice, as keyword arguments of `PEER`.
    """
    probes = list(fit.probe_scale_f) if rerank == "auto" else [rerank]
    step = max(1, len(data.x_td) // PROBE_TOKENS)
    x_td, y_td = data.x_td[::step], data.y_td[::step]
    products = layer.products(x_td)

    def use(probe: str, budget: tuple[int, int, int]) -> None:
        layer.set_budget(*budget)
        layer.pool.rerank = probe
        assert layer.pool.rerank_scale is not None
        scale_f = fit.probe_scale_f[probe]
        if layer.keys.act is not None and layer.pool.gate is not None:
            scale_f = 1 / fit.up_f  # the score speaks for the rest, and for E|up| as long as nothing better is known
        layer.pool.rerank_scale.data.copy_(scale_f[neuron_n])

    def error(option: tuple[str, tuple[int, int, int]]) -> float:
        use(*option)
        experts_td = layer.activations(x_td, products) @ layer.pool.v
        return relative_error(experts_td + (0.0 if layer.bias is None else layer.bias), y_td)

    options = [(probe, budgets[0]) for budgets in splits for probe in probes]
    probe, budget = min(options, key=error) if len(options) > 1 else options[0]
    options = [(probe, other) for budgets in splits if budgets[0] == budget for other in budgets]
    probe, budget = min(options, key=error) if len(options) > 1 else options[0]
    use(probe, budget)
    chosen: dict[str, Any] = {"rerank": probe} | dict(zip(("topk", "shortlist", "candidates"), budget, strict=True))
    if layer.keys.share_query and layer.candidates >= layer.keys.num_keys:
        chosen["query_dim"] = truncate(layer.keys, fit, math.ceil(RERANK_RANK * layer.d_model))
    return chosen
