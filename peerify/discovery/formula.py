"""Read the formula of a feed-forward layer off a recorded forward: what lies between its linear layers.

Walking back from the input z of a linear layer through element-wise and reshaping operations leads, in a
feed-forward layer, to the outputs of one or two linear layers that read the same x. Replaying the recorded
operations on index tensors then tells which output features feed z; replaying them on numbers tells
z = act(up) or z = act(gate) * up. Neither needs the model's weights, so both work on the meta device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.utils._pytree import tree_flatten, tree_map

from peerify.discovery.replay import FACTORIES, RESHAPING, Chain, Clamp, base_name, classify, pointwise
from peerify.discovery.trace import Value

_KEEPS_ROWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "alias", "detach", "clone",
    "contiguous", "_to_copy",
}  # fmt: skip
# Between activation and down projection these make a layer *nearly* a feed-forward: named, never converted.
_STATISTICS = {
    "native_layer_norm", "_fused_rms_norm", "rms_norm", "mean", "var", "var_mean", "std", "std_mean",
    "linalg_vector_norm", "native_batch_norm", "batch_norm", "_native_batch_norm_legit_no_training",
    "_native_batch_norm_legit", "cudnn_batch_norm", "_batch_norm_no_update", "native_group_norm",
}  # fmt: skip
_ARITHMETIC = {"mul", "add", "sub", "rsub", "div", "neg", "pow", "sqrt", "rsqrt", "reciprocal", "square"}
_SELECTING = {"index", "index_select", "gather", "masked_select", "take_along_dim"}
_CHOOSING = {"topk", "nonzero", "nonzero_numpy", "sort", "argsort", "argmax"}
_LONGEST_CHAIN = 128


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
    clamp: Clamp | None = None
    scale: float = 1.0
    """A constant that multiplies what enters the activation."""
    learned: str = ""
    """The module that holds the activation's own parameters, if it has any (xIELU)."""


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
        if not any(v.op is not None and pointwise(v) and base_name(v) not in _ARITHMETIC for v in chain.order):
            return None  # two linear layers with a norm between, as in low-rank attention
        gate = whole[1] if len(whole) > 1 else None
        reason = chain.obstacles[0]
        return Formula(x=x, up=whole[0], gate=gate, activation="unknown", reason=reason, inner=inner)
    known = {} if known is None else known
    signature = _signature(chain)
    if signature not in known:
        known[signature] = classify(chain)
    if known[signature] is None:
        return None
    up, gate, activation, reason, clamp, scale = known[signature]
    owners = {value.path.rpartition(".")[0] for value in chain.learned}

    def located(part: tuple[int, int, int] | None) -> Any:
        return part and Projection(path=chain.leaves[part[0]].path, start=part[1], step=part[2])

    return Formula(
        x=x,
        up=located(up),
        gate=located(gate),
        activation=activation,
        reason=reason,
        inner=inner,
        clamp=clamp,
        scale=scale,
        learned=owners.pop() if owners else "",
    )


def without_reshape(value: Value) -> Value:
    """The value before casts, copies and views that keep its rows: the same vectors in the same order."""
    while value.name in _KEEPS_ROWS and value.args[0].shape[-1:] == value.shape[-1:]:
        value = value.args[0]
    return value


def _walk(z: Value) -> Chain | None:
    """Everything between z and the projections it is made of; None if it is made of anything else."""
    chain = Chain()
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
            chain.leaves.append(value)
        elif value.kind == "parameter" and value.shape.numel() == 1:
            chain.learned.append(value)
            chain.order.append(value)
        elif value.kind == "parameter":
            chain.obstacles.append("learned parameters enter between its activation and its down projection")
        elif value.kind == "constant":
            chain.order.append(value)
        elif value.kind == "op":
            if base_name(value) in _STATISTICS:
                chain.obstacles.insert(0, "a norm lies between its linear layers")
            elif value.name == "convolution":
                chain.obstacles.insert(0, "a convolution lies between its linear layers")
            elif not (value.name in RESHAPING | FACTORIES or pointwise(value)):
                return None
            stack.append((value, True))
            stack.extend((parent, False) for parent in value.parents())
        else:
            return None
        if len(seen) > _LONGEST_CHAIN or len(chain.leaves) > 4:  # gate, up and an adapter of each
            return None
    _set_adapters_apart(chain)
    if not 1 <= len(chain.leaves) <= 2:
        return None
    return chain if len({_input(leaf) for leaf in chain.leaves}) == 1 else None


def _input(projection: Value) -> Value:
    return without_reshape(projection.args[0])


def _set_adapters_apart(chain: Chain) -> None:
    """Turn leaves that read x through another linear layer, and are added to one that reads x, into an obstacle."""
    direct = [leaf for leaf in chain.leaves if _input(leaf).kind != "projection"]
    xs = {_input(leaf) for leaf in direct}
    through = [leaf for leaf in chain.leaves if leaf not in direct]
    if through and all(
        _input(_input(leaf)) in xs and all(base_name(c) == "add" for c in leaf.consumers) for leaf in through
    ):
        chain.leaves = direct
        chain.obstacles.append("low-rank adapters of its own add to its linear layers")


def _routed(x: Value) -> bool:
    """Whether x holds only the tokens that a router chose: then its layer is a routed expert, not dense."""
    while x.kind == "op" and (x.name in RESHAPING or x.name == "mul") and isinstance(x.args[0], Value):
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


def _signature(chain: Chain) -> str:
    number = {value: i for i, value in enumerate([*chain.leaves, *chain.order])}
    lines = []
    for value in number:
        arguments = tree_map(lambda a: f"#{number[a]}" if a in number else a, (value.args, value.kwargs))
        if value.kind == "projection":
            arguments = ()
        lines.append(f"{value.op} {value.output} {value.constant} {tuple(value.shape)} {arguments}")
    return "\n".join(lines)
