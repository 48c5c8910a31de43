"""What lies in a converted model's folder beside the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
import yaml
from checkpoints import text_file, tiny_checkpoint

from peerify.checkpoint.files import CODE, CODE_FOLDER
from peerify.config.recipe import CalibrationConfig, Recipe
from peerify.conversion.checkpoint import convert_checkpoint


@pytest.mark.parametrize(
    ("family", "loader"), [("llama", "AutoModelForCausalLM"), ("gpt2", "AutoModelForCausalLM"), ("bert", None)]
)
def test_card_record_and_code(tmp_path: Path, family: str, loader: str | None) -> None:
    source = tiny_checkpoint(tmp_path / "dense", family)
    (tmp_path / "secret place").mkdir()
    text = text_file(tmp_path / "secret place" / "text.txt", 2000)
    out = tmp_path / "out"
    calibration = CalibrationConfig(data=str(text), tokens=512, context=32)
    convert_checkpoint(Recipe(model=str(source), output=str(out), calibration=calibration))

    card = (out / "README.md").read_text(encoding="utf-8")
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["library_name"] == "transformers"
    assert "peer" in metadata["tags"]
    assert "base_model" not in metadata, "a local folder has no address"
    code = card.split("```python")[1].split("```")[0].replace("PATH_OR_ID", str(out))
    names: dict[str, object] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == json.loads((out / "config.json").read_text())["architectures"][0]
    if loader:
        assert f"{loader}.from_pretrained" in code

    record = json.loads((out / "peerify.json").read_text(encoding="utf-8"))
    assert record["source"]["model"] == "dense"
    assert record["calibration"]["tokens"] == 512
    assert record["versions"]["transformers"] == transformers.__version__
    assert record["layer_errors"].keys() == json.loads((out / "config.json").read_text())["peer"]["layers"].keys()
    assert all((CODE_FOLDER / name).read_bytes() == (out / name).read_bytes() for name in CODE)
    for path in out.iterdir():
        if path.suffix in (".json", ".md", ".py"):
            assert str(tmp_path) not in path.read_text(encoding="utf-8"), f"{path.name} tells where it was made"
