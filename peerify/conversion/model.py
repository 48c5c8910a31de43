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
    divergences,
    floored,
    plan_shares,
    planned_fractions,
    predicted_loss,
    samples,
    sensitivities,
)
from peerify.conversion.calibration import Batch, SiteData, token_batches, walk
from peerify.conversion.elastic import (
    EVERYTHING,
    Measured,
    Point,
    build_elastic,
    measure_layer,
    plan_elastic,
    settle,
)
from peerify.conversion.feedforward import read_feedforward, replace
from peerify.conversion.layer import MOST_SHARED, convert_layer, plan_for
from peerify.discovery.sites import Site, calibrated_feedforwards, select_sites
from peerify.errors import ConversionError
from peerify.modeling.modeling_peer import FORMAT, adopt
from peerify.modeling.peer_elastic import Budget
from peerify.modeling.peer_layer import PEER
from peerify.progress import Progress

PROBE_ACTIVE = 0.5  # at which sensitivities are measured where no active share below 1 is given, with product keys
PROBE_BYTES = 0.2  # likewise with copies: below it errors are too large to add up, above it too small to be seen


@dataclass(frozen=True, kw_only=True, eq=False)
class Conversion:
    """A converted model and what is known of it."""

    model: nn.Module
    layers: dict[str, dict[str, Any]]
    """Options of the layer at each converted path, as in config.json."""
    layer_errors: dict[str, float]
    """Relative output error |y' - y|^2 / |y|^2 of each layer on its own calibration input, as predicted for layers that
    have several budgets."""
    bytes_fraction: float
    """Bytes of weights that a token reads at batch 1, over those of the dense layers that are replaced, in bfloat16."""
    macs_fraction: float
    """Multiply-adds of a token over theirs."""
    predicted_ratio: float | None
    """As of `ConversionPlan`."""
    seconds: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ConversionPlan:
    """What a conversion does to each layer, and what it is expected to cost."""

    sites: list[Site]
    """The layers that `config.layers` names, as they run; those without an entry in `layers` stay dense."""
    configs: dict[str, PeerConfig]
    """For each path to be converted to product keys: the configuration with the layer's own active share."""
    layers: dict[str, dict[str, Any]]
    """Options of each layer to be converted, as in config.json. With product keys the calibration data still say which
    experts are always on."""
    measured: dict[str, Measured]
    """For each path to be converted to copies: what is known of it."""
    active: float
    """The budget of the model."""
    fractions: dict[str, tuple[float, float]]
    """For each of `sites`: bytes and multiply-adds of a token over the dense layer's."""
    errors: dict[str, float]
    """Predicted output errors of layers with copies."""
    sensitivity: dict[str, float]
    """Sensitivity of each of `sites`; empty where nothing depended on it. With copies: nats per token for an error as
    large as the output; with product keys: see `peerify.conversion.allocation`."""
    loss: float | None
    """Predicted increase of the loss, nats per token, to first order; None where sensitivities were not measured."""

    @property
    def bytes_fraction(self) -> float:
        """Bytes that a token reads over those of all `sites`, layers that stay dense counted in full."""
        return self._mean(0)

    @property
    def macs_fraction(self) -> float:
        """Multiply-adds over the same."""
        return self._mean(1)

    @property
    def predicted_ratio(self) -> float | None:
        """Predicted perplexity over the dense model's, to first order; None where sensitivities were not measured."""
        return None if self.loss is None else math.exp(self.loss)

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
    """Choose the layers to convert and what each spends; the model is left as it is.

    Args:
        model, config, calibration, progress: as for `convert`.
        measure: measure sensitivities also where `config` alone decides, to predict what that costs.

    Raises:
        ConversionError: see `convert`; no layer can be converted within the budget or the loss asked for; a loss with
            fewer experts than neurons.
    """
    if any(hasattr(module, "get_delta_weight") for module in model.modules()):
        raise ConversionError(
            "the model holds LoRA adapters, which a converted model could not be loaded with: merge them first, "
            "model = peft_model.merge_and_unload()"
        )
    batches = token_batches(calibration, model) if isinstance(calibration, Tensor) else list(calibration)
    sites = select_sites(calibrated_feedforwards(model, batches[0]), config.layers)
    plan = plan_copies if config.has_copies else plan_product_keys
    return plan(model, config, sites, batches, measure, progress)


