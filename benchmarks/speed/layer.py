"""Time and memory of one PEER layer with many experts, beside other layers that a token reads as much of.

Each layer gets the same tokens, one layer after the other in every round, so that what else the machine does touches
all alike. A step is forward and backward, with gradients of the input and of all parameters. Reported are medians,
quartiles, and the median of each round's ratio to peerify's layer; and by how much a pass raises the memory of the
process at its peak. That of a step has the gradients of the parameters in it.

    python benchmarks/speed/layer.py [--json] [--cases 1024:65536,256:1048576] [--tokens 256] [--rounds 7]

A case is d_model:experts. Beside it are, as far as they are installed, PEER-pytorch with the same weights (it must give
the same output), product-key-memory with the same keys and as many values, and always peerify without kernels, a dense
layer, and the mixture of experts of transformers' Qwen3, with as many parameters for each token.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from peerify.modeling import peer_kernels
from peerify.modeling.peer_layer import PEER

OURS = "peerify"


def main(arguments: list[str] | None = None) -> None:
    """Parse, measure, print a table or one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="1024:4096,1024:65536,256:1048576")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--topk", type=int, default=16)
    parser.add_argument("--query-dim", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    results = []
    for case in options.cases.split(","):
        d_model, experts = map(int, case.split(":"))
        if math.isqrt(experts) ** 2 != experts:
            parser.error(f"{experts} experts fill no square grid")
        results.append({"d_model": d_model, "experts": experts, "layers": measured(options, d_model, experts)})
        if not options.json:
            print_table(results[-1])
    if options.json:
        print(json.dumps({**vars(options), "torch": torch.__version__, "results": results}, indent=2))


# --- The layers ---------------------------------------------------------------------------------------------------


def layers_of(options: Any, d_model: int, experts: int) -> dict[str, nn.Module]:
    """By name; ours first. Layers of the same kind share tables of experts, since several would not fit."""
    side, read = math.isqrt(experts), options.heads * options.topk
    ours = PEER(
        d_model, experts, (side, side), options.heads, options.topk, share_keys=False, query_dim=options.query_dim
    )
    layers: dict[str, nn.Module] = {OURS: ours, "peerify, no kernels": ours}
    half = options.query_dim // 2
    assert ours.keys.query_proj is not None
    key_hs2r = torch.stack(ours.keys.sub_keys.detach().split(side, dim=1), dim=2)
    if (reference := imported("PEER_pytorch", "PEER")) is not None:
        other = reference(
            d_model, heads=options.heads, num_experts=1, num_experts_per_head=options.topk, dim_key=half,
            non_competing_scores=False,  # as in the paper; by default one expert of each head is kept
        )  # fmt: skip
        other.num_experts, other.num_keys, other.keys = experts, side, nn.Parameter(key_hs2r)
        other.weight_down_embed = nn.Embedding(1, 1)
        other.weight_up_embed = nn.Embedding(1, 1)
        other.weight_down_embed.weight, other.weight_up_embed.weight = ours.pool.u, ours.pool.v
        query = ours.keys.query_proj.weight.detach().view(options.heads, 2, half, d_model)
        other.to_queries[0].weight = nn.Parameter(query.transpose(0, 1).flatten(0, 2).contiguous())
        layers["PEER-pytorch"] = other
    if (memory := imported("product_key_memory", "PKM")) is not None:
        layers["product-key-memory"] = memory(
            d_model, heads=options.heads, num_keys=side, topk=options.topk, dim_head=half
        )
    layers["dense"] = nn.Sequential(
        nn.Linear(d_model, read, bias=False), nn.GELU(), nn.Linear(read, d_model, bias=False)
    )
    chosen = 8
    width = max(1, 2 * read // 3 // chosen)  # an expert has three matrices of that width
    config = Qwen3MoeConfig(
        hidden_size=d_model, num_experts=64, num_experts_per_tok=chosen, moe_intermediate_size=width
    )
    config._experts_implementation = "eager"
    block = Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=d_model**-0.5)
    layers["Qwen3 MoE"] = block
    return layers


def imported(module: str, name: str) -> Any:
    """A class of a package that need not be installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        print(f"without {module}: {error}", file=sys.stderr)
        return None


# --- Time and memory ----------------------------------------------------------------------------------------------


def measured(options: Any, d_model: int, experts: int) -> dict[str, dict[str, Any]]:
    """What each layer takes."""
    torch.manual_seed(0)
    layers = layers_of(options, d_model, experts)
    x = torch.randn(1, options.tokens, d_model)
    if "PEER-pytorch" in layers:
        with torch.no_grad():
            torch.testing.assert_close(layers["PEER-pytorch"](x), layers[OURS](x), rtol=1e-3, atol=1e-4)
    passes: dict[str, Callable[[str], None]] = {
        "forward": lambda name: forward(layers[name], x),
        "step": lambda name: step(layers[name], x),
    }
    seconds: dict[str, dict[str, list[float]]] = {what: {name: [] for name in layers} for what in passes}
    for number in range(options.rounds + 1):
        for what, run in passes.items():
            for name in layers:
                with kernels(name):
                    start = time.perf_counter()
                    run(name)
                    if number:  # the first one compiles kernels and warms caches
                        seconds[what][name].append(time.perf_counter() - start)
                layers[name].zero_grad()
    result: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        result[name] = {"parameters": sum(parameter.numel() for parameter in layer.parameters())}
        for what, run in passes.items():
            times = seconds[what][name]
            ratios = [a / b for a, b in zip(times, seconds[what][OURS], strict=True)]
            low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
            with kernels(name):
                peak = raised(lambda run=run, name=name: run(name))  # type: ignore[misc]
            layer.zero_grad()
            result[name][what] = {
                "ms": round(1e3 * middle, 2),
                "quartiles_ms": [round(1e3 * low, 2), round(1e3 * high, 2)],
                "of_ours": round(statistics.median(ratios), 2),
                "peak_mb": peak,
            }
    return result


def forward(layer: nn.Module, x: torch.Tensor) -> None:
    """Without gradients."""
    with torch.no_grad():
        layer(x)


def step(layer: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward."""
    y = layer(x.requires_grad_())
    (y[0] if isinstance(y, tuple) else y).square().sum().backward()
    x.grad = None
    x.requires_grad_(False)


class kernels:  # noqa: N801  # reads as a function
    """Kernels are on in the block, unless the layer is named as one without."""

    def __init__(self, name: str) -> None:
        self.on = "no kernels" not in name

    def __enter__(self) -> None:
        self.before, peer_kernels.enabled = peer_kernels.enabled, peer_kernels.enabled and self.on

    def __exit__(self, *_: Any) -> None:
        peer_kernels.enabled = self.before


def raised(run: Callable[[], None]) -> float | None:
    """Megabytes by which a call raises the memory of this process at its peak; None where Linux does not tell."""
    reset = Path("/proc/self/clear_refs")
    try:
        ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: what is freed goes back at once
        ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")
    except (AttributeError, OSError, TypeError):
        return None
    before = status("VmRSS")
    run()
    return round((status("VmHWM") - before) / 1e3, 1)


def status(field: str) -> int:
    """A figure of the process, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1])


def print_table(case: dict[str, Any]) -> None:
    """One case."""
    print(f"\nd_model {case['d_model']}, {case['experts']:,} experts")
    print(f"{'':22}{'forward ms':>22}{'× ours':>8}{'MB':>8}{'step ms':>24}{'× ours':>8}{'MB':>8}")
    for name, found in case["layers"].items():
        line = f"{name:22}"
        for what, width in (("forward", 22), ("step", 24)):
            low, high = found[what]["quartiles_ms"]
            line += f"{found[what]['ms']:.1f} ({low:.1f}-{high:.1f})".rjust(width) + f"{found[what]['of_ours']:8.2f}"
            line += f"{found[what]['peak_mb'] if found[what]['peak_mb'] is not None else '':>8}"
        print(line)


if __name__ == "__main__":
    main()
