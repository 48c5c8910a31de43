"""Replay a recorded chain of operations on other inputs: which numbers feed its end, and by which function.

On index tensors the replay tells which output features of which linear layer each neuron reads; on numbers it tells
the function, act(up) or act(gate) * up. Neither needs the model's weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from transformers.activations import ACT2FN

from peerify.discovery.trace import Value

# Operations that only move or copy numbers. Casts count: every replay is in float64.
RESHAPING = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "slice", "select", "split", "split_with_sizes",
    "chunk", "unbind", "narrow", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "alias",
    "detach", "clone", "contiguous", "_to_copy", "lift_fresh",
}  # fmt: skip
FACTORIES = {"full", "scalar_tensor", "zeros", "ones"}
_UNTAGGED_POINTWISE = {"hardswish", "hardswish_", "prelu", "_prelu_kernel"}
_CLAMPING = {"clamp", "clamp_min", "clamp_max", "hardtanh", "add", "sub", "rsub", "minimum", "maximum"}
_SCALING = {"mul", "div"}
_FEWEST_POINTS = 256
_MOST_FEATURES = 2**20  # a config may ask for any width; no model is a tenth as wide

# In the order of preference among functions that are equal (gelu_new is gelu_pytorch_tanh, swish is silu).
_PREFERRED = ("linear", "relu", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "tanh", "sigmoid")
_LEARNED = {"prelu", "xielu"}

Clamp = dict[str, float]
"""What some gated layers do besides act(gate) * up: gate ≤ "gate", act(gate) ≤ "act", |up| ≤ "up", up + "shift"."""


@dataclass
class Chain:
    """What lies between linear layers and the input of another."""

    order: list[Value] = field(default_factory=list)
    """Every value between the leaves and z, each after the values it is made of."""
    leaves: list[Value] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    learned: list[Value] = field(default_factory=list)
    """Single numbers among the model's parameters and buffers: those of a learned activation."""
    numbers: dict[Value, Tensor] = field(default_factory=dict)
    """Stand-ins for them."""


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name` in transformers' ACT2FN."""
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def base_name(value: Value) -> str:
    """Name of the operation, whether in place or not."""
    return value.name.rstrip("_")


def pointwise(value: Value) -> bool:
    """Whether each number it returns depends on one number of each argument."""
    assert value.op is not None
    return torch.Tag.pointwise in value.op.tags or value.name in _UNTAGGED_POINTWISE


Part = tuple[int, int, int]  # number of the leaf, first feature, step
Found = tuple[Part, Part | None, str, str, Clamp | None, float]  # up, gate, activation, reason, clamp, scale


def classify(chain: Chain) -> Found | None:
    parts = _parts(chain)
    if parts is None:
        return None
    known = _activations()
    if chain.learned:
        known = _learned(chain)
        if not known:
            reason = "learned parameters enter between its activation and its down projection"
            return parts[-1], None if len(parts) == 1 else parts[0], "unknown", reason, None, 1.0
    generator = torch.Generator().manual_seed(0)
    shape = chain.order[-1].shape if chain.order else chain.leaves[0].shape
    limits = _constants(chain, _CLAMPING)
    # Both tails lie beyond the corners of clipped functions such as relu6 and gelu_10, and of clamps.
    far = max([12.0, *(1.5 * limit for limit in limits if limit < 1000)])
    # Several replays where one has too few numbers to tell functions apart.
    rounds = -(-_FEWEST_POINTS // int(shape.numel()))
    count = rounds * int(shape.numel())
    a = torch.linspace(-far, far, count, dtype=torch.float64)[torch.randperm(count, generator=generator)]
    b = a[torch.randperm(count, generator=generator)]
    one = torch.ones_like(a)

    def replay(*inputs: Tensor) -> Tensor:
        parted = zip(*(x.reshape(rounds, *shape) for x in inputs), strict=True)
        return torch.stack([_replay(chain, parts, list(given)) for given in parted]).flatten()

    scales = [1.0, *_constants(chain, _SCALING)]
    if len(parts) == 1:
        act_a = replay(a)
        for scale in scales:
            activation = _name_of(scale * a, act_a, known)
            if activation == "linear":
                return None  # a low-rank linear map, not a feed-forward
            if activation is not None:
                return parts[0], None, activation, "", None, scale
        return parts[0], None, "unknown", "its activation is none of those that transformers knows", None, 1.0
    reason = "its gate and up projections are not combined as act(gate) * up"
    for up in (1, 0):

        def z(gate_value: Tensor, up_value: Tensor, up: int = up) -> Tensor:
            return replay(up_value, gate_value) if up == 0 else replay(gate_value, up_value)

        for clamp, up_b, up_one in _ups(b, one, limits):
            act_a = z(a, one) / up_one
            if not _equal(z(a, b), act_a * up_b):
                continue
            for scale in scales:
                activation, more = _gate_of(scale * a, act_a, known, limits)
                if activation is not None:
                    return parts[up], parts[1 - up], activation, "", {**clamp, **more} or None, scale
            reason = "the activation of its gate is none of those that transformers knows"
    return parts[1], parts[0], "unknown", reason, None, 1.0


def _ups(b: Tensor, one: Tensor, limits: list[float]) -> Iterator[tuple[Clamp, Tensor, Tensor]]:
    """What may stand for up in act(gate) * up, for the values b and 1: up, clamped, shifted, or both."""
    for shift in (0.0, *limits):
        shifted = {"shift": shift} if shift else {}
        yield shifted, b + shift, one + shift
        for limit in limits:
            clamp = {"up": limit, **shifted}
            yield clamp, b.clamp(-limit, limit) + shift, one.clamp(-limit, limit) + shift


def _gate_of(
    a: Tensor, act_a: Tensor, known: Sequence[tuple[str, Callable[[Tensor], Tensor]]], limits: list[float]
) -> tuple[str | None, Clamp]:
    """Which activation of the gate a gives act_a, perhaps clamped before or after."""
    activation = _name_of(a, act_a, known)
    if activation is not None:
        return activation, {}
    for limit in limits:
        activation = _name_of(a.clamp(max=limit), act_a, known)
        if activation is not None:
            return activation, {"gate": limit}
        for name, function in known:
            if _equal(function(a).clamp(max=limit), act_a):
                return name, {"act": limit}
    return None, {}


def _constants(chain: Chain, names: set[str]) -> list[float]:
    """Numbers above 0 that operations of these names take: where they may clamp, what they may add or multiply."""
    found: set[float] = set()
    for value in chain.order:
        if value.op is not None and base_name(value) in names:
            for thing in tree_flatten((value.args, value.kwargs))[0]:
                number = thing.constant if isinstance(thing, Value) else thing
                if isinstance(number, int | float) and number and number < 1e6:
                    found.add(abs(1 / number if base_name(value) == "div" else float(number)))
    return sorted(found)[:4]


def _learned(chain: Chain) -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
    """The learned activation that owns the single parameters of the chain, with the numbers put in their place."""
    owners = {value.path.rpartition(".")[0] for value in chain.learned}
    names = {value.path.rpartition(".")[2]: value for value in chain.learned}
    if len(owners) > 1:
        return ()
    for activation in sorted(_LEARNED):
        module: Any = ACT2FN[activation].double().requires_grad_(False)
        own = dict(module.named_parameters()) | dict(module.named_buffers())
        if own.keys() >= names.keys():
            for i, (name, value) in enumerate(names.items()):
                own[name].add_(0.1 * i * own[name].abs())
                chain.numbers[value] = own[name].reshape(value.shape)
            return ((activation, module),)
    return ()


def _parts(chain: Chain) -> list[Part] | None:
    """Which features of which leaf feed z, one entry per independent input of the element-wise function.

    Every value is replayed as index tensors: per leaf that it depends on, which of its numbers it came from.
    """
    if any(leaf.shape[-1] > _MOST_FEATURES for leaf in chain.leaves):
        return None
    streams: dict[Value, list[tuple[int, Tensor]]] = {}
    for number, leaf in enumerate(chain.leaves):
        streams[leaf] = [(number, torch.arange(leaf.shape.numel()).reshape(leaf.shape))]
    z = (chain.order or chain.leaves)[-1]
    for value in chain.order:
        if value.name in RESHAPING and isinstance(value.args[0], Value):
            streams[value] = [
                (number, _apply(value, {value.args[0]: index})) for number, index in streams[value.args[0]]
            ]
            continue
        merged: list[tuple[int, Tensor]] = []
        for number, index in (stream for parent in value.parents() for stream in streams[parent]):
            index = index.expand(value.shape)
            if not any(number == n and torch.equal(index, i) for n, i in merged):
                merged.append((number, index))
        streams[value] = merged
    if not 1 <= len(streams[z]) <= 2:
        return None
    parts = []
    for number, index in streams[z]:
        width = chain.leaves[number].shape[-1]
        if not index.numel():
            return None
        index = index.reshape(-1, z.shape[-1])
        features = index[0]
        step = int(features[1] - features[0]) if len(features) > 1 else 1
        straight = features[0] + step * torch.arange(len(features))
        rows = width * torch.arange(len(index))[:, None]
        if step < 1 or not torch.equal(index, rows + straight):
            return None  # tokens or neurons are mixed, reversed or repeated
        parts.append((number, int(features[0]), step))
    return parts


def _replay(chain: Chain, parts: list[Part], inputs: list[Tensor]) -> Tensor:
    """z for these numbers in place of the projections' outputs, by the recorded operations, in float64."""
    values = {leaf: torch.zeros(leaf.shape, dtype=torch.float64) for leaf in chain.leaves} | chain.numbers
    for (number, start, step), given in zip(parts, inputs, strict=True):
        leaf = values[chain.leaves[number]]
        features = slice(start, start + step * (given.shape[-1] - 1) + 1, step)
        leaf.reshape(-1, leaf.shape[-1])[:, features] = given.reshape(-1, given.shape[-1])
    for value in chain.order:
        if value not in chain.numbers:
            values[value] = _apply(value, values)
    return values[(chain.order or chain.leaves)[-1]]


def _apply(value: Value, values: dict[Value, Tensor]) -> Tensor:
    """Run one recorded operation on other inputs, without its casts, devices and in-place writes."""
    if value.constant is not None:
        return torch.full(value.shape, value.constant, dtype=torch.float64)
    assert value.op is not None
    if value.name in ("_to_copy", "lift_fresh", "clone", "contiguous"):
        return values[value.args[0]].contiguous()
    if value.name in ("view", "_unsafe_view", "_reshape_alias"):
        return values[value.args[0]].reshape(value.shape)  # strides may differ in the replay
    args = list(tree_map(lambda a: values[a] if isinstance(a, Value) else a, value.args))
    if value.op._schema.is_mutable:
        args[0] = args[0].clone()
    kwargs = {k: v for k, v in value.kwargs.items() if k not in ("device", "dtype", "layout", "pin_memory")}
    kwargs = tree_map(lambda a: values[a] if isinstance(a, Value) else a, kwargs)
    if value.name in FACTORIES:
        kwargs["dtype"] = torch.float64
    result: Tensor = tree_flatten(value.op(*args, **kwargs))[0][value.output]
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def _name_of(a: Tensor, act_a: Tensor, known: Sequence[tuple[str, Callable[[Tensor], Tensor]]]) -> str | None:
    for name, function in known:
        if _equal(function(a), act_a):
            return name
    return None


@cache
def _activations() -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
    names: Iterator[str] = (n for n in ACT2FN if n not in _PREFERRED and n not in _LEARNED)
    return tuple((name, activation_function(name)) for name in (*_PREFERRED, *names))
