"""Checkpoints of a run: whole or not at all, and the same files whatever the number of processes.

A checkpoint is a folder `step-000120` with model.safetensors (everything by its name in the model), optimizer.pt (the
optimizer's state by parameter name) and run.json (stage, step, position in the text, recipe). Random numbers need no
state: they are drawn afresh in every step from the seed, the step and the process.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.files import is_checkpoint
from peerify.errors import CheckpointError, UsageError
from peerify.reading import printable, read_object, reason, shown
from peerify.training.tables import SUM, TABLES, RowOptimizer

NAME = re.compile(r"step-(\d{6,})")
BEST = "best"
_UNFINISHED = re.compile(r"\.(step-\d+|best)\.(tmp|old)-\d+")
_GONE = re.compile(r"\.(step-\d+|best)\.gone")
# Keys of `train` that a run may change on the way: they do not change what is computed.
FREE = {
    *("output", "loggers", "log_every", "checkpoints", "evaluation", "spike"),
    *("gradient_checkpointing", "micro_batch_size"),
}


@dataclass(kw_only=True)
class RunState:
    """Where a run is; JSON."""

    stage: int = 0
    step_in_stage: int = 0
    step: int = 0
    position: dict[str, Any] | None = None
    best_perplexity: float | None = None
    best_step: int | None = None
    losses: list[float] = field(default_factory=list)
    """Of the last steps, for the detection of spikes."""
    use: dict[str, dict[str, float]] = field(default_factory=dict)
    """The last report of how evenly experts are found; see `Use.report`."""
    recipe: dict[str, Any] = field(default_factory=dict)


_STATE = TypeAdapter(RunState)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and kept buffers by name, whole, on the CPU. Every process must call it."""
    tensors = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - tensors.keys()
    state = model.state_dict()
    tensors |= {name: state[name] for name, _ in model.named_buffers() if name in state and name not in tied}
    return {name: _whole(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def put_weights(model: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """The reverse of `weights_of`, in place.

    Raises:
        CheckpointError: names or shapes differ.
    """
    targets = dict(model.named_parameters())
    state = model.state_dict()
    targets |= {name: state[name] for name, _ in model.named_buffers() if name in state}
    wrong = sorted(weights.keys() ^ targets.keys())
    wrong += [name for name in weights.keys() & targets.keys() if weights[name].shape != targets[name].shape]
    if wrong:
        raise CheckpointError(
            f"{where} does not fit the model: {wrong[0]} differs; was {where} made from another converted model?"
        )
    for name, tensor in weights.items():
        assign(targets[name], tensor)


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into `target`, of which this process may hold a part."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def optimizer_state(parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by the name of each parameter, whole, on the CPU. Every process must call it."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items()}
    result = {}
    for parameter, state in optimizer.state.items():
        result[names[parameter]] = {
            key: _whole(value) if isinstance(value, Tensor) else value for key, value in state.items()
        }
    return result


@torch.no_grad()
def put_optimizer_state(
    parameters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    states: dict[str, dict[str, Any]],
    where: str,
) -> None:
    """The reverse of `optimizer_state`.

    Raises:
        CheckpointError: it names a parameter that does not train.
    """
    known = {parameter: group["name"] for group in optimizer.param_groups for parameter in group["params"]}
    rest = optimizer.rest if isinstance(optimizer, RowOptimizer) else optimizer
    for name, state in states.items():
        parameter = parameters.get(name)
        if parameter is None or parameter not in known:
            raise CheckpointError(f"{where} holds optimizer state for {printable(name)}, which does not train here")
        by_rows = known[parameter] == TABLES
        total = state.get(SUM)
        if by_rows and not (isinstance(total, Tensor) and total.shape == parameter.shape[:1]):
            raise CheckpointError(f"{where} does not hold {SUM} of the rows of {printable(name)}; was it changed?")
        adam = type(rest) in (torch.optim.AdamW, torch.optim.Adam) and not by_rows
        step = state.get("step")
        if adam and not (isinstance(step, Tensor) and step.numel() == 1 and step.item() >= 1):
            raise CheckpointError(f"{where} does not say how many steps {printable(name)} has taken; was it changed?")
        for key in ("exp_avg", "exp_avg_sq") if adam else ():
            if not isinstance(state.get(key), Tensor) or state[key].shape != parameter.shape:
                raise CheckpointError(f"{where} holds {key} of another shape for {printable(name)}; was it changed?")
        optimizer.state[parameter] = {
            key: _like(value, parameter, key) if isinstance(value, Tensor) else value for key, value in state.items()
        }


def _like(value: Tensor, parameter: Tensor, key: str) -> Tensor:
    if key == "step":  # AdamW keeps it on the CPU
        return value
    value = value.to(parameter.device)
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return tensor.cpu().clone().contiguous()


class Checkpoints:
    """The folder of a run's checkpoints. Only the main process writes."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self._complete()), None)

    def save(self, state: RunState, weights: dict[str, Tensor], optimizer: dict[str, dict[str, Any]] | None) -> Path:
        """Write a checkpoint, then remove those that are one too many.

        Raises:
            OutputError: the disk is full, or the folder cannot be written; earlier checkpoints stay.
        """
        target = self.folder / f"step-{state.step:06d}"
        with atomic_folder(target, overwrite=True, expected_bytes=_bytes(weights, optimizer)) as folder:
            _write(folder, weights, state)
            if optimizer is not None:
                torch.save(optimizer, folder / "optimizer.pt")
        self.prune()
        return target

    def prune(self) -> None:
        """Remove checkpoints that are too many: at a start, too, where a run was killed between writing and this."""
        for entry in sorted(self.folder.iterdir()):
            if _GONE.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
        for old in self._complete()[: -self.keep]:
            self._remove(old)

    def _remove(self, checkpoint: Path) -> None:
        """Whole or not at all: what a kill leaves of it bears a name that is cleared at the next start."""
        gone = checkpoint.with_name(f".{checkpoint.name}.gone")
        checkpoint.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _complete(self) -> list[Path]:
        """All complete checkpoints, the newest last. Folders appear only when complete."""
        if not self.folder.is_dir():
            return []
        found = [entry for entry in self.folder.iterdir() if NAME.fullmatch(entry.name) and is_checkpoint(entry)]
        return sorted(found, key=lambda entry: int(entry.name[5:]))

    def save_best(self, state: RunState, weights: dict[str, Tensor]) -> None:
        """Put these weights in the place of the best so far."""
        with atomic_folder(self.folder / BEST, overwrite=True, expected_bytes=_bytes(weights, None)) as folder:
            _write(folder, weights, state)

    @property
    def best(self) -> Path:
        """Where the best weights are, if any were measured."""
        return self.folder / BEST

    def clear(self) -> None:
        """Remove what a run wrote: checkpoints, the best, and unfinished ones. What others put there stays."""
        entries = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for entry in entries:  # hidden ones come first
            if _GONE.fullmatch(entry.name) or _UNFINISHED.fullmatch(entry.name):
                shutil.rmtree(entry, ignore_errors=True)
            elif (NAME.fullmatch(entry.name) or entry.name == BEST) and is_checkpoint(entry):
                self._remove(entry)


def read_state(folder: Path) -> RunState:
    """run.json of a checkpoint. Raises CheckpointError when it cannot be read, or is not what a run writes."""
    path, remedy = folder / "run.json", f"remove {folder} to go on from the checkpoint before"
    content = read_object(path, CheckpointError, remedy)
    try:
        unknown = content.keys() - RunState.__dataclass_fields__.keys()
        if unknown:
            raise ValueError(f"{shown(min(unknown))} is not known")
        found = _STATE.validate_json(json.dumps(content), strict=True)
        if min(found.stage, found.step_in_stage, found.step) < 0:
            raise ValueError("a negative step")
        return found
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        fault = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        fault = reason(error)
    raise CheckpointError(f"{folder} is no checkpoint of this version ({printable(fault)}); {remedy}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint. Raises CheckpointError when they cannot be read."""
    try:
        return load_file(folder / "model.safetensors")
    except Exception as error:
        raise CheckpointError(
            f"{folder / 'model.safetensors'} cannot be read ({reason(error)}); remove {folder} to go on "
            "from the checkpoint before"
        ) from None


def read_optimizer(folder: Path) -> dict[str, dict[str, Any]] | None:
    """The optimizer's state in a checkpoint, None at the start of a stage.

    Raises:
        CheckpointError: it cannot be read, or is no mapping of names to tensors and numbers. No code in it is run.
    """
    path = folder / "optimizer.pt"
    if not path.exists():
        return None
    remedy = f"remove {folder} to go on from the checkpoint before"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and pickle raise a dozen kinds, and advise to load it unsafely
        raise CheckpointError(
            f"{path} cannot be read as tensors alone ({type(error).__name__}); whoever made it, {remedy}"
        ) from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(state, dict) and all(map(_is_state, state.items()))
        for name, state in content.items()
    ):
        raise CheckpointError(f"{path} is not the state of an optimizer; {remedy}")
    return content


def _is_state(item: tuple[Any, Any]) -> bool:
    """Whether an optimizer may keep this under this name: finite numbers, or whatever its own class puts there."""
    key, value = item
    if isinstance(value, Tensor):
        return value.layout == torch.strided and (not value.is_floating_point() or bool(value.isfinite().all()))
    return isinstance(key, str) and (value is None or isinstance(value, str | bool | int | float | list | tuple | dict))


def check_same_recipe(saved: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Whether a run may go on from a checkpoint.

    Raises:
        UsageError: naming the first key that differs.
    """
    for key in sorted(saved.keys() | now.keys()):
        if saved.get(key) != now.get(key) and key.removeprefix("train.").split(".")[0] not in FREE:
            raise UsageError(
                f"{folder} was made with {key} {shown(saved.get(key))}, and the recipe says {shown(now.get(key))}: "
                "restore it, or start anew with --overwrite"
            )


def _write(folder: Path, weights: dict[str, Tensor], state: RunState) -> None:
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(asdict(state)) + "\n"
    (folder / "run.json").write_text(text, encoding="utf-8")
    (folder / "peerify.json").write_text(json.dumps({"checkpoint": state.step}) + "\n", encoding="utf-8")


def _bytes(weights: dict[str, Tensor], optimizer: dict[str, dict[str, Any]] | None) -> int:
    tensors = list(weights.values())
    for state in (optimizer or {}).values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
