"""What `peerify bench` and `peerify env` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peerify.cli.tables import _bytes as in_bytes
from peerify.cli.tables import _console as console_on_stdout
from peerify.cli.tables import _table as new_table

TRAINS = {"peer": "train PEER", "full": "train all"}  # narrow, so that rows fit 80 columns


def print_bench(result: Mapping[str, Any]) -> None:
    """Tokens per second, dense and converted, and how that compares with what is possible."""
    console = console_on_stdout()
    head = f"{result['model']} beside {result['against']}: {result['dtype']}, {result['device']}"
    console.print(f"{head}, {result['threads']} threads; tokens per second\n")
    table = new_table("", ">at once", ">budget", ">dense", ">converted", ">ratio", ">spread", ">limit")
    rows = [("decode", row["batch"], row) for row in result["decode"]]
    rows += [("read a prompt", row["tokens"], row) for row in result["prefill"]]
    rows += [(TRAINS[row["trains"]], row["tokens"], row) for row in result["train"]]
    for what, count, row in rows:
        low, high = row["spread"]
        limit = f"{row['limit']:.2f}×" if "limit" in row else ""
        speeds = [f"{row[name]:.1f}" for name in ("dense", "converted")]
        ratio = [f"{row['ratio']:.2f}×", f"{low:.2f}–{high:.2f}"]
        table.add_row(what, str(count), f"{row['active']:.4g}", *speeds, *ratio, limit)
    console.print(table)
    first = [f"{row['first_token_s']:.3g} s at {row['active']:.4g}" for row in result["prefill"]]
    console.print(
        f"first token of a prompt: {result['prefill'][0]['dense_first_token_s']:.3g} s dense, {', '.join(first)}"
    )
    held = result["memory"]
    peak = result["peak_rss_mb"]
    both = f"; the process held {in_bytes(1e6 * peak)} with both" if peak is not None else ""
    console.print(f"memory: {in_bytes(held['dense'])} dense, {in_bytes(held['converted'])} converted{both}")
    if result["kernel"]:
        console.print(f"The kernel for few tokens is not used: {result['kernel']}")


def print_environment(result: Mapping[str, Any]) -> None:
    """Versions, devices, fast paths."""
    console = console_on_stdout()
    table = new_table("", "")
    table.show_header = False
    for name, value in {"peerify": result["peerify"], "python": result["python"], **result["packages"]}.items():
        table.add_row(name, value or "not installed")
    table.add_row("platform", result["platform"])
    table.add_row("devices", ", ".join(result["devices"]) + f" ({result['threads']} threads)")
    for name, reason in result["kernels"].items():
        table.add_row(f"kernel ({name})", "used" if reason is None else f"not used: {reason}")
    console.print(table)
