"""Feed damaged files to every reader: `make fuzz`, or python tests/fuzzing/fuzz.py --count 100 safetensors recipe.

Prints a line for each corpus and one for each fault, and keeps the damaged file of each kind of fault in --keep. Exit
code 1 if there is any fault.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS), str(TESTS.parent)]

from fuzzing import mutate
from fuzzing.harness import Corpus, Outcome, outcome

CASES = Path(__file__).parent / "cases"


def corpora() -> dict[str, Corpus]:
    """All of them, by name."""
    from fuzzing import checkpoints, models, texts

    return models.CORPORA | texts.CORPORA | checkpoints.CORPORA


def damaged(corpus: Corpus, data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` mutants of the corpus's file."""
    values = count // 2 if corpus.as_json else 0
    yield from mutate.mutants(data, seed, count - values)
    for text in mutate.json_mutants(data.decode(), seed, values) if values else ():
        yield text.encode("utf-8", "surrogatepass")


def try_all(name: str, corpus: Corpus, seed: int, count: int, keep: Path | None) -> tuple[Counter[str], float]:
    """How the mutants of one corpus end: counts by kind, and the longest time in seconds."""
    ends: Counter[str] = Counter()
    longest, seen = 0.0, set()
    with tempfile.TemporaryDirectory(prefix="peerify-fuzz-") as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        corpus.make(whole)
        valid = outcome(corpus.reader, whole)
        if valid.kind != "result":
            raise SystemExit(f"{name}: the undamaged example is not read: {valid}")
        data = (whole / corpus.file).read_bytes()
        cases = sorted((CASES / name).glob("*")) if (CASES / name).is_dir() else []
        kept = ((path.name, path.read_bytes()) for path in cases)
        fresh = ((f"{seed}-{number}", raw) for number, raw in enumerate(damaged(corpus, data, seed, count)))
        for label, raw in [*kept, *fresh]:
            folder = Path(scratch) / "case"
            shutil.copytree(whole, folder)
            (folder / corpus.file).write_bytes(raw)
            end = outcome(corpus.reader, folder)
            shutil.rmtree(folder)
            ends[end.kind if end.fine else "fault"] += 1
            longest = max(longest, end.seconds)
            if not end.fine and (sort := _sort(end)) not in seen:
                seen.add(sort)
                print(f"  {name} {label}: {end.kind}: {end.message[:3000]}", flush=True)
                if keep is not None:
                    (keep / name).mkdir(parents=True, exist_ok=True)
                    (keep / name / f"{label}{Path(corpus.file).suffix}").write_bytes(raw)
    return ends, longest


def _sort(end: Outcome) -> str:
    """The same for faults that have the same cause: the last place in the code that the message names."""
    places = re.findall(r'File "([^"]+)", line (\d+)', end.message)
    return f"{end.kind} {places[-1] if places else end.message[:40]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="corpora; default: all")
    parser.add_argument("--count", type=int, default=100, help="mutants of each")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--keep", type=Path, help="folder for the files that a reader stumbled over")
    given = parser.parse_args()
    every = corpora()
    print(f"seed {given.seed}", flush=True)
    total: Counter[str] = Counter()
    for name in given.names or every:
        ends, longest = try_all(name, every[name], given.seed, given.count, given.keep)
        total += ends
        print(f"{name}: {dict(ends)}, at most {longest:.1f} s", flush=True)
    print(f"{total.total()} cases, {total['fault']} faults", flush=True)
    sys.exit(total["fault"] > 0)


if __name__ == "__main__":
    main()
