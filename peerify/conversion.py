"""Dense model in, PEER model out: the story of a conversion.

Suffixes: t tokens, d d_model, f neurons of the dense layer, n experts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peerify.allocation import KEEP_DENSE, LEAST, plan_shares, planned_fractions, predicted_loss, sensitivities
from peerify.calibration import Batch, SiteData, token_batches, walk
from peerify.clustering import arrange
from peerify.dense import FeedForward, read_feedforward, replace
from peerify.errors import ConversionError
from peerify.feedforward import Site, calibrated_feedforwards, select_sites
from peerify.modeling_peer import FORMAT, PEER, adopt
from peerify.plan import plan_layer, splits
from peerify.recipe import PeerConfig
from peerify.refine import refine
from peerify.refit import fit_outputs, relative_error
from peerify.router import RouterFit, fill_keys, fit_router, points

# A neuron with a peak above this (RouterFit.peak_f) is always on: models keep a few whose rare, huge values hold up all
# of their attention, and a router that misses one of them once spoils a whole window. They are less than 1 %.
PEAK = 1.5
MOST_SHARED = 0.02  # of the neurons
PROBE_TOKENS = 2048  # enough to tell which projection re-ranks better
PROBE_ACTIVE = 0.5  # at which sensitivities are measured where no active share below 1 is given

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A converted model and what is known of it."""

    model: nn.Module
    layers: dict[str, dict[str, Any]]
    """Keyword arguments of `PEER` for each converted path."""
    layer_errors: dict[str, float]
    """Relative output error |y' - y|^2 / |y|^2 of each layer on its own calibration input."""
    active_fraction: float
    """Multiply-adds of the experts per token over those of the dense layers they replace."""
    router_fraction: float
    """The router's own multiply-adds, over the same."""
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ConversionPlan:
    """What a conversion does to each layer, and what it is expected to cost."""

    sites: list[Site]
    """The layers that `config.layers` names, as they run; those without an entry in `configs` stay dense."""
    configs: dict[str, PeerConfig]
    """For each path to be converted: the configuration with the layer's own active share."""
    layers: dict[str, dict[str, Any]]
    """Keyword arguments of `PEER` for the same; the calibration data may still shift topk against candidates."""
    fractions: dict[str, tuple[float, float]]
    """For each of `sites`: multiply-adds of experts and of router per token, over the dense layer's."""
    sensitivity: dict[str, float]
    """k of each of `sites` (`peerify.allocation`); empty where nothing depended on it."""

    @property
    def active_fraction(self) -> float:
        """Multiply-adds of the experts over those of all `sites`, layers that stay dense counted in full."""
        return self._mean(0)

    @property
    def router_fraction(self) -> float:
        """The router's own multiply-adds, over the same."""
        return self._mean(1)

    @property
    def predicted_ratio(self) -> float | None:
        """Predicted perplexity over the dense model's, to first order; None where sensitivities were not measured."""
        if not self.sensitivity:
            return None
        shares = {path: active for path, (active, _) in self.fractions.items()}
        return math.exp(predicted_loss(self.sensitivity, shares))

    def _mean(self, part: int) -> float:
        return _mean([self.fractions[site.path][part] for site in self.sites], [_cost(site) for site in self.sites])


