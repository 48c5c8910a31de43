"""The results as Markdown: first ratios at a glance, then every figure. Aligned, so that it reads as plain text too."""

from __future__ import annotations

from typing import Any

TEXTS = {"test": "test", "ood": "out of domain", "known": "known by heart"}


def markdown(results: dict[str, Any]) -> str:
    """The whole of table.md."""
    settings, cells = results["settings"], results["cells"]
    texts = [key for key in TEXTS if key in results["dense"]]
    actives = sorted({cell["active"] for cell in cells}, reverse=True)
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    at = {(cell["method"], cell["active"]): cell for cell in cells}
    tokens = ", ".join(f"{count:,} {key}" for key, count in settings["tokens"].items())
    names = "; ".join(f"{key}: {_names(value)}" for key, value in settings["texts"].items())
    dense = ", ".join(f"{results['dense'][key]:.2f} {TEXTS[key]}" for key in texts)
    glance = [
        [method, *(" / ".join(_ratio(at.get((method, active)), key) for key in texts) for active in actives)]
        for method in methods
    ]
    full = [_row(at[method, active], texts) for active in actives for method in methods if (method, active) in at]
    heads = [f"{TEXTS[key]} {what}" for what in ("×", "KL", "same") for key in texts]
    failed = [f"- {cell['method']} at {cell['active']:.4g}: {cell['error']}" for cell in cells if "error" in cell]
    parts = [
        f"# {settings['model']}",
        f"Tokens: {tokens}; windows of {settings['context']}. Texts: {names}.\nDense perplexity: {dense}.",
        f"Perplexity over the dense model's ({' / '.join(TEXTS[key] for key in texts)}), by active share:",
        _aligned(["method", *(_percent(active) for active in actives)], glance),
        "*bytes*, *macs*: what a token of the first text took of the dense layers' bytes (in bfloat16, batch 1) and "
        "multiply-adds,\nrouters and keys counted; the oracle's choosing costs nothing. *KL*: from the dense model, "
        "nats per token. *same*:\nshare of tokens for which both models find the same one most likely. *s*: seconds of "
        "conversion, for all budgets of a\nmodel that has several.",
        _aligned(["active", "method", "bytes", "macs", *heads, "s"], full),
        *(["Not possible:", "\n".join(failed)] if failed else []),
    ]
    return "\n\n".join(parts) + "\n"


def _row(cell: dict[str, Any], texts: list[str]) -> list[str]:
    start = [_percent(cell["active"]), cell["method"]]
    if "error" in cell:
        return [*start, *[""] * (3 * len(texts) + 3)]
    return [
        *start,
        _percent(cell["bytes"]),
        _percent(cell["macs"]),
        *(_ratio(cell, key) for key in texts),
        *(f"{cell[key]['kl']:.4f}" for key in texts),
        *(_percent(cell[key]["agreement"]) for key in texts),
        f"{cell['seconds']:.0f}",
    ]


def _ratio(cell: dict[str, Any] | None, key: str) -> str:
    if cell is None or "error" in cell:
        return "–"
    ratio = cell[key]["ratio"]
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.3g} %"


def _names(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else str(value)


def _aligned(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; words to the left, numbers to the right."""
    left = [column == "method" for column in head]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(row: list[str]) -> str:
        padded = [
            text.ljust(width) if is_left else text.rjust(width)
            for text, width, is_left in zip(row, widths, left, strict=True)
        ]
        return f"| {' | '.join(padded)} |"

    rule = [
        "-" * (width + 2) if is_left else "-" * (width + 1) + ":" for width, is_left in zip(widths, left, strict=True)
    ]
    return "\n".join([line(head), f"|{'|'.join(rule)}|", *map(line, rows)])
