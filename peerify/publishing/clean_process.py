"""What someone without peerify does with a published model: load it and compute. Run by verify.py as plain text.

One argument, JSON: {"source", "revision", "files", "inputs", "out", "reference"}. Loads `source` (a folder, or a Hub id
with the `files` it must have) with trust_remote_code, writes `out`.json (class, digests of all weights) and
`out`.safetensors (what the model answers to the first of `inputs` that it takes), and with a `reference` compares with
such a pair. {"error"} in `out`.json: it failed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import sys
import time
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
    source, files = job["source"], job["files"]
    if files is None:
        files = [path.name for path in Path(source).iterdir()]
    else:
        fetch(source, job["revision"], files)
    where = {"revision": job["revision"], "trust_remote_code": True}
    config = transformers.AutoConfig.from_pretrained(source, **where)
    name = config.architectures[0]
    autos = [auto for auto, reference in config.auto_map.items() if reference.endswith(f".{name}")]
    loader = getattr(transformers, autos[0] if autos else "AutoModel")
    model, info = loader.from_pretrained(source, output_loading_info=True, **where)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info.get(kind):
            return {"error": f"{kind.replace('_', ' ')} while loading: {_some(sorted(map(str, info[kind])))}"}
    if any(name.startswith("tokenizer") for name in files):
        transformers.AutoTokenizer.from_pretrained(source, **where)
    digests = {}
    for key, tensor in model.state_dict().items():
        if tensor.numel() and tensor.is_floating_point():
            low, high = torch.aminmax(tensor.detach())
            if not (low.isfinite() and high.isfinite()):
                return {"error": f"the weight {key} has NaN or infinite values"}
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        digests[key] = hashlib.sha256(raw.numpy()).hexdigest()
    said = ask(model.eval(), torch.load(job["inputs"], weights_only=True))
    keys = [key for key in ("logits", "last_hidden_state") if said.get(key) is not None] or list(said)
    answers = {key: said[key].contiguous().clone() for key in keys if isinstance(said[key], torch.Tensor)}
    if not answers:
        return {"error": f"what {name} answers cannot be compared: it holds no tensors"}
    result: dict[str, Any] = {
        "class": type(model).__name__,
        "weights": digests,
    }
    if job["reference"]:
        result["differs"] = _difference(result, answers, Path(job["reference"]), load_file)
    save_file(answers, job["out"] + ".safetensors")
    return result


def fetch(source: str, revision: str, files: list[str]) -> None:
    """Bring all files into the cache. A Hub that is busy, down or gone is waited for, a minute in all."""
    from huggingface_hub import snapshot_download

    for pause in (1, 2, 4, 8, 8, 8, 8, 8, 13, None):
        try:
            folder = Path(snapshot_download(source, revision=revision, allow_patterns=files))
            missing = [name for name in files if not (folder / name).exists()]
            if not missing:
                return
            raise FileNotFoundError(f"{_some(missing)} is missing on the Hub")  # or the Hub went away half-way
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            if pause is None or full or status in (400, 401, 403, 404):
                raise
            time.sleep(pause)


def ask(model: Any, candidates: list[dict[str, Any]]) -> Any:
    """What the model answers to the first of the inputs that it takes."""
    import torch

    problem: Exception | None = None
    for given in candidates:
        of_its_type = {
            key: value.to(model.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in given.items()
        }
        torch.manual_seed(0)  # some models mask or drop at random even now
        try:
            with torch.no_grad():
                return model(**of_its_type)
        except Exception as error:
            problem = problem or error
    raise ValueError(f"it takes none of the inputs tried: {problem}")


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
