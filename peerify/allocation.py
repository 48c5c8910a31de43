"""How much to retrieve in each layer: more where errors cost more.

Converting layer l at active share a costs the model about k_l (1 - a)^POWER of its loss, and losses of layers add up,
to first order. Then, at a given total of multiply-adds, the loss is least where (1 - a_l)^(POWER - 1) is proportional
cost_l over k_l, cost_l being the size of the layer (Lagrange), within limits; to a given loss belongs one such total.

k_l is measured: with only layer l converted, in closed form, how far do the model's predictions move?
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from peerify.calibration import Batch, SiteData, walk
from peerify.dense import replaced
from peerify.feedforward import Site
from peerify.modeling_peer import PEER

# The output error of a single layer falls about as (1 - a)^2. Later layers make up for part of what earlier ones do
# wrong, which a layer measured alone does not show: 3 moves less compute, and comes out better (1.40 against 1.47 times
# the dense perplexity for SmolLM2-135M at half of the compute).
POWER = 3
LEAST, MOST = 0.1, 1.0  # active share of a layer
TOKENS = 2048  # that sensitivities are measured on: 30 layers differ by much more than what the sample leaves open
KEEP_DENSE = 0.95  # `layers: auto` leaves a layer alone that would be more active than this: retrieval gains nothing


def sensitivities(
    model: nn.Module,
    sites: list[Site],
    batches: list[Batch],
    build: Callable[[SiteData], tuple[PEER, float]],
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, float]:
    """k_l of each site by its path: mean KL divergence (nats per position) over (1 - active)^POWER.

    Models without logits: relative squared error of their first output instead of the divergence.

    Args:
        batches: inputs; the first TOKENS tokens of them are used.
        build: makes a converted layer of what a site sees, and says how active it is.
    """
    batches = _first(batches)
    with torch.no_grad():
        wanted = [_output(model, batch) for batch in batches]
    found: dict[str, float] = {}
    for data in walk(model, sites, batches):
        if progress:
            progress("Measuring sensitivities", len(found), len(sites))
        layer, active = build(data)
        data.converted_td = data.y_td  # the next layer, too, is measured in the dense model
        parameter = next(model.get_submodule(data.site.path).parameters())
        with torch.no_grad(), replaced(model, data.site, layer.to(parameter.device, parameter.dtype)):
            moved = sum(_distance(model, batch, out) for batch, out in zip(batches, wanted, strict=True))
        found[data.site.path] = max(moved / len(batches), 1e-12) / max(1 - active, 1e-3) ** POWER
    if progress:
        progress("Measuring sensitivities", len(sites), len(sites))
    return found


def allocate(k: dict[str, float], cost: dict[str, float], total: float) -> dict[str, float]:
    """The active share of each layer, at `total` of all layers' multiply-adds, that makes sum k (1 - a)^POWER least.

    Args:
        k: sensitivities.
        cost: multiply-adds of each dense layer.
        total: mean active share, weighted by cost.
    """
    budget = total * sum(cost.values())

    def shares(price: float) -> dict[str, float]:
        return {path: min(MOST, max(LEAST, 1 - price * (cost[path] / k[path]) ** (1 / (POWER - 1)))) for path in k}

    low, high = 0.0, max((k[path] / cost[path]) ** (1 / (POWER - 1)) for path in k)
    for _ in range(100):  # by bisection: what is spent falls as the price rises
        price = (low + high) / 2
        spent = sum(share * cost[path] for path, share in shares(price).items())
        low, high = (price, high) if spent > budget else (low, price)
    return shares(high)


def predicted_loss(k: dict[str, float], shares: dict[str, float]) -> float:
    """Sum of k (1 - a)^POWER: the increase of the loss (nats per token) to first order."""
    return sum(k[path] * (1 - share) ** POWER for path, share in shares.items())


def allocate_for_loss(k: dict[str, float], cost: dict[str, float], loss: float) -> dict[str, float]:
    """The least total of multiply-adds whose predicted loss is at most `loss` (nats per token)."""
    low, high = LEAST, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        enough = predicted_loss(k, allocate(k, cost, middle)) <= loss
        low, high = (low, middle) if enough else (middle, high)
    return allocate(k, cost, high)


def plan_shares(
    k: dict[str, float], cost: dict[str, float], *, total: float, max_loss: float | None
) -> dict[str, float]:
    """`allocate` at `total`, or for the ratio of perplexities `max_loss` where that is given."""
    return allocate(k, cost, total) if max_loss is None else allocate_for_loss(k, cost, math.log(max_loss))


def _first(batches: list[Batch]) -> list[Batch]:
    chosen, tokens = [], 0
    for batch in batches:
        if tokens >= TOKENS:
            break
        main = next(value for value in batch.values() if isinstance(value, Tensor))
        rows = max(1, min(len(main), (TOKENS - tokens) // max(1, main[0].numel())))
        chosen.append({name: value[:rows] if isinstance(value, Tensor) else value for name, value in batch.items()})
        tokens += rows * main[0].numel()
    return chosen


def _output(model: nn.Module, batch: Batch) -> tuple[Tensor, bool]:
    """Log-probabilities where the model predicts, else its first output; and which of the two."""
    device = next(model.parameters()).device
    output: Any = model(
        **{name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    )
    logits = getattr(output, "logits", None)
    return (output[0].float(), False) if logits is None else (logits.float().log_softmax(-1), True)


def _distance(model: nn.Module, batch: Batch, wanted: tuple[Tensor, bool]) -> float:
    """KL divergence from the wanted log-probabilities, or relative squared error of the wanted output."""
    (dense, predicts), (moved, _) = wanted, _output(model, batch)
    if predicts:
        return float((dense.exp() * (dense - moved)).sum(-1).mean())
    return float((moved - dense).square().sum() / dense.square().sum().clamp_min(1e-30))
