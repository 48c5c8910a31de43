"""Seconds and memory of arranging the neurons of one layer in product-key grids, by the size of the layer.

Random weights, random tokens; the grids are those that a conversion to product keys at `--active` would take. Each size
runs in a process of its own: the peak of memory is that of the process, the layer's weights included, after each step.

    python benchmarks/clustering.py [--sizes 1536x576,11008x4096,28672x8192] [--tokens 4096] [--active 0.5]
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch

from peerify.config.peer import PeerConfig
from peerify.conversion.clustering import arrange
from peerify.conversion.feedforward import FeedForward
from peerify.conversion.router import fill_keys, fit_router, points
from peerify.conversion.sizing import plan_layer
from peerify.modeling.peer_keys import ProductKeys


def main() -> None:
    """Measure each size in a process of its own; print one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1536x576,11008x4096,28672x8192", help="d_ff x d_model, with commas")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--active", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    sizes = options.sizes.split(",")
    if len(sizes) > 1:
        rest = [f"--{name}={value}" for name, value in vars(options).items() if name != "sizes"]
        for size in sizes:
            subprocess.run([sys.executable, __file__, f"--sizes={size}", *rest], check=True)
        return
    torch.set_num_threads(options.threads)
    d_ff, d_model = map(int, sizes[0].split("x"))
    print(json.dumps(measure(d_ff, d_model, options.tokens, options.active)), flush=True)


@torch.no_grad()
def measure(d_ff: int, d_model: int, tokens: int, active: float) -> dict[str, object]:
    """Seconds of fit_router, points, arrange and fill_keys, and the peak of memory after each, in MB."""
    torch.manual_seed(0)
    scale_d = torch.linspace(0.1, 2, d_model)  # so that neurons matter unequally
    u_fd, gate_fd, v_fd = (torch.randn(d_ff, d_model) / d_model**0.5 for _ in range(3))
    ff = FeedForward(
        u_fd=u_fd, gate_fd=gate_fd, v_fd=v_fd, u_bias_f=None, gate_bias_f=None, bias_d=None, activation="silu"
    )
    x_td = torch.randn(tokens, d_model) * scale_d
    config = PeerConfig(active=active, keys="product")
    plan = plan_layer(config, path="mlp", d_model=d_model, d_ff=d_ff, gated=True, activation="silu")
    names = ("share_pool", "share_keys", "query_dim", "query_norm", "key_bias")
    grid = tuple(plan["grid"])
    keys = ProductKeys(d_model, d_ff, grid, plan["num_heads"], **{name: plan[name] for name in names})
    seconds: dict[str, float] = {}
    memory = {"weights": _peak_mb()}

    def lap(step: str, since: float) -> None:
        seconds[step], memory[step] = round(time.perf_counter() - since, 2), _peak_mb()

    start = time.perf_counter()
    fit = fit_router(ff, x_td)
    lap("fit_router", start)
    start = time.perf_counter()
    points_nz = points(fit)
    lap("points", start)
    start = time.perf_counter()
    order = arrange(points_nz, plan["num_heads"], grid, seed=0)
    lap("arrange", start)
    start = time.perf_counter()
    fill_keys(keys, fit, order, torch.ones(plan["num_heads"], d_ff))
    lap("fill_keys", start)
    shape = {"d_ff": d_ff, "d_model": d_model, "tokens": tokens, "heads": plan["num_heads"], "grid": plan["grid"]}
    return {**shape, "threads": torch.get_num_threads(), "seconds": seconds, "peak_mb": memory}


def _peak_mb() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak / (1e6 if sys.platform == "darwin" else 1e3))


if __name__ == "__main__":
    main()
