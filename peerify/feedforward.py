"""Find, read and replace the dense feed-forward layers of any transformers model.

Layers are found by what they compute, never by what they are called: see formula.py. A found layer is a
Site; its weights are read in one form, FeedForward, always with one row per neuron.
"""

from __future__ import annotations

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
from peerify.formula import Formula, Projection, activation_function, read_formula, without_reshape


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

    def to(self, device: torch.device, dtype: torch.dtype) -> FeedForward:
        """The same layer on another device and in another number type; unchanged tensors are not copied."""
        moved: dict[str, Any] = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value for name, value in vars(self).items()
        }
        return FeedForward(**moved)

    def factors(self, x_td: Tensor) -> tuple[Tensor, Tensor | None]:
        """The factors of a gated neuron's value, up and act(gate); or (act(up), None): (…, d_ff) each."""
        act = activation_function(self.activation)
        up_tf = F.linear(x_td, self.u_fd, self.u_bias_f)
        if self.gate_fd is None:
            return act(up_tf), None
        return up_tf, act(F.linear(x_td, self.gate_fd, self.gate_bias_f))

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
    sites = (_site(model, trace, group, uses) for group in groups.values())
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
    return FeedForward(
        u_fd=u_fd,
        gate_fd=gate_fd,
        v_fd=down_df.T,
        u_bias_f=u_bias_f,
        gate_bias_f=gate_bias_f,
        bias_d=bias_d,
        activation=site.activation,
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


def _rows(model: nn.Module, part: Projection, count: int) -> tuple[Tensor, Tensor | None]:
    """Weight rows, one per output feature, and biases of a part of a linear module."""
    module: Any = model.get_submodule(part.path)
    weight, bias = module.weight.detach(), module.bias
    if not weight.is_floating_point():
        raise ConversionError(f"{part.path}.weight is quantized ({weight.dtype}): load the model dequantized")
    if isinstance(module, Conv1D):
        weight = weight.T
    rows = slice(part.start, part.start + part.step * (count - 1) + 1, part.step)
    return weight[rows], None if bias is None else bias.detach()[rows]


def _site(model: nn.Module, trace: Trace, group: list[tuple[Call, Formula]], uses: dict[str, int]) -> Site | None:
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
    )
    if site.reason:
        return site
    if d_out != d_model:
        return changed(site, reason=f"its output width {d_out} differs from its input width {d_model}")
    if any((f.up, f.gate, f.reason) != (formula.up, formula.gate, "") for _, f in group[1:]):
        return changed(site, reason="its down projection also serves another layer")
    if any(len(trace.calls[path]) != uses[path] or _read_elsewhere(model, trace, path) for path in members):
        return changed(site, reason="its weights are also used outside of it")
    if any(_leaks(c, f) for c, f in group):
        return changed(site, reason="its hidden activation is also used outside of it")
    if _whole(model, trace, site.path, group):
        return changed(site, convertible=True)
    if formula.gate is not None:
        return changed(site, reason="it has no module of its own that takes x and returns its output")
    activation = _activation_module(model, trace, group)
    if activation is None:
        return changed(site, reason="neither the layer nor its activation is a module of its own")
    return changed(site, path=formula.up.path, identities=(activation, call.path), convertible=True)


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
    return any(c not in allowed for v in formula.inner if v.kind != "constant" for c in v.consumers)


def _whole(model: nn.Module, trace: Trace, path: str, group: list[tuple[Call, Formula]]) -> bool:
    """Whether the module at `path` is exactly the layer: its parameters, x in, the layer's output out."""
    if not path:
        return False
    own = {id(t) for m in _members(*group[0]) for t in model.get_submodule(m).parameters()}
    module = model.get_submodule(path)
    if not own >= {id(t) for t in module.parameters()} or list(module.buffers()):
        return False
    calls = trace.calls.get(path, [])
    if len(calls) != len(group):
        return False
    for outer, (call, formula) in zip(calls, group, strict=True):
        if not outer.start <= call.start <= call.end <= outer.end:
            return False
        if outer.x is None or outer.output is None or outer.x.shape != outer.output.shape:
            return False
        if without_reshape(outer.x) is not formula.x or not _same(outer.output, call.output):
            return False
    return True


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
