"""Record what a model computes: one small forward pass as a graph of values, projections and module calls.

The same recording works with real weights and on the meta device, where tensors have shapes but no
numbers; there, what does not depend on weights (positions, masks) is computed on the side, because models
branch on it. Nothing here knows of feed-forward layers; formula.py and sites.py read the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from peerify.discovery.example_inputs import candidates
from peerify.errors import ConversionError

# What a subclass of a projection may run inside and still be a plain x @ W + b.
_MATMUL_OPS = {
    "addmm", "mm", "bmm", "baddbmm", "linear", "matmul", "add", "add_", "t", "transpose", "permute",
    "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "clone", "detach", "alias",
}  # fmt: skip

_ADAPTER_OPS = _MATMUL_OPS | {"mul", "_to_copy"}

_MOST_NUMBERS = 2**20  # masks and positions of a trial forward are far below


class _NeedsWeights(Exception):  # noqa: N818 - not an error of the model
    """The model branches on numbers that only its weights can tell."""


@dataclass(eq=False, slots=True)
class Memory:
    """The storage that a tensor and its views share."""

    writes: int = 0
    """How often it has been written in place."""


@dataclass(eq=False, slots=True)
class Value:
    """A tensor of the recorded forward at one moment: an in-place write makes a new Value of the same tensor.

    `kind` says where it comes from: "op" (an ATen operation on `args`), "projection" (the output of the
    linear module at `path`, whose input is `args[0]`), "parameter" (a parameter or buffer of the model),
    "constant" (one number, in `constant`), or "other" (an input of the model, or anything unknown).
    """

    kind: str
    shape: torch.Size
    dtype: torch.dtype
    op: torch._ops.OpOverload | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: int = 0
    """Which of the operation's results this is."""
    path: str = ""
    constant: float | None = None
    consumers: list[Value] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)
    writes: int = 0
    """How often the memory had been written when this value was made."""

    @property
    def name(self) -> str:
        """Name of the operation without namespace and overload: "mul", "gelu", "view"; "" for the rest."""
        return "" if self.op is None else self.op._schema.name.split("::")[-1]

    def parents(self) -> Iterator[Value]:
        """The Values among the operation's arguments, nested lists included."""
        return (a for a in tree_flatten((self.args, self.kwargs))[0] if isinstance(a, Value))


