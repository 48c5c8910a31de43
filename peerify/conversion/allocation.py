"""How much to retrieve by product keys in each layer: more where errors cost more.

Converting layer l at active share a_l raises the model's loss by about k_l (1 - a_l)^POWER, and these increases add up
to first order. k_l is the layer's sensitivity, cost_l its size. By Lagrange the loss at a given total of multiply-adds
is least where (1 - a_l)^(POWER - 1) is proportional to cost_l / k_l, within limits. A given loss determines one total.

k_l is measured: how far do the model's predictions move with only layer l converted, in closed form, on text that it
was not fitted to? On the text that it was fitted to a layer looks better than it is, by factors that differ much: layer
0 of SmolLM2-135M by 7, layer 10 by 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peerify.conversion.block_cache import BlockCache
from peerify.conversion.calibration import Batch, SiteData, on_device, walk
from peerify.conversion.feedforward import replaced
from peerify.discovery.sites import Site
from peerify.modeling.modeling_peer import make_layer
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER

# Measured on single, refined layers of SmolLM2-135M: between 2.1 (few experts) and 3.1 (most of them). The whole model
# at half of the compute: 1.220 times the dense perplexity with 2.5, 1.225 with 3.
POWER = 2.5
LEAST, MOST = 0.1, 1.0  # active share of a layer
TOKENS = 8192  # that sensitivities are measured with, from all over the calibration data
# Of the mean sensitivity. Experts that the activation function cuts off cost nothing to leave out, until there are no
# more of them: a layer that seems not to matter may do so at a lower share than it was measured at.
FLOOR = 1e-2
HELD_OUT = 4  # one sample in so many of them judges what is fitted to the others
KEEP_DENSE = 0.95  # `layers: auto` leaves a layer alone that would be more active than this: retrieval gains nothing


def sensitivities(
    model: nn.Module,
    sites: list[Site],
    batches: list[Batch],
    build: Callable[[SiteData], tuple[PEER, float]],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """k_l of each site by its path: its divergence over (1 - active)^POWER, at least FLOOR of the mean.

    Args:
        batches, progress: see `divergences`.
        build: makes a converted layer of what a site sees, and says what share of the dense layer it spends.
    """
    spent: dict[str, float] = {}

    def layer_of(data: SiteData) -> nn.Module:
        layer, spent[data.site.path] = build(data)
        return layer

    moved = divergences(model, sites, batches, layer_of, progress)
    return floored({path: kl / max(1 - spent[path], 1e-3) ** POWER for path, kl in moved.items()})


def floored(sensitivity: dict[str, float]) -> dict[str, float]:
    """The same, each at least FLOOR of the mean."""
    least = FLOOR * sum(sensitivity.values()) / len(sensitivity)
    return {path: max(value, least) for path, value in sensitivity.items()}


def divergences(
    model: nn.Module,
    sites: list[Site],
    batches: list[Batch],
    build: Callable[[SiteData], nn.Module],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """How far the model's predictions move with one layer replaced: mean KL divergence, nats per position, by path.

    Models without logits: relative squared error of their first output instead of the divergence.

    Args:
        batches: inputs; TOKENS tokens of them are used, or two samples where these are longer.
        build: makes a layer of what a site sees.
    """
    fitted, held_out = samples(batches)
    cache, wanted = BlockCache(model, sites), []
    for batch in held_out:
        with torch.no_grad(), cache.recording():
            wanted.append(_output(model, batch))
    with torch.no_grad():
        cache.check(lambda: _distance(model, held_out[0], wanted[0]), sites[-1])
    found: dict[str, float] = {}
    for data in walk(model, sites, fitted):
        if progress:
            progress("Measuring sensitivities", len(found), len(sites))
        layer = build(data)
        data.converted_td = data.y_td  # the next layer, too, is measured in the dense model
        parameter = next(model.get_submodule(data.site.path).parameters())
        with torch.no_grad(), replaced(model, data.site, layer.to(parameter.device, parameter.dtype)):
            moved = 0.0
            for i, batch in enumerate(held_out):
                with cache.answering(i, data.site):
                    moved += _distance(model, batch, wanted[i])
        found[data.site.path] = max(moved / len(held_out), 1e-12)
    if progress:
        progress("Measuring sensitivities", len(sites), len(sites))
    return found


def allocate(
    sensitivity: dict[str, float], cost: dict[str, float], total: float, *, least: float = LEAST, most: float = MOST
) -> dict[str, float]:
    """The active share a of each layer that makes the predicted loss least at `total` of all layers' multiply-adds.

    Args:
        sensitivity: the k_l of each layer.
        cost: multiply-adds of each dense layer.
        total: mean active share, weighted by cost.
        least: of a layer's share, where `total` allows it.
        most: of a layer's share.
    """
    budget = total * sum(cost[path] for path in sensitivity)

    def too_much(shares: dict[str, float]) -> bool:
        return sum(share * cost[path] for path, share in shares.items()) > budget

    return _by_price(sensitivity, cost, too_much, min(least, total), most)[1]


def predicted_loss(sensitivity: dict[str, float], shares: dict[str, float]) -> float:
    """Sum of k_l (1 - a_l)^POWER: the increase of the loss (nats per token) to first order."""
    return sum(sensitivity[path] * (1 - share) ** POWER for path, share in shares.items())


def allocate_for_loss(
    sensitivity: dict[str, float], cost: dict[str, float], loss: float, *, least: float = LEAST, most: float = MOST
) -> dict[str, float]:
    """The least total of multiply-adds whose predicted loss is at most `loss` (nats per token)."""
    cheap_enough = _by_price(sensitivity, cost, lambda shares: predicted_loss(sensitivity, shares) <= loss, least, most)
    return cheap_enough[0]


def _by_price(
    sensitivity: dict[str, float],
    cost: dict[str, float],
    may_rise: Callable[[dict[str, float]], bool],
    least: float,
    most: float,
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares just below and just above the price of a multiply-add up to which `may_rise` holds, by bisection.

    All shares fall, and the loss rises, as the price does: from `most` for nothing to `least` at the highest.
    """

    def shares(price: float) -> dict[str, float]:
        return {
            path: min(most, max(least, 1 - price * (cost[path] / sensitivity[path]) ** (1 / (POWER - 1))))
            for path in sensitivity
        }

    low, high = 0.0, max((sensitivity[path] / cost[path]) ** (1 / (POWER - 1)) for path in sensitivity)
    if may_rise(shares(high)):
        return shares(high), shares(high)
    for _ in range(60):
        price = (low + high) / 2
        low, high = (price, high) if may_rise(shares(price)) else (low, price)
    return shares(low), shares(high)


