"""The picture of a run: how many experts were found, and how unevenly, over its tokens."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

PICTURE = "use.svg"


def draw_use(log: Path, picture: Path) -> bool:
    """Draw the lines about use that a log.jsonl has; False where it has none, or matplotlib is not installed.

    The same log gives the same bytes.
    """
    curves = curves_of(log)
    if not curves or importlib.util.find_spec("matplotlib") is None:
        return False
    import matplotlib
    from matplotlib.figure import Figure  # without pyplot, which would open windows and keep figures

    with matplotlib.rc_context({"svg.hashsalt": "peerify", "svg.fonttype": "none"}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True)
        for path, points in curves.items():
            tokens = [point["seen"] for point in points]
            label = f"{path}: {int(points[-1]['experts']):,} experts"
            (line,) = above.plot(tokens, [100 * point["used"] for point in points], marker="o", label=label)
            ceiling = [100 * point["reachable"] / point["experts"] for point in points]
            above.plot(tokens, ceiling, linestyle=":", color=line.get_color())
            below.plot(tokens, [point["kl_uniform"] for point in points], marker="o", color=line.get_color())
        above.set_ylabel("experts found, % (dotted: at most)")
        above.set_ylim(0, 103)
        above.legend(fontsize="small")
        below.set_ylabel("KL of use from uniform, nats")
        below.set_xlabel("tokens of training; each point is of the tokens since the one before")
        below.set_ylim(bottom=0)
        figure.savefig(picture, metadata={"Date": None} if picture.suffix == ".svg" else None)
    return True


def curves_of(log: Path) -> dict[str, list[dict[str, Any]]]:
    """Path of a pool -> its reports, each with "seen": tokens of the run so far."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        for path, report in json.loads(line).get("use", {}).items():
            points = curves.setdefault(path, [])
            points.append({**report, "seen": report["tokens"] + (points[-1]["seen"] if points else 0)})
    return curves
