"""A cross-section of all architectures is converted exactly, and docs/architectures.md says so for this version."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from check import check_type
from table import documented, rows

# Chosen to span what feed-forward layers look like; each takes a second or two.
TYPES = """
    aimv2_vision_model albert apertus arcee axk1 bitnet bart bloom clip codegen convnext cpmant deepseek_v4 dinov2
    dinov2_with_registers distilbert esm falcon falcon_h1 falcon_mamba gemma3_text gpt2 gpt_bigcode gpt_neox gptj
    granite helium ijepa layoutlm levit llama mamba minimax_m3_vl_text mixtral moonshine mpt nystromformer olmo2 opt
    persimmon phi3 rwkv qwen2_moe qwen2_vl qwen3_next segformer siglip_vision_model starcoder2
    swin switch_transformers t5 time_series_transformer vit vjepa2 wav2vec2 xglm
""".split()  # noqa: SIM905


def test_the_table_is_of_the_pinned_transformers() -> None:
    pins = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
    newest = re.findall(r"^transformers==([\d.]+)", pins, re.MULTILINE)[0]
    assert documented()[0] == newest, "run `make zoo`"


@pytest.mark.parametrize("model_type", TYPES)
def test_type_is_as_documented(model_type: str) -> None:
    found_in, table = documented()
    if version("transformers") != found_in:
        pytest.skip(f"docs/architectures.md is of transformers {found_in}")
    results = check_type(model_type)
    assert not [r for r in results if r.outcome == "defect"]
    assert [row[:5] for row in rows(results)] == table[model_type]
