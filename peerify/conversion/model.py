"""Dense model in, PEER model out: the story of a conversion."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peerify.config.peer import PeerConfig
from peerify.conversion.allocation import (
    KEEP_DENSE,
    LEAST,
    plan_shares,
    planned_fractions,
    predicted_loss,
    sensitivities,
)
from peerify.conversion.calibration import Batch, SiteData, token_batches, walk
from peerify.conversion.feedforward import read_feedforward, replace
from peerify.conversion.layer import convert_layer, plan_for
from peerify.discovery.sites import Site, calibrated_feedforwards, select_sites
from peerify.errors import ConversionError
from peerify.modeling.modeling_peer import FORMAT, adopt
from peerify.modeling.peer_layer import PEER
from peerify.progress import Progress

PROBE_ACTIVE = 0.5  # at which sensitivities are measured where no active share below 1 is given


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
    predicted_ratio: float | None
    """As of `ConversionPlan`."""
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ConversionPlan:
    """What a conversion does to each layer, and what it is expected to cost."""

    sites: list[Site]
    """The layers that `config.layers` names, as they run; those without an entry in `configs` stay dense."""
    configs: dict[str, PeerConfig]
    """For each path to be converted: the configuration with the layer's own active share."""
    layers: dict[str, dict[str, Any]]
    """Keyword arguments of `PEER` for the same; the calibration data may still shift topk against shortlist and
    candidates, and shorten the query of a layer whose candidates are all."""
    fractions: dict[str, tuple[float, float]]
    """For each of `sites`: multiply-adds of experts and of router per token, over the dense layer's."""
    sensitivity: dict[str, float]
    """Sensitivity of each of `sites` (`peerify.conversion.allocation`); empty where nothing depended on it."""

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
        ConversionError: see `convert`; no layer can be converted within the compute or the loss asked for; a loss with
            fewer experts than neurons.
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
    if config.max_loss is not None and most < 1:
        raise ConversionError(
            f"num_experts {config.num_experts} leaves out some of {d_ff} neurons, and max_loss does not know their "
            "price: leave one of the two out, or give active instead of max_loss"
        )
    decided = config.topk is not None or (
        config.max_loss is None
        and not auto
        and (config.allocation == "uniform" or len(sites) == 1 or (config.active or 1.0) >= most)
    )
    sensitivity = {} if decided and not measure else _sensitivities(model, sites, batches, config, progress)
    configs = {site.path: config for site in sites}
    if not decided:
        shares = plan_shares(
            sensitivity,
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
    return ConversionPlan(sites=sites, configs=configs, layers=layers, fractions=fractions, sensitivity=sensitivity)


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
        predicted_ratio=plan.predicted_ratio,
        seconds=time.perf_counter() - start,
    )


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


def _plan(model: nn.Module, site: Site, config: PeerConfig) -> dict[str, Any]:
    return plan_for(read_feedforward(model, site), site, config)


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