@torch.no_grad()
def plan_conversion(
    model: nn.Module,
    config: PeerConfig,
    calibration: Tensor | Sequence[Batch],
    *,
    measure: bool = True,
    progress: Progress | None = None,
) -> ConversionPlan:
    """Choose the layers to convert and how much to retrieve in each; the model is left as it is.

    Args:
        model, config, calibration, progress: as for `convert`.
        measure: measure sensitivities also where `config` alone decides, to predict what that costs.

    Raises:
        ConversionError: see `convert`; no layer can be converted within the compute or the loss asked for.
    """
    if any(hasattr(module, "get_delta_weight") for module in model.modules()):
        raise ConversionError(
            "the model holds LoRA adapters, which a converted model could not be loaded with: merge them first, "
            "model = peft_model.merge_and_unload()"
        )
    batches = token_batches(calibration, model) if isinstance(calibration, Tensor) else list(calibration)
    sites = select_sites(calibrated_feedforwards(model, batches[0]), config.layers)
    auto, d_ff = config.layers == "auto", min(site.d_ff for site in sites)
    most = min(1.0, (config.num_experts or d_ff) / d_ff)
    decided = config.topk is not None or (
        config.max_loss is None
        and not auto
        and (config.allocation == "uniform" or len(sites) == 1 or (config.active or 1.0) >= most)
    )
    k = {} if decided and not measure else _sensitivities(model, sites, batches, config, progress)
    configs = {site.path: config for site in sites}
    if not decided:
        shares = plan_shares(
            k,
            {site.path: float(_cost(site)) for site in sites},
            total=config.active,
            max_loss=config.max_loss,
            keep_dense=auto,
            least=min(most, max(LEAST, ((config.num_shared or 0) + 1) / d_ff)),
            most=most,
        )
        own = {path: {"active": share, "max_loss": None} for path, share in shares.items()}
        kept = [path for path, share in shares.items() if not auto or share <= KEEP_DENSE]
        configs = {path: config.model_copy(update=own[path]) for path in kept}
    if not configs:
        raise ConversionError(
            "no layer can be converted within "
            + (f"active {config.active}" if config.max_loss is None else f"max_loss {config.max_loss}")
            + ": allow a lower active share or a larger loss, or name the layers"
        )
    layers = {site.path: _plan(model, site, configs[site.path]) for site in sites if site.path in configs}
    fractions = {site.path: (1.0, 0.0) for site in sites}
    fractions |= {path: planned_fractions(options) for path, options in layers.items()}
    return ConversionPlan(sites=sites, configs=configs, layers=layers, fractions=fractions, sensitivity=k)


@torch.no_grad()
def convert(
    model: nn.Module,
    config: PeerConfig,
    calibration: Tensor | Sequence[Batch],
    *,
    progress: Progress | None = None,
) -> Conversion:
    """Replace dense feed-forward layers by PEER layers, in place.

    Args:
        model: a transformers model of a class of its own library.
        config: which layers, how many experts, how they are retrieved.
        calibration: windows of token ids (windows, context), or batches of keyword arguments for the model.
        progress: called with (stage, done, total).

    Raises:
        ConversionError: nothing to convert, a layer has no room for what `config` asks, or activations are not finite.
    """
    start = time.perf_counter()
    batches = token_batches(calibration, model) if isinstance(calibration, Tensor) else list(calibration)
    plan = plan_conversion(model, config, batches, measure=False, progress=progress)
    sites = [site for site in plan.sites if site.path in plan.configs]
    plans = dict(plan.layers)
    errors: dict[str, float] = {}
    layers: list[PEER] = []
    weights: list[int] = []
    for data in walk(model, sites, batches):
        path = data.site.path
        if progress:
            progress("Converting layers", len(errors), len(sites))
        ff = read_feedforward(model, data.site)
        layer, plans[path], errors[path] = convert_layer(ff, data, plan.configs[path])
        parameter = next(model.get_submodule(path).parameters())
        replace(model, data.site, layer.to(parameter.device, parameter.dtype))
        layers.append(layer)
        weights.append(_cost(data.site))
    if progress:
        progress("Converting layers", len(sites), len(sites))
    identities = [path for site in sites for path in site.identities]
    adopt(model, {"format": FORMAT, "layers": plans, "identities": identities})  # type: ignore[arg-type]
    return Conversion(
        model=model,
        layers=plans,
        layer_errors=errors,
        active_fraction=_mean([layer.active_fraction for layer in layers], weights),
        router_fraction=_mean([layer.router_fraction for layer in layers], weights),
        seconds=time.perf_counter() - start,
    )


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
    plan = _plan_for(ff, data.site, config)
    neuron_n, share_n = _experts(fit, plan, config.seed)
    layer = _build(ff, plan, fit, neuron_n, share_n)
    if plan["rerank"] is not None:
        plan = plan | _choose(layer, plan["rerank"], splits(config, plan), fit, neuron_n, data)
    target_td = data.y_td if data.correction_td is None else data.y_td + data.correction_td
    refine(layer, data.x_td, target_td, steps=config.refine_steps, seed=config.seed)
    inexact = layer.gates != "unit" or layer.topk < layer.num_experts - layer.num_shared
    data.converted_td = fit_outputs(layer, data.x_td, target_td, refit=config.refit and inexact)
    return layer, plan, relative_error(data.converted_td, data.y_td)


