"""What people read on stdout: tables. `print_json` is what scripts read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console

from peerify.cli.evaluation_tables import print_evaluation
from peerify.cli.layout import console as _console
from peerify.cli.layout import table as _table


def print_json(result: Mapping[str, Any]) -> None:
    """One JSON object on stdout; numbers that JSON cannot hold (NaN, infinity) become null."""
    sys.stdout.write(json.dumps(_finite(result), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_inspection(result: Mapping[str, Any]) -> None:
    """The feed-forward layers of a model; neighbours that differ in their number only share a row."""
    console = _console()
    sites = list(enumerate(result["feedforwards"]))
    console.print(f"{result['model']}: {result['model_type']}, {_count(result['parameters'])} parameters\n")
    for path, reason in result.get("unseen", {}).items():
        console.print(f"Not looked into: {path + ': ' if path else ''}{reason}\n")
    if not sites and "" in result.get("unseen", {}):
        return  # nothing is known of it
    if not sites:
        console.print("No dense feed-forward layer was found; routed experts cannot be converted.")
        return
    share = f">at {result['active']:.0%}"
    staying = ["stays dense"] if not all(site["convertible"] for _, site in sites) else []
    table = _table("", "layer", "kind", ">d_model×d_ff", ">read", share, ">FLOPs", share, *staying)
    for _, run in groupby(sites, key=lambda site: _alike(site[1])):
        rows = list(run)
        (first, site), (last, _) = rows[0], rows[-1]
        cost = [*map(_bytes, site["bytes_per_token"].values()), *map(_count, site["flops_per_token"].values())]
        table.add_row(
            str(first) if first == last else f"{first}–{last}",
            _common_path([row["path"] for _, row in rows]),
            f"{site['kind']} {site['activation'] or ''}",
            f"{site['d_model']}×{site['d_ff']}",
            *(cost if site["convertible"] else ["", "", "", "", f"because {site['reason']}"]),
        )
    console.print(table)
    totals = result["totals"]
    read, flops = totals["bytes_per_token"], totals["flops_per_token"]
    console.print(
        f"{totals['convertible']} of {len(sites)} layers can be converted; "
        f"with {result['active']:.0%} active, for each token they\n"
        f"  read {_bytes(read['dense'])} → {_bytes(read['converted'])} of weights in bfloat16\n"
        f"  take {_count(flops['dense'])} → about {_count(flops['converted'])} FLOPs"
    )
    if result.get("weights"):
        console.print(f"\nIt cannot be converted yet: {result['weights']}")
    elif totals["convertible"]:
        console.print(f"\nnext: peerify convert {result['model']} OUT --calibration TEXT.txt")


def print_conversion(result: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], *, last: bool = True) -> None:
    """One row per converted layer, then, if this is the `last` thing asked for, where the model lies and what next."""
    console = _console()
    product = any("grid" in layer for layer in layers)
    keys = (">grid", ">heads × top-k") if product else (">budgets",)
    table = _table("layer", ">experts", *keys, ">bytes", ">multiply-adds", ">error")
    order = {path: i for i, path in enumerate(result["layers"])}  # as they run; config.json sorts them as text
    for layer in sorted(layers, key=lambda layer: order[layer["path"]]):
        error = result["layer_errors"].get(layer["path"])
        table.add_row(
            layer["path"],
            f"{layer['num_experts']:,}",
            *(("×".join(map(str, layer["grid"])), _topk(layer)) if product else (f"{len(layer['budgets'])}",)),
            f"{layer['bytes_fraction']:.1%}",
            f"{layer['macs_fraction']:.1%}",
            "–" if error is None else f"{error:.4f}",
        )
    console.print(table)
    peak = result["peak_rss_mb"]
    memory = f" with at most {peak:,.0f} MB of memory" if peak is not None else ""
    console.print(
        f"{len(layers)} layers converted; a token reads {result['bytes_fraction']:.1%} of their bytes and takes "
        f"{result['macs_fraction']:.1%} of their multiply-adds; in {result['seconds']:.0f} s{memory}"
    )
    if result.get("grown"):
        _print_memories(console, result["grown"], layers)
    if last:
        _print_model(console, result["output"])


def print_growth(result: Mapping[str, Any], layers: Sequence[Mapping[str, Any]]) -> None:
    """One row per layer that has new experts, then what the model is now."""
    console = _console()
    _print_memories(console, result["layers"], layers)
    peak = result["peak_rss_mb"]
    memory = f" with at most {peak:,.0f} MB of memory" if peak is not None else ""
    console.print(
        f"{_count(result['parameters'])} parameters; it computes what it did, and in all PEER layers a token reads "
        f"{result['bytes_fraction']:.1%} of the dense layers' bytes and takes {result['macs_fraction']:.1%} of their "
        f"multiply-adds; in {result['seconds']:.0f} s{memory}"
    )
    console.print(f"model: {result['output']}")


def _print_memories(console: Console, paths: Iterable[str], layers: Sequence[Mapping[str, Any]]) -> None:
    """A row for each of `paths`, in their order."""
    by_path = {layer["path"]: layer for layer in layers}
    table = _table("layer", ">new experts", ">grid", ">heads × top-k", "pool", ">bytes", ">multiply-adds")
    for path in paths:
        layer, memory = by_path[path], by_path[path]["memory"]
        table.add_row(
            path,
            f"{memory['num_experts']:,}",
            "×".join(map(str, memory["grid"])),
            _topk(memory),
            f"of {memory['pool_of']}" if memory.get("pool_of") else "its own",
            f"{layer['bytes_fraction']:.1%}",
            f"{layer['macs_fraction']:.1%}",
        )
    console.print(table)


def print_densified(result: Mapping[str, Any]) -> None:
    """What was written."""
    console = _console()
    console.print(f"{len(result['layers'])} layers are dense again: a {result['architecture']}")
    console.print(f"model: {result['output']}")


def print_plan(result: Mapping[str, Any]) -> None:
    """One row per layer that could be converted, then what all of it would come to."""
    console = _console()
    layers = result["layers"]
    product = any(layer["topk"] for layer in layers)
    table = _table("layer", ">sensitivity", ">bytes", ">multiply-adds", *((">heads × top-k",) if product else ()))
    for layer in layers:
        table.add_row(
            layer["path"],
            f"{layer['sensitivity']:.4f}",
            *(
                (
                    f"{layer['bytes_fraction']:.1%}",
                    f"{layer['macs_fraction']:.1%}",
                    *((_topk(layer),) if product else ()),
                )
                if layer["converted"]
                else ("dense",)
            ),
        )
    console.print(table)
    console.print(
        f"{result['converted']} of {len(layers)} layers would be converted; of all {len(layers)} a token would read "
        f"{result['bytes_fraction']:.1%} of the bytes and take {result['macs_fraction']:.1%} of the multiply-adds\n"
        f"predicted perplexity: {result['predicted_ratio']:.3f}× the dense model's, to first order\n"
        f"next: peerify convert {result['model']} OUT, with the same options but --plan"
    )


def print_push(result: Mapping[str, Any]) -> None:
    """Every file, then where the model is; of a dry run the card as well."""
    console = _console()
    table = _table("file", ">size", "")
    rows = result["files"]
    for row in rows:
        state = "would be sent" if result.get("dry_run") else "sent" if row["sent"] else "was there"
        table.add_row(row["path"], _bytes(row["bytes"]), state)
    console.print(table)
    total = f"{len(rows)} files, {_bytes(sum(row['bytes'] for row in rows))}"
    if result.get("dry_run"):
        console.print(f"{total}; this was a dry run: nothing was sent to {result['repo']}\n\nREADME.md:\n")
        sys.stdout.write(result["card"])
        return
    what = "commit" if result["new_commit"] else "nothing had changed, commit"
    tag = f", tagged {result['tag']}" if result["tag"] else ""
    console.print(
        f"{total}; {what} {result['commit'][:12]}{tag}\n"
        "loaded back without peerify: the same answers as the folder's, to the bit\n"
        f"model: {result['url']}"
    )


def _print_model(console: Console, folder: str) -> None:
    console.print(f"model: {folder}\nnext: peerify eval {folder} --against DENSE --data TEXT.txt")


def print_training(result: Mapping[str, Any], *, last: bool = True) -> None:
    """How far training came, then, if this is the `last` thing asked for, where the model lies and what next."""
    console = _console()
    loss = "" if result["final_loss"] is None else f", loss {result['final_loss']:.4f}"
    console.print(f"{result['steps']:,} steps, {result['tokens']:,} tokens{loss}")
    if result["perplexity"] is not None:
        console.print(f"smallest perplexity measured on the way: {result['perplexity']:.2f}")
    for path, use in result["use"].items():
        console.print(
            f"{path}: the last {use['tokens']:,.0f} tokens found {use['used']:.1%} of {use['experts']:,.0f} experts "
            f"(at most {use['reachable']:,.0f} in reach, {use['dead']:,.0f} dead), KL from uniform "
            f"{use['kl_uniform']:.2f}"
        )
    if result["stopped"]:
        console.print(f"stopped early; checkpoint in {result['checkpoints']}")
    elif last:
        _print_model(console, result["output"])


def print_run(result: Mapping[str, Any], converted: Sequence[Mapping[str, Any]]) -> None:
    """What each stage of a recipe came to; `converted`: the layers of the converted model."""
    console = _console()
    if result["skipped"]:
        console.print(f"done before: {', '.join(result['skipped'])}")
    if "convert" in result["done"]:
        print_conversion(result["convert"], converted, last=False)
    if "train" in result["done"] or result["stopped"] == "train":
        print_training(result["train"], last=False)
    if "eval" in result:
        print_evaluation(result["eval"])
    if "push" in result["done"]:
        console.print(f"published: {result['push'].get('url', result['push'].get('repo'))}")
    if not result["stopped"]:
        console.print(f"model: {result['output']}")


def print_training_plan(plan: Mapping[str, Any]) -> None:
    """What a training run will do and take: one row per stage, then the totals."""
    console = _console()
    table = _table("stage", ">steps", ">tokens", "trains", ">trainable", "losses", "optimizer", ">FLOPs", ">memory")
    for stage in plan["stages"]:
        table.add_row(
            str(stage["stage"]),
            f"{stage['steps']:,}",
            _count(stage["tokens"]),
            stage["train"],
            _count(stage["trainable"]),
            " + ".join(stage["objectives"]),
            f"{stage['optimizer']} {stage['lr']:g}",
            _count(stage["flops"]),
            _bytes(stage["memory"]["total"]),
        )
    console.print(table)
    console.print(
        f"{_count(plan['parameters'])} parameters; {plan['steps']:,} steps of {plan['batch_size']} x {plan['context']} "
        f"tokens, {plan['tokens']:,} tokens and {_count(plan['flops'])} FLOPs in all; checkpoints take up to "
        f"{_bytes(plan['checkpoint_bytes'])}"
    )
    if plan["tables"]:
        _print_table_costs(console, plan["tables"])


def _print_table_costs(console: Console, tables: Mapping[str, Any]) -> None:
    """What the experts of memories take with each optimizer of tables."""
    table = _table("optimizer", ">state", ">gradients")
    for name, size in tables["state_bytes"].items():
        table.add_row(name, _bytes(size), _bytes(tables["gradient_bytes"][name]))
    console.print(
        f"{tables['experts']:,} experts of memories, {_count(tables['parameters'])} parameters, take with "
        "stages.N.optimizer.name (tables: same) or stages.N.optimizer.tables:"
    )
    console.print(table)


def _topk(layer: Mapping[str, Any]) -> str:
    """Heads and what each adds up."""
    return f"{layer['num_heads']} × {layer['topk']}"


def _alike(site: Mapping[str, Any]) -> tuple[Any, ...]:
    skeleton = ".".join("*" if part.isdigit() else part for part in site["path"].split("."))
    return skeleton, *(str(value) for key, value in sorted(site.items()) if key != "path")


def _common_path(paths: list[str]) -> str:
    """["a.0.mlp", "a.1.mlp"] → "a.0–1.mlp"."""
    parts = zip(*(path.split(".") for path in paths), strict=True)
    return ".".join(part[0] if len(set(part)) == 1 else f"{part[0]}–{part[-1]}" for part in parts)


def _count(number: float) -> str:
    return _scaled(number, 1000, ("", " k", " M", " G", " T"))


def _bytes(number: float) -> str:
    return _scaled(number, 1000, (" B", " kB", " MB", " GB", " TB"))


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(number) >= step and power < len(units) - 1:
        number /= step
        power += 1
    return f"{number:.0f}{units[0]}" if power == 0 else f"{number:.3g}{units[power]}"
