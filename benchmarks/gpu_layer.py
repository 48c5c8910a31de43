"""Time one layer on a GPU: dense products, and the kernels at budgets, launched one by one and from a CUDA graph.

    PEERIFY_KERNELS=triton python benchmarks/gpu_layer.py
    PEERIFY_KERNELS=triton python benchmarks/gpu_layer.py --d-model 2048 --experts 8192 --tokens 1,2,4 --active 0.3

Experts and tokens are random. For each budget the price is sought at which these tokens read that share of the bytes.
"limit" is the time in which the GPU would read so many bytes, if it read as fast as the dense layer does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch

from peerify.modeling import peer_triton
from peerify.modeling.peer_elastic import Budget, ElasticPEER

WARM, TIMES = 5, 50


def milliseconds(run: Callable[[], object]) -> float:
    """The median of several runs."""
    for _ in range(WARM):
        run()
    times = []
    for _ in range(TIMES):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[TIMES // 2]


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The same work from a CUDA graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def at_share(layer: ElasticPEER, x_td: torch.Tensor, share: float) -> float:
    """Set the budget at which these tokens spend about that share of the bytes; return what they spend."""
    low, high = 1e-12, 1e12
    spent = 1.0
    for _ in range(20):  # no more: the price must not end at that at which an expert changes
        price = (low * high) ** 0.5
        layer.budget = Budget(share, 1.0, price, share, share)
        spent = layer.usage(x_td)[1]
        low, high = (price, high) if spent > share else (low, price)
    return spent


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-model", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=14336)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--tokens", default="1,2,4,16,64")
    parser.add_argument("--active", default="0.75,0.5,0.25")
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    if (why := peer_triton.obstacle()) is not None:
        raise SystemExit(f"the GPU kernels cannot be used: {why}")
    dtype = getattr(torch, asked.dtype)
    torch.manual_seed(0)
    layer = ElasticPEER(asked.d_model, asked.experts, activation="silu", gated=True).to(asked.device, dtype).eval()
    for table in (layer.pool.u, layer.pool.v, layer.pool.gate):
        assert table is not None
        table.data.normal_(std=asked.d_model**-0.5)
    dense_bytes = 3 * asked.d_model * asked.experts * dtype.itemsize
    print(f"{torch.cuda.get_device_name(asked.device)}, {asked.dtype}, {dense_bytes / 1e6:.0f} MB")
    print("tokens  bytes   dense us (graph)   kernels us (graph)   times dense (graph)   limit us   error")
    for tokens in map(int, asked.tokens.split(",")):
        x_td = torch.randn(tokens, asked.d_model, device=asked.device).to(dtype)
        layer.budget, once = None, partial(layer, x_td)
        dense = [1e3 * milliseconds(run) for run in (once, captured(once))]
        for share in map(float, asked.active.split(",")):
            spent = at_share(layer, x_td, share)
            y_td = layer(x_td)
            ours = [1e3 * milliseconds(run) for run in (once, captured(once))]
            peer_triton.enabled, layer.prefill_all = False, False
            plain_td = layer(x_td).float()
            peer_triton.enabled, layer.prefill_all = True, True
            error = float((y_td.float() - plain_td).norm() / plain_td.norm())
            print(
                f"{tokens:6d} {spent:6.3f} {dense[0]:10.1f} ({dense[1]:.1f}) {ours[0]:13.1f} ({ours[1]:.1f}) "
                f"{dense[0] / ours[0]:12.2f} ({dense[1] / ours[1]:.2f}) {spent * dense[1]:14.1f} {error:12.1e}"
            )
    if (why := peer_triton.obstacle()) is not None:
        raise SystemExit(f"the GPU kernels failed: {why}")


if __name__ == "__main__":
    main()
