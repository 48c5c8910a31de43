"""Every method at every active share, on the same model, texts and tokens; what is measured is kept at once.

`results.json` holds ``{"settings", "dense": {text: perplexity}, "cells": [...]}``. A cell has "method", "active" (what
was asked for), "bytes" and "macs" (what tokens of the first text took of the dense layers', everything counted, see
methods.Made.costs), "seconds" of conversion, "evaluation_seconds", and for each text, such as "test" and "ood",
``{"perplexity", "ratio", "kl", "agreement"}``: the ratio to the dense model's, the mean KL(dense || model) in nats, and
how often both find the same token most likely. A cell that failed has "error" instead. "identity" is what it depends
on.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from methods import Maker, Method
from reference import Reference
from torch import Tensor, nn

from peerify import __version__
from peerify.errors import OutputError, PeerifyError
from peerify.evaluation import evaluate

Progress = Callable[[str, int, int], None]
FILE = "results.json"


def run_matrix(
    dense: Any,
    *,
    name: str,
    calibration_bt: Tensor,
    texts: dict[str, Tensor],
    labels: dict[str, Any],
    methods: list[Method],
    actives: list[float],
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    finished: Callable[[dict[str, Any]], object] = lambda results: None,
) -> dict[str, Any]:
    """Measure every cell that `out` does not hold yet.

    Args:
        dense: a causal language model, in eval mode; left as it is.
        name: of the model, for people.
        calibration_bt, texts: windows of token ids; texts by name, "test" and perhaps "ood".
        labels: names of the files, for people.
        out: folder, made if need be.
        finished: called with the results after every cell.

    Raises:
        OutputError: `out` holds results of another model, text or number of tokens, or cannot be written.
        UsageError: a method with options that there are not.
    """
    cells_wanted = [(method, active, method.identity(active)) for method in methods for active in actives]
    settings = {
        "model": name,
        "weights": _weights_digest(dense),
        "seed": seed,
        "texts": labels,
        "tokens": {key: windows.numel() for key, windows in [("calibration", calibration_bt), *texts.items()]},
        "context": calibration_bt.shape[1],
        "windows": {key: _digest(windows) for key, windows in [("calibration", calibration_bt), *texts.items()]},
    }
    results = _earlier(out, settings)
    results["machine"] = {"peerify": __version__, "torch": torch.__version__, "threads": torch.get_num_threads()}
    reference = Reference(dense)
    missing = [wanted for wanted in cells_wanted if not _known(results, *wanted)]
    if missing or not results["dense"]:
        for key, windows in texts.items():  # also fills the reference's memory
            results["dense"][key] = evaluate(reference, windows, progress=_under(progress, f"dense, {key}"))[
                "perplexity"
            ]
        _write(out, results)
    maker = None
    started = time.monotonic()
    for done, (method, active, identity) in enumerate(missing):
        maker = maker or Maker(dense, calibration_bt, seed)
        left = (time.monotonic() - started) / done * (len(missing) - done) / 60 if done else None
        heading = f"{method.name} at {active:.4g} ({done + 1} of {len(missing)}"
        heading += ")" if left is None else f", about {left:.0f} min left)"
        if not _known(results, method, active, identity):  # unless another name for the same was measured just now
            cell = {"method": method.name, "active": active, "identity": identity}
            _add(results, cell | _measure(maker, method, active, texts, reference, _under(progress, heading)))
        _write(out, results)
        finished(results)
    return results


def _measure(
    maker: Maker, method: Method, active: float, texts: dict[str, Tensor], reference: nn.Module, progress: Progress
) -> dict[str, Any]:
    """The figures of one cell; a method that has no room for this share says why instead."""
    try:
        made = maker.make(method, active, progress)
        costs: dict[str, float] = {}
        start = time.perf_counter()
        found: dict[str, Any] = {}
        for key, windows in texts.items():
            for layer in made.layers:
                getattr(layer, "forget", lambda: None)()
            measured = evaluate(made.model, windows, against=reference, progress=progress)
            costs = costs or made.costs(measured["layers"])
            found[key] = {
                "perplexity": measured["perplexity"],
                "ratio": measured["against"]["ratio"],
                "kl": measured["against"]["kl"],
                "agreement": measured["against"]["agreement"],
            }
        seconds = time.perf_counter() - start
        return {**found, **costs, "seconds": made.seconds, "evaluation_seconds": seconds}
    except PeerifyError as error:
        return {"error": str(error)}
    finally:
        gc.collect()  # a model copy for each cell, with cycles in it


def _known(results: dict[str, Any], method: Method, active: float, identity: dict[str, Any]) -> bool:
    """Whether there is such a cell, after one of the same identity and another name was copied."""
    alike = [cell for cell in results["cells"] if cell["identity"] == identity and "error" not in cell]
    if alike and all(cell["method"] != method.name for cell in alike):
        _add(results, {**alike[0], "method": method.name, "active": active})
    return bool(alike)


def _add(results: dict[str, Any], cell: dict[str, Any]) -> None:
    """Add a cell, in the place of an older one."""
    place = (cell["method"], cell["active"])
    results["cells"] = [*(old for old in results["cells"] if (old["method"], old["active"]) != place), cell]


def _earlier(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    path = out / FILE
    fresh: dict[str, Any] = {"settings": settings, "machine": {}, "dense": {}, "cells": []}
    if not path.exists():
        return fresh
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        earlier = results["settings"]
    except (ValueError, KeyError, TypeError):
        raise OutputError(f"{path} is not a result of this benchmark: remove it or name another --out") from None
    differing = [key for key in settings if key != "texts" and earlier.get(key) != settings[key]]
    if differing:
        raise OutputError(
            f"{path} was measured with another {differing[0]} ({earlier.get(differing[0])}, now "
            f"{settings[differing[0]]}): name another --out, or remove it to begin anew"
        )
    return fresh | results


def _write(out: Path, results: dict[str, Any]) -> None:
    write_whole(out / FILE, json.dumps(results, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}") from error


def _under(progress: Progress | None, heading: str) -> Progress:
    return lambda stage, done, total: progress(f"{heading}: {stage}", done, total) if progress else None


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _digest(windows_bt: Tensor) -> str:
    return hashlib.sha256(windows_bt.cpu().numpy().tobytes()).hexdigest()[:12]
