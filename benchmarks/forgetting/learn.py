"""What a model forgets of some texts while it learns another one, by how it learns.

    python benchmarks/forgetting/learn.py --dense MODEL --converted FOLDER --learn TEXT --background TEXT...
        --watch TEXT... --out DIR [--runs full@3e-5,lora@5e-4,peer@5e-5,memory@1e-3,memory+experts=0.02@2e-3]

FOLDER is what `peerify convert` made of MODEL; all its experts are on. Every run takes the same steps on the same
windows of --learn, with the loss of the next token and AdamW. Of its pieces of 20,000 characters each fifth is held
out. That and the watched texts are measured on the way: perplexity, and KL(original || model) in nats. A run is a
method, perhaps with options, and its highest learning rate:

    full      everything, of MODEL
    lora      adapters on all linear layers of MODEL: rank=16, alpha=32
    peer      all experts of FOLDER, as healing does
    memory    experts that --learn uses more than --background: the options of `train.stages.N.memory`
              (docs/options.md), such as experts=0.05

DIR gets results.json after every run, table.md, and forgetting.svg where there is matplotlib. Run it again to go on, or
to add runs and seeds: what is there is not measured again.

Suffixes: b windows, t tokens of a window, p predictions, v vocabulary.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from curves import draw, markdown
from torch import Tensor, nn

from peerify.checkpoint.load import load_dense, load_for_eval
from peerify.config.train import StageConfig, TrainConfig
from peerify.data import load_windows, public_name, read_text, tokenize
from peerify.errors import PeerifyError, UsageError
from peerify.training.data import Windows
from peerify.training.distribution import accelerator_on, forget_processes
from peerify.training.groups import select_trainable
from peerify.training.malloc import keep_freed_memory
from peerify.training.stage import Run, Stage
from peerify.training.state import Checkpoints, RunState

PIECE, HELD_OUT = 20_000, 5  # characters; one piece in so many is held out
RUNS = "full@3e-5,lora@5e-4,peer@5e-5,memory@1e-3"
METHODS = ("full", "lora", "peer", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is missing, write results, table and picture; returns the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", required=True)
    parser.add_argument("--converted", required=True)
    parser.add_argument("--learn", required=True, metavar="TEXT")
    parser.add_argument("--background", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--watch", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--runs", default=RUNS, help="by commas (%(default)s)")
    parser.add_argument("--seeds", default="0", help="by commas (%(default)s)")
    parser.add_argument("--steps", type=int, default=40, help="(%(default)s)")
    parser.add_argument("--points", type=int, default=4, help="measurements on the way (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="windows of a step (%(default)s)")
    parser.add_argument("--context", type=int, default=256, help="tokens of a window (%(default)s)")
    parser.add_argument("--tokens", type=int, default=8192, help="of each text that is measured on (%(default)s)")
    parser.add_argument("--precision", default="bf16", choices=["no", "bf16"], help="(%(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--levels", help="perplexities of what is held out at which methods are compared, by commas")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    try:
        results = measure_all(options)
        table = markdown(results, [float(level) for level in options.levels.split(",")] if options.levels else None)
    except PeerifyError as error:
        print(f"learn.py: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        forget_processes()
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")
    try:
        draw(results, options.out / "forgetting.svg")
    except ImportError:
        print("learn.py: no picture without matplotlib: pip install 'peerify[plots]'", file=sys.stderr)
    return 0


def measure_all(options: argparse.Namespace) -> dict[str, Any]:
    """``{"settings", "original": point, "runs": [{"run", "seed", "trainable", "seconds", "points": [point]}]}``.

    A point is ``{"tokens", "learned": perplexity of what is held out, "watched": {text: {"perplexity", "kl"}}}``.

    Raises:
        UsageError: a run that there is not, or results of other settings in --out.
    """
    wanted = [(run, int(seed)) for seed in options.seeds.split(",") for run in options.runs.split(",")]
    for run, _ in wanted:
        stage_of(run, options)
    file = options.out / "results.json"
    settings = {
        **{"dense": public_name(options.dense), "learn": public_name(options.learn)},
        **{key: [public_name(text) for text in getattr(options, key)] for key in ("background", "watch")},
        **{key: getattr(options, key) for key in ("steps", "points", "batch_size", "context", "tokens", "precision")},
    }
    results: dict[str, Any] = {"settings": settings, "original": None, "runs": []}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            raise UsageError(f"{file} was measured with other settings: name another --out")
    known = {(row["run"], row["seed"]) for row in results["runs"]}
    missing = [each for each in wanted if each not in known]
    if not missing:
        return results
    options.out.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    results["original"] = results["original"] or bench.point(bench.dense, 0)
    for run, seed in missing:
        started = time.monotonic()
        trainable, points = bench.learn(run, seed)
        row = {"run": run, "seed": seed, "trainable": trainable, "points": points}
        results["runs"].append(row | {"seconds": round(time.monotonic() - started)})
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), file=sys.stderr)
    return results


def stage_of(run: str, options: argparse.Namespace) -> StageConfig:
    """The stage that `method[+key=value...]@rate` asks for.

    Raises:
        UsageError: there is no such method, or one of its options is wrong.
    """
    described, _, rate = run.partition("@")
    method, *extra = described.split("+")
    if method not in METHODS or not rate or not all("=" in part for part in extra):
        raise UsageError(f"--runs {run}: write method[+key=value]@rate, the method one of {', '.join(METHODS)}")
    settings = {key: yaml.safe_load(value) for key, _, value in (part.partition("=") for part in extra)}
    stage: dict[str, Any] = {
        "train": {"full": "full", "lora": "peer+lora"}.get(method, method),
        "objectives": {"next_token": 1},
        "optimizer": {"lr": float(rate)},
        "schedule": "constant",
        "warmup": 0.1,
    }
    if method == "lora":
        stage["lora"] = {"rank": 16, "alpha": 32} | settings
    elif method == "memory":
        stage["memory"] = {"background": options.background} | settings
    elif settings:
        raise UsageError(f"--runs {run}: {method} takes no options")
    try:
        return StageConfig.model_validate(stage)
    except ValueError as error:
        raise UsageError(f"--runs {run}: {error}") from None


class Bench:
    """The models, the texts, and what the original says of the watched ones."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.accelerator: Accelerator = accelerator_on(options.device, options.precision)
        if self.accelerator.device.type == "cpu":
            keep_freed_memory()
        loaded = load_dense(options.dense)
        self.dense: Any = loaded.model.float().to(self.accelerator.device).eval()
        context = options.context
        pieces = [read_text(options.learn)]
        pieces = [pieces[0][at : at + PIECE] for at in range(0, len(pieces[0]), PIECE)]
        held_out = [number % HELD_OUT == HELD_OUT - 1 for number in range(len(pieces))]

        def part(held: bool) -> Tensor:
            text = "".join(piece for piece, out in zip(pieces, held_out, strict=True) if out == held)
            return tokenize(text, loaded.tokenizer, context)

        self.new_bt, held_bt = part(False), part(True)
        self.texts = {"learned": _spread(held_bt, options.tokens // context)}
        for spec in options.watch:
            windows_bt = load_windows([spec], loaded.tokenizer, context=context)
            self.texts[public_name(spec)] = _spread(windows_bt, options.tokens // context)
        self.background_bt = load_windows(options.background, loaded.tokenizer, context=context)
        self.reference: dict[str, list[Tensor]] = {}

    def learn(self, described: str, seed: int) -> tuple[int, list[dict[str, Any]]]:
        """How many parameters one run trains, and its points."""
        options = self.options
        stage = stage_of(described, options)
        train = {
            "tokens": options.steps * options.batch_size * options.context,
            "data": {"sources": [], "context": options.context},
            "batch_size": options.batch_size,
            "precision": options.precision,
            "stages": [stage],
            "seed": seed,
            "log_every": 2**31,
            "spike": 0,
        }
        background_bt = self.background_bt
        if stage.train == "memory":
            background_bt = _spread(background_bt, max(1, stage.memory.tokens // options.context))
        dense = stage.train in ("full", "peer+lora")
        points = []
        with tempfile.TemporaryDirectory() as nowhere:
            run = Run(
                config=TrainConfig.model_validate(train),
                accelerator=self.accelerator,
                make_model=(lambda: copy.deepcopy(self.dense)) if dense else self._converted,
                select=_select_dense if dense else select_trainable,
                teacher=None,
                windows=cast(Windows, _Shuffled(self.new_bt, seed)),
                test_bt=None,
                checkpoints=Checkpoints(Path(nowhere), 1),
                log=None,
                progress=lambda *_: None,
                publish=None,
                recipe={},
                background_bt={0: background_bt},
            )
            with Stage(run, RunState(), options.steps, None) as taking:
                trainable = sum(p.numel() for group in taking.plain_optimizer.param_groups for p in group["params"])
                wanted = {round(options.steps * (i + 1) / options.points) for i in range(options.points)}
                for step in range(1, options.steps + 1):
                    taking.step()
                    if step in wanted:
                        tokens = step * options.batch_size * options.context
                        points.append(self.point(taking.unwrapped, tokens))
        return trainable, points

    def _converted(self) -> Any:
        model: Any = load_for_eval(self.options.converted).model.float()
        model.set_active(1)
        return model

    @torch.no_grad()
    def point(self, model: Any, tokens: int) -> dict[str, Any]:
        """What the model makes of all texts; the first one that is measured is the original."""
        model.eval()
        point: dict[str, Any] = {"tokens": tokens, "watched": {}}
        for name, windows_bt in self.texts.items():
            first = name not in self.reference
            kept = self.reference.setdefault(name, [])
            loss = kl = 0.0
            for number, ids_bt in enumerate(windows_bt.split(2)):
                with self.accelerator.autocast():
                    logits = model(input_ids=ids_bt.to(self.accelerator.device), use_cache=False).logits
                logits_pv = logits[:, :-1].flatten(0, 1)
                if first:
                    kept.append(logits_pv)
                target_p = ids_bt[:, 1:].flatten().to(logits_pv.device)
                for rows in torch.arange(len(logits_pv)).split(256):
                    logp_pv = logits_pv[rows].float().log_softmax(-1)
                    wanted_pv = kept[number][rows].float().log_softmax(-1)
                    loss -= float(logp_pv.gather(1, target_p[rows][:, None]).sum())
                    kl += float((wanted_pv.exp() * (wanted_pv - logp_pv)).sum())
            predicted = len(windows_bt) * (windows_bt.shape[1] - 1)
            perplexity = math.exp(loss / predicted)
            if name == "learned":
                point["learned"] = perplexity
            else:
                point["watched"][name] = {"perplexity": perplexity, "kl": kl / predicted}
        return point


def _select_dense(model: Any, stage: StageConfig) -> Any:
    """Everything of a dense model, or adapters on all of its linear layers but the head."""
    model.requires_grad_(True)
    if stage.train == "full":
        return model
    from peft import LoraConfig, get_peft_model

    head = model.get_output_embeddings()
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head]
    lora = stage.lora
    return get_peft_model(model, LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=linear))


def _spread(windows_bt: Tensor, count: int) -> Tensor:
    """`count` windows from all over a text, or all of them."""
    return windows_bt[torch.linspace(0, len(windows_bt) - 1, min(count, len(windows_bt))).round().long()]


class _Shuffled:
    """Windows in an order that depends on the seed, as training asks for them."""

    def __init__(self, ids_bt: Tensor, seed: int) -> None:
        self.ids_bt, self.at = ids_bt.numpy()[np.random.default_rng(seed).permutation(len(ids_bt))], 0

    def block(self, count: int) -> np.ndarray:
        rows = np.arange(self.at, self.at + count) % len(self.ids_bt)
        self.at += count
        return self.ids_bt[rows]

    def position(self) -> dict[str, Any]:
        return {"at": self.at}

    def seek(self, position: dict[str, Any]) -> None:
        self.at = position["at"]


if __name__ == "__main__":
    sys.exit(main())
