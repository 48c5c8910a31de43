"""Language models from scratch that differ in one layer: dense, coarse mixture, product-key memory, or PEER.

    python benchmarks/isoflop/train.py --text a.txt b.txt --out DIR [--runs dense@3e-3,moe@3e-3,pkm@3e-3,peer@3e-3]
        [--seeds 0,1,2] [--tokens 2000000] [--experts 16384]

A small Llama is trained on the texts, of whose pieces of 20,000 characters each tenth is held out. The feed-forward
layer in its middle is of the kind that a run names; all kinds take about as many multiply-adds for a token, routing
included, and see the same tokens in the same order. That is the comparison of the PEER paper (2407.04153, section 3.2)
at a toy's scale. A run is a kind, perhaps with options, and its highest learning rate: peer+norm=0 leaves out the
normalisation of queries over the batch, peer+experts=65536 has so many experts.

DIR gets results.json after every run and table.md: held-out perplexity, mean and standard deviation over seeds, the
layer's parameters, and how many of its experts held-out text used and how far from evenly (KL from uniform in nats, the
paper's Table 2). Run it again to go on, or to add runs and seeds: what is there is not trained again.

Suffixes: b windows, t tokens of a window, n experts, k of them for a token.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from layers import KINDS, make
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from peerify.usage import evenness

PIECE, HELD_OUT = 20_000, 10  # characters; one piece in so many is held out
RUNS = "dense@3e-3,moe@3e-3,pkm@3e-3,peer@3e-3"
USE = (("usage", ".1%"), ("kl_uniform", ".2f"))  # of experts, with the form in which a table has it
WARMUP, DECAY = 0.05, 0.1  # share of steps; AdamW's


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, write results and a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, nargs="+", type=Path)
    parser.add_argument("--runs", default=RUNS, help="by commas (%(default)s)")
    parser.add_argument("--seeds", default="0", help="by commas (%(default)s)")
    parser.add_argument("--tokens", type=int, default=2_000_000, help="to train on (%(default)s)")
    parser.add_argument("--experts", type=int, default=16384, help="a square (%(default)s)")
    parser.add_argument("--heads", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--topk", type=int, default=32, help="experts of each head (%(default)s)")
    parser.add_argument("--query-dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--d-model", type=int, default=128, help="(%(default)s)")
    parser.add_argument("--blocks", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=2048, help="(%(default)s)")
    parser.add_argument("--context", type=int, default=128, help="tokens of a window (%(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows of a step (%(default)s)")
    parser.add_argument("--test-tokens", type=int, default=65536, help="of held-out text (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(arguments)
    runs = [parsed(run, parser) for run in options.runs.split(",")]
    settings = {key: value for key, value in vars(options).items() if key not in ("runs", "seeds", "out", "text")}
    settings["text"] = [path.name for path in options.text]
    file = options.out / "results.json"
    results: dict[str, Any] = {"settings": settings, "runs": []}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if results["settings"] != settings:
            parser.error(f"{file} was measured with other settings: name another --out")
    known = {(row["run"], row["seed"]) for row in results["runs"]}
    options.out.mkdir(parents=True, exist_ok=True)
    texts = None
    for seed, (run, kind, rate, extra) in itertools.product(map(int, options.seeds.split(",")), runs):
        if (run, seed) in known:
            continue
        texts = texts or tokenized(options)
        row = {"run": run, "seed": seed} | trained(options, kind, rate, extra, seed, *texts)
        results["runs"].append(row)
        file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(row), file=sys.stderr, flush=True)
    table = markdown(results)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table, end="")


def parsed(run: str, parser: argparse.ArgumentParser) -> tuple[str, str, float, dict[str, int]]:
    """`kind[+experts=N][+norm=0]@rate`, the kind, the rate, and the options."""
    described, _, rate = run.partition("@")
    kind, *extra = described.split("+")
    try:
        options = {key: int(value) for key, value in (part.split("=") for part in extra)}
        if kind not in KINDS or not set(options) <= {"experts", "norm"}:
            raise ValueError
        return run, kind, float(rate), options
    except ValueError:
        parser.error(f"--runs {run}: write kind[+experts=N][+norm=0]@rate, the kind one of {', '.join(KINDS)}")


def tokenized(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Windows to train on and held-out ones, each (b, t), by a byte-level BPE of the text to train on."""
    pieces = []
    for path in options.text:
        text = path.read_text(encoding="utf-8")
        pieces += [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    parts = [[p for i, p in enumerate(pieces) if (i % HELD_OUT == HELD_OUT - 1) == held] for held in (False, True)]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(parts[0], vocab_size=options.vocabulary, show_progress=False)

    def windows(part: list[str]) -> Tensor:
        ids = [id_ for piece in bpe.encode_batch(part) for id_ in piece.ids]
        return torch.tensor(ids[: len(ids) // options.context * options.context]).view(-1, options.context)

    if not parts[1]:
        sys.exit(f"train.py: the texts have less than {PIECE * HELD_OUT:,} characters: none would be held out")
    train_bt, test_bt = windows(parts[0]), windows(parts[1])
    count = min(len(test_bt), options.test_tokens // options.context)
    return train_bt, test_bt[torch.linspace(0, len(test_bt) - 1, count).round().long()]


def trained(
    options: argparse.Namespace,
    kind: str,
    rate: float,
    extra: dict[str, int],
    seed: int,
    train_bt: Tensor,
    test_bt: Tensor,
) -> dict[str, Any]:
    """Train one model; what it came to."""
    torch.manual_seed(seed)
    d_model = options.d_model
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=options.vocabulary,
            hidden_size=d_model,
            intermediate_size=8 * d_model // 3,
            num_hidden_layers=options.blocks,
            num_attention_heads=max(1, d_model // 32),
            max_position_embeddings=options.context,
            tie_word_embeddings=True,
        )
    )
    layer = make(
        kind,
        d_model,
        experts=extra.get("experts", options.experts),
        heads=options.heads,
        topk=options.topk,
        query_dim=options.query_dim,
        norm=bool(extra.get("norm", 1)),
    )
    model.model.layers[options.blocks // 2].mlp = layer
    steps = math.ceil(options.tokens / (options.batch_size * options.context))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=DECAY)
    order = torch.Generator().manual_seed(seed)
    index_b = torch.cat([torch.randperm(len(train_bt), generator=order) for _ in range(_epochs(options, train_bt))])
    start, losses = time.monotonic(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _factor(step, steps)
        ids_bt = train_bt[index_b[step * options.batch_size : (step + 1) * options.batch_size]]
        loss = model(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss
        losses.append(loss.item())
        (loss + getattr(layer, "loss", 0)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.monotonic() - start
    return {
        **{"macs": layer.macs(), "parameters": sum(p.numel() for p in layer.parameters())},
        **{"train_loss": statistics.mean(losses[-50:]), "seconds": round(seconds)},
        **tested(model, layer, test_bt),
    }


def _epochs(options: argparse.Namespace, train_bt: Tensor) -> int:
    return math.ceil((options.tokens / options.context + options.batch_size) / len(train_bt))


def _factor(step: int, steps: int) -> float:
    """A linear rise, then half a cosine down to a tenth."""
    rise = max(1, round(WARMUP * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


@torch.no_grad()
def tested(model: Any, layer: Any, test_bt: Tensor) -> dict[str, float]:
    """Held-out perplexity, and what the text used of the layer's experts."""
    model.eval()
    loss, count_n = 0.0, torch.zeros(0, dtype=torch.float64)
    for ids_bt in test_bt.split(32):
        loss += float(model(input_ids=ids_bt, labels=ids_bt, use_cache=False).loss) * len(ids_bt)
        if (found_tk := getattr(layer, "found", None)) is not None:
            experts = len(layer.experts) if hasattr(layer, "experts") else layer.keys.num_keys
            more_n = torch.bincount(found_tk.flatten(), minlength=experts).double()
            count_n = count_n + more_n if len(count_n) else more_n
    used = dict(evenness(count_n)) if len(count_n) else {}
    return {"perplexity": math.exp(loss / len(test_bt)), **{key: used[key] for key, _ in USE if key in used}}


def markdown(results: dict[str, Any]) -> str:
    """A row for each run, the mean over its seeds."""
    lines = ["| run | seeds | perplexity | parameters | multiply-adds | used | KL from uniform | s |", "|" + "---|" * 8]
    for run in dict.fromkeys(row["run"] for row in results["runs"]):
        rows = [row for row in results["runs"] if row["run"] == run]
        value = [row["perplexity"] for row in rows]
        spread = f" ± {statistics.stdev(value):.2f}" if len(value) > 1 else ""
        use = [f"{statistics.mean(row[key] for row in rows):{form}}" if key in rows[0] else "" for key, form in USE]
        cells = [run, len(rows), f"{statistics.mean(value):.2f}{spread}", f"{rows[0]['parameters']:,}"]
        cells += [f"{rows[0]['macs']:,}", *use, round(statistics.mean(row["seconds"] for row in rows))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
