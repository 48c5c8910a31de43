"""Find the dense feed-forward layers of any transformers model.

Layers are found by what they compute, never by what they are called: see formula.py. A found layer is a
Site; conversion/feedforward.py reads its weights and puts something else in its place.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from peerify.discovery.formula import Formula, Projection, read_formula, without_reshape
from peerify.discovery.replay import Clamp
from peerify.discovery.selection import select
from peerify.discovery.trace import Call, Trace, Value, is_projection, needs_weights, record
from peerify.errors import ConversionError


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
    """Clamps and a shift inside a gated layer, see replay.Clamp."""
    learned: str = ""
    """The module that holds the activation's own parameters, if it has any."""
    inner_scale: float = 1.0
    """A constant that multiplies what enters the activation; read_feedforward folds it into the weights."""
    outer_scale: float = 1.0
    """A constant that multiplies the layer's output; read_feedforward folds it into the weights."""

    def below(self, path: str) -> Site:
        """The same layer in a model that holds its model at `path`."""

        def moved(part: Projection | None) -> Any:
            return part and Projection(path=f"{path}.{part.path}", start=part.start, step=part.step)

        return changed(
            self,
            path=f"{path}.{self.path}",
            identities=tuple(f"{path}.{identity}" for identity in self.identities),
            up=moved(self.up),
            gate=moved(self.gate),
            down=f"{path}.{self.down}",
            learned=self.learned and f"{path}.{self.learned}",
        )


def find_feedforwards(model: nn.Module, inputs: dict[str, Any] | None = None) -> list[Site]:
    """Every dense feed-forward layer of `model`, in the order in which they first run.

    Runs the model once on `inputs` (keyword arguments; by default a few tokens or one picture); a model on
    the meta device will do. A layer that runs several times (ALBERT) is one site. Routed experts are not
    listed. Without `inputs`, the layers of models inside the model that it does not run then (towers for pictures
    or sound) follow: each is run on its own. Raises ConversionError if the forward pass fails.
    """
    sites, unseen = survey(model, inputs)
    if not sites and "" in unseen:
        raise needs_weights(model)
    return sites


def survey(model: nn.Module, inputs: dict[str, Any] | None = None) -> tuple[list[Site], dict[str, str]]:
    """`find_feedforwards`, and what could not be looked into, by path ("" is the model itself), with the reason."""
    sites: list[Site] = []
    unseen: dict[str, str] = {}
    try:
        trace = record(model, inputs)
    except ConversionError:
        parts = [] if inputs is not None else _idle(model, None)
        if not parts:
            raise
        failed = True
    else:
        sites, parts, failed = _sites(model, trace), [] if inputs is not None else _idle(model, trace), False
        if trace.guessed:
            unseen[""] = "it decides by the values of its activations what to run: some of its layers may be missing"
    for path in parts:
        try:
            found, deeper = survey(model.get_submodule(path))
        except ConversionError as error:
            unseen[path] = str(error)
            continue
        sites += [site.below(path) for site in found]
        unseen |= {f"{path}.{below}".rstrip("."): reason for below, reason in deeper.items()}
    if failed and not sites:
        record(model)  # raises
    return sites, unseen


def calibrated_feedforwards(model: nn.Module, batch: dict[str, Any]) -> list[Site]:
    """`find_feedforwards(model)`, where layers that `batch` does not run cannot be converted: nothing is known of
    what they see. Layers that only `batch` runs come last."""
    trace = record(model)
    if not _idle(model, trace) and set(batch) <= _TEXT:
        return _sites(model, trace)
    sites = find_feedforwards(model)
    ran = {site.path: site for site in find_feedforwards(model, batch)}
    reason = "the calibration data does not run it"
    known = {site.path for site in sites}
    return [
        *(s if s.path in ran or not s.convertible else changed(s, convertible=False, reason=reason) for s in sites),
        *(site for path, site in ran.items() if path not in known),
    ]


_TEXT = {"input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"}


def _idle(model: nn.Module, trace: Trace | None) -> list[str]:
    """Models inside `model` with linear layers none of which ran; of nested ones the outermost."""
    found: list[str] = []
    for path, part in model.named_modules():
        if path and isinstance(part, PreTrainedModel) and not path.startswith(tuple(f"{other}." for other in found)):
            linears = [name for name, module in part.named_modules() if is_projection(module)]
            if len(linears) > 1 and not (trace and any(f"{path}.{name}" in trace.calls for name in linears)):
                found.append(path)
    return found


def _sites(model: nn.Module, trace: Trace) -> list[Site]:
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
    chosen = select([site.path for site in sites], able, spec, where="`peerify inspect` lists them")
    for i in chosen:
        if not sites[i].convertible:
            raise ConversionError(f"layer {i} ({sites[i].path}) cannot be converted: {sites[i].reason}; leave it out")
    return [sites[i] for i in chosen]


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
