"""What people read of `peerify sweep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerify.cli.layout import console as make_console
from peerify.cli.layout import table as make_table


def print_sweep(result: Mapping[str, Any]) -> None:
    """One row per share, then which to take and how."""
    console = make_console()
    found, speed = result["evaluation"], result["speed"]
    texts = found.get("texts", [found])
    console.print(f"{result['model']} beside {result['against']}\n")
    timed = (">tokens/s", ">speed", ">limit") if speed else ()
    table = make_table(">share", ">bytes", ">multiply-\nadds", ">perplexity\nover dense", ">same\ntoken", *timed)
    for row in result["rows"]:
        fast = [f"{row['tokens_per_s']:.1f}", f"{row['speed']:.2f}×", f"{row['limit']:.2f}×"] if speed else []
        table.add_row(
            f"{row['active']:.4g}",
            f"{row['bytes_fraction']:.1%}",
            f"{row['macs_fraction']:.1%}",
            f"{row['ratio']:.3f}×",
            f"{row['agreement']:.1%}",
            *fast,
        )
    console.print(table)
    worst = f", at each share the one of {len(texts)} that loses most" if len(texts) > 1 else ""
    console.print(f"on {', '.join(text['data'] for text in texts)}{worst}; {texts[0]['tokens']:,} tokens")
    if result["unreachable"]:
        shares = ", ".join(f"{share:g}" for share in result["unreachable"])
        console.print(f"not measured, since these layers cannot read so little: {shares}")
    if speed:
        dense = speed["decode"][0]["dense"]
        console.print(
            f"one token at a time, {speed['dtype']}, {speed['device']}, {speed['threads']} threads; the dense model: "
            f"{dense:.1f} tokens/s"
        )
    choice = result["choice"]
    console.print(f"\n{choice['said']}.\n{choice['command']}")