def plan_copies(
    model: nn.Module,
    config: PeerConfig,
    sites: list[Site],
    batches: list[Batch],
    measure: bool,
    progress: Progress | None,
) -> ConversionPlan:
    """`plan_conversion` of layers whose experts have copies as keys: everything about them is known from here on."""
    options = {site.path: plan_elastic(read_feedforward(model, site), site, config) for site in sites}
    measured: dict[str, Measured] = {}
    error: dict[str, float] = {}

    def build(data: SiteData) -> nn.Module:
        path = data.site.path
        layer, measured[path] = measure_layer(read_feedforward(model, data.site), data, options[path])
        probe = min(measured[path].curve, key=lambda point: abs(point.bytes - PROBE_BYTES))
        error[path] = max(probe.error, 1e-9)
        layer.budget, layer.prefill_all = Budget(PROBE_BYTES, *list(vars(probe).values())[:4]), False
        return layer

    alike = config.allocation == "uniform" or (len(sites) == 1 and config.max_loss is None)
    if alike and not measure:
        for data in walk(model, sites, samples(batches)[0]):
            if progress:
                progress("Measuring layers", len(measured), len(sites))
            build(data)
            data.converted_td = data.y_td
        sensitivity: dict[str, float] = {}
    else:
        moved = divergences(model, sites, batches, build, progress)
        sensitivity = floored({path: kl / error[path] for path, kl in moved.items()})
    cost = {site.path: float(_cost(site)) for site in sites}
    dense: list[str] = []
    while True:
        curves = {path: [EVERYTHING] if path in dense else found.curve for path, found in measured.items()}
        weights = {} if alike else sensitivity
        budgets = settle(curves, weights, cost, active=config.active, max_loss=config.max_loss)
        spent = {path: _spent(rows, budgets.active) for path, rows in budgets.rows.items() if path not in dense}
        largest = max(spent, key=lambda path: spent[path].bytes, default=None)
        if largest is None or config.layers != "auto" or spent[largest].bytes <= KEEP_DENSE:
            break
        dense.append(largest)  # one at a time: what it takes more may bring the others below the limit
    kept = [site.path for site in sites if site.path not in dense]
    _require_some(kept, config)
    loss = sum(sensitivity[path] * budgets.errors[path] for path in kept) if sensitivity else None
    return ConversionPlan(
        sites=sites,
        configs={},
        layers={path: options[path] | {"budgets": budgets.rows[path]} for path in kept},
        measured={path: measured[path] for path in kept},
        active=budgets.active,
        fractions={site.path: (1.0, 1.0) for site in sites}
        | {path: (spent[path].bytes, spent[path].macs) for path in kept},
        errors={path: budgets.errors[path] for path in kept},
        sensitivity=sensitivity,
        loss=loss,
    )


