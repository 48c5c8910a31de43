"""The PEER layer as a loop written from its docstring's formula, and layers with random parameters."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peerify.modeling.peer_keys import ProductKeys
from peerify.modeling.peer_layer import PEER

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "linear": lambda x: x}


def randomise(module: torch.nn.Module, seed: int) -> None:
    """Every parameter and buffer, those that start as constants too."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point():
            value = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            # variances are positive; norm weights may be anything
            tensor.data.copy_(value.abs() + 0.1 if name.endswith("running_var") else value)


def make(seed: int = 0, **options: Any) -> PEER:
    layer = PEER(**options).double().eval()
    randomise(layer, seed)
    return layer


def normals(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- The reference ------------------------------------------------------------------------------------------------


@torch.no_grad()
def score_of_every_cell(keys: ProductKeys, x_d: Tensor) -> Tensor:
    """(h, n): the score of each expert in each head's grid, -inf where a head does not own it; one cell at a time."""
    rows, columns = keys.grid
    score_hn = torch.full((keys.num_heads, keys.num_keys), -math.inf, dtype=x_d.dtype)
    for h in range(keys.num_heads):
        key_md = keys.sub_keys[h if len(keys.sub_keys) > 1 else 0]
        row_query = column_query = x_d
        if keys.query_proj is not None:
            query = keys.query_proj.weight @ x_d
            if (norm := keys.query_norm) is not None:
                query = (query - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            width = len(query) // keys.num_heads
            query = query[h * width : (h + 1) * width]
            row_query, column_query = query[: width // 2], query[width // 2 :]
        row = [float(key_md[a] @ row_query) for a in range(rows)]
        column = [float(key_md[rows + b] @ column_query) for b in range(columns)]
        if keys.sub_key_bias is not None:
            bias = keys.sub_key_bias[h if len(keys.sub_key_bias) > 1 else 0].tolist()
            row = [score + bias[a] for a, score in enumerate(row)]
            column = [score + bias[rows + b] for b, score in enumerate(column)]
        for a, b in itertools.product(range(rows), range(columns)):
            expert = a * columns + b + (0 if keys.share_pool else h * rows * columns)
            if expert < keys.num_keys:
                score_hn[h, expert] = row[a] + column[b]
    return score_hn


def best(score_n: Tensor, count: int) -> list[int]:
    order = score_n.argsort(descending=True).tolist()
    return [i for i in order[:count] if score_n[i] > -math.inf]


@torch.no_grad()
def reference(layer: PEER, options: dict[str, Any], x_d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(y_d, what multiplies each expert's output vector (n,), whether it takes part (n,)), as loops."""
    act = ACTIVATIONS[options["activation"]]
    pool, shared, gates = layer.pool, options["num_shared"], options["gates"]
    routed = options["num_experts"] - shared
    heads, topk = options["num_heads"], options["topk"]
    score_hn = score_of_every_cell(layer.keys, x_d)

    weight: dict[int, float] = {}
    if gates == "unit" and heads * topk >= routed:  # the budget covers all experts
        weight = dict.fromkeys(range(routed), 1.0)
    else:
        if options["joint_topk"]:
            retrieved = [best(score_hn.amax(0), heads * topk)]
            score_hn = score_hn.amax(0, keepdim=True)
        else:
            retrieved = [best(score_n, topk) for score_n in score_hn]
        for score_n, found in zip(score_hn, retrieved, strict=True):
            total = sum(math.exp(score_n[i]) for i in found)
            for i in found:
                if gates == "unit":
                    weight[i] = 1.0
                elif gates == "softmax":
                    weight[i] = weight.get(i, 0.0) + math.exp(score_n[i]) / total
                else:
                    weight[i] = weight.get(i, 0.0) + 1 / (1 + math.exp(-score_n[i]))

    def u(i: int) -> Tensor:
        return pool.u[i] @ x_d + (0 if pool.u_bias is None else pool.u_bias[i])

    def gate(i: int) -> Tensor:
        return pool.gate[i] @ x_d + (0 if pool.gate_bias is None else pool.gate_bias[i])

    a_n = torch.zeros(options["num_experts"], dtype=x_d.dtype)
    active_n = torch.zeros(options["num_experts"], dtype=torch.bool)
    y_d = torch.zeros_like(x_d) if layer.bias is None else layer.bias.clone()
    for expert, w in [(i, 1.0) for i in range(shared)] + [(i + shared, w) for i, w in weight.items()]:
        active_n[expert] = True
        a_n[expert] = w * (act(gate(expert)) * u(expert) if options["gated"] else act(u(expert)))
        y_d = y_d + a_n[expert] * pool.v[expert]
    return y_d, a_n, active_n
