"""The results of the zoo as docs/architectures.md, and back."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import transformers
from check import Result
from exceptions import REASONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "architectures.md"

OUTCOMES = {
    "exact": "exact",
    "halfrun": "exact as far as it was run",
    "partly": "exact, some layers left dense",
    "refused": "not convertible",
    "none": "no dense feed-forward",
    "missing": "cannot be built here",
    "unbuilt": "the zoo has no config or input for it",
    "part": "part of other models",
    "defect": "defect",
}
"""What an outcome is called in the table, best first."""

_HEAD = """\
# Architectures

<!-- Written by `make zoo`; do not edit. transformers {version} -->

Every model type of transformers {version}, through every Auto class that builds it: where a small random model could
be made by rule, all its dense feed-forward layers are converted with unit gates and everything retrieved; it is saved,
loaded back, and compared with the dense model, with text, pictures, video or sound as it takes them. *exact* means
that no output differs by more than 1e-5, relatively, in float32. A model inside the model that its forward pass does
not run (a codec, for instance) is compared on inputs of its own.

| outcome | types | meaning |
|---|---|---|
{counts}

Of {buildable} types that the zoo built and that have a dense feed-forward layer, {exact} ({share:.1f} %) are exact in
all their parts{halfrun}. The {unbuilt} types without a config or input are untested and not counted.
A layer is a *site* if it takes a vector of some width and returns one of the same width; projectors and
classification heads are none. Layers that cannot be converted stay dense, and `peerify inspect` says why:

{refused}

## Types
"""

_MEANING = {
    "exact": "all its dense feed-forward layers are converted, and it computes what it did before",
    "halfrun": "the same, but the zoo's inputs leave a part of the model out, and with it that part's layers",
    "partly": "the same for most of them; the rest stay dense",
    "refused": "has dense feed-forward layers of a form that a sum of neurons cannot express",
    "none": "routed experts, state space, convolutions, … instead",
    "missing": "needs the network or a package that is not installed",
    "unbuilt": "its default config or input does not make a small model by rule",
    "part": "no Auto class builds it alone; its layers are those of the models that it is part of",
    "defect": "wrong: to be mended",
}


def rows(results: Iterable[Result]) -> list[list[str]]:
    """Type, classes, sites, outcome, reason, worst relative error; classes of one fate share a row."""
    groups: dict[tuple[str, str, str, int], list[Result]] = {}
    for r in results:
        groups.setdefault((r.model_type, r.outcome, r.reason, r.sites), []).append(r)
    table = []
    for (model_type, outcome, reason, sites), group in groups.items():
        names = ", ".join(sorted({r.class_name for r in group})) or "-"
        error = f"{max(r.error for r in group):.0e}" if outcome in ("exact", "halfrun", "partly") else "-"
        count = str(sites) if outcome in ("exact", "halfrun", "partly") else "-"
        if outcome == "unbuilt":
            reason = REASONS.get(model_type, reason)
        cells = [model_type, names, count, OUTCOMES[outcome], reason.replace("|", "/") or "-", error]
        table.append(cells)
    return sorted(table)


def of_type(results: list[Result]) -> str:
    """The outcome of a whole type: the worst of its classes that could be built."""
    found = {r.outcome for r in results}
    for outcome in ("defect", "partly", "refused", "halfrun", "exact", "none", "unbuilt", "missing", "part"):
        if outcome in found:
            return outcome
    raise ValueError("no results")


def render(results: list[Result]) -> str:
    """The whole document."""
    types: dict[str, list[Result]] = {}
    for r in results:
        types.setdefault(r.model_type, []).append(r)
    count = Counter(of_type(group) for group in types.values())
    lines = [f"| {OUTCOMES[o]} | {count[o]} | {_MEANING[o]} |" for o in OUTCOMES if count[o]]
    dense = sum(count[o] for o in ("exact", "halfrun", "partly", "refused", "defect"))
    refused: dict[str, set[str]] = {}
    for r in results:
        if r.outcome in ("partly", "refused"):
            refused.setdefault(r.reason, set()).add(r.model_type)
    listed = [f"- {reason}: {', '.join(sorted(names))}" for reason, names in sorted(refused.items())]
    head = _HEAD.format(
        version=transformers.__version__,
        counts="\n".join(lines),
        buildable=dense,
        exact=count["exact"],
        halfrun=f" and {count['halfrun']} more as far as they were run" if count["halfrun"] else "",
        unbuilt=count["unbuilt"],
        share=100 * count["exact"] / max(1, dense),
        refused="\n".join(listed) or "(none)",
    )
    body = ["| type | class | sites | outcome | reason | worst error |", "|---|---|---|---|---|---|"]
    body += ["| " + " | ".join(cells) + " |" for cells in rows(results)]
    return head + "\n" + "\n".join(body) + "\n"


def documented() -> tuple[str, dict[str, list[list[str]]]]:
    """The transformers version of the document, and its rows (without the error) by type."""
    text = DOCUMENT.read_text(encoding="utf-8")
    version = re.search(r"<!-- Written by `make zoo`.*transformers (\S+) -->", text)
    assert version, "docs/architectures.md names no transformers version"
    found: dict[str, list[list[str]]] = {}
    for line in text.partition("## Types")[2].splitlines()[3:]:
        cells = line.strip("| ").split(" | ")
        found.setdefault(cells[0], []).append(cells[:5])
    return version[1], found
