"""The smallest random model of any type that transformers knows, made from nothing but its config class.

`small_models(model_type)` yields one model per class that an Auto class builds for the type, with inputs that it
runs on. Widths are divided by one common factor, so that sizes which must agree still do; where the model does not
run that small, the next smaller factor is tried. Exceptions that no rule covers are in exceptions.py.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
import transformers
from exceptions import INPUTS, OWN_TYPE_ONLY
from inputs import candidates
from shrink import Scale, own_config, small_config
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 100_000_000
NOT_EXPORTED = "transformers does not export its class: it is part of other models"


# Smallest model first.
SCALES = (Scale(16, 4, 2), Scale(16, 4, 2, True), Scale(8, 4, 2), Scale(8, 1, 2), Scale(8, 4, 0), Scale(16, 1, 0),
          Scale(4, 1, 2), Scale(4, 1, 2, True), Scale(2, 4, 2), Scale(1, 1, 2), Scale(1, 1, 0))  # fmt: skip
_worked: dict[str, list[Scale]] = {}
"""By type, the scales to try for its next class."""


def auto_classes(model_type: str) -> dict[str, list[str]]:
    """Class name → the Auto classes that build it for `model_type`."""
    found: dict[str, list[str]] = {}
    for name, auto in sorted(vars(modeling_auto).items()):
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            classes = auto._model_mapping._model_mapping.get(model_type)
            for cls in [classes] if isinstance(classes, str) else list(classes or ())[:1]:
                if OWN_TYPE_ONLY.get(cls, model_type) == model_type:
                    found.setdefault(cls, []).append(name)
    return found


@dataclasses.dataclass
class Built:
    """A model, or why there is none."""

    model_type: str
    class_name: str
    autos: list[str]
    model: PreTrainedModel | None
    inputs: dict[str, Any] | None
    """None: only its parts can be run."""
    problem: str
    parts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """Inputs of models inside the model that its own forward does not run, by path: they are run on their own."""
    seed: int = 0

    def outputs(self, model: nn.Module | None = None) -> list[Tensor]:
        """All that the model and the parts return, or another instance of the same model."""
        model = model or self.model
        assert model is not None
        found = [] if self.inputs is None else outputs(model, self.inputs)
        for path, inputs in self.parts.items():
            found += outputs(model.get_submodule(path), inputs)
        return found

    def idle(self) -> list[str]:
        """Models inside the model of which nothing is run."""
        assert self.model is not None
        return [path for path in idle_parts(self.model, self.inputs) if path not in self.parts]


def small_models(model_type: str, only: str | None = None) -> Iterator[Built]:
    """For each class of the type: the smallest model that runs, with its inputs, or the reason why none does."""
    for name, autos in auto_classes(model_type).items():
        if only is None or name == only:
            yield build(model_type, name, autos)
            gc.collect()


def build(model_type: str, class_name: str, autos: list[str], seed: int = 0) -> Built:
    """The smallest model of one class that runs."""
    problem = ""
    cls = getattr(transformers, class_name, None)
    if cls is None:
        return Built(model_type, class_name, autos, None, {}, NOT_EXPORTED)
    if not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        return Built(model_type, class_name, autos, None, {}, missing(class_name, cls))
    best: tuple[list[str], Scale, int] | None = None  # idle parts, scale, which inputs
    for scale in _worked.get(model_type, list(SCALES)):
        try:
            model = _model(cls, model_type, scale, seed)
        except ImportError as error:
            return Built(model_type, class_name, autos, None, {}, missing(class_name, cls, error))
        except Exception as error:
            problem = problem if isinstance(error, MemoryError) and problem else f"build: {first_line(error)}"
            continue
        for i, inputs in enumerate(candidate_inputs(model, model_type)):
            try:
                out = outputs(model, inputs)
                if out and not any(t.isnan().any() for t in out):
                    idle = idle_parts(model, inputs)
                    if best is None or len(idle) < len(best[0]):
                        best = idle, scale, i
                    if not idle:
                        break
                else:
                    problem = "run: its outputs are not numbers" if out else "run: no tensors come out"
            except ImportError as error:
                return Built(model_type, class_name, autos, None, {}, missing(class_name, cls, error))
            except Exception as error:
                problem = f"run: {first_line(error)}"
        del model
        tries = SCALES.index(scale) - (SCALES.index(best[1]) if best else 0)
        if best is not None and (not best[0] or tries >= 3):
            break
    if best is None:
        built = _in_parts(cls, model_type, autos, seed)
        if built is not None:
            return built
        _worked.setdefault(model_type, list(SCALES[:1]))
        return Built(model_type, class_name, autos, None, {}, problem)
    _worked[model_type] = [best[1], *SCALES]
    model = _model(cls, model_type, best[1], seed)
    inputs = next(itertools.islice(candidate_inputs(model, model_type), best[2], None))
    return Built(model_type, class_name, autos, model, inputs, "", _alone(model, best[0]), seed)


def _alone(model: PreTrainedModel, paths: list[str]) -> dict[str, dict[str, Any]]:
    """Inputs of those parts of a model that run on inputs of their own."""
    parts = {}
    for path in paths:
        part: Any = model.get_submodule(path)
        for own in candidate_inputs(part, part.config.model_type):
            with suppress(Exception):
                out = outputs(part, own)
                if out and not any(t.isnan().any() for t in out) and not idle_parts(part, own):
                    parts[path] = own
                    break
    return parts


def _in_parts(cls: type[PreTrainedModel], model_type: str, autos: list[str], seed: int) -> Built | None:
    """A model that has no forward pass of its own, or one that takes objects: the models that it is made of."""
    for scale in SCALES[:3]:
        with suppress(Exception):
            model = _model(cls, model_type, scale, seed)
            paths = idle_parts(model, None)
            parts = _alone(model, paths)
            if parts:
                return Built(model_type, cls.__name__, autos, model, None, "", parts, seed)
    return None


def _model(cls: type[PreTrainedModel], model_type: str, scale: Scale, seed: int) -> PreTrainedModel:
    """A random model of this size; MemoryError if it is too large."""
    torch.manual_seed(seed)
    count = 0
    with suppress(Exception), torch.device("meta"):  # some models cannot be built there
        config = own_config(cls, small_config(model_type, scale))
        count = sum(p.numel() for p in cls._from_config(config, dtype=torch.float32).parameters())
    if count > MOST_PARAMETERS:
        raise MemoryError(f"{count / 1e6:.0f}M parameters at the smallest size that its config allows")
    torch.manual_seed(seed)
    model = cls._from_config(own_config(cls, small_config(model_type, scale)), dtype=torch.float32).eval()
    randomise(model)
    return model


def missing(class_name: str, cls: Any, error: Exception | None = None) -> str:
    """Which package a class needs."""
    if error is None:
        try:
            cls.from_pretrained("none")
        except Exception as raised:
            error = raised
    found = re.search(r"requires the (.+?) library|No module named '([\w.]+)'|pip install ([\w-]+)", str(error))
    package = next((g for g in found.groups() if g), "") if found else first_line(error)
    return f"needs {package}"


def first_line(error: BaseException | None) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:200]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights large enough that every layer shows in the output; biases and norms that are not 0 and 1."""
    done: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in done or not parameter.is_floating_point() or not parameter.numel():
            continue
        done.add(id(parameter))
        if parameter.dim() >= 2 and "embed" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias") and parameter.dim() == 1:
            parameter.normal_(std=0.1)
        elif name.endswith("weight") and parameter.dim() == 1:
            parameter.uniform_(0.7, 1.3)
        elif parameter.dim() == 1 and re.search(r"scale|gamma|lambda", name) and not re.search(r"logit", name):
            parameter.uniform_(0.5, 1.0)


