"""Fit elastic layers: what each price buys in each layer, and which prices make a budget of the whole model.

Nothing is trained and no weight is changed. A layer's curve says, for each price and share of inputs, what a token
spends on calibration text and how far the layer's output is then from the dense layer's. A layer's sensitivity turns
that error into a loss of the model. For each budget the loss predicted for all layers together is made least, by
Lagrange: in every layer the point of the curve that makes loss plus multiplier times bytes least.

Suffixes: t tokens, d d_model, f neurons of the dense layer, n experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peerify.config.peer import PeerConfig
from peerify.conversion.calibration import SiteData
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.layer import copy_neurons
from peerify.discovery.sites import Site
from peerify.errors import ConversionError
from peerify.modeling.modeling_peer import make_layer
from peerify.modeling.peer_copies import Copy, Estimate
from peerify.modeling.peer_elastic import Budget, ElasticPEER
from peerify.modeling.peer_evaluation import COARSE, FINE, FULL

LEVELS = (0.1, 0.125, 0.15, 0.175, 0.2, 0.225, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
INPUTS = (1.0, 0.75, 0.5, 0.35, 0.25)  # shares that a layer may read to estimate
PRICES = 32  # points of a curve, for each of INPUTS
ROUNDING = 1e-9  # of sums of shares: a total that a choice spends exactly must find that choice again
KEY_SHARE, COPIED = 0.72, 0.75  # see `typical_cost`
SLACK = 1.03  # of a budget: points of a curve are some percent apart
TOKENS = 1024  # that a curve is measured on, from all over the calibration text


@dataclass(frozen=True)
class Point:
    """What one price buys in one layer."""

    inputs: float
    price: float
    bytes: float
    """Of a token, as a share of the dense layer's; `macs` likewise."""
    macs: float
    error: float
    """Squared error of the output over the output's square, mean over tokens."""


EVERYTHING = Point(1.0, 0.0, 1.0, 1.0, 0.0)  # the dense layer


@dataclass(frozen=True, eq=False)
class Budgets:
    """What each layer spends for several budgets of the model."""

    rows: dict[str, list[list[float]]]
    """Of `ElasticPEER`, by path."""
    errors: dict[str, float]
    """Of each layer at the budget that was asked for."""
    loss: float | None
    """Predicted loss of the model there, nats per token; None where sensitivities were not measured."""
    active: float


def plan_elastic(ff: FeedForward, site: Site, config: PeerConfig) -> dict[str, Any]:
    """Keyword arguments of `ElasticPEER` for one dense layer, without budgets."""
    return {
        "kind": "elastic",
        "d_model": site.d_model,
        "num_experts": site.d_ff,
        "activation": site.activation,
        "gated": ff.gate_fd is not None,
        "expert_bias": ff.u_bias_f is not None,
        "gate_bias": ff.gate_bias_f is not None,
        "output_bias": ff.bias_d is not None,
        "bits": config.bits,
        "group": min(config.group, site.d_model),
        "d_ff": site.d_ff,
    } | ({"clamp": ff.clamp} if ff.clamp else {})


def typical_cost(layer: ElasticPEER, active: float) -> tuple[float, float]:
    """Bytes and multiply-adds that a layer is likely to spend at a budget, before any data are seen.

    As calibrated layers do: the keys take at most KEY_SHARE of the budget, for which fewer inputs are read; copies are
    then taken of most experts, first coarse ones, then fine ones in their place; what is left reads experts in full.
    """
    if active >= 1:
        return 1.0, 1.0

    def keys(inputs: float) -> float:
        return layer.cost(inputs, (0, 0, 0))[0]

    inputs = next((share for share in INPUTS if keys(share) <= KEY_SHARE * active), INPUTS[-1])
    _, coarse, fine = layer.pool.costs(inputs)
    left = max(0.0, active - keys(inputs)) * layer.d_ff
    copied = min(COPIED * layer.num_experts, left / coarse)
    left -= copied * coarse
    finely = min(copied, left / (fine - coarse)) if fine < 1 else 0.0
    left -= finely * (fine - coarse)
    return layer.cost(inputs, (copied - finely, finely, left))


@dataclass(frozen=True, eq=False)
class Measured:
    """What calibration text tells of one layer."""

    input_rms_d: Tensor
    curve: list[Point]


