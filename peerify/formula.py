"""Read the formula of a feed-forward layer off a recorded forward: what lies between its linear layers.

Walking back from the input z of a linear layer through element-wise and reshaping operations leads, in a
feed-forward layer, to the outputs of one or two linear layers that read the same x. Replaying the recorded
operations on index tensors then tells which output features feed z; replaying them on numbers tells
z = act(up) or z = act(gate) * up. Neither needs the model's weights, so both work on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from transformers.activations import ACT2FN

from peerify.dataflow import Value

# Operations that only move or copy numbers. Casts count: every replay is in float64.
_RESHAPING = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "slice", "select", "split", "split_with_sizes",
    "chunk", "unbind", "narrow", "unsqueeze", "squeeze", "expand", "permute", "transpose", "t", "alias",
    "detach", "clone", "contiguous", "_to_copy", "lift_fresh",
}  # fmt: skip
_KEEPS_ROWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "alias", "detach", "clone",
    "contiguous", "_to_copy",
}  # fmt: skip
_FACTORIES = {"full", "scalar_tensor", "zeros", "ones"}
_UNTAGGED_POINTWISE = {"hardswish", "hardswish_"}
# Between activation and down projection these make a layer *nearly* a feed-forward: named, never converted.
_STATISTICS = {
    "native_layer_norm", "_fused_rms_norm", "rms_norm", "mean", "var", "var_mean", "std", "std_mean",
    "linalg_vector_norm",
}  # fmt: skip
_ARITHMETIC = {"mul", "add", "sub", "rsub", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "square"}
_SELECTING = {"index", "index_select", "gather", "masked_select", "take_along_dim"}
_CHOOSING = {"topk", "nonzero", "nonzero_numpy", "sort", "argsort", "argmax"}
_LONGEST_CHAIN = 128

# In the order of preference among functions that are equal (gelu_new is gelu_pytorch_tanh, swish is silu).
_PREFERRED = ("linear", "relu", "silu", "gelu", "gelu_pytorch_tanh", "quick_gelu", "relu2", "tanh", "sigmoid")
_LEARNED = {"prelu", "xielu"}


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Some output features of the linear module at `path`: start, start + step, …, as many as d_ff."""

    path: str
    start: int = 0
    step: int = 1


@dataclass(frozen=True, kw_only=True)
class Formula:
    """z = act(up) if gate is None, else z = act(gate) * up; `reason` says what is in the way, if anything."""

    x: Value
    up: Projection
    gate: Projection | None
    activation: str
    """A key of transformers' ACT2FN; "unknown" where there is a reason."""
    reason: str
    inner: frozenset[Value]
    """Everything computed from x on the way to z, z and the projections' outputs included."""


@dataclass
class _Chain:
    order: list[Value] = field(default_factory=list)
    """Every value between the leaves and z, each after the values it is made of."""
    leaves: list[Value] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)


def read_formula(z: Value, known: dict[str, Any] | None = None) -> Formula | None:
    """The feed-forward whose hidden activation is `z`; None if z is not the inside of one.

    `known` keeps what was found for the same operations before: layers of one model mostly repeat.
    """
    chain = _walk(z)
    if chain is None or _routed(chain.leaves[0].args[0]):
        return None
    x = without_reshape(chain.leaves[0].args[0])
    inner = frozenset([*chain.order, *chain.leaves])
    whole = [Projection(path=leaf.path) for leaf in chain.leaves]
    if chain.obstacles:
        if not any(v.op is not None and _pointwise(v) and _base(v) not in _ARITHMETIC for v in chain.order):
            return None  # two linear layers with a norm between, as in low-rank attention
        gate = whole[1] if len(whole) > 1 else None
        reason = chain.obstacles[0]
        return Formula(x=x, up=whole[0], gate=gate, activation="unknown", reason=reason, inner=inner)
    known = {} if known is None else known
    signature = _signature(chain)
    if signature not in known:
        known[signature] = _classify(chain)
    if known[signature] is None:
        return None
    up, gate, activation, reason = known[signature]

    def located(part: tuple[int, int, int] | None) -> Any:
        return part and Projection(path=chain.leaves[part[0]].path, start=part[1], step=part[2])

    return Formula(x=x, up=located(up), gate=located(gate), activation=activation, reason=reason, inner=inner)


def without_reshape(value: Value) -> Value:
    """The value before casts, copies and views that keep its rows: the same vectors in the same order."""
    while value.name in _KEEPS_ROWS and value.args[0].shape[-1:] == value.shape[-1:]:
        value = value.args[0]
    return value


def activation_function(name: str) -> Callable[[Tensor], Tensor]:
    """The activation called `name` in transformers' ACT2FN."""
    function: Callable[[Tensor], Tensor] = ACT2FN[name]
    return function


def _base(value: Value) -> str:
    return value.name.rstrip("_")


def _pointwise(value: Value) -> bool:
    assert value.op is not None
    return torch.Tag.pointwise in value.op.tags or value.name in _UNTAGGED_POINTWISE


def _walk(z: Value) -> _Chain | None:
    """Everything between z and the projections it is made of; None if it is made of anything else."""
    chain = _Chain()
    seen: set[Value] = set()
    stack = [(z, False)]
    while stack:
        value, expanded = stack.pop()
        if expanded:
            chain.order.append(value)
            continue
        if value in seen:
            continue
        seen.add(value)
        if value.kind == "projection":
            x = without_reshape(value.args[0])
            if any(without_reshape(leaf.args[0]) is not x for leaf in chain.leaves):
                return None
            chain.leaves.append(value)
        elif value.kind == "parameter":
            chain.obstacles.append("learned parameters enter between its activation and its down projection")
        elif value.kind == "constant":
            chain.order.append(value)
        elif value.kind == "op":
            if _base(value) in _STATISTICS:
                chain.obstacles.insert(0, "a norm lies between its activation and its down projection")
            elif not (value.name in _RESHAPING | _FACTORIES or _pointwise(value)):
                return None
            stack.append((value, True))
            stack.extend((parent, False) for parent in value.parents())
        else:
            return None
        if len(seen) > _LONGEST_CHAIN or len(chain.leaves) > 2:
            return None
    return chain if chain.leaves else None


