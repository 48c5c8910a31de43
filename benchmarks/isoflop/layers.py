"""Feed-forward layers of about as many multiply-adds for a token, and what these are.

Shape suffixes: t tokens, d d_model, n experts or values, h heads, k of them that a head adds up, f neurons.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from peerify.modeling.peer_keys import ProductKeys
from peerify.modeling.peer_layer import PEER

KINDS = ("dense", "moe", "pkm", "peer")
BALANCE = 0.01  # weight of the mixture's loss for even use (2101.03961, section 2.2)


class Dense(nn.Module):
    """y = gelu(x U) V."""

    def __init__(self, d_model: int, neurons: int) -> None:
        super().__init__()
        self.u, self.v = nn.Linear(d_model, neurons, bias=False), nn.Linear(neurons, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out: (..., d)."""
        return self.v(F.gelu(self.u(x)))  # type: ignore[no-any-return]

    def macs(self) -> int:
        """Multiply-adds of a token."""
        return self.u.weight.numel() + self.v.weight.numel()


class Mixture(nn.Module):
    """A coarse mixture: each token goes to the one expert its router likes best (Switch Transformer, 2101.03961)."""

    def __init__(self, d_model: int, num_experts: int, neurons: int) -> None:
        super().__init__()
        self.router = nn.Linear(d_model, num_experts, bias=False)
        self.experts = nn.ModuleList(Dense(d_model, neurons) for _ in range(num_experts))
        self.loss = torch.zeros(())
        self.found: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out: (..., d). Leaves the loss for even use in `loss`."""
        x_td = x.flatten(0, -2)
        gate_tn = self.router(x_td).softmax(-1)
        gate_t, index_t = gate_tn.max(-1)
        count_n = torch.bincount(index_t, minlength=len(self.experts))
        self.loss = BALANCE * len(self.experts) * (count_n / len(x_td) * gate_tn.mean(0)).sum()
        order_t = index_t.argsort()
        parts = x_td[order_t].split(count_n.tolist())
        y_td = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True) if len(part)])
        self.found = index_t[:, None]
        return (torch.empty_like(y_td).index_copy(0, order_t, y_td) * gate_t[:, None]).view_as(x)

    def macs(self) -> int:
        """Multiply-adds of a token."""
        expert: Any = self.experts[0]
        return self.router.weight.numel() + expert.macs()


class ProductKeyMemory(nn.Module):
    """Values that product keys find, added up under softmax gates: experts without input vectors (1907.05242)."""

    def __init__(self, d_model: int, num_values: int, heads: int, topk: int, query_dim: int, norm: bool) -> None:
        super().__init__()
        self.topk, side = topk, math.isqrt(num_values)
        self.keys = ProductKeys(
            d_model, num_values, (side, side), heads,
            share_pool=True, share_keys=False, query_dim=query_dim, query_norm=norm, key_bias=False,
        )  # fmt: skip
        self.values = nn.EmbeddingBag(num_values, d_model, mode="sum")
        nn.init.normal_(self.values.weight, std=d_model**-0.5)
        self.found: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Same shape in and out: (..., d)."""
        index_thk, score_thk = self.keys(x.flatten(0, -2), self.topk)
        self.found = index_thk.flatten(1)
        weight_tk = score_thk.softmax(-1).flatten(1)
        return self.values(self.found, per_sample_weights=weight_tk).view_as(x)  # type: ignore[no-any-return]

    def macs(self) -> int:
        """Multiply-adds of a token."""
        return key_macs(self.keys) + self.keys.num_heads * self.topk * self.values.embedding_dim


class Peer(PEER):
    """The paper's layer, which remembers what it retrieved."""

    found: Tensor | None = None

    def retrieve(self, x_td: Tensor) -> Any:
        """As `PEER` does it."""
        retrieved = super().retrieve(x_td)
        self.found = retrieved.index_tk
        return retrieved

    def _gathers(self, x_td: Tensor) -> bool:
        return True

    def macs(self) -> int:
        """Multiply-adds of a token."""
        return key_macs(self.keys) + self.topk * 2 * self.d_model


def key_macs(keys: ProductKeys) -> int:
    """Multiply-adds of queries and sub-keys: every head meets one set of them."""
    assert keys.query_proj is not None
    return keys.query_proj.weight.numel() + keys.num_heads * sum(keys.grid) * keys.sub_keys.shape[-1]


def make(kind: str, d_model: int, *, experts: int, heads: int, topk: int, query_dim: int, norm: bool) -> Any:
    """A layer of about the multiply-adds that a PEER layer of these numbers takes.

    What is left for them after routing sets the width of the others: neurons of the dense layer and of the mixture's
    experts, and how many values each head adds up. The mixture has about as many parameters as the PEER layer.
    """
    side = math.isqrt(experts)
    peer = Peer(d_model, experts, (side, side), heads, topk, query_dim=query_dim, query_norm=norm)
    if kind == "peer":
        return peer
    macs, routing, neuron = peer.macs(), key_macs(peer.keys), 2 * d_model
    if kind == "dense":
        return Dense(d_model, round(macs / neuron))
    if kind == "pkm":
        return ProductKeyMemory(d_model, experts, heads, round((macs - routing) / d_model / heads), query_dim, norm)
    # Its router takes mixture_of * d_model, its experts have the rest each: about mixture_of * rest parameters.
    root = math.sqrt(max(0, macs**2 - 4 * d_model * experts * neuron))
    mixture_of = max(2, round((macs - root) / neuron))
    return Mixture(d_model, mixture_of, max(1, round((macs - mixture_of * d_model) / neuron)))
