"""Layers with budgets as a loop written from their docstrings, and such layers with random parameters."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import assume
from peer_reference import ACTIVATIONS, randomise
from torch import Tensor

from peerify.modeling.peer_elastic import Budget, ElasticPEER


def make(seed: int, d_model: int = 10, num_experts: int = 14, dtype: torch.dtype = torch.float64, **form: Any) -> Any:
    """A layer with random parameters, at the budget that `at` sets, for tokens of any number."""
    layer = ElasticPEER(d_model, num_experts, **{"gated": True, "activation": "silu"} | form).double().eval()
    randomise(layer, seed)
    layer.pool.input_rms.data.abs_().add_(0.2)
    layer.prefill_all = False
    return layer.to(dtype)


def at(layer: Any, price: float, inputs: float = 1.0) -> Any:
    layer.budget = Budget(0.5, inputs, price, 0.5, 0.5)
    return layer


@torch.no_grad()
def middling(layer: Any, x_td: Tensor) -> float:
    """A price at which experts of all three kinds are likely."""
    return float((layer.pool.products(x_td)[2].square() * layer.pool.v.square().sum(1)).quantile(0.6)) + 1e-6


def fresh(layer: Any) -> Any:
    """The same layer, made anew from its weights: nothing that was kept can be stale in it."""
    again = ElasticPEER(layer.d_model, layer.num_experts, gated=layer.pool.gate is not None, activation="silu")
    again = again.to(layer.pool.u.dtype).eval()
    again.load_state_dict(layer.state_dict())
    again.budget, again.prefill_all = layer.budget, False
    return again


# --- The reference ------------------------------------------------------------------------------------------------


def vectors_of(pool: Any) -> list[Tensor]:
    return [pool.u, pool.v] if pool.gate is None else [pool.u, pool.gate, pool.v]


def reference(layer: Any, x_d: Tensor, price: float, inputs: float) -> tuple[Tensor, list[str]]:
    """(y_d, what becomes of each expert): of the four, the one with the least error plus price times cost."""
    pool, kept = layer.pool, layer.pool.copies()
    act, clamp = ACTIVATIONS[pool_activation(layer)], pool.clamp
    d, n = len(x_d), len(pool.u)
    reach_d = sum(table.square().sum(0) for table in vectors_of(pool)[:-1]).sqrt()
    order = (x_d.abs() * reach_d).argsort(descending=True).tolist()
    read = order[: max(1, round(inputs * d))]
    omitted = sum(float(x_d[j]) ** 2 for j in range(d) if j not in read)

    def product(table: Tensor, copied: Tensor, bias: Tensor | None, i: int, inputs: Any = read) -> Tensor:
        return sum(copied[i, j] * x_d[j] for j in inputs) + (0 if bias is None else bias[i])

    def deviation(table: Tensor, copied: Tensor, i: int) -> float:
        """Of the error of a product with all inputs."""
        return math.sqrt(sum(float((copied[i, j] - table[i, j]) * pool.input_rms[j]) ** 2 for j in range(d)))

    def limited(z: Tensor) -> Tensor:
        """The activation function, within the limits of gated experts."""
        if pool.gate is None:
            return act(z)
        a = act(z.clamp(max=clamp.get("gate", math.inf)))
        return a.clamp(max=clamp.get("act", math.inf))

    def up(z: Tensor) -> Tensor:
        return z.clamp(-clamp.get("up", math.inf), clamp.get("up", math.inf)) + clamp.get("shift", 0.0)

    def expected(z: Tensor, deviation: float) -> tuple[float, float]:
        """E a and E a^2 of a = limited(z + e), by three points."""
        points = [(4 / 6, z), (1 / 6, z - math.sqrt(3) * deviation), (1 / 6, z + math.sqrt(3) * deviation)]
        return sum(w * float(limited(p)) for w, p in points), sum(w * float(limited(p)) ** 2 for w, p in points)

    def activation(tables: Any, i: int) -> Tensor:
        """Of an expert whose vectors are all of `tables`."""
        u = product(pool.u, tables.u_nd, pool.u_bias, i, range(d))
        if pool.gate is None:
            return limited(u)
        return limited(product(pool.gate, tables.gate_nd, pool.gate_bias, i, range(d))) * up(u)

    _, coarse_cost, fine_cost = costs(layer, inputs)
    experts = SimpleNamespace(u_nd=pool.u, gate_nd=pool.gate, v_nd=pool.v)
    y_d = torch.zeros_like(x_d) if layer.bias is None else layer.bias.clone()
    tiers = []
    for i in range(n):
        steps = []
        for copy in (kept.coarse, kept.fine):
            v_error = float((pool.v[i] - copy.v_nd[i]).square().sum())
            leading = (pool.u, copy.u_nd) if pool.gate is None else (pool.gate, copy.gate_nd)
            steps.append((deviation(pool.u, copy.u_nd, i), deviation(*leading, i), v_error))
        (u_deviation, lead_deviation, v_error), (_, fine_deviation, fine_v_error) = steps

        def with_omitted(deviation: float, table: Tensor, i: int = i) -> float:
            return math.sqrt(deviation**2 + omitted * float(table[i].square().mean()))

        u, u_deviation = product(pool.u, kept.coarse.u_nd, pool.u_bias, i), with_omitted(u_deviation, pool.u)
        if pool.gate is None:
            a, square = expected(u, u_deviation)
            variance = square - a**2
            lead_deviation = u_deviation
        else:
            gate, lead_deviation = (
                product(pool.gate, kept.coarse.gate_nd, pool.gate_bias, i),
                with_omitted(lead_deviation, pool.gate),
            )
            mean, mean_square = expected(gate, lead_deviation)
            a, middle = mean * float(up(u)), float(up(u)) ** 2
            square = mean_square * (middle + u_deviation**2)
            variance = square - mean**2 * middle
        energy = float(pool.v[i].square().sum())
        finer = (fine_deviation / max(lead_deviation, 1e-30)) ** 2
        losses = {
            "none": square * energy,
            "coarse": variance * energy + square * v_error + price * coarse_cost,
            "fine": variance * energy * finer + square * fine_v_error + price * fine_cost,
            "full": price,
        }
        first, second, *_ = sorted(losses.values())
        assume(second - first > 1e-5 * price)  # statistics of copies are in float32
        tiers.append(min(losses, key=losses.__getitem__))
        if tiers[-1] == "full":
            y_d = y_d + activation(experts, i) * pool.v[i]
        elif tiers[-1] == "fine":
            y_d = y_d + activation(kept.fine, i) * kept.fine.v_nd[i]
        elif tiers[-1] == "coarse":
            y_d = y_d + a * kept.coarse.v_nd[i]
    return y_d, tiers


def pool_activation(layer: Any) -> str:
    return {"SiLUActivation": "silu", "GELUActivation": "gelu", "ReLU": "relu", "SiLU": "silu"}[
        type(layer.pool.act).__name__
    ]


def expert_bytes(layer: Any) -> int:
    return 2 * layer.d_model * len(vectors_of(layer.pool))


def costs(layer: Any, inputs: float) -> tuple[float, float, float]:
    """Bytes over an expert's, each number and each step of two bytes for a group counted: the key, and what either copy
    takes besides."""
    parts, d, steps = len(vectors_of(layer.pool)), layer.d_model, 2 * math.ceil(layer.d_model / layer.pool.group)
    of_a_number = layer.pool.bits / 8
    key = (parts - 1) * (inputs * d * of_a_number + steps) + 2 * (2 * parts + 2)
    coarse = d * of_a_number + steps
    key_again = 0 if inputs == 1 else (parts - 1) * (d * of_a_number + steps)
    fine = key_again + coarse + parts * (d * of_a_number + steps)
    return key / expert_bytes(layer), coarse / expert_bytes(layer), fine / expert_bytes(layer)


def spent(layer: Any, tiers: list[list[str]], inputs: float) -> tuple[float, float]:
    """Bytes and multiply-adds of a token, over the dense layer's."""
    parts, n, d = len(vectors_of(layer.pool)), layer.num_experts, layer.d_model
    coarse, fine, full = (sum(row.count(tier) for row in tiers) / len(tiers) for tier in ("coarse", "fine", "full"))
    of_key, of_coarse, of_fine = costs(layer, inputs)
    read = n * of_key + coarse * of_coarse + fine * of_fine + full + 2 * d / expert_bytes(layer)
    # A fine copy multiplies the numbers that it adds to the key's, the key's own if not all were, and its v.
    again = d * (parts if inputs == 1 else 2 * parts - 1)
    done = d * n * inputs * (parts - 1) + d * coarse + again * fine + d * parts * full
    return read / layer.d_ff, done / (d * parts * layer.d_ff)