@dataclass(eq=False, slots=True)
class Call:
    """One call of one module. `x` is its input if that is exactly one positional tensor and nothing else."""

    path: str
    start: int
    end: int
    x: Value | None
    output: Value | None
    """What it returned, if that is one tensor."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """A recorded forward."""

    calls: dict[str, list[Call]]
    """Every call of every module, by the path of the module."""
    projections: list[Call]
    """The calls of linear modules (nn.Linear, Conv1D), in the order in which they ended."""
    parameters: dict[int, Value]
    """By id of the parameter; its consumers are uses outside of projections."""
    guessed: bool = False
    """Whether the model chose what to run by numbers that only its weights can tell, taken as zeros."""


def is_projection(module: nn.Module) -> bool:
    """Whether a module may compute x @ W + b: nn.Linear, Conv1D, or one of them with LoRA adapters around it."""
    if hasattr(module, "get_delta_weight"):
        module = module.base_layer  # type: ignore[assignment]
    return isinstance(module, (nn.Linear, Conv1D))


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module, guess: bool = False) -> None:
        super().__init__()
        self.guess = guess  # take zeros for numbers that only the weights can tell
        self.clock = 0
        self.calls: dict[str, list[Call]] = {}
        self.projections: list[Call] = []
        # Weak keys: a value must be found again while its tensor lives, but holding the tensors themselves
        # would keep everything the forward computes (gathered experts, for instance) in memory.
        self.values: Any = WeakTensorKeyDictionary()
        self.numbers: Any = WeakTensorKeyDictionary()  # of the meta tensors that do not depend on weights
        self.parameters: dict[int, Value] = {}
        self._open: list[tuple[Call, set[str] | None]] = []
        self._projection: set[str] | None = None  # names of the operations inside the running projection
        for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
            value = Value("parameter", tensor.shape, tensor.dtype, path=path)
            self.values[tensor] = self.parameters[id(tensor)] = value

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._projection is not None:
            self._projection.add(func._schema.name.split("::")[-1])
            return func(*args, **kwargs)
        seen_args, seen_kwargs = tree_map(self._seen, tuple(args)), tree_map(self._seen, kwargs)
        result = self._run(func, args, kwargs)
        self.clock += 1
        inputs = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        written = []
        if func._schema.is_mutable:
            for i, spec in enumerate(func._schema.arguments):
                target = args[i] if i < len(args) else kwargs.get(spec.name)
                if spec.alias_info is not None and spec.alias_info.is_write and isinstance(target, Tensor):
                    written.append(target)
        for i, out in enumerate(tree_flatten(result)[0]):
            if isinstance(out, Tensor) and not any(out is w for w in written):
                value = Value("op", out.shape, out.dtype, func, seen_args, seen_kwargs, output=i)
                self._remember(out, value, inputs)
        for target in written:
            memory = self._seen(target).memory
            memory.writes += 1
            value = Value("op", target.shape, target.dtype, func, seen_args, seen_kwargs)
            value.memory, value.writes = memory, memory.writes
            self.values[target] = value
            self._consume(value)
        return result

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation; on the meta device, with its numbers beside it where they are known."""
        tensors = [a for a in tree_flatten((args, kwargs))[0] if isinstance(a, Tensor)]
        if not any(t.is_meta for t in tensors) and torch.device(kwargs.get("device") or "cpu").type != "meta":
            return func(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "meta":  # x.cpu()
            if not self.guess and not all(not t.is_meta or t in self.numbers for t in tensors):
                raise _NeedsWeights
            return func(*tree_map(self._number, args), **tree_map(self._number, kwargs))
        if func is torch.ops.aten.index.Tensor:
            args = (args[0], self._positions(args[1]))
        needs_numbers = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if func is torch.ops.aten.index.Tensor and all(i is None or i.dtype != torch.bool for i in args[1]):
            needs_numbers = set()
        known = all(not t.is_meta or t in self.numbers for t in tensors) or bool(self.guess and needs_numbers)
        result = None
        if not (known and needs_numbers):
            try:
                result = func(*self._on_meta(args), **kwargs)
            except RuntimeError as error:  # NotImplementedError is one
                if needs_numbers:
                    raise _NeedsWeights from error
                raise
        size = sum(r.numel() for r in tree_flatten(result)[0] if isinstance(r, Tensor))
        if not known or size > _MOST_NUMBERS:
            if func._schema.is_mutable and tensors:
                self.numbers.pop(tensors[0], None)
            return result

        numbers = func(*tree_map(self._number, args), **tree_map(self._number, kwargs))
        if result is None:
            result = tree_map(lambda n: n.to("meta") if isinstance(n, Tensor) else n, numbers)
        for out, number in zip(tree_flatten(result)[0], tree_flatten(numbers)[0], strict=True):
            if isinstance(out, Tensor) and out.is_meta:
                self.numbers[out] = number
        return result

    def _number(self, thing: Any) -> Any:
        """The numbers of a tensor of which they are known; the CPU in place of any device."""
        if isinstance(thing, Tensor):
            if not thing.is_meta:
                return thing
            if thing in self.numbers or not self.guess:
                return self.numbers[thing]
            return torch.zeros(thing.shape, dtype=thing.dtype, device="cpu")
        return torch.device("cpu") if isinstance(thing, torch.device) else thing

    def _positions(self, indices: list[Tensor | None]) -> list[Tensor | None]:
        """Indices of x[mask] as numbers in place of masks, where those are known: then the result's shape is, too."""
        found: list[Tensor | None] = []
        for index in indices:
            known = index is not None and (not index.is_meta or index in self.numbers)
            if index is None or index.dtype != torch.bool or not known:
                found.append(index)
                continue
            for places in self._number(index).nonzero(as_tuple=True):
                moved = places.to("meta")
                self.numbers[moved] = places
                found.append(moved)
        return found

    @staticmethod
    def _on_meta(args: Any) -> Any:
        """Arguments of an operation that mixes devices, which real ones would not, all on the meta device."""
        tensors = [a for a in tree_flatten(args)[0] if isinstance(a, Tensor)]
        if not any(t.is_meta for t in tensors) or not any(not t.is_meta and t.dim() for t in tensors):
            return args
        return tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) and not a.is_meta and a.dim() else a, args)

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        """An input of the model on the model's device; its numbers stay known if that is the meta device."""
        moved = tensor.to(device)
        if moved.is_meta and not tensor.is_meta:
            self.numbers[moved] = tensor
        return moved

    def _remember(self, tensor: Tensor, value: Value, inputs: list[Tensor]) -> None:
        for source in inputs:
            if _same_memory(tensor, source):
                value.memory = self._seen(source).memory
                value.writes = value.memory.writes
                break
        self.values[tensor] = value
        self._consume(value)

    @staticmethod
    def _consume(value: Value) -> None:
        for parent in value.parents():
            parent.consumers.append(value)

    def _seen(self, thing: Any) -> Any:
        """The Value of a tensor as it is now; anything else unchanged."""
        if not isinstance(thing, Tensor):
            return thing
        value: Value | None = self.values.get(thing)
        if value is not None:
            if value.memory.writes == value.writes:
                return value
            # Somebody wrote through another view of the same memory: what it holds now is unknown.
            memory = value.memory
            value = Value("other", thing.shape, thing.dtype, memory=memory, writes=memory.writes)
        elif thing.numel() == 1 and not thing.is_meta and not thing.is_complex():
            value = Value("constant", thing.shape, thing.dtype, constant=float(thing))
        else:
            value = Value("other", thing.shape, thing.dtype)
        self.values[thing] = value
        return value

    def enter(self, path: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        call = Call(path, self.clock, self.clock, self._seen(args[0]) if single else None, None)
        self._open.append((call, self._projection))
        if self._projection is None and single and is_projection(module):
            self._projection = set()

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        call, outside = self._open.pop()
        inside, self._projection = self._projection, outside
        self.clock += 1
        call.end = self.clock
        if outside is None and inside is not None and isinstance(output, Tensor):
            adapted = hasattr(module, "get_delta_weight")
            kind = "projection" if inside <= (_ADAPTER_OPS if adapted else _MATMUL_OPS) else "other"
            value = Value(kind, output.shape, output.dtype, args=(call.x,), path=path)
            self._remember(output, value, [])
            if kind == "projection":
                self.projections.append(call)
        if outside is None:
            call.output = self._seen(output) if isinstance(output, Tensor) else None
        self.calls.setdefault(path, []).append(call)


def needs_weights(model: nn.Module) -> ConversionError:
    """The error for a model of which nothing is known without its weights."""
    return ConversionError(
        f"{type(model).__name__} decides by the values of its activations what to run, so its layers "
        "cannot be listed without its weights; `peerify convert` finds them"
    )


class _Constants(TorchFunctionMode):
    """Remembers the numbers of constants that a model makes on the meta device, where they are lost."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor) and result.is_meta and not isinstance(args[0], Tensor):
            self.recorder.numbers[result] = torch.tensor(args[0], dtype=result.dtype, device="cpu")
        return result


def record(model: nn.Module, inputs: dict[str, Any] | None = None) -> Trace:
    """Run `model` once in eval mode without gradients and return what it computed.

    `inputs` are keyword arguments of the model; without them those of `candidates(model)` are tried in turn. On the
    meta device, what the model makes depend on its activations is run as if they were zero. The model is left as it
    was. Raises ConversionError if the forward pass fails.
    """
    first: ConversionError | None = None
    for given in candidates(model) if inputs is None else [inputs]:
        try:
            return _record(model, given, guess=False)
        except _NeedsWeights:
            try:
                return _record(model, given, guess=True)
            except (_NeedsWeights, ConversionError):
                first = needs_weights(model)
        except ConversionError as error:
            first = first or error
    raise first or ConversionError(f"{type(model).__name__} says nothing of what it takes: pass example inputs")


def _record(model: nn.Module, given: dict[str, Any], *, guess: bool) -> Trace:
    recorder = _Recorder(model, guess)
    handles = []
    for path, module in model.named_modules():
        handles.append(
            module.register_forward_pre_hook(
                lambda m, args, kwargs, path=path: recorder.enter(path, m, args, kwargs), with_kwargs=True
            )
        )
        handles.append(module.register_forward_hook(lambda m, args, output, path=path: recorder.leave(path, m, output)))
    try:
        with _eval_mode(model), _traceable_experts(model), torch.no_grad():
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            given = tree_map(lambda v: recorder.to_device(v, device) if isinstance(v, Tensor) else v, given)
            with recorder, _Constants(recorder) if device.type == "meta" else nullcontext():
                model(**given)
    except (ConversionError, _NeedsWeights):
        raise
    except Exception as error:
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise ConversionError(
            f"the trial forward pass of {type(model).__name__} failed ({first_line}): pass example inputs"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return Trace(calls=recorder.calls, projections=recorder.projections, parameters=recorder.parameters, guessed=guess)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _traceable_experts(model: nn.Module) -> Iterator[None]:
    """On the meta device, run routed experts by the implementation whose shapes do not depend on routing."""
    if not isinstance(model, PreTrainedModel) or model.device.type != "meta":
        yield
        return
    before = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm")
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def _same_memory(a: Tensor, b: Tensor) -> bool:
    try:
        return a.untyped_storage()._cdata == b.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without a storage
        return False