def idle_parts(model: nn.Module, inputs: dict[str, Any] | None) -> list[str]:
    """Models inside the model, such as a vision tower, of which the inputs run nothing: nothing is found in them."""
    ran: set[nn.Module] = set()
    handles = [m.register_forward_hook(lambda m, *_: ran.add(m)) for m in model.modules() if isinstance(m, nn.Linear)]
    if inputs is not None:
        outputs(model, inputs)
    for handle in handles:
        handle.remove()
    found: list[str] = []
    for name, part in model.named_modules():
        if not name:
            continue
        linears = [m for m in part.modules() if isinstance(m, nn.Linear)]
        inside = any(name.startswith(other + ".") for other in found)
        if isinstance(part, PreTrainedModel) and len(linears) > 1 and not inside and not ran & set(linears):
            found.append(name)
    return found


@torch.no_grad()
def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """All tensors that the model returns, with the random state at the same place each time."""
    torch.manual_seed(0)
    copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return [t.clone() for t in tensors(model(**copies))]


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output.float()] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for o in output for t in tensors(o)]
    if isinstance(output, transformers.cache_utils.Cache) or not hasattr(output, "__dict__"):
        return []
    return []


def candidate_inputs(model: PreTrainedModel, model_type: str) -> Iterator[dict[str, Any]]:
    """Inputs to try, in order: what example_inputs makes, then what the exceptions table says."""
    generator = torch.Generator().manual_seed(1)
    make = INPUTS.get((model_type, type(model).__name__)) or INPUTS.get((model_type, "*"))
    if make is not None:
        yield make(model, generator)
        return
    yield from candidates(model)
