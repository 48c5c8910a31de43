"""Tokens per second of a training step: a converted model beside the dense one it came from, in one run.

Both take the same windows of random tokens, forward, next-token loss, backward and AdamW, one step of the one after
one step of the other, so that what else the machine does touches both alike. Reported are medians and their ratio, by
the clock and by processor time, which other programs hardly touch.

    python benchmarks/training/step.py DENSE CONVERTED [--steps 7] [--windows 2] [--context 512] [--precision bf16]

A step of recipes/smollm2-135m/heal-50.yaml: --precision bf16 --train peer --router frozen --kl. Of the dense model the
layers train then that were converted, beside the same teacher.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch

from peerify.checkpoint.load import load_for_eval
from peerify.config.train import OptimizerConfig, StageConfig
from peerify.modules import peer_layers
from peerify.training.groups import parameter_groups, require_peer, select_trainable
from peerify.training.malloc import keep_freed_memory
from peerify.training.objectives import prediction_loss, shifted
from peerify.training.straight_through import StraightThrough


def main() -> None:
    """Parse, measure, print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dense")
    parser.add_argument("converted")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--router", choices=["trained", "frozen"], default="trained")
    parser.add_argument("--train", choices=["full", "peer"], default="full")
    parser.add_argument(
        "--kl", action="store_true", help="also the divergence from a teacher, which is the dense model"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    keep_freed_memory()  # as `peerify train` does
    models = {name: load_for_eval(getattr(options, name)).model.train() for name in ("dense", "converted")}
    ids = torch.randint(models["dense"].config.vocab_size, (options.windows, options.context))
    optimizer = OptimizerConfig(router_scale=1.0 if options.router == "trained" else 0.0)
    stage = StageConfig(train=options.train, optimizer=optimizer)
    require_peer(models["converted"])
    select_trainable(models["converted"], stage)
    if options.train == "peer":
        converted = tuple(path + "." for path in peer_layers(models["converted"]))
        for name, parameter in models["dense"].named_parameters():
            parameter.requires_grad_(name.startswith(converted))
    teacher = load_for_eval(options.dense).model if options.kl else None
    steps = {"dense": Step(models["dense"], teacher, None, options.precision)}
    temperature = stage.temperature if options.router == "trained" else None
    seconds: dict[str, list[float]] = {name: [] for name in models}
    processor: dict[str, list[float]] = {name: [] for name in models}
    with StraightThrough(models["converted"], temperature=temperature, every=stage.router_every):
        steps["converted"] = Step(models["converted"], teacher, stage, options.precision)
        for number in range(options.steps + 1):
            for name, step in steps.items():
                start, spent = time.perf_counter(), time.process_time()
                step(ids)
                if number:  # the first one makes the optimizer's state
                    seconds[name].append(time.perf_counter() - start)
                    processor[name].append(time.process_time() - spent)
    tokens = {name: ids.numel() / statistics.median(times) for name, times in seconds.items()}
    pairs = [a / b for a, b in zip(seconds["dense"], seconds["converted"], strict=True)]
    result = {
        **vars(options),
        "tokens_per_s": {name: round(value, 1) for name, value in tokens.items()},
        "ratio": round(statistics.median(pairs), 3),
        "ratios": [round(pair, 3) for pair in pairs],
        "ratio_of_processor_time": round(
            statistics.median(processor["dense"]) / statistics.median(processor["converted"]), 3
        ),
    }
    print(json.dumps(result, indent=2))


class Step:
    """One training step of a model."""

    def __init__(self, model: Any, teacher: Any | None, stage: StageConfig | None, precision: str) -> None:
        self.model, self.teacher, self.precision = model, teacher, precision
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            [{"params": trained}] if stage is None else parameter_groups(model, stage), lr=1e-5
        )

    def __call__(self, ids: torch.Tensor) -> None:
        """Forward, backward, update."""
        used = torch.ones_like(ids, dtype=torch.bool)
        wanted = None
        with torch.autocast("cpu", torch.bfloat16) if self.precision == "bf16" else nullcontext():
            if self.teacher is not None:
                with torch.no_grad():
                    wanted = shifted(self.teacher(input_ids=ids, use_cache=False).logits, ids, used)[0]
            logits = self.model(input_ids=ids, use_cache=False).logits
        rows, targets = shifted(logits, ids, used)
        loss, _, _ = prediction_loss(rows, targets, wanted, next_token=1.0, kl=0.0 if wanted is None else 1.0)
        loss.div(len(targets)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