def _routed(x: Value) -> bool:
    """Whether x holds only the tokens that a router chose: then its layer is a routed expert, not dense."""
    while x.kind == "op" and (x.name in _RESHAPING or x.name == "mul") and isinstance(x.args[0], Value):
        x = x.args[0]
    if x.name not in _SELECTING:
        return False
    stack = [v for v in tree_flatten((x.args[1:], x.kwargs))[0] if isinstance(v, Value)]
    seen: set[Value] = set()
    while stack and len(seen) < 10 * _LONGEST_CHAIN:
        value = stack.pop()
        if value.name in _CHOOSING:
            return True
        if value not in seen:
            seen.add(value)
            stack.extend(value.parents())
    return False


def _signature(chain: _Chain) -> str:
    number = {value: i for i, value in enumerate([*chain.leaves, *chain.order])}
    lines = []
    for value in number:
        arguments = tree_map(lambda a: f"#{number[a]}" if a in number else a, (value.args, value.kwargs))
        if value.kind == "projection":
            arguments = ()
        lines.append(f"{value.op} {value.output} {value.constant} {tuple(value.shape)} {arguments}")
    return "\n".join(lines)


Part = tuple[int, int, int]  # number of the leaf, first feature, step


def _classify(chain: _Chain) -> tuple[Part, Part | None, str, str] | None:
    parts = _parts(chain)
    if parts is None:
        return None
    generator = torch.Generator().manual_seed(0)
    shape = chain.order[-1].shape if chain.order else chain.leaves[0].shape
    count = int(shape.numel())
    # Both tails lie beyond the corners of clipped functions such as relu6 and gelu_10.
    a = torch.linspace(-12, 12, count, dtype=torch.float64)
    a = a[torch.randperm(count, generator=generator)].reshape(shape)
    b = torch.randn(shape, dtype=torch.float64, generator=generator)
    one = torch.ones_like(a)
    if len(parts) == 1:
        activation = _name_of(a, _replay(chain, parts, [a]))
        if activation == "linear":
            return None  # a low-rank linear map, not a feed-forward
        if activation is None:
            return parts[0], None, "unknown", "its activation is none of those that transformers knows"
        return parts[0], None, activation, ""
    for up in (1, 0):

        def z(gate_value: Tensor, up_value: Tensor, up: int = up) -> Tensor:
            return _replay(chain, parts, [up_value, gate_value] if up == 0 else [gate_value, up_value])

        act_a = z(a, one)
        if _equal(z(a, 0 * one), 0 * one) and _equal(z(a, b), act_a * b):
            activation = _name_of(a, act_a)
            if activation is None:
                reason = "the activation of its gate is none of those that transformers knows"
                return parts[up], parts[1 - up], "unknown", reason
            return parts[up], parts[1 - up], activation, ""
    reason = "its gate and up projections are not combined as act(gate) * up"
    return parts[1], parts[0], "unknown", reason


def _parts(chain: _Chain) -> list[Part] | None:
    """Which features of which leaf feed z, one entry per independent input of the element-wise function.

    Every value is replayed as index tensors: per leaf that it depends on, which of its numbers it came from.
    """
    streams: dict[Value, list[tuple[int, Tensor]]] = {}
    for number, leaf in enumerate(chain.leaves):
        streams[leaf] = [(number, torch.arange(leaf.shape.numel()).reshape(leaf.shape))]
    z = (chain.order or chain.leaves)[-1]
    for value in chain.order:
        if value.name in _RESHAPING and isinstance(value.args[0], Value):
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
        index = index.reshape(-1, z.shape[-1])
        features = index[0]
        step = int(features[1] - features[0]) if len(features) > 1 else 1
        straight = features[0] + step * torch.arange(len(features))
        rows = width * torch.arange(len(index))[:, None]
        if step < 1 or not torch.equal(index, rows + straight):
            return None  # tokens or neurons are mixed, reversed or repeated
        parts.append((number, int(features[0]), step))
    return parts


def _replay(chain: _Chain, parts: list[Part], inputs: list[Tensor]) -> Tensor:
    """z for these numbers in place of the projections' outputs, by the recorded operations, in float64."""
    values = {leaf: torch.zeros(leaf.shape, dtype=torch.float64) for leaf in chain.leaves}
    for (number, start, step), given in zip(parts, inputs, strict=True):
        leaf = values[chain.leaves[number]]
        features = slice(start, start + step * (given.shape[-1] - 1) + 1, step)
        leaf.reshape(-1, leaf.shape[-1])[:, features] = given.reshape(-1, given.shape[-1])
    for value in chain.order:
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
    if value.name in _FACTORIES:
        kwargs["dtype"] = torch.float64
    result: Tensor = tree_flatten(value.op(*args, **kwargs))[0][value.output]
    return result


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-6, atol=1e-6)


def _name_of(a: Tensor, act_a: Tensor) -> str | None:
    for name, function in _activations():
        if _equal(function(a), act_a):
            return name
    return None


@cache
def _activations() -> tuple[tuple[str, Callable[[Tensor], Tensor]], ...]:
    names: Iterator[str] = (n for n in ACT2FN if n not in _PREFERRED and n not in _LEARNED)
    return tuple((name, activation_function(name)) for name in (*_PREFERRED, *names))