@torch.no_grad()
def build_elastic(ff: FeedForward, options: Mapping[str, Any], input_rms_d: Tensor) -> ElasticPEER:
    """The dense layer as an elastic one with everything on: its experts are the neurons."""
    ff = ff.to(ff.u_fd.device, torch.float32)
    with torch.random.fork_rng(devices=[]):  # the random initialisation is overwritten: leave no trace of it
        layer = make_layer(dict(options)).to(ff.u_fd.device)
    assert isinstance(layer, ElasticPEER)
    copy_neurons(layer, ff, torch.arange(layer.num_experts, device=ff.u_fd.device))
    layer.pool.input_rms.copy_(input_rms_d)
    return layer.eval()


@torch.no_grad()
def measure_layer(ff: FeedForward, data: SiteData, options: Mapping[str, Any]) -> tuple[ElasticPEER, Measured]:
    """The elastic layer, and its curve."""
    input_rms_d = data.x_td.square().mean(0).sqrt()
    layer = build_elastic(ff, options, input_rms_d)
    return layer, Measured(input_rms_d.cpu(), price_curve(layer, data))


@torch.no_grad()
def price_curve(layer: ElasticPEER, data: SiteData) -> list[Point]:
    """What prices buy, from nearly nothing to nearly everything.

    Errors of single experts are added up as if they pointed in directions of their own.
    """
    step = max(1, len(data.x_td) // TOKENS)
    x_td, y_td = data.x_td[::step][:TOKENS], data.y_td[::step][:TOKENS]
    pool = layer.pool
    copies = pool.copies()
    a_tn = pool.products(x_td)[2]
    power_t = y_td.square().sum(1)
    power_t = power_t + 1e-3 * power_t.mean() + torch.finfo(power_t.dtype).tiny

    def off(copied_tn: Tensor, copy: Copy) -> Tensor:
        return (a_tn - copied_tn).square() * copies.energy_n + copied_tn.square() * copy.v_error_n

    fine = copies.fine
    gate_tn = None if fine.gate_nd is None else F.linear(x_td, fine.gate_nd, pool.gate_bias)
    fine_tn = off(pool.activate(F.linear(x_td, fine.u_nd, pool.u_bias), gate_tn), fine)
    points = []
    for inputs in INPUTS:
        estimated = pool.estimate(x_td, copies, inputs)
        costs = pool.costs(inputs)
        high = max(_quantile(estimated.left_out_tn, 0.9995) / costs[1], 1e-30)
        low = max(_quantile(estimated.fine_tn, 0.02), high * 1e-12)
        prices_p = torch.logspace(math.log10(low), math.log10(high), PRICES, dtype=torch.float64)
        errors = a_tn.square() * copies.energy_n, off(estimated.a_tn, copies.coarse), fine_tn
        error_p = (errors[0].sum(1) / power_t).double().mean().cpu().expand(PRICES)
        reached = []  # experts of a token that are read at least so closely, by price
        for limit_tn, error_tn, closer_tn in zip(
            _limits(estimated, costs), errors, (*errors[1:], torch.zeros_like(fine_tn)), strict=True
        ):
            above = torch.bucketize(limit_tn.flatten().double().cpu(), prices_p, right=True)
            saved = ((error_tn - closer_tn) / power_t[:, None]).flatten().double().cpu()
            error_p = error_p - _up_to(above, saved) / len(x_td)
            reached.append(_up_to(above, torch.ones_like(saved)) / len(x_td))
        counts_p = [reached[0] - reached[1], reached[1] - reached[2], reached[2]]
        for i, price in enumerate(prices_p.tolist()):
            read, done = layer.cost(inputs, [float(count_p[i]) for count_p in counts_p])
            if read < 1:
                points.append(Point(inputs, price, read, done, max(0.0, float(error_p[i]))))
    return [*points, EVERYTHING]


def _limits(found: Estimate, costs: tuple[float, float, float]) -> list[Tensor]:
    """The highest prices at which experts are read coarsely or closer, finely or closer, and in full: (t, n) each.

    An expert is read at least as closely as a tier if a tier from there on is better than each one before, which it is
    up to the error that it saves over what it costs more.
    """
    _, coarse, fine = costs
    tiers = [(found.left_out_tn, 0.0), (found.coarse_tn, coarse), (found.fine_tn, fine)]
    tiers.append((torch.zeros_like(found.fine_tn), 1.0))

    def limit(tier: int) -> Tensor:
        best = None
        for error_tn, cost in tiers[tier:]:
            worth = [(before_tn - error_tn) / (cost - less) for before_tn, less in tiers[:tier] if less < cost]
            least = torch.stack(worth).amin(0)
            best = least if best is None else torch.maximum(best, least)
        assert best is not None
        return best

    return [limit(tier) for tier in (COARSE, FINE, FULL)]


def _up_to(above: Tensor, weights: Tensor) -> Tensor:
    """For each price, the sum of the weights of all limits that it does not exceed.

    Args:
        above: the number of prices that do not exceed each limit.
    """
    histogram = torch.bincount(above, weights=weights, minlength=PRICES + 1)
    return histogram.flip(0).cumsum(0).flip(0)[1:]


def _quantile(x_tn: Tensor, share: float) -> float:
    flat = x_tn.flatten()
    return float(flat[:: max(1, len(flat) // 10**5)].quantile(share))


def choose(
    curves: Mapping[str, Sequence[Point]],
    sensitivity: Mapping[str, float],
    cost: Mapping[str, float],
    total: float,
) -> dict[str, Point]:
    """For each layer the point that makes the predicted loss least at `total` of all layers' bytes.

    Args:
        curves: of each layer.
        sensitivity: loss of the model per error of each layer.
        cost: bytes of each dense layer.
    """
    everything = sum(cost[path] for path in curves)
    weights = {path: cost[path] / everything for path in curves}

    def at(multiplier: float) -> dict[str, Point]:
        return {
            path: min(points, key=lambda p: sensitivity[path] * p.error + multiplier * weights[path] * p.bytes)
            for path, points in curves.items()
        }

    def spent(chosen: Mapping[str, Point]) -> float:
        return sum(weights[path] * point.bytes for path, point in chosen.items())

    low, high = -40.0, 40.0  # logarithms of the multiplier
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(at(math.exp(middle))) > total + ROUNDING else (low, middle)
    return at(math.exp(high))


def settle(
    curves: Mapping[str, Sequence[Point]],
    sensitivity: Mapping[str, float],
    cost: Mapping[str, float],
    *,
    active: float | None,
    max_loss: float | None,
) -> Budgets:
    """Budgets for all LEVELS that can be reached, and for the share that was asked for.

    Args:
        curves, cost: see `choose`.
        sensitivity: likewise; empty: every layer spends the same.
        active: share that the model is to spend, or
        max_loss: the ratio of perplexities that it may cost.

    Raises:
        ConversionError: `active` is less than can be reached.
    """
    everything = sum(cost[path] for path in curves)

    def at(total: float) -> dict[str, Point]:
        if sensitivity:
            return choose(curves, sensitivity, cost, total)
        return {path: choose({path: curve}, {path: 1.0}, cost, total)[path] for path, curve in curves.items()}

    def spent(chosen: Mapping[str, Point]) -> float:
        return sum(cost[path] * point.bytes for path, point in chosen.items()) / everything

    def loss(chosen: Mapping[str, Point]) -> float:
        return sum(sensitivity[path] * point.error for path, point in chosen.items())

    if active is None:
        assert max_loss is not None
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if loss(at(middle)) > math.log(max_loss) else (low, middle)
        active = spent(at(high))
    found = {level: at(level) for level in sorted({*LEVELS, active}) if level < 1}
    reached = {level: chosen for level, chosen in found.items() if spent(chosen) <= level * SLACK}
    if active < 1 and active not in reached:
        least = spent(at(0.0))
        raise ConversionError(
            f"active {active:g} cannot be reached: reading the experts' copies and the few that matter most takes "
            f"{least:.3g} of the bytes; raise active, or give fewer bits"
        )
    chosen = reached.get(active) or dict.fromkeys(curves, EVERYTHING)
    return Budgets(
        rows={
            path: [
                [*Budget(level, point.inputs, point.price, point.bytes, point.macs)]
                for level, points in reached.items()
                for point in [points[path]]
            ]
            for path in curves
        },
        errors={path: point.error for path, point in chosen.items()},
        loss=loss(chosen) if sensitivity else None,
        active=active,
    )