def plan_shares(
    sensitivity: dict[str, float],
    cost: dict[str, float],
    *,
    total: float | None,
    max_loss: float | None,
    keep_dense: bool = False,
    least: float = LEAST,
    most: float = MOST,
) -> dict[str, float]:
    """`allocate` at `total`, or for the ratio of perplexities `max_loss`, which of the two is given.

    Args:
        keep_dense: layers that would be more active than KEEP_DENSE stay dense, share 1; the others make up for it,
            so that the total, or the loss, is still the one asked for.
    """
    dense: dict[str, float] = {}
    while len(dense) < len(sensitivity):
        rest = {path: value for path, value in sensitivity.items() if path not in dense}
        if max_loss is not None:
            shares = allocate_for_loss(rest, cost, math.log(max_loss), least=least, most=most)
        else:
            assert total is not None
            left = total * sum(cost[path] for path in sensitivity) - sum(cost[path] for path in dense)
            share = max(left / sum(cost[path] for path in rest), min(least, total))
            shares = allocate(rest, cost, share, least=least, most=most)
        largest = max(shares, key=shares.__getitem__)
        if not keep_dense or shares[largest] <= KEEP_DENSE:
            return {path: (dense | shares)[path] for path in sensitivity}
        dense[largest] = 1.0  # one at a time: what it takes more may bring the others below the limit
    return dense


def planned_fractions(options: Mapping[str, Any], active: float = 1.0) -> tuple[float, float]:
    """Bytes and multiply-adds per token of a layer that has these options in config.json, over the dense layer's.

    Args:
        active: the budget of layers that have several.
    """
    with torch.device("meta"):
        layer = make_layer(dict(options))
    if isinstance(layer, ElasticPEER):
        layer.set_active(active)
    return layer.bytes_fraction, layer.macs_fraction


def samples(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Samples from all over `batches`, each a batch by itself, to fit layers to and to judge them by; where there is
    only one, it does for both."""
    rows = [(batch, row) for batch in batches for row in range(len(_main(batch)))]
    count = min(len(rows), max(2, TOKENS // max(1, _main(batches[0])[0].numel())))
    chosen = [
        {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
        for batch, row in (rows[i * len(rows) // count] for i in range(count))
    ]
    step = min(HELD_OUT, count)
    return [sample for i, sample in enumerate(chosen) if count == 1 or i % step != step - 1], chosen[step - 1 :: step]


def _main(batch: Batch) -> Tensor:
    return next(value for value in batch.values() if isinstance(value, Tensor))


def _output(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Log-probabilities where the model predicts, else its first output; and which of the two."""
    device = next(model.parameters()).device
    output: Any = model(**on_device(batch, device))
    logits = getattr(output, "logits", None)
    return (output[0].float(), False) if logits is None else (logits.float().log_softmax(-1), True)


def _distance(model: nn.Module, batch: Batch, wanted: tuple[Tensor, bool]) -> float:
    """KL divergence from the wanted log-probabilities, or relative squared error of the wanted output."""
    (dense, predicts), (moved, _) = wanted, _output(model, batch)
    if predicts:
        return float((dense.exp() * (dense - moved)).sum(-1).mean())
    return float((moved - dense).square().sum() / dense.square().sum().clamp_min(1e-30))
