"""Find what peerify's commands have written in folders and files, and check it before anything is drawn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from typing_extensions import NotRequired, TypedDict

from peerify.checkpoint.files import MARKER
from peerify.checkpoint.layer_options import check_layers
from peerify.checkpoint.record import checked, read_record
from peerify.errors import DataError, UsageError
from peerify.reading import local_path, printable, read_object, read_text

LOG = "log.jsonl"
REMEDY = "write it again with the command that it is of, or leave it out"
MORE = ConfigDict(extra="allow")


@with_config(MORE)
class Share(TypedDict):
    """A budget of an evaluation, or a row of a sweep."""

    active: float
    bytes_fraction: float
    macs_fraction: float
    ratio: float | None
    kl: NotRequired[float | None]
    agreement: NotRequired[float | None]
    speed: NotRequired[float | None]


@with_config(MORE)
class LayerUse(TypedDict):
    """What an evaluation tells of a layer."""

    path: str
    num_experts: int
    bytes_fraction: float
    ranked: NotRequired[list[float]]
    grid: NotRequired[list[list[float]] | None]
    effective_experts: NotRequired[float]


@with_config(MORE)
class Continued(TypedDict):
    """A continuation at a budget."""

    active: float
    tokens: list[str]
    bytes: list[float | None]
    alike: int


@with_config(MORE)
class Prompt(TypedDict):
    """A prompt and its continuations."""

    prompt: str
    dense: list[str]
    budgets: list[Continued]


@with_config(MORE)
class Evaluation(TypedDict):
    """What `peerify eval --json` says of one text."""

    model: str
    data: str
    tokens: int
    perplexity: float
    layers: list[LayerUse]
    against: NotRequired[dict[str, Any] | None]
    budgets: NotRequired[list[Share]]
    continuations: NotRequired[list[Prompt] | None]


@with_config(MORE)
class Timed(TypedDict):
    """A row of `peerify bench --json`."""

    active: float
    dense: float
    converted: float
    ratio: float
    spread: tuple[float, float] | list[float]
    batch: NotRequired[int]
    tokens: NotRequired[int]
    trains: NotRequired[str]
    limit: NotRequired[float]


@with_config(MORE)
class Speed(TypedDict):
    """What `peerify bench --json` says."""

    model: str
    against: str
    dtype: str
    device: str
    threads: int
    decode: list[Timed]
    prefill: list[Timed]
    train: NotRequired[list[Timed]]


@with_config(MORE)
class Chosen(TypedDict):
    """The share that a sweep recommends."""

    active: float
    met: bool
    said: str
    command: NotRequired[str]


@with_config(MORE)
class Sweep(TypedDict):
    """What `peerify sweep --json` says; its evaluation and speed are checked by themselves."""

    model: str
    choice: Chosen
    rows: list[Share]
    evaluation: dict[str, Any]
    speed: dict[str, Any] | None


@with_config(MORE)
class Cell(TypedDict):
    """A method at a share."""

    method: str
    active: float
    bytes: NotRequired[float]
    macs: NotRequired[float | None]
    test: NotRequired[dict[str, float | None]]


@with_config(MORE)
class Quality(TypedDict):
    """results.json of benchmarks/quality."""

    settings: dict[str, Any]
    cells: list[Cell]


@with_config(MORE)
class LogRow(TypedDict):
    """A line of log.jsonl."""

    step: int
    layers: NotRequired[dict[str, dict[str, float]]]
    use: NotRequired[dict[str, dict[str, float]]]


_KINDS: dict[str, tuple[set[str], TypeAdapter[Any]]] = {
    "sweep": ({"choice", "rows", "evaluation"}, TypeAdapter(Sweep)),
    "speed": ({"decode", "prefill"}, TypeAdapter(Speed)),
    "quality": ({"settings", "cells"}, TypeAdapter(Quality)),
    "evaluation": ({"perplexity", "tokens", "layers"}, TypeAdapter(Evaluation)),
}
_LOG: TypeAdapter[Any] = TypeAdapter(LogRow)


@dataclass
class Run:
    """All that was found under one name."""

    name: str
    record: dict[str, Any] | None = None
    """peerify.json."""
    layers: list[dict[str, Any]] = field(default_factory=list)
    """As of `converted_layers`, in the order in which they run, each with "error"."""
    sweeps: list[Any] = field(default_factory=list)
    evaluations: list[Any] = field(default_factory=list)
    """One for each text; those of sweeps among them."""
    speeds: list[Any] = field(default_factory=list)
    qualities: list[Any] = field(default_factory=list)
    log: list[Any] = field(default_factory=list)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to show."""
        found = (self.record, self.layers, self.evaluations, self.speeds, self.qualities, self.log)
        return not any(found)


