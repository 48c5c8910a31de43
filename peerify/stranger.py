"""What someone without peerify does with a published model: load it and compute. Run by loadback.py as plain text.

One argument, JSON: {"source", "revision", "out", "reference", "tokenizer"}. Loads `source` (a folder or Hub
id) with trust_remote_code, writes `out`.json (class, digests of all weights) and `out`.safetensors (what the
model answers to fixed inputs), and with a `reference` compares with such a pair. {"error"} in `out`.json: it failed.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any


class _Absent:
    """peerify cannot be imported here, wherever it is installed."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == "peerify":
            raise ImportError("peerify is not to be used here")


def look(job: dict[str, Any]) -> dict[str, Any]:
    """Load, compute, compare."""
    import torch
    import transformers
    from safetensors.torch import load_file, save_file

    transformers.logging.set_verbosity_error()
    source = job["source"]
    where = {"revision": job["revision"], "trust_remote_code": True}
    config = transformers.AutoConfig.from_pretrained(source, **where)
    name = config.architectures[0]
    autos = [auto for auto, reference in config.auto_map.items() if reference.endswith(f".{name}")]
    loader = getattr(transformers, autos[0] if autos else "AutoModel")
    model, info = loader.from_pretrained(source, output_loading_info=True, **where)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            return {"error": f"{kind.replace('_', ' ')} while loading: {_some(sorted(map(str, info[kind])))}"}
    if list(Path(source).glob("tokenizer*")) if Path(source).is_dir() else job["tokenizer"]:
        transformers.AutoTokenizer.from_pretrained(source, **where)
    digests = {}
    for key, tensor in model.state_dict().items():
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor.detach())
            if not (low.isfinite() and high.isfinite()):
                return {"error": f"the weight {key} has NaN or infinite values"}
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digests[key] = hashlib.sha256(raw.numpy()).hexdigest()
    with torch.no_grad():
        said = model.eval()(**inputs(model))
    keys = [key for key in ("logits", "last_hidden_state") if said.get(key) is not None] or list(said)
    answers = {key: said[key].contiguous() for key in keys if isinstance(said[key], torch.Tensor)}
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "weights": digests,
    }
    if job["reference"]:
        result["differs"] = _difference(result, answers, Path(job["reference"]), load_file)
    save_file(answers, job["out"] + ".safetensors")
    return result


def inputs(model: Any) -> dict[str, Any]:
    """The same inputs everywhere: token ids (2, 16), or pixels, from a fixed seed."""
    import torch

    generator = torch.Generator().manual_seed(20260101)
    main, config = model.main_input_name, model.config
    if main == "pixel_values":
        size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
        return {main: torch.randn(2, config.num_channels, *size, generator=generator).to(model.dtype)}
    if main != "input_ids":
        raise ValueError(f"models that read {main} cannot be tried out here")
    text = config.get_text_config()
    length = min(16, getattr(text, "max_position_embeddings", None) or 16)

    def ids() -> Any:
        # Low numbers: high ones may stand for images, which have to come with the text.
        return torch.randint(3, min(1000, text.vocab_size), (2, length), generator=generator)

    return {main: ids(), **({"decoder_input_ids": ids()} if config.is_encoder_decoder else {})}


def _difference(result: dict[str, Any], answers: dict[str, Any], reference: Path, load_file: Any) -> str | None:
    import torch

    wanted = json.loads(reference.with_suffix(".json").read_text())
    if result["class"] != wanted["class"]:
        return f"the class is {result['class']}, not {wanted['class']}"
    ours, theirs = wanted["weights"], result["weights"]
    unlike = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if unlike:
        return f"the weights differ: {_some(unlike)}"
    for key, expected in load_file(reference.with_suffix(".safetensors")).items():
        if key not in answers or answers[key].shape != expected.shape:
            return f"the shape of its {key} differs"
        if not torch.equal(answers[key], expected):
            gap = (answers[key].double() - expected.double()).abs().max().item()
            return f"the weights are the same, but its {key} differ by up to {gap:.3g}"
    return None


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def main() -> None:
    """Do the job in argv; whatever happens is written down."""
    job = json.loads(sys.argv[1])
    sys.meta_path.insert(0, _Absent)  # type: ignore[arg-type]
    try:
        result = look(job)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        result = {"error": lines[0] if lines else type(error).__name__, "type": type(error).__name__}
    Path(job["out"] + ".json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
