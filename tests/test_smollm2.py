"""The truth: a real model, SmolLM2-135M, as `make demo` gets it from the package index. Run by `make slow`."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from peerify import PeerConfig, convert, evaluate, load_dense, perplexity
from peerify.data import tokenize

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def demo() -> Any:
    spec = importlib.util.spec_from_file_location("demo", ROOT / "demo" / "demo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def gguf(demo: Any) -> str:
    # A process of its own: the download goes to the package index, which tests must not reach.
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'demo')!r}); import demo; demo.FOLDER.mkdir(exist_ok=True); "
    subprocess.run([sys.executable, "-c", code + "demo.smollm2()"], cwd=ROOT, check=True)
    return str(ROOT / demo.FOLDER / demo.GGUF)


def windows(dense: Any, count: int, skip: int = 0) -> torch.Tensor:
    """Windows of 256 tokens of Python's own documentation."""
    from pydoc_data.topics import topics

    return tokenize("\n\n".join(topics[key] for key in sorted(topics)), dense.tokenizer, 256, 256 * (skip + count))[
        skip:
    ]


def test_everything_retrieved_is_the_dense_model(gguf: str) -> None:
    dense = load_dense(gguf)
    test_bt = windows(dense, 4)
    with torch.no_grad():
        wanted = dense.model(test_bt).logits
        dense_perplexity = perplexity(dense.model, test_bt)
        convert(dense.model, PeerConfig(active=1.0), test_bt[:1])
        got = dense.model(test_bt).logits
    assert (got - wanted).norm() / wanted.norm() <= 1e-5
    assert perplexity(dense.model, test_bt) == pytest.approx(dense_perplexity, rel=1e-5)


def test_copies_spend_what_was_asked_and_lose_less_the_more_that_is(gguf: str) -> None:
    dense = load_dense(gguf)
    original = load_dense(gguf).model
    calibration_bt, test_bt = windows(dense, 16), windows(dense, 4, skip=24)
    conversion = convert(dense.model, PeerConfig(active=0.5, allocation="uniform"), calibration_bt)
    found = []
    for active in (0.125, 0.25, 0.5, 1):
        conversion.model.set_active(active)
        result = evaluate(conversion.model, test_bt, against=original)
        spent = sum(layer["bytes_fraction"] for layer in result["layers"]) / len(result["layers"])
        assert spent == pytest.approx(active, rel=0.08)
        found.append(result["against"]["ratio"])
    assert found == sorted(found, reverse=True)
    assert found[2] < 1.03
    assert found[3] == pytest.approx(1, abs=1e-5)


def test_half_of_a_few_layers_costs_little_and_beats_random_retrieval(gguf: str) -> None:
    dense = load_dense(gguf)
    original = load_dense(gguf).model
    calibration_bt, test_bt = windows(dense, 24), windows(dense, 8, skip=24)
    config = PeerConfig(active=0.5, layers="4,12,20", keys="product")
    conversion = convert(dense.model, config, calibration_bt)
    assert conversion.bytes_fraction == pytest.approx(0.5, abs=0.01)
    result = evaluate(dense.model, test_bt, against=original)
    fitted = result["against"]["ratio"]
    assert len(result["layers"]) == 3
    for path in conversion.layers:
        keys = dense.model.get_submodule(path).keys
        torch.nn.init.normal_(keys.sub_keys, std=0.1, generator=torch.Generator().manual_seed(0))
    random = evaluate(dense.model, test_bt, against=original)["against"]["ratio"]
    assert fitted < 1.1
    assert fitted < random
