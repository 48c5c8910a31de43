"""What people read of `peerify eval`. Results noted by older versions lack keys: nothing is shown for these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from peerify.cli.layout import console as make_console
from peerify.cli.layout import table as make_table

# Headings of two lines, so that tables fit 80 columns.
COMPARED = ">ratio", ">KL from\ndense", ">same\ntoken", ">tokens\nalike"


def print_evaluation(result: Mapping[str, Any]) -> None:
    """Perplexities, at each budget if there are several, then one row per PEER layer; or one table of several texts."""
    console = make_console()
    if "texts" in result:
        _print_texts(console, result["texts"])
        return
    against = result["against"]
    if against:
        table = make_table("model", ">perplexity", *COMPARED)
        table.add_row(result["model"], f"{result['perplexity']:.2f}", *_compared(against))
        table.add_row(against["model"], f"{against['perplexity']:.2f}")
    else:
        table = make_table("model", ">perplexity")
        table.add_row(result["model"], f"{result['perplexity']:.2f}")
    console.print(table)
    console.print(f"{result['tokens']:,} tokens")
    if len(result.get("budgets", [])) > 1:
        _print_budgets(console, result["budgets"])
    if result["layers"]:
        _print_layers(console, result["layers"])


def _compared(found: Mapping[str, Any]) -> list[str]:
    """Cells below `COMPARED`."""
    return [
        _shown("{:.3f}×", found.get("ratio")),
        _shown("{:.4f}", found.get("kl")),
        _shown("{:.1%}", found.get("agreement")),
        continued(found),
    ]


def continued(found: Mapping[str, Any]) -> str:
    """How many tokens were alike, of how many; of a model without a cache there are none."""
    if "continuation" not in found:
        return ""
    alike = found["continuation"]
    return "–" if alike is None else f"{alike['mean']:.1f}/{alike['of']}"


def _shown(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def _print_budgets(console: Console, budgets: Sequence[Mapping[str, Any]]) -> None:
    """One row per budget."""
    compared = budgets[0].get("ratio") is not None
    more = (*COMPARED, ">after\nprefill") if compared else ()
    table = make_table(">active", ">bytes", ">multiply-\nadds", ">perplexity", *more)
    for row in budgets:
        table.add_row(
            f"{row['active']:.4g}",
            f"{row['bytes_fraction']:.1%}",
            f"{row['macs_fraction']:.1%}",
            f"{row['perplexity']:.2f}",
            *((*_compared(row), _after(row)) if compared else ()),
        )
    console.print()
    console.print(table)


def _after(row: Mapping[str, Any]) -> str:
    return "–" if row.get("after_prefill") is None else f"{row['after_prefill']:.3f}×"


def _print_texts(console: Console, texts: Sequence[Mapping[str, Any]]) -> None:
    """One row per text and budget, then what each text used of the layers."""
    first = texts[0]
    budgets, against = "budgets" in first, first["against"] is not None
    table = make_table(
        "text",
        *([">active"] if budgets else []),
        ">perplexity",
        *([">dense", *COMPARED] if against else []),
        *([">after\nprefill"] if budgets and against else []),
    )
    for text in texts:
        dense = text["against"] or {}
        rows = text.get("budgets", [{**dense, "perplexity": text["perplexity"]}])
        if len(rows) > 1:
            table.add_section()
        for i, row in enumerate(rows):
            table.add_row(
                "" if i else text["data"],
                *([f"{row['active']:.4g}"] if budgets else []),
                f"{row['perplexity']:.2f}",
                *([f"{dense['perplexity']:.2f}", *_compared(row)] if against else []),
                *([_after(row)] if budgets and against else []),
            )
    console.print(first["model"] + (f" beside {first['against']['model']}" if against else "") + "\n")
    console.print(table)
    counts = [f"{text['tokens']:,}" for text in texts]
    console.print(f"{', '.join(counts)} tokens")
    layers = len(first["layers"])
    if layers:
        table = make_table("text", ">bytes", ">multiply-\nadds", ">used", ">used\neffectively")
        for text in texts:
            table.add_row(text["data"], *_used(_mean(text["layers"])))
        console.print(f"\nmeans of {layers} layers, which --json tells apart:\n")
        console.print(table)


def _print_layers(console: Console, layers: Sequence[Mapping[str, Any]]) -> None:
    """What tokens used of each PEER layer, then the means."""
    table = make_table(
        "layer", ">experts", ">bytes", ">p5–p95\nof tokens", ">multiply-\nadds", ">used", ">used\neffectively"
    )
    for layer in layers:
        spread = layer.get("bytes_per_token")
        span = f"{100 * spread['p5']:.0f}–{spread['p95']:.0%}" if spread else ""
        read, *more = _used(layer)
        table.add_row(layer["path"], f"{layer['num_experts']:,}", read, span, *more)
        if "memory" in layer:
            memory = layer["memory"]
            table.add_row("  its memory", f"{memory['num_experts']:,}", "", "", "", *_used(memory)[2:])
    table.add_section()
    read, *more = _used(_mean(layers))
    table.add_row("mean", "", read, "", *more)
    console.print(table)


def _mean(layers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of what all layers tell."""
    keys = [key for key in ("bytes_fraction", "macs_fraction", "usage", "effective_experts") if key in layers[0]]
    return {key: sum(layer[key] for layer in layers) / len(layers) for key in keys}


def _used(layer: Mapping[str, Any]) -> list[str]:
    return [
        *(_shown("{:.1%}", layer.get(key)) for key in ("bytes_fraction", "macs_fraction", "usage")),
        _shown("{:,.0f}", layer.get("effective_experts")),
    ]
