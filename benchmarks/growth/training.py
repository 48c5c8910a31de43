"""Training of a grown model: speed beside the dense model's, use of experts over training, and memory.

    peerify grow smol-peer smol-grown --num-experts 1048576 --layers 14 --calibration valid.txt
    python benchmarks/growth/training.py smol-grown --dense HuggingFaceTB/SmolLM2-135M --text train.txt --test test.txt
        [--tokens 200000] [--context 512] [--batch 2] [--active 1] [--tables rowwise_adagrad]
        [--lr 2e-4] [--tables-scale 10] [--precision bf16] [--out .training] [--json]

Takes the steps of `peerify train` with the next token's loss: the converted layers train, memories among them, and of
the dense model the same layers. After every few steps of the grown model the dense one takes a step on the same tokens,
so that what else the machine does touches both alike; speed is told by the medians. Without --dense the peak of memory
is that of the grown model alone.

Use of experts is as in the log of `peerify train`, over windows of --window tokens, and at the end on the test text. No
more experts can be found than tokens x heads x k of each. The log and, with matplotlib, use.svg go to --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from peerify.checkpoint.load import load_dense, load_for_eval
from peerify.config.train import DataConfig, ObjectiveConfig, OptimizerConfig, SourceConfig, StageConfig, TrainConfig
from peerify.data import load_windows
from peerify.memory import peak_mb
from peerify.modules import peer_layers
from peerify.progress import teller
from peerify.training import validation
from peerify.training.data import Windows
from peerify.training.distribution import accelerator_on
from peerify.training.loggers import LogFile
from peerify.training.malloc import keep_freed_memory
from peerify.training.stage import Run, Stage
from peerify.training.state import Checkpoints, RunState
from peerify.training.use import Use
from peerify.training.use_plot import PICTURE, draw_use


def main() -> None:
    """Train, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a grown model")
    parser.add_argument("--dense", help="the dense model whose speed it is set against")
    parser.add_argument("--text", nargs="+", required=True, help="text to train on")
    parser.add_argument("--test", nargs="+", help="text on which use and perplexity are measured before and after")
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--window", type=int, default=50_000, help="tokens of a report of use")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch", type=int, default=2, help="windows in a step")
    parser.add_argument("--active", type=float, help="budget of the converted layers; by default the model's own")
    parser.add_argument("--tables", default="rowwise_adagrad", choices=["same", "rowwise_adagrad", "sgd"])
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--tables-scale", type=float, default=10.0, help="times --lr, for tables")
    parser.add_argument("--precision", default="no", choices=["no", "bf16"])
    parser.add_argument("--every", type=int, default=4, help="steps between two of the dense model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(".training"))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    result = measure(options, Recorder(options))
    if options.json:
        print(json.dumps(result))
        return
    print("| tokens | found | of those in reach | KL from uniform | dead |\n|---|---|---|---|---|")
    for row in [*result["training"], *result["test"]]:
        print(
            f"| {row['what']} | {row['used']:.1%} | {row['used'] * row['experts'] / row['reachable']:.1%} "
            f"| {row['kl_uniform']:.2f} | {row['dead']:,} |"
        )
    print(f"\n{result['tokens_per_s']:,.0f} tokens/s", end="")
    if result["over_dense"] is not None:
        print(f", {result['over_dense']:.2f} x the dense model's {result['dense_tokens_per_s']:,.0f}", end="")
    print(f"; peak of memory {result['peak_mb'] / 1000:.1f} GB")
    if result["perplexity"]:
        print(f"perplexity of the test text: {result['perplexity'][0]:.2f} -> {result['perplexity'][1]:.2f}")


class Recorder:
    """Makes the stages that are compared, of one configuration."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        scale = {} if options.tables == "same" else {"tables_scale": options.tables_scale}
        optimizer = OptimizerConfig(lr=options.lr, tables=options.tables, **scale)
        stage = StageConfig(objectives=ObjectiveConfig(next_token=1.0), optimizer=optimizer)
        self.config = TrainConfig(
            tokens=options.tokens,
            batch_size=options.batch,
            data=DataConfig(context=options.context, sources=[SourceConfig(path=text) for text in options.text]),
            stages=[stage],
            precision=options.precision,
            usage_tokens=options.window,
        )
        self.accelerator = accelerator_on(options.device, options.precision)
        options.out.mkdir(parents=True, exist_ok=True)

    def stage(self, make_model: Callable[[], Any], tokenizer: Any, log: LogFile | None, **settings: Any) -> Stage:
        """A stage that begins anew, and reads the text from its start."""
        run = Run(
            config=self.config,
            accelerator=self.accelerator,
            make_model=make_model,
            teacher=None,
            windows=Windows(self.config.data, tokenizer, seed=0, progress=teller(None)),
            test_bt=None,
            checkpoints=Checkpoints(self.options.out, 1),
            log=log,
            progress=teller(None),
            publish=None,
            recipe={},
            **settings,
        )
        return Stage(run, RunState(), self.config.steps_of_stages()[0], None)


def measure(options: argparse.Namespace, recorder: Recorder) -> dict[str, Any]:
    """What `main` prints: ``{"training": [report], "test": [report], "tokens_per_s", "dense_tokens_per_s",
    "over_dense", "perplexity": [before, after], "peak_mb"}``."""
    if options.device == "cpu":
        keep_freed_memory()  # as `peerify train` does
    loaded = load_for_eval(options.folder)
    tokenizer = loaded.tokenizer
    test_bt = None
    if options.test:
        test_bt = load_windows(options.test, tokenizer, context=options.context, max_tokens=options.test_tokens)
    paths = tuple(path + "." for path in peer_layers(loaded.model))
    if options.active is not None:
        loaded.model.set_active(options.active)  # type: ignore[operator]
    first = [loaded.model]  # the stage takes it, and nothing else holds it
    del loaded

    def select_dense(model: Any, _: StageConfig) -> Any:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.startswith(paths))
        return model

    log_path, ours, theirs, perplexity = options.out / "log.jsonl", list[float](), list[float](), list[float]()
    log_path.unlink(missing_ok=True)
    log = LogFile(log_path, from_step=0)
    with ExitStack() as stages:
        grown = stages.enter_context(recorder.stage(first.pop, tokenizer, log))
        dense = None
        if options.dense:
            made = recorder.stage(lambda: load_dense(options.dense).model, tokenizer, None, select=select_dense)
            dense = stages.enter_context(made)
        if test_bt is not None:
            perplexity.append(validation.perplexity(grown.model, test_bt, recorder.accelerator))
        for number in range(grown.steps):
            ours.append(seconds(grown))
            if dense is not None and number % options.every == 0:
                here = grown.run.windows.position()
                theirs.append(seconds(dense))
                dense.run.windows.seek(here)
        log.close()
        test = []
        if test_bt is not None:
            perplexity.append(validation.perplexity(grown.model, test_bt, recorder.accelerator))
            test = [{"what": f"test, {test_bt.numel():,}", **use_of(grown, test_bt)}]
    draw_use(log_path, options.out / PICTURE)
    tokens = options.batch * options.context
    rows = [json.loads(line) for line in log_path.read_text().splitlines()]
    reports = [(row["step"] * tokens, report) for row in rows for report in row.get("use", {}).values()]
    # The first two steps of each make its optimizer's state and compile its kernels.
    speed = tokens / median(ours[2:])
    beside = tokens / median(theirs[2:]) if theirs[2:] else None
    return {
        "training": [{"what": f"training, to {seen:,}", **report} for seen, report in reports],
        "test": test,
        "tokens_per_s": speed,
        "dense_tokens_per_s": beside,
        "over_dense": None if beside is None else speed / beside,
        "perplexity": perplexity,
        "peak_mb": peak_mb(),
    }


def seconds(stage: Stage) -> float:
    """Of one step."""
    start = perf_counter()
    stage.step()
    if stage.run.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return perf_counter() - start


@torch.no_grad()
def use_of(stage: Stage, ids_bt: Tensor) -> dict[str, float]:
    """A report of what these tokens find, of all pools together if they are several the first one's."""
    model, accelerator = stage.unwrapped, stage.run.accelerator
    counter = Use(model)
    with counter.watching():
        for ids in ids_bt.to(accelerator.device).split(1):
            with accelerator.autocast(), counter.counting(torch.ones_like(ids, dtype=torch.bool)):
                model(input_ids=ids, use_cache=False)
    counter.tokens = ids_bt.numel()
    return next(iter(counter.report(accelerator).values()))


if __name__ == "__main__":
    main()