@torch.no_grad()
def exact_layer(ff: FeedForward, site: Site) -> tuple[PEER, dict[str, Any]]:
    """A PEER layer that retrieves every neuron with gate 1, which is the dense layer, and its keyword arguments.

    Its keys are random: nothing depends on them until fewer are retrieved.
    """
    plan = _plan_for(ff, site, PeerConfig(active=1.0))
    plan["rerank"] = None
    with torch.random.fork_rng(devices=[]):
        layer = PEER(**plan).to(ff.u_fd.device, ff.u_fd.dtype)
    _copy_neurons(layer, ff, torch.arange(site.d_ff, device=ff.u_fd.device))
    return layer.eval(), plan


def _sensitivities(
    model: nn.Module, sites: list[Site], batches: list[Batch], config: PeerConfig, progress: Progress | None
) -> dict[str, float]:
    """`sensitivities` of the layers that `config` would make, fitted in closed form only."""
    share = config.active if config.active not in (None, 1.0) else PROBE_ACTIVE
    compute = {"active": share, "topk": None, "candidates": None, "max_loss": None}
    quick = config.model_copy(update=compute | {"refit": False, "refine_steps": 0})

    def build(data: SiteData) -> tuple[PEER, float]:
        layer, _, _ = convert_layer(read_feedforward(model, data.site), data, quick)
        return layer, layer.active_fraction

    return sensitivities(model, sites, batches, build, progress)


def _cost(site: Site) -> int:
    """Multiply-adds of a dense layer per token."""
    return site.d_ff * site.d_model * (3 if site.kind == "gated" else 2)


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
    _copy_neurons(layer, ff, neuron_n)
    layer.pool.v.data.mul_(share_n[:, None])
    routed = neuron_n[layer.num_shared :]
    fill_keys(layer.keys, fit, routed, _head_weights(layer.pool.v.data[layer.num_shared :], layer.num_heads))
    return layer.eval()


def _copy_neurons(layer: PEER, ff: FeedForward, neuron_n: Tensor) -> None:
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
    layer: PEER, rerank: str, splits: list[tuple[int, int]], fit: RouterFit, neuron_n: Tensor, data: SiteData
) -> dict[str, Any]:
    """Set the projection that re-ranks and the split of compute that give the smallest output error.

    Args:
        rerank: "gate", "up", or "auto" for the better one.
        splits: (topk, candidates) per head to choose from.

    Returns:
        The choice, as keyword arguments of `PEER`.
    """
    probes = list(fit.probe_scale_f) if rerank == "auto" else [rerank]
    options = [(probe, *split) for split in splits for probe in probes]
    step = max(1, len(data.x_td) // PROBE_TOKENS)

    def use(probe: str, topk: int, candidates: int) -> None:
        layer.set_budget(topk, candidates)
        layer.pool.rerank = probe
        assert layer.pool.rerank_scale is not None
        layer.pool.rerank_scale.data.copy_(fit.probe_scale_f[probe][neuron_n])

    def error(option: tuple[str, int, int]) -> float:
        use(*option)
        return relative_error(layer(data.x_td[::step]), data.y_td[::step])

    best = min(options, key=error) if len(options) > 1 else options[0]
    use(*best)
    return dict(zip(("rerank", "topk", "candidates"), best, strict=True))


def _plan(model: nn.Module, site: Site, config: PeerConfig) -> dict[str, Any]:
    return _plan_for(read_feedforward(model, site), site, config)


def _plan_for(ff: FeedForward, site: Site, config: PeerConfig) -> dict[str, Any]:
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


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
