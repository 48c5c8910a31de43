"""One dense layer in, one PEER layer out.

Suffixes: t tokens, d d_model, f neurons of the dense layer, n experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peerify.config.peer import PeerConfig
from peerify.conversion.calibration import SiteData
from peerify.conversion.clustering import arrange
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.refine import refine
from peerify.conversion.refit import fit_outputs, relative_error
from peerify.conversion.router import RouterFit, fill_keys, fit_router, points
from peerify.conversion.sizing import plan_layer
from peerify.discovery.sites import Site
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER

# A neuron with a peak above this (RouterFit.peak_f) is always on: models keep a few whose rare, huge values hold up all
# of their attention, and a router that misses one of them once spoils a whole window. They are less than 1 %.
PEAK = 1.5
MOST_SHARED = 0.02  # of the neurons


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
        layer = PEER(**plan).to(ff.u_fd.device)
    copy_neurons(layer, ff, neuron_n)
    layer.pool.v.data.mul_(share_n[:, None])
    routed = neuron_n[layer.num_shared :]
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
