"""Layers with budgets as a loop written from their docstrings, and such layers with random parameters."""

from __future__ import annotations

import math
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
    """(y_d, what becomes of each expert): of the three, the one with the least error plus price times cost."""
    pool, kept = layer.pool, layer.pool.copies()
    act, clamp = ACTIVATIONS[pool_activation(layer)], pool.clamp
    d, n = len(x_d), len(pool.u)
    reach_d = sum(table.square().sum(0) for table in vectors_of(pool)[:-1]).sqrt()
    order = (x_d.abs() * reach_d).argsort(descending=True).tolist()
    read = order[: max(1, round(inputs * d))]
    omitted = sum(float(x_d[j]) ** 2 for j in range(d) if j not in read)

    def product(table: Tensor, copied: Tensor, bias: Tensor | None, i: int) -> tuple[Tensor, float]:
        """With the copy, and the standard deviation of the error."""
        z = sum(copied[i, j] * x_d[j] for j in read) + (0 if bias is None else bias[i])
        variance = sum(float((copied[i, j] - table[i, j]) * pool.input_rms[j]) ** 2 for j in range(d))
        return z, math.sqrt(variance + omitted * float(table[i].square().mean()))

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

    share = copy_bytes(layer) / expert_bytes(layer)
    y_d = torch.zeros_like(x_d) if layer.bias is None else layer.bias.clone()
    tiers = []
    for i in range(n):
        u, u_deviation = product(pool.u, kept.u_nd, pool.u_bias, i)
        exact_u = pool.u[i] @ x_d + (0 if pool.u_bias is None else pool.u_bias[i])
        if pool.gate is None:
            exact, (a, square) = limited(exact_u), expected(u, u_deviation)
            variance = square - a**2
        else:
            gate, deviation = product(pool.gate, kept.gate_nd, pool.gate_bias, i)
            exact_gate = pool.gate[i] @ x_d + (0 if pool.gate_bias is None else pool.gate_bias[i])
            exact = limited(exact_gate) * up(exact_u)
            mean, mean_square = expected(gate, deviation)
            a, middle = mean * float(up(u)), float(up(u)) ** 2
            square = mean_square * (middle + u_deviation**2)
            variance = square - mean**2 * middle
        v_error = float((pool.v[i] - kept.v_nd[i]).square().sum())
        left_out, copied = square * float(pool.v[i].square().sum()), variance * float(pool.v[i].square().sum())
        losses = {"none": left_out, "copy": copied + square * v_error + price * share, "full": price}
        first, second, _ = sorted(losses.values())
        assume(second - first > 1e-5 * price)  # statistics of copies are in float32
        tiers.append(min(losses, key=losses.__getitem__))
        if tiers[-1] == "full":
            y_d = y_d + exact * pool.v[i]
        elif tiers[-1] == "copy":
            y_d = y_d + a * kept.v_nd[i]
    return y_d, tiers


def pool_activation(layer: Any) -> str:
    return {"SiLUActivation": "silu", "GELUActivation": "gelu", "ReLU": "relu", "SiLU": "silu"}[
        type(layer.pool.act).__name__
    ]


def copy_bytes(layer: Any, inputs: float = 1.0) -> float:
    """Of one vector: its numbers, and a step of two bytes for each group."""
    return inputs * layer.d_model * layer.pool.bits / 8 + 2 * math.ceil(layer.d_model / layer.pool.group)


def expert_bytes(layer: Any) -> int:
    return 2 * layer.d_model * len(vectors_of(layer.pool))


def spent(layer: Any, tiers: list[list[str]], inputs: float) -> tuple[float, float]:
    """Bytes and multiply-adds of a token, over the dense layer's."""
    parts, n = len(vectors_of(layer.pool)), layer.num_experts
    copied = sum(row.count("copy") for row in tiers) / len(tiers)
    full = sum(row.count("full") for row in tiers) / len(tiers)
    keys = n * ((parts - 1) * copy_bytes(layer, inputs) + 2 * 2 * parts) + 2 * layer.d_model
    read = keys + copied * copy_bytes(layer) + full * expert_bytes(layer)
    done = layer.d_model * (n * inputs * (parts - 1) + copied + full * parts)
    return read / (expert_bytes(layer) * layer.d_ff), done / (layer.d_model * parts * layer.d_ff)
