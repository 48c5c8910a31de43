"""Curves of forgetting against learning, compared at equal perplexity of what is learned, as a table and a picture."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

COLOURS = {"full": "tab:red", "lora": "tab:orange", "peer": "tab:purple", "memory": "tab:blue"}


def at_level(curve: list[dict[str, Any]], level: float, figure: Callable[[dict[str, Any]], float]) -> float | None:
    """A figure where the curve first reaches the perplexity `level` of what is learned, between two points linearly in
    the logarithm of that perplexity; None if it never does."""
    for before, after in itertools.pairwise(curve):
        a, b, x = (math.log(value) for value in (before["learned"], after["learned"], level))
        if a >= x >= b and a > b:
            part = (a - x) / (a - b)
            return (1 - part) * figure(before) + part * figure(after)
    return None


def curves_of(results: dict[str, Any]) -> dict[str, dict[str, list[list[dict[str, Any]]]]]:
    """Method -> run -> a curve for each seed, from the original on."""
    found: dict[str, dict[str, list[list[dict[str, Any]]]]] = {}
    for row in results["runs"]:
        method = row["run"].partition("@")[0]
        found.setdefault(method, {}).setdefault(row["run"], []).append([results["original"], *row["points"]])
    return found


def levels_of(results: dict[str, Any]) -> list[float]:
    """The perplexity that every method reaches with all its seeds, and half of the way there."""
    curves = curves_of(results)
    reached = max(
        min(max(min(point["learned"] for point in curve) for curve in seeds) for seeds in runs.values())
        for runs in curves.values()
    )
    return [math.sqrt(reached * results["original"]["learned"]), reached]


def compared(results: dict[str, Any], level: float) -> list[dict[str, Any]]:
    """Of each method its run that forgets least at the level, which means the smallest mean KL over the watched texts:
    ``{"run", "seeds", "texts": {text: {"rise", "kl"}}}``, means over seeds, the rise of perplexity as a share.

    A run takes part if all its seeds reach the level.
    """
    original, rows = results["original"], []
    for method, runs in curves_of(results).items():
        best: dict[str, Any] | None = None
        for run, curves in runs.items():
            texts: dict[str, dict[str, float]] = {}
            for text, start in original["watched"].items():
                rises, kls = (
                    [at_level(curve, level, partial(_watched, text, key)) for curve in curves]
                    for key in ("perplexity", "kl")
                )
                if None in rises:
                    break
                texts[text] = {
                    "rise": mean(rise for rise in rises if rise is not None) / start["perplexity"] - 1,
                    "kl": mean(kl for kl in kls if kl is not None),
                }
            else:
                row = {"method": method, "run": run, "seeds": len(curves), "texts": texts}
                if best is None or _forgotten(row) < _forgotten(best):
                    best = row
        if best is not None:
            rows.append(best)
    return rows


def _watched(text: str, key: str, point: dict[str, Any]) -> float:
    return float(point["watched"][text][key])


def _forgotten(row: dict[str, Any]) -> float:
    return mean(text["kl"] for text in row["texts"].values())


def markdown(results: dict[str, Any], levels: list[float] | None = None) -> str:
    """A table for each level."""
    settings, original = results["settings"], results["original"]
    watched = list(original["watched"])
    lines = [
        f"{settings['learn']} is learned, up to {settings['steps'] * settings['batch_size'] * settings['context']:,} "
        f"tokens; perplexity of what is held out of it: {original['learned']:.2f} at the start."
    ]
    for level in levels or levels_of(results):
        heads = "".join(f" {text}: perplexity | KL |" for text in watched)
        lines += ["", f"At {level:.2f}:", "", f"| run | seeds |{heads}", "|---|---|" + "---|---|" * len(watched)]
        starts = "".join(f" {original['watched'][text]['perplexity']:.2f} | 0 |" for text in watched)
        lines.append(f"| the original | |{starts}")
        for row in compared(results, level):
            cells = "".join(f" {100 * row['texts'][t]['rise']:+.1f} % | {row['texts'][t]['kl']:.4f} |" for t in watched)
            lines.append(f"| {row['run']} | {row['seeds']} |{cells}")
    return "\n".join(lines) + "\n"


def draw(results: dict[str, Any], path: Path) -> None:
    """Write the picture (.svg), whole or not at all: perplexity and KL of each watched text against what is learned.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    watched = list(results["original"]["watched"])
    with plt.rc_context({"svg.hashsalt": "peerify", "svg.fonttype": "none", "font.size": 10}):
        figure, axes = plt.subplots(2, len(watched), figsize=(5 * len(watched), 8), layout="constrained", squeeze=False)
        for column, text in enumerate(watched):
            for row, key in enumerate(("perplexity", "kl")):
                panel, named = axes[row][column], set[str]()
                for method, runs in curves_of(results).items():
                    for curve in (curve for curves in runs.values() for curve in curves):
                        label = None if method in named else method
                        named.add(method)
                        panel.plot(
                            [point["learned"] for point in curve],
                            [point["watched"][text][key] for point in curve],
                            color=COLOURS.get(method.partition("+")[0]),
                            linestyle="--" if "+" in method else "-",
                            marker=".",
                            label=label,
                        )
                panel.invert_xaxis()
                panel.set_xlabel(f"perplexity of {results['settings']['learn']}, held out")
                panel.set_ylabel(
                    f"{text}: perplexity" if key == "perplexity" else f"{text}: KL from the original, nats"
                )
                panel.grid(alpha=0.25)
        axes[0][0].legend(frameon=False)
        beside = path.with_name(f".{path.name}.tmp")
        figure.savefig(beside, format="svg", metadata={"Date": None})
        plt.close(figure)
    os.replace(beside, path)
