"""Run the zoo: every model type in a process of its own; progress to stderr, results to docs/architectures.md.

    python tests/zoo/run.py [--types a,b] [--again OUTCOME,…] [--fresh]

A run that was interrupted goes on where it stopped, unless code has changed since; --fresh starts anew.
"""

# ruff: noqa: T201 - a script prints
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import resource
import sys
import time
import warnings
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "helpers"), str(HERE.parents[1])]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402
import transformers  # noqa: E402
from check import Result, check_type  # noqa: E402
from table import DOCUMENT, render  # noqa: E402
from transformers import CONFIG_MAPPING  # noqa: E402

RESULTS = HERE.parents[1] / ".zoo" / "results.json"
MEMORY = 10 * 2**30
SECONDS = 900


def _child(model_type: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    warnings.simplefilter("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        pipe.send([dataclasses.asdict(result) for result in check_type(model_type)])
    except BaseException as error:
        pipe.send([dataclasses.asdict(Result(model_type, "", "defect", f"{type(error).__name__}: {error}"[:200]))])
    pipe.close()
    os._exit(0)


def run_type(model_type: str) -> list[dict[str, Any]]:
    """The results of one type, from a process of its own: a crash is a result, too."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_child, args=(model_type, there))
    process.start()
    there.close()
    results = None
    try:
        if here.poll(SECONDS):
            results = here.recv()
        else:
            results = [dataclasses.asdict(Result(model_type, "", "defect", f"takes more than {SECONDS} s"))]
    except EOFError:
        pass
    process.kill()
    process.join()
    return results or [dataclasses.asdict(Result(model_type, "", "defect", "crashed"))]


def fingerprint() -> str:
    """Of all code that the results depend on."""
    files = sorted([*HERE.glob("*.py"), *(HERE.parents[1] / "peerify").glob("*.py")])
    code = hashlib.sha256(transformers.__version__.encode())
    for file in files:
        code.update(file.read_bytes())
    return code.hexdigest()


def model_types() -> list[str]:
    return sorted(CONFIG_MAPPING.keys())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--types", default="")
    parser.add_argument("--again", default="", help="outcomes to run again")
    parser.add_argument("--keep", action="store_true", help="keep results of other code (for development only)")
    parser.add_argument("--all", action="store_true", help="run every type again, keeping results until then")
    parser.add_argument("--fresh", action="store_true", help="forget earlier results")
    options = parser.parse_args()
    RESULTS.parent.mkdir(exist_ok=True)
    saved: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    same = options.keep or saved.get("code") == fingerprint()
    done: dict[str, Any] = saved.get("results", {}) if same else {}
    again = set(options.again.split(",")) - {""}
    wanted = [t for t in options.types.split(",") if t] or [
        t for t in model_types() if options.all or t not in done or any(r["outcome"] in again for r in done[t])
    ]
    # What has never been run comes first, then what was not exact.
    wanted.sort(key=lambda t: t in done and 1 + all(r["outcome"] == "exact" for r in done[t]))
    for i, model_type in enumerate(wanted):
        start = time.time()
        results = run_type(model_type)
        done[model_type] = results
        RESULTS.with_suffix(".tmp").write_text(json.dumps({"code": fingerprint(), "results": done}, indent=0))
        RESULTS.with_suffix(".tmp").replace(RESULTS)
        for r in results:
            line = f"[{i + 1}/{len(wanted)}] {model_type} {r['class_name']}: {r['outcome']} {r['sites']}"
            print(f"{line} {r['error']:.0e} {r['reason']} ({time.time() - start:.1f} s)", file=sys.stderr, flush=True)
    results = [Result(**r) for model_type in model_types() for r in done.get(model_type, [])]
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(render(results), encoding="utf-8")
    bad = sorted({r.model_type for r in results if r.outcome == "defect"})
    print(f"{os.path.relpath(DOCUMENT)}: {len(results)} results, defects: {', '.join(bad) or 'none'}")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
