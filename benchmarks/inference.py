"""Tokens per second of reading a prompt and of generating text: a converted model beside its dense one, in one run.

Both read the same random tokens, then continue them greedily, one model after the other, so that what else the machine
does touches both alike. Reported are medians and their ratio, converted over dense; below 1 the converted is slower.

    python benchmarks/inference.py DENSE CONVERTED [--dtype bfloat16] [--prompt 512] [--new 32] [--repeats 5]

After `make demo`:

    python benchmarks/inference.py .demo/SmolLM2-135M-Instruct.Q4_1.gguf .demo/smollm2-peer
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from peerify.checkpoint.load import load_for_eval


@torch.inference_mode()
def measure(model: Any, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Tokens per second of the prompt `ids` (1, t), and of `new` tokens after it, one at a time."""
    start = time.perf_counter()
    step = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    read = time.perf_counter()
    for _ in range(new):
        token = step.logits[:, -1:].argmax(-1)
        step = model(input_ids=token, past_key_values=step.past_key_values, use_cache=True)
    return ids.numel() / (read - start), new / (time.perf_counter() - read)


def main() -> None:
    """Parse, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("converted")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    models = {name: load_for_eval(getattr(options, name), dtype=options.dtype).model for name in ("dense", "converted")}
    ids = torch.randint(models["dense"].config.vocab_size, (1, options.prompt))
    rates: dict[str, dict[str, list[float]]] = {"prefill": {}, "decoding": {}}
    for number in range(options.repeats + 1):
        for name, model in models.items():
            pair = measure(model, ids, options.new)
            if number:  # the first one warms up
                for phase, rate in zip(rates, pair, strict=True):
                    rates[phase].setdefault(name, []).append(rate)
    result: dict[str, Any] = dict(vars(options))
    for phase, of in rates.items():
        ratios = [converted / dense for dense, converted in zip(of["dense"], of["converted"], strict=True)]
        result[phase] = {
            "tokens_per_s": {name: round(statistics.median(values), 1) for name, values in of.items()},
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
