"""How evenly text finds the new experts of a grown layer, by their number: random keys beside fitted ones.

    python benchmarks/growth/usage.py smol-peer --calibration valid.txt --text test.txt [--layer 14]
        [--sizes 16384,65536,262144,1048576] [--tokens 65536]

Three ways to begin, with 8 heads and 16 experts each: `random`, queries and sub-keys at random; `batch norm`, the same
with queries normalised as the PEER paper does, by what the calibration text gives; `fitted`, as `peerify grow` leaves
them. Each line tells the share of experts that the text found at least once, and the KL divergence of how often each
was found from uniform, in nats (the paper's Table 2). No more than tokens x 128 experts can be found. Prints a table in
Markdown, and how long the fit took.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from peerify.checkpoint.load import load_for_eval
from peerify.config.grow import GrowConfig
from peerify.conversion.calibration import token_batches
from peerify.conversion.growth import layer_inputs, plan_growth
from peerify.conversion.memory_keys import fit_keys
from peerify.data import load_windows
from peerify.modeling.peer_keys import ProductKeys
from peerify.usage import evenness

WAYS = ("random", "batch norm", "fitted")
AT_ONCE = 4096  # tokens


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a converted model")
    parser.add_argument("--calibration", nargs="+", required=True, help="text that keys are fitted to")
    parser.add_argument("--text", nargs="+", required=True, help="text that finds experts")
    parser.add_argument("--layer", default="middle", help="as --layers of peerify grow")
    parser.add_argument("--sizes", default="16384,65536,262144,1048576")
    parser.add_argument("--tokens", type=int, default=65536, help="of the text")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    loaded = load_for_eval(options.folder)
    sizes = [int(size) for size in options.sizes.split(",")]
    config = GrowConfig(num_experts=sizes[-1], layers=options.layer, seed=options.seed)
    path, memory = next(iter(plan_growth(loaded.model, config).items()))

    def inputs(sources: list[str], tokens: int) -> Tensor:
        windows_bt = load_windows(sources, loaded.tokenizer, context=512, max_tokens=tokens)
        return layer_inputs(loaded.model, [path], token_batches(windows_bt, loaded.model), tokens)[path]

    calibration_td, text_td = inputs(options.calibration, 16384), inputs(options.text, options.tokens)
    print(f"{path}: {len(calibration_td):,} tokens of calibration, {len(text_td):,} of text\n")
    print("| new experts | " + " | ".join(f"{way}: found | KL" for way in WAYS) + " |")
    print("|---|" + "---|---|" * len(WAYS), flush=True)
    seconds = []
    for size in sizes:
        cells = []
        for way in WAYS:
            keys = random_keys(text_td.shape[1], size, config, memory["query_dim"])
            start = time.perf_counter()
            if way == "fitted":
                fit_keys(keys, calibration_td, options.seed)
                seconds.append(time.perf_counter() - start)
            elif way == "batch norm":
                normalise(keys, calibration_td)
            found = evenness(counts(keys, text_td, config.topk))
            cells.append(f"{found['usage']:.1%} | {found['kl_uniform']:.2f}")
        print(f"| {size:,} | " + " | ".join(cells) + " |", flush=True)
    print(f"\nfitted in {', '.join(f'{each:.1f}' for each in seconds)} s")


def random_keys(d_model: int, size: int, config: GrowConfig, query_dim: int) -> ProductKeys:
    """Queries and sub-keys at random."""
    torch.manual_seed(config.seed)
    side = math.isqrt(size)
    keys = ProductKeys(
        d_model, size, (side, side), config.num_heads,
        share_pool=True, share_keys=True, query_dim=query_dim, query_norm=False, key_bias=False, query_bias=True,
    )  # fmt: skip
    assert keys.query_proj is not None
    torch.nn.init.zeros_(keys.query_proj.bias)
    return keys.requires_grad_(False)


def normalise(keys: ProductKeys, x_td: Tensor) -> None:
    """Give each number of a query the mean 0 and the variance 1, in place."""
    assert keys.query_proj is not None
    query_tq = keys.query_proj(x_td)
    deviation_q, mean_q = torch.std_mean(query_tq, dim=0)
    keys.query_proj.weight.div_(deviation_q[:, None])
    keys.query_proj.bias.sub_(mean_q).div_(deviation_q)


def counts(keys: ProductKeys, x_td: Tensor, topk: int) -> Tensor:
    """How often each expert is found."""
    count_n = torch.zeros(keys.num_keys, dtype=torch.float64)
    for part_td in x_td.split(AT_ONCE):
        count_n += torch.bincount(keys(part_td, topk)[0].flatten(), minlength=keys.num_keys)
    return count_n


if __name__ == "__main__":
    main()