def read_runs(places: Sequence[str]) -> list[Run]:
    """One `Run` for each folder or file; a file about a model whose folder is named as well belongs to that.

    Raises:
        UsageError: two have the same name.
        DataError: one is not there, holds nothing of peerify's, or something damaged.
    """
    runs: list[Run] = []
    for place in places:
        path = local_path(place, DataError)
        if not path.exists():
            raise DataError(f"{printable(place)}: no such file or folder")
        run = _read_folder(path) if path.is_dir() else _read_file(path)
        if run.empty:
            raise DataError(
                f"{printable(place)} holds nothing to report: give a converted model, the folder of a training run, or "
                "what `peerify eval`, `sweep` or `bench` print with --json"
            )
        if run.name in (other.name for other in runs):
            raise UsageError(f"two of the folders are called {printable(run.name)}: rename one, to tell them apart")
        runs.append(run)
    return _joined(runs)


def _joined(runs: Sequence[Run]) -> list[Run]:
    """The same, where what a file says of a model goes to the run that is this model's folder."""
    folders = {run.name: run for run in runs if run.record is not None}
    kept = []
    for run in runs:
        told = [*run.sweeps, *run.evaluations, *run.speeds]
        owner = None if run.record else next((folders.get(Path(each["model"]).name) for each in told), None)
        if owner is None or run.log or run.qualities:
            kept.append(run)
        else:
            owner.sweeps += run.sweeps
            owner.evaluations += run.evaluations
            owner.speeds += run.speeds
    return kept


def _read_folder(folder: Path) -> Run:
    run = Run(folder.resolve().name)
    if (folder / MARKER).exists():
        _read_model(run, folder)
    for path in sorted(folder.glob("*.json")):
        if path.name not in (MARKER, "config.json", "report.json"):
            _add(run, path, known_only=True)
    beside = folder.resolve().with_name(f"{folder.resolve().name}-run")  # of a training that made this model
    for log in (folder / LOG, beside / LOG):
        if log.exists():
            run.log += _read_log(log)
    return run


def _read_file(path: Path) -> Run:
    run = Run(path.stem)
    if path.suffix == ".jsonl":
        run.log = _read_log(path)
    else:
        _add(run, path, known_only=False)
    return run


def _read_model(run: Run, folder: Path) -> None:
    """The record of a converted model, and its layers."""
    from peerify.conversion.inspection import converted_layers

    record: Any = read_record(folder, DataError)
    config = read_object(folder / "config.json", DataError, "convert again")
    check_layers(config, str(folder / "config.json"), DataError)
    errors, run.record = record["layer_errors"], record
    order = {path: i for i, path in enumerate(errors)}  # as they run; config.json sorts them as text
    layers = sorted(converted_layers(folder), key=lambda layer: order.get(layer["path"], len(order)))
    kept = ("path", "num_experts", "bytes_fraction", "macs_fraction")
    run.layers = [{key: layer[key] for key in kept} | {"error": errors.get(layer["path"])} for layer in layers]


def _add(run: Run, path: Path, *, known_only: bool) -> None:
    """Add what a JSON file holds; of others nothing, where they may lie there."""
    try:
        value = read_object(path, DataError, REMEDY)
    except DataError:
        if known_only and path.name not in ("results.json", "eval.json", "sweep.json", "bench.json"):
            return  # somebody else's
        raise
    where = str(path)
    kind = next((kind for kind, (keys, _) in _KINDS.items() if keys <= value.keys()), None)
    texts = value.get("texts")
    if kind is None and isinstance(texts, list):
        run.evaluations += [_check("evaluation", text, where) for text in texts]
    elif kind == "sweep":
        run.sweeps.append(_check("sweep", value, where))
        found = value["evaluation"]
        run.evaluations += [_check("evaluation", text, where) for text in found.get("texts", [found])]
        if value["speed"] is not None:
            run.speeds.append(_check("speed", value["speed"], where))
    elif kind is not None:
        getattr(run, {"speed": "speeds", "quality": "qualities"}.get(kind, "evaluations")).append(
            _check(kind, value, where)
        )


def _check(kind: str, value: Any, where: str) -> Any:
    return checked(_KINDS[kind][1], value, where, DataError, REMEDY)


def _read_log(path: Path) -> list[Any]:
    rows = []
    for line in read_text(path, DataError, REMEDY).splitlines():
        try:
            rows.append(checked(_LOG, json.loads(line), str(path), DataError, REMEDY))
        except ValueError:  # the line that a killed run was writing
            continue
    return rows
