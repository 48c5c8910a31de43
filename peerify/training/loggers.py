"""Where curves go: always a log.jsonl beside the checkpoints, and TensorBoard, W&B or trackio through Accelerate."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peerify.errors import UsageError

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def chosen(loggers: Sequence[str] | None) -> list[str]:
    """The loggers to use: those named, or tensorboard where it is installed.

    Raises:
        UsageError: one that is named is not installed.
    """
    if loggers is None:
        return ["tensorboard"] if _installed("tensorboard") else []
    for name in loggers:
        if not _installed(PACKAGES[name]):
            raise UsageError(
                f"train.loggers names {name}, which is not installed: pip install 'peerify[{name}]', or take it out"
            )
    return list(dict.fromkeys(loggers))


class LogFile:
    """One JSON object a line. Lines after the step from which a run goes on are dropped: they will come again."""

    def __init__(self, path: Path, *, from_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # the line that a killed run was writing
                    continue
                if row["step"] <= from_step:
                    kept.append(line)
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it is on its way to the disk when this returns."""
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()

    def close(self) -> None:
        """No more rows."""
        self._file.close()


def flat(row: dict[str, Any]) -> dict[str, float]:
    """A row for curves: {"layers": {path: {"used": x}}} becomes {"used/path": x}, and so on."""
    values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
    for path, statistics in (row.get("layers", {}) | row.get("use", {})).items():
        values |= {f"{name}/{path}": value for name, value in statistics.items()}
    return values


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
