"""What the page says, as plain data: report.json. Pictures and tables are drawn from it, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

import peerify
from peerify.choice import Wish, choose
from peerify.report.read import Run

OTHERS = ("oracle", "teal", "wina", "cmoe", "few-bits")  # methods of the benchmark that have a line beside peerify's
CURVES = {  # of a log: key -> what it is called
    "loss": "training loss",
    "kl": "KL from the dense model, nats per token",
    "eval_perplexity": "perplexity on the test text",
    "used": "experts that were read, %, mean of layers",
    "kl_uniform": "unevenness of their use, nats, mean of layers",
    "bytes": "bytes that a token reads, % of the dense layers', mean of layers",
}
PERCENT = ("used", "bytes")


def content_of(runs: Sequence[Run], wish: Wish) -> dict[str, Any]:
    """What the page shows of `runs`.

    Returns:
        ``{"peerify", "runs": [name], "wish", "decisions", "price", "speed", "use", "layers", "training",
        "continuations", "recipes"}``. decisions is a list of ``{"run", "active", "met", "said", "command", "bytes",
        "ratio", "speed"}``; the others are lists of what the runs have, and empty where they have nothing: see the
        functions below.
    """
    several = len(runs) > 1
    return {
        "peerify": peerify.__version__,
        "runs": [run.name for run in runs],
        "wish": vars(wish),
        "decisions": [decision for run in runs for decision in _decisions(run, wish)],
        "price": [line for run in runs for line in _price(run, several)],
        "speed": [{"run": run.name, **_speed(speed)} for run in runs for speed in run.speeds],
        "use": [found for run in runs for found in _use(run)],
        "layers": [{"run": run.name, "rows": rows} for run in runs if (rows := _layers(run))],
        "training": [{"run": run.name, "curves": curves} for run in runs if (curves := _curves(run.log))],
        "continuations": [found for run in runs for found in _continuations(run)],
        "recipes": [{"run": run.name, "yaml": recipe} for run in runs if (recipe := _recipe(run))],
    }


def _decisions(run: Run, wish: Wish) -> Iterable[dict[str, Any]]:
    """The share to take: as a sweep said, or by the same rule from an evaluation at several budgets."""
    for sweep in run.sweeps:
        row = next((row for row in sweep["rows"] if row["active"] == sweep["choice"]["active"]), None)
        if row is not None:
            yield _decision(run, sweep["choice"], row)
    measured = [] if run.sweeps else [text for text in run.evaluations if text.get("budgets")]
    if not measured:
        return
    fast = _fast(run)
    rows = [
        {**max(of_share, key=lambda row: row["ratio"]), "speed": fast.get(of_share[0]["active"])}
        for of_share in _by_share(measured)
    ]
    timed = bool(rows) and all(row["speed"] is not None for row in rows if row["active"] < 1)
    if any(row["active"] < 1 for row in rows) and (wish.min_speed is None or timed):
        chosen = choose(rows, wish)
        yield _decision(run, vars(chosen), next(row for row in rows if row["active"] == chosen.active))


def _decision(run: Run, choice: Mapping[str, Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "run": run.name,
        **{key: choice.get(key) for key in ("active", "met", "said", "command")},
        "bytes": row["bytes_fraction"],
        "ratio": row["ratio"],
        "speed": row.get("speed"),
    }


def _by_share(texts: Sequence[Any]) -> Iterable[list[Any]]:
    """Rows of a share that every text was measured at."""
    for share in (row["active"] for row in texts[0]["budgets"]):
        rows = [row for text in texts for row in text["budgets"] if row["active"] == share and row["ratio"] is not None]
        if len(rows) == len(texts):
            yield rows


def _fast(run: Run) -> dict[float, float]:
    """Share -> speed when decoding one token at a time."""
    return {row["active"]: row["ratio"] for speed in run.speeds for row in speed["decode"] if row.get("batch") == 1}


def _price(run: Run, several: bool) -> Iterable[dict[str, Any]]:
    """Lines ``{"run", "name", "text", "points": [{"active", "bytes", "macs", "ratio", "kl", "agreement"}]}``."""
    for text in run.evaluations:
        rows = [row for row in text.get("budgets", []) if row["ratio"] is not None]
        if rows:
            data = text.get("data") or "its text"
            told = [(row["active"], row["bytes_fraction"], row["macs_fraction"], row) for row in rows]
            yield _line(run, f"{run.name}, {data}" if several or len(run.evaluations) > 1 else data, data, told)
    for quality in run.qualities:
        cells = [cell for cell in quality["cells"] if (cell.get("test") or {}).get("ratio") and "bytes" in cell]
        methods = dict.fromkeys(cell["method"] for cell in cells)
        data = (quality["settings"].get("texts") or {}).get("test") or "its text"
        for method in (name for name in methods if name == "peerify" or name in OTHERS):
            own = [cell for cell in cells if cell["method"] == method]
            told = [(cell["active"], cell["bytes"], cell.get("macs"), cell["test"]) for cell in own]
            yield _line(run, f"{method} ({run.name})" if several else method, data, told)


def _line(run: Run, name: str, text: str, told: Iterable[tuple[float, float, float | None, Any]]) -> dict[str, Any]:
    points = [
        {"active": active, "bytes": read, "macs": macs, **{key: of.get(key) for key in ("ratio", "kl", "agreement")}}
        for active, read, macs, of in told
    ]
    return {"run": run.name, "name": name, "text": text, "points": sorted(points, key=lambda point: point["bytes"])}


def _speed(speed: Mapping[str, Any]) -> dict[str, Any]:
    """``{"dtype", "device", "threads", "rows": [{"work", "active", "dense", "converted", "ratio", "spread",
    "limit"}]}``; limit is Amdahl's, None where it was not measured."""
    trains = {"peer": "train the PEER layers", "full": "train everything"}
    rows = [(f"decode, {row.get('batch', 1)} at once", row) for row in speed["decode"]]
    rows += [(f"read a prompt of {row.get('tokens', 0):,}", row) for row in speed["prefill"]]
    rows += [(trains.get(row.get("trains", ""), "train"), row) for row in speed.get("train", [])]
    keys = ("active", "dense", "converted", "ratio", "spread")
    told = [{"work": work, **{key: row[key] for key in keys}, "limit": row.get("limit")} for work, row in rows]
    return {**{key: speed[key] for key in ("dtype", "device", "threads")}, "rows": told}