def plan_product_keys(
    model: nn.Module,
    config: PeerConfig,
    sites: list[Site],
    batches: list[Batch],
    measure: bool,
    progress: Progress | None,
) -> ConversionPlan:
    """`plan_conversion` of layers with product keys, which are fitted to calibration text only later."""
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
            least=min(most, max(_least(model, site, config) for site in sites)),
            most=most,
        )
        own = {path: {"active": share, "max_loss": None} for path, share in shares.items()}
        kept = [path for path, share in shares.items() if not auto or share <= KEEP_DENSE]
        configs = {path: config.model_copy(update=own[path]) for path in kept}
    _require_some(list(configs), config)
    layers = {site.path: _plan(model, site, configs[site.path]) for site in sites if site.path in configs}
    fractions = {site.path: (1.0, 1.0) for site in sites}
    fractions |= {path: planned_fractions(options) for path, options in layers.items()}
    active = {path: share for path, (share, _) in fractions.items()}
    return ConversionPlan(
        sites=sites,
        configs=configs,
        layers=layers,
        measured={},
        active=1.0,
        fractions=fractions,
        errors={},
        sensitivity=sensitivity,
        loss=predicted_loss(sensitivity, active) if sensitivity else None,
    )


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
    sites = [site for site in plan.sites if site.path in plan.layers]
    layers, errors = dict(plan.layers), dict(plan.errors)
    fractions = {site.path: plan.fractions[site.path] for site in sites}
    if config.has_copies:
        for site in sites:
            found = plan.measured[site.path]
            layer = build_elastic(read_feedforward(model, site), layers[site.path], found.input_rms_d)
            _put(model, site, layer)
    else:
        for data in walk(model, sites, batches):
            path = data.site.path
            if progress:
                progress("Converting layers", len(errors), len(sites))
            ff = read_feedforward(model, data.site)
            fitted, layers[path], errors[path] = convert_layer(ff, data, plan.configs[path])
            _put(model, data.site, fitted)
            fractions[path] = fitted.bytes_fraction, fitted.macs_fraction
        if progress:
            progress("Converting layers", len(sites), len(sites))
    identities = [path for site in sites for path in site.identities]
    peer = {"format": FORMAT, "layers": layers, "identities": identities}
    adopt(model, peer, plan.active)  # type: ignore[arg-type]
    weights = [_cost(site) for site in sites]
    return Conversion(
        model=model,
        layers=layers,
        layer_errors=errors,
        bytes_fraction=_mean([fractions[site.path][0] for site in sites], weights),
        macs_fraction=_mean([fractions[site.path][1] for site in sites], weights),
        predicted_ratio=plan.predicted_ratio,
        seconds=time.perf_counter() - start,
    )


def _least(model: nn.Module, site: Site, config: PeerConfig) -> float:
    """The smallest share, in steps of a tenth, at which a layer with product keys has room for router and experts."""
    shared = int(MOST_SHARED * site.d_ff) if config.num_shared is None else config.num_shared
    share = LEAST
    while share < 1:
        own = {"active": share, "max_loss": None, "num_shared": shared}
        try:
            _plan(model, site, config.model_copy(update=own))
            return share
        except ConversionError:
            share *= 1.1
    return 1.0


def _put(model: nn.Module, site: Site, layer: nn.Module) -> None:
    parameter = next(model.get_submodule(site.path).parameters())
    replace(model, site, layer.to(parameter.device, parameter.dtype))


def _spent(rows: list[list[float]], active: float) -> Budget | Point:
    """What a layer spends at the budget `active`."""
    return next((Budget(*row) for row in rows if row[0] == active), EVERYTHING)


def _require_some(kept: list[str], config: PeerConfig) -> None:
    if not kept:
        raise ConversionError(
            "no layer can be converted within "
            + (f"active {config.active}" if config.max_loss is None else f"max_loss {config.max_loss}")
            + ": allow a lower active share or a larger loss, or name the layers"
        )


def _sensitivities(
    model: nn.Module, sites: list[Site], batches: list[Batch], config: PeerConfig, progress: Progress | None
) -> dict[str, float]:
    """`sensitivities` of the layers that `config` would make, fitted in closed form only."""
    share = config.active if config.active not in (None, 1.0) else PROBE_ACTIVE
    compute = {"active": share, "topk": None, "max_loss": None}
    quick = config.model_copy(update=compute | {"refit": False, "refine_steps": 0})

    def build(data: SiteData) -> tuple[PEER, float]:
        layer, _, _ = convert_layer(read_feedforward(model, data.site), data, quick)
        return layer, layer.bytes_fraction

    return sensitivities(model, sites, batches, build, progress)


def _cost(site: Site) -> int:
    """Multiply-adds of a dense layer per token."""
    return site.d_ff * site.d_model * (3 if site.kind == "gated" else 2)


def _plan(model: nn.Module, site: Site, config: PeerConfig) -> dict[str, Any]:
    return plan_for(read_feedforward(model, site), site, config)


def _mean(values: list[float], weights: list[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
