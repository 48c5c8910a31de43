"""Quality of conversion: methods side by side on the same model, texts, tokens and active shares.

    python benchmarks/quality/run.py --model MODEL --calibration TEXT... --test TEXT --ood TEXT --out DIR

MODEL is a Hub id, a folder or a .gguf file; a TEXT is a .txt, .jsonl or .parquet file or a Hub dataset. DIR gets
results.json and table.md after every cell, and ratio.svg in the end, where there is matplotlib (`pip install
peerify[plots]`). Run it again to go on where it stopped, or to add methods and shares: cells that are there are not
measured again, unless the code that made them has changed. A method is one of

    {methods}

or one of the peerify ones with options of `peerify.PeerConfig` added: peerify+refine_steps=0+num_shared=64.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from matrix import run_matrix, write_whole
from methods import METHODS, Method, parse_method
from plot import draw
from summary import markdown

from peerify import load_dense
from peerify.cli.progress_report import progress_on_stderr
from peerify.data import load_windows
from peerify.errors import PeerifyError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Parse, measure, write; returns the exit code."""
    options = _parse(arguments)
    try:
        results = _run(options)
    except PeerifyError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"run.py: interrupted; what is measured is in {options.out}", file=sys.stderr)
        return 130
    print(json.dumps(results, indent=1) if options.json else markdown(results), end="\n" if options.json else "")
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    names = textwrap.fill(", ".join(METHODS), 115, subsequent_indent="    ", break_on_hyphens=False)
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.replace("{methods}", names), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--calibration", required=True, nargs="+", metavar="TEXT", help="share the tokens equally")
    parser.add_argument("--test", required=True, metavar="TEXT", help="text of the kind that is calibrated on")
    parser.add_argument("--ood", metavar="TEXT", help="text of another kind")
    parser.add_argument("--known", metavar="TEXT", help="text that the model knows by heart")
    parser.add_argument("--active", default="0.125,0.25,0.5,0.75,1", help="shares, by commas (%(default)s)")
    parser.add_argument("--calibration-tokens", type=int, default=16384, help="(%(default)s)")
    parser.add_argument("--max-tokens", type=int, default=16384, help="of each text that is tested on (%(default)s)")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window (%(default)s)")
    parser.add_argument("--methods", default=",".join(METHODS), help="names, by commas (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(".quality"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON, not as a table")
    return parser.parse_args(arguments)


def _run(options: argparse.Namespace) -> dict[str, Any]:
    methods = [parse_method(name.strip()) for name in dict.fromkeys(options.methods.split(","))]
    actives = _shares(options.active)
    if options.test in options.calibration:
        raise UsageError(f"--test {options.test} is calibrated on as well: name a text that is not")
    with progress_on_stderr() as progress:
        dense = load_dense(options.model, device=options.device)

        def windows(specs: list[str], tokens: int) -> Any:
            return load_windows(specs, dense.tokenizer, context=options.context, max_tokens=tokens, progress=progress)

        specs = {"test": options.test, "ood": options.ood, "known": options.known}
        texts = {key: windows([spec], options.max_tokens) for key, spec in specs.items() if spec}
        results = run_matrix(
            dense.model,
            name=dense.source,
            calibration_bt=windows(options.calibration, options.calibration_tokens),
            texts=texts,
            labels={
                "calibration": [_public(spec) for spec in options.calibration],
                **{key: _public(specs[key]) for key in texts},
            },
            methods=methods,
            actives=actives,
            out=options.out,
            seed=options.seed,
            progress=progress,
            finished=lambda results: write_whole(options.out / "table.md", markdown(_ordered(results, methods))),
        )
    shown = _ordered(results, methods)
    write_whole(options.out / "table.md", markdown(shown))
    try:
        draw(shown, options.out / "ratio.svg")
    except ImportError:
        print("run.py: no ratio.svg without matplotlib: pip install 'peerify[plots]'", file=sys.stderr)
    return shown


def _ordered(results: dict[str, Any], methods: list[Method]) -> dict[str, Any]:
    """The same with the cells of `methods` first, in their order."""
    order = {method.name: place for place, method in enumerate(methods)}
    cells = sorted(results["cells"], key=lambda cell: (order.get(cell["method"], len(order)), -cell["active"]))
    return {**results, "cells": cells}


def _shares(text: str) -> list[float]:
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = [0.0]
    if not all(0 < share <= 1 for share in shares):
        raise UsageError(f"--active {text}: give shares above 0 and up to 1, by commas")
    return list(dict.fromkeys(shares))


def _public(spec: str) -> str:
    return Path(spec).name if Path(spec).expanduser().exists() else spec


if __name__ == "__main__":
    sys.exit(main())