def _use(run: Run) -> Iterable[dict[str, Any]]:
    """``{"run", "text", "active", "layers": [{"path", "num_experts", "ranked", "grid"}]}``: see `details.use_of`."""
    for text in run.evaluations:
        layers = [layer for layer in text["layers"] if layer.get("ranked")]
        if layers:
            rows = [{key: layer.get(key) for key in ("path", "num_experts", "ranked", "grid")} for layer in layers]
            active = text["budgets"][0]["active"] if text.get("budgets") else None
            yield {"run": run.name, "text": text.get("data"), "active": active, "layers": rows}


def _layers(run: Run) -> list[dict[str, Any]]:
    """``{"path", "bytes", "error", "effective"}`` of each layer: its share of bytes and error as converted, and of how
    many experts its use was; of an evaluation alone the share that tokens read."""
    evaluated = {layer["path"]: layer for text in run.evaluations[:1] for layer in text["layers"]}
    told = {layer["path"]: layer for layer in run.layers} or evaluated
    return [
        {
            "path": path,
            "bytes": layer["bytes_fraction"],
            "error": layer.get("error"),
            "effective": evaluated.get(path, {}).get("effective_experts"),
            "experts": layer["num_experts"],
        }
        for path, layer in told.items()
    ]


def _curves(log: Sequence[Any]) -> dict[str, list[list[float]]]:
    """Key of CURVES -> [step, value] pairs."""
    curves: dict[str, list[list[float]]] = {}
    for row in log:
        layers = [*row.get("layers", {}).values(), *row.get("use", {}).values()]
        for key in CURVES:
            values = [layer[key] for layer in layers if key in layer]
            value = sum(values) / len(values) if values else row.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                curves.setdefault(key, []).append([row["step"], 100 * value if key in PERCENT else value])
    return curves


def _continuations(run: Run) -> Iterable[dict[str, Any]]:
    """A prompt of each text, as the evaluation has it, with "run" and "text"."""
    for text in run.evaluations:
        for prompt in text.get("continuations") or []:
            yield {"run": run.name, "text": text.get("data"), **prompt}


def _recipe(run: Run) -> str | None:
    """The recipe with which the model was made, and trained, as YAML."""
    if run.record is None:
        return None
    training = (run.record.get("training") or {}).get("recipe")
    recipe = dict(run.record["recipe"]) | ({"train": training} if training else {})
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).strip()
