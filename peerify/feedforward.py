"""Find, read and replace the dense feed-forward layers of any transformers model.

Layers are found by what they compute, never by what they are called: see formula.py. A found layer is a
Site; its weights are read in one form, FeedForward, always with one row per neuron.
"""

from __future__ import annotations

import copy
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from peerify.dataflow import Call, Trace, Value, record
from peerify.errors import ConversionError
from peerify.formula import Clamp, Formula, Projection, activation_function, read_formula, without_reshape


@dataclass(frozen=True, kw_only=True)
class Site:
    """A dense feed-forward layer: x → down(act(gate x) * up x), or x → down(act(up x)) if it has no gate."""

    path: str
    """The module that a replacement takes the place of: called with x, it returns the layer's output."""
    identities: tuple[str, ...]
    """Modules that become nn.Identity when `path` is replaced, because the layer has no module of its own."""
    up: Projection
    gate: Projection | None
    down: str
    kind: Literal["gated", "plain"]
    d_model: int
    d_ff: int
    activation: str
    """A key of transformers.activations.ACT2FN, or "unknown"."""
    parameters: int
    """Number of weights and biases of the layer."""
    convertible: bool
    reason: str
    """Why it is not convertible; empty if it is."""
    clamp: Clamp | None = None
    """Clamps and a shift inside a gated layer, see formula.Clamp."""
    learned: str = ""
    """The module that holds the activation's own parameters, if it has any."""
    inner_scale: float = 1.0
    """A constant that multiplies what enters the activation; read_feedforward folds it into the weights."""
    outer_scale: float = 1.0
    """A constant that multiplies the layer's output; read_feedforward folds it into the weights."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeedForward:
    """The weights of a feed-forward layer: row i of each matrix is neuron i's input, gate or *output* vector.

    u_fd, gate_fd, v_fd: (d_ff, d_model); u_bias_f, gate_bias_f: (d_ff,); bias_d: (d_model,).
    """

    u_fd: Tensor
    gate_fd: Tensor | None
    v_fd: Tensor
    u_bias_f: Tensor | None
    gate_bias_f: Tensor | None
    bias_d: Tensor | None
    activation: str
    clamp: Clamp | None = None
    learned: nn.Module | None = None
    """The activation itself where it has parameters."""

    def to(self, device: torch.device, dtype: torch.dtype) -> FeedForward:
        """The same layer on another device and in another number type; unchanged tensors are not copied."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        if self.learned is not None:
            moved["learned"] = copy.deepcopy(self.learned).to(device, dtype)
        return FeedForward(**moved)

    def factors(self, x_td: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factors of a gated neuron's value, up and act(gate); or (act(up), None): (…, d_ff) each."""
        act = self.learned or activation_function(self.activation)
        up_tf = F.linear(x_td, self.u_fd, self.u_bias_f)
        if self.gate_fd is None:
            return act(up_tf), None
        gate_tf = F.linear(x_td, self.gate_fd, self.gate_bias_f)
        if self.clamp is None:
            return up_tf, act(gate_tf)
        infinite = float("inf")
        act_tf = act(gate_tf.clamp(max=self.clamp.get("gate", infinite))).clamp(max=self.clamp.get("act", infinite))
        limit = self.clamp.get("up", infinite)
        return up_tf.clamp(-limit, limit) + self.clamp.get("shift", 0.0), act_tf

    def hidden(self, x_td: Tensor) -> Tensor:
        """What enters the down projection, one number per neuron: (…, d_model) → (…, d_ff)."""
        up_tf, act_tf = self.factors(x_td)
        return up_tf if act_tf is None else up_tf * act_tf

    def __call__(self, x_td: Tensor) -> Tensor:
        """The dense layer itself: (…, d_model) → (…, d_model)."""
        return F.linear(self.hidden(x_td), self.v_fd.T, self.bias_d)


def find_feedforwards(model: nn.Module, inputs: dict[str, Any] | None = None) -> list[Site]:
    """Every dense feed-forward layer of `model`, in the order in which they first run.

    Runs the model once on `inputs` (keyword arguments; by default a few tokens or one picture); a model on
    the meta device will do. A layer that runs several times (ALBERT) is one site. Routed experts are not
    listed. Raises ConversionError if the forward pass fails.
    """
    trace = record(model, inputs)
    known: dict[str, Any] = {}
    groups: dict[str, list[tuple[Call, Formula]]] = {}
    for call in trace.projections:
        if call.x is not None and (formula := read_formula(call.x, known)) is not None:
            groups.setdefault(call.path, []).append((call, formula))
    uses: dict[str, int] = {}  # how many feed-forward calls each projection takes part in
    for group in groups.values():
        for call, formula in group:
            for path in {formula.up.path, formula.gate.path if formula.gate else formula.up.path, call.path}:
                uses[path] = uses.get(path, 0) + 1
    deep = {f.up.path for group in groups.values() for _, f in group} & groups.keys()  # both ends of a layer
    sites = (_site(model, trace, group, uses, deep) for group in groups.values())
    return [site for site in sites if site is not None]


def read_feedforward(model: nn.Module, site: Site) -> FeedForward:
    """The weights of the layer at `site`, detached, without a copy where the model's layout allows it.

    Raises ConversionError if the site is not convertible or its weights are not floating-point numbers.
    """
    if not site.convertible:
        raise ConversionError(f"{site.path} cannot be converted: {site.reason}")
    u_fd, u_bias_f = _rows(model, site.up, site.d_ff)
    gate_fd, gate_bias_f = _rows(model, site.gate, site.d_ff) if site.gate else (None, None)
    down_df, bias_d = _rows(model, Projection(path=site.down), site.d_model)
    down_df, bias_d = _times(site.outer_scale, down_df, bias_d)
    if gate_fd is None:
        u_fd, u_bias_f = _times(site.inner_scale, u_fd, u_bias_f)
    else:
        gate_fd, gate_bias_f = _times(site.inner_scale, gate_fd, gate_bias_f)
    return FeedForward(
        u_fd=u_fd,
        gate_fd=gate_fd,
        v_fd=down_df.T,
        u_bias_f=u_bias_f,
        gate_bias_f=gate_bias_f,
        bias_d=bias_d,
        activation=site.activation,
        clamp=site.clamp,
        learned=model.get_submodule(site.learned) if site.learned else None,
    )


def replace(model: nn.Module, site: Site, module: nn.Module) -> None:
    """Put `module` in place of the layer at `site`, under every name that the layer has in `model`."""
    for path, new in [(site.path, module), *((path, nn.Identity()) for path in site.identities)]:
        old = model.get_submodule(path)
        for parent in list(model.modules()):
            for name, child in parent.named_children():
                if child is old:
                    setattr(parent, name, new)


def select_sites(sites: list[Site], spec: str) -> list[Site]:
    """The sites that `spec` names: "all", "middle", "first-last", "0,4,9", "12-18" or paths with globs.

    Numbers count all `sites` from 0, as `peerify inspect` lists them. "all", "middle", "first-last" and globs
    pass over sites that are not convertible; naming one by number or in full is an error. Raises
    ConversionError, too, for a number out of range and for a path that matches nothing.
    """
    able = [i for i, site in enumerate(sites) if site.convertible]
    if not able:
        why = f" ({sites[0].path}: {sites[0].reason})" if sites else "; routed experts are not dense"
        raise ConversionError(f"the model has no dense feed-forward layer that can be converted{why}")
    chosen: set[int] = set()
    for part in (p.strip() for p in spec.split(",")):
        if part == "all":
            chosen.update(able)
        elif part == "middle":
            chosen.add(able[len(able) // 2])
        elif part == "first-last":
            chosen.update((able[0], able[-1]))
        elif match := re.fullmatch(r"(\d+)(?:\s*-\s*(\d+))?", part):
            first, last = int(match[1]), int(match[2] or match[1])
            if first > last or last >= len(sites):
                raise ConversionError(
                    f"layers {part!r}: the model has feed-forward layers 0-{len(sites) - 1}; "
                    "`peerify inspect` lists them"
                )
            chosen.update(range(first, last + 1))
        else:
            named = [i for i, site in enumerate(sites) if fnmatch.fnmatchcase(site.path, part)]
            if not named or not part:
                raise ConversionError(
                    f"layers {part!r}: no feed-forward layer has that path; they are called like "
                    f"{sites[able[0]].path!r}, `peerify inspect` lists them"
                )
            usable = [i for i in named if sites[i].convertible]
            chosen.update(usable or named)
    for i in sorted(chosen):
        if not sites[i].convertible:
            raise ConversionError(f"layer {i} ({sites[i].path}) cannot be converted: {sites[i].reason}; leave it out")
    return [sites[i] for i in sorted(chosen)]


def _times(scale: float, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if scale == 1.0:
        return weight, bias
    return scale * weight, None if bias is None else scale * bias


def _rows(model: nn.Module, part: Projection, count: int) -> tuple[Tensor, Tensor | None]:
    """Weight rows, one per output feature, and biases of a part of a linear module."""
    module: Any = model.get_submodule(part.path)
    weight, bias = module.weight.detach(), module.bias
    if hasattr(module, "get_delta_weight"):  # LoRA: what the adapters in use add belongs to the layer
        if not weight.is_floating_point():
            raise ConversionError(f"{part.path}.weight is quantized ({weight.dtype}): load the model dequantized")
        extra = [] if module.merged or module.disable_adapters else module.active_adapters
        weight = sum((module.get_delta_weight(name).detach() for name in extra if name in module.lora_A), weight)
        module = module.base_layer
    if not weight.is_floating_point():
        raise ConversionError(f"{part.path}.weight is quantized ({weight.dtype}): load the model dequantized")
    if isinstance(module, Conv1D):
        weight = weight.T
    rows = slice(part.start, part.start + part.step * (count - 1) + 1, part.step)
    return weight[rows], None if bias is None else bias.detach()[rows]


def _site(
    model: nn.Module, trace: Trace, group: list[tuple[Call, Formula]], uses: dict[str, int], deep: set[str]
) -> Site | None:
    """Judge one down projection and all its calls."""
    call, formula = group[0]
    up: Any = model.get_submodule(formula.up.path)
    down: Any = model.get_submodule(call.path)
    assert call.x is not None
    assert call.output is not None
    d_model, d_ff, d_out = formula.x.shape[-1], call.x.shape[-1], call.output.shape[-1]
    if d_out != d_model and formula.reason:
        return None  # nearly a feed-forward, nearly a residual layer: a head or a low-rank projection
    vectors = 3 if formula.gate else 2
    gate: Any = model.get_submodule(formula.gate.path) if formula.gate else None
    biases = sum(d_ff for module in (up, gate) if module is not None and module.bias is not None)
    members = _members(call, formula)
    site = Site(
        path=_common(members) or call.path,
        identities=(),
        up=formula.up,
        gate=formula.gate,
        down=call.path,
        kind="gated" if formula.gate else "plain",
        d_model=d_model,
        d_ff=d_ff,
        activation=formula.activation,
        parameters=vectors * d_model * d_ff + biases + (0 if down.bias is None else d_out),
        convertible=False,
        reason=formula.reason,
        clamp=formula.clamp,
        learned=formula.learned,
        inner_scale=formula.scale,
    )
    if site.reason:
        return site
    if d_out != d_model:
        return changed(
            site, reason=f"its output width {d_out} differs from its input width {d_model}, as in a projector"
        )
    if any(
        (f.up, f.gate, f.learned, f.scale, f.clamp, f.reason)
        != (formula.up, formula.gate, formula.learned, formula.scale, formula.clamp, "")
        for _, f in group[1:]
    ):
        return changed(site, reason="its down projection also serves another layer")
    if deep & {formula.up.path, call.path}:
        return changed(site, reason="it is a part of a perceptron with more than two layers, as in a head")
    if any(len(trace.calls[path]) != uses[path] or _read_elsewhere(model, trace, path) for path in members):
        return changed(site, reason="its weights are also used outside of it")
    if any(_leaks(c, f) for c, f in group):
        return changed(site, reason="its hidden activation is also used outside of it")
    scale = _whole(model, trace, site.path, group)
    if scale is not None:
        return changed(site, convertible=True, outer_scale=scale)
    activation = None if formula.gate is not None else _activation_module(model, trace, group)
    if activation is not None:
        return changed(site, path=formula.up.path, identities=(activation, call.path), convertible=True)
    inner = _inner_module(model, trace, group)
    if inner is not None:
        return changed(site, path=inner, identities=(call.path,), convertible=True)
    if formula.gate is not None:
        return changed(site, reason="it has no module of its own that takes x and returns its output")
    return changed(site, reason="neither the layer nor its activation is a module of its own")


def _members(call: Call, formula: Formula) -> list[str]:
    gate = [formula.gate.path] if formula.gate and formula.gate.path != formula.up.path else []
    return [formula.up.path, *gate, call.path]


def _common(paths: list[str]) -> str:
    """The path of the lowest module that holds all `paths`."""
    first, last = min(paths).split("."), max(paths).split(".")
    shared = 0
    while shared < min(len(first), len(last)) and first[shared] == last[shared]:
        shared += 1
    return ".".join(first[:shared])


def _read_elsewhere(model: nn.Module, trace: Trace, path: str) -> bool:
    """Whether the weights at `path` enter anything but the calls of that module."""
    ids = (id(p) for p in model.get_submodule(path).parameters())
    return any(i in trace.parameters and trace.parameters[i].consumers for i in ids)


def _leaks(call: Call, formula: Formula) -> bool:
    """Whether anything but the down projection reads what lies between x and it."""
    allowed = {*formula.inner, call.output}
    fixed = ("constant", "parameter")
    return any(c not in allowed for v in formula.inner if v.kind not in fixed for c in v.consumers)


def _whole(model: nn.Module, trace: Trace, path: str, group: list[tuple[Call, Formula]]) -> float | None:
    """What the module at `path` returns, in units of the layer's output, if it is exactly the layer: its
    parameters, x in, the layer's output or a constant multiple of it out. Else None."""
    if not path:
        return None
    learned = group[0][1].learned
    members = [*_members(*group[0]), *([learned] if learned else [])]
    own = {id(t) for m in members for t in _tensors(model.get_submodule(m))}
    module = model.get_submodule(path)
    if not own >= {id(t) for t in _tensors(module)}:
        return None
    calls = trace.calls.get(path, [])
    if len(calls) != len(group):
        return None
    scales = set()
    for outer, (call, formula) in zip(calls, group, strict=True):
        if not outer.start <= call.start <= call.end <= outer.end:
            return None
        if outer.x is None or outer.output is None or outer.x.shape != outer.output.shape:
            return None
        output, scale = _without_scale(outer.output)
        if without_reshape(outer.x) is not formula.x or not _same(output, call.output):
            return None
        scales.add(scale)
    return scales.pop() if len(scales) == 1 else None


def _inner_module(model: nn.Module, trace: Trace, group: list[tuple[Call, Formula]]) -> str | None:
    """A module that takes x and returns z, activation included, and holds nothing else: then PEER takes its place,
    and the down projection falls away."""
    formula = group[0][1]
    own = {id(t) for m in (*_members(*group[0])[:-1], formula.learned) if m for t in _tensors(model.get_submodule(m))}
    path = formula.up.path.rpartition(".")[0]
    while path:
        if not own >= {id(t) for t in _tensors(model.get_submodule(path))}:
            return None
        calls = trace.calls.get(path, [])
        if len(calls) == len(group) and all(
            outer.x is not None
            and outer.output is not None
            and without_reshape(outer.x) is f.x
            and _same(outer.output, call.x)
            and outer.x.shape[:-1] == outer.output.shape[:-1]
            for outer, (call, f) in zip(calls, group, strict=True)
        ):
            return path
        path = path.rpartition(".")[0]
    return None


def _without_scale(value: Value) -> tuple[Value, float]:
    """The value before multiplications by constants, and their product."""
    scale = 1.0
    while value.name == "mul" and len(value.args) == 2:
        factor = value.args[1]
        number = factor.constant if isinstance(factor, Value) else factor
        if not isinstance(number, int | float) or not isinstance(value.args[0], Value):
            break
        value, scale = value.args[0], scale * number
    return value, scale


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _same(value: Value, source: Value | None) -> bool:
    """Whether `value` is `source`, at most reshaped or copied but not cast."""
    return source is not None and (without_reshape(value) is without_reshape(source) and value.dtype == source.dtype)


def _activation_module(model: nn.Module, trace: Trace, group: list[tuple[Call, Formula]]) -> str | None:
    """A parameterless leaf module that takes the up projection's output and returns z, in all calls."""
    up_calls = iter(trace.calls[group[0][1].up.path])
    wanted: list[tuple[Value | None, Value | None]] = [(next(up_calls).output, c.x) for c, _ in group]
    for path in _leaves(model):
        calls = trace.calls.get(path, [])
        if calls and [(c.x, c.output) for c in calls] == wanted:
            return path
    return None


def _leaves(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        if not any(True for _ in module.children()) and not any(True for _ in module.parameters()):
            yield path
