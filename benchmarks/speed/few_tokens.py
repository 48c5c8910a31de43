"""The layers of a converted model with few tokens on a CPU, one after another, beside the dense layers they came from.

    python benchmarks/speed/few_tokens.py CONVERTED [--dtype float32,bfloat16,float16] [--tokens 1,2,4,6,8]

For each number type and count of tokens: milliseconds of all dense layers, by PyTorch's products, and how many times as
fast all experts are by its products, in full by the kernel, and budgets by theirs. The table in peer_faster.py comes
from here.
Inputs are random, of the sizes that calibration found, so budgets spend somewhat more or less than on text. Of each
measurement the lower quartile is taken, all of them in turn.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from peerify.checkpoint.load import load_for_eval
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_full import in_full
from peerify.modeling.peer_products import combined
from peerify.modules import peer_layers


def quartiles(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: sorted(each)[rounds // 4] for name, each in times.items()}


def measure(layers: list[ElasticPEER], tokens: int, shares: list[float], rounds: int) -> dict[str, float]:
    """Milliseconds of all layers: "dense", all experts by "products" and "full" by the kernel, and of each share."""
    pools: list[Any] = [layer.pool for layer in layers]
    dtype = pools[0].u.dtype
    inputs = [(torch.randn(tokens, len(pool.input_rms)) * pool.input_rms).to(dtype) for pool in pools]
    down = [pool.v.T.contiguous() for pool in pools]  # as dense layers have it

    def dense() -> None:
        for x, pool, v_dn in zip(inputs, pools, down, strict=True):
            u = F.linear(x, pool.u, pool.u_bias)
            gate = None if pool.gate is None else F.linear(x, pool.gate, pool.gate_bias)
            F.linear(pool.activate(u, gate), v_dn)

    def at(share: float) -> Callable[[], None]:
        def run() -> None:
            for x, layer in zip(inputs, layers, strict=True):
                layer.set_active(share)
                layer.prefill_all = False
                layer(x)

        return run

    def full() -> None:
        for x, pool in zip(inputs, pools, strict=True):
            in_full(pool, x)

    def products() -> None:
        for x, pool in zip(inputs, pools, strict=True):
            combined(pool.products(x)[2], pool.v)

    runs: dict[str, Callable[[], object]] = {"dense": dense, "products": products, "full": full}
    return quartiles(runs | {f"{share:g}": at(share) for share in shares}, rounds)


def main() -> None:
    """Parse, measure, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("converted")
    parser.add_argument("--dtype", default="float32,bfloat16,float16")
    parser.add_argument("--tokens", default="1,2,4,6,8")
    parser.add_argument("--active", default="0.75,0.5,0.25,0.125")
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    shares = [float(share) for share in options.active.split(",")]
    print(
        f"{'':>10}{'tokens':>8}{'dense ms':>10}{'products':>10}{'in full':>9}",
        *(f"{100 * share:>7g} %" for share in shares),
    )
    for name in options.dtype.split(","):
        model = load_for_eval(options.converted).model.to(getattr(torch, name)).eval()
        layers: Any = [*peer_layers(model).values()]
        for tokens in map(int, options.tokens.split(",")):
            with torch.inference_mode():
                found = measure(layers, tokens, shares, options.rounds)
            dense = found.pop("dense")
            ratios = " ".join(f"{dense / each:>8.2f}×" for each in found.values())
            print(f"{name:>10}{tokens:>8}{dense:>10.1f} {ratios}", flush=True)


if __name__ == "__main__":
    main()
