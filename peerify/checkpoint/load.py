"""Load a model, dense or converted, from the Hub, a folder or a GGUF file."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.files import PROCESSOR_FILES, matching, require_own
from peerify.checkpoint.skeleton import build, is_native, load_config, model_class, quiet, refuse_misfit
from peerify.checkpoint.source import Source, open_source
from peerify.errors import CheckpointError, UsageError
from peerify.reading import read_object, reason, shown

__all__ = ["DenseModel", "atomic_folder", "load_dense", "load_for_eval", "load_skeleton"]

OLDEST_TRANSFORMERS = "5.17"
DTYPES = ("float32", "bfloat16", "float16", "auto")
TOKENIZER_OBJECTS = tuple(
    f"{name}.json" for name in ("tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens", "vocab")
)
# Written by transformers into tokenizer_config.json: facts about this machine, not about the tokenizer.
LOCAL_KEYS = ("is_local", "local_files_only", "name_or_path")


@dataclass(frozen=True)
class DenseModel:
    """A loaded model in eval mode, with what its folder held besides the weights."""

    model: PreTrainedModel
    source: str  # Hub id, or the last part of the path: fit for publishing
    revision: str | None  # the commit on the Hub
    files: Path | None  # the folder (or, for a Hub id, its snapshot in the cache)
    gguf: str | None = None
    trust_remote_code: bool = False

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises CheckpointError when there is none."""
        options: dict[str, Any] = {"gguf_file": self.gguf} if self.gguf else {}
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(
                    self.files, trust_remote_code=self.trust_remote_code, **options
                )
                tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]  # what fails here fails on a text
        except Exception as error:
            if not self.gguf and self.files and not list(self.files.glob("*token*")):
                raise CheckpointError(
                    f"{self.source} has no tokenizer (tokenizer.json): text cannot be turned into tokens; "
                    "copy the original model's tokenizer files beside the weights"
                ) from error
            if self.files and not self.gguf:
                _require_objects(self.files, TOKENIZER_OBJECTS)
            raise CheckpointError(f"{self.source} has no readable tokenizer: {reason(error)}") from error
        tokenizer.name_or_path = self.source
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if self.gguf and positions:  # GGUF tokenizers come without a length, which shows as 1e30
            tokenizer.model_max_length = positions
        return tokenizer

    def save_processor(self, folder: str | Path) -> None:
        """Copy tokenizer, processor, generation and licence files into `folder`, byte for byte.

        A GGUF file holds its tokenizer inside, so there it is written out anew.
        Raises CheckpointError where one of the files is a link out of the model's folder, or no regular file.
        """
        folder = Path(folder)
        if self.gguf:
            self.tokenizer.save_pretrained(folder)
            _drop_keys(folder / "tokenizer_config.json", LOCAL_KEYS)
        elif self.files:
            patterns = [*PROCESSOR_FILES, *(["*.py"] if self.trust_remote_code else [])]
            names = [name for name in matching(self.files, patterns) if not name.endswith((".safetensors", ".bin"))]
            require_own(self.files, names, self.source, CheckpointError, "put the file itself there, or remove it")
            for name in names:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.files / name, folder / name)


def load_dense(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> DenseModel:
    """Load the dense model to be converted: a Hub id, a directory or a .gguf file.

    `dtype` is float32, bfloat16, float16 or auto (as stored). Code from the model's repository runs only
    with `trust_remote_code`. Raises CheckpointError (see `open_source`) also for a model that is already
    converted or has NaN or infinite weights, and UsageError for an unknown dtype or device.
    """
    return _load(source, revision, dtype, device, trust_remote_code, converted_too=False)


def load_for_eval(
    source: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
) -> DenseModel:
    """Load a dense or a converted model; a converted one runs on peerify's own code, so needs no trust.

    Raises what `load_dense` raises, but takes converted models.
    """
    return _load(source, revision, dtype, device, trust_remote_code, converted_too=True)


def load_skeleton(
    source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, converted_too: bool = False
) -> PreTrainedModel:
    """Build a dense model (or a converted one, too) on the meta device from its config; no weight is read or fetched.

    Raises CheckpointError, as `load_dense` does, for what the config and the headers of weights that are there show.
    """
    _require_transformers()
    found = open_source(source, revision=revision, weights=False, code=trust_remote_code)
    if not converted_too:
        _refuse_converted(found)
    config = load_config(found, trust_remote_code)
    return build(found, config, model_class(found, config), trust_remote_code)


def _load(
    source: str | Path,
    revision: str | None,
    dtype: str,
    device: str,
    trust_remote_code: bool,
    *,
    converted_too: bool,
) -> DenseModel:
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    target = usable_device(device)
    _require_transformers()
    found = open_source(source, revision=revision, code=trust_remote_code)
    if not converted_too:
        _refuse_converted(found)
    config = load_config(found, trust_remote_code)
    options: dict[str, Any] = {"config": config, "dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if found.gguf:
        options["gguf_file"] = found.gguf
        if hasattr(transformers, "GgufConfig"):  # older releases always dequantize
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options |= {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    cls = model_class(found, config)
    if is_native(cls):
        options.pop("trust_remote_code", None)
        build(found, config, cls, trust_remote_code)  # weights that do not fit are refused before memory is taken
    try:
        with quiet():
            # Sizes that do not fit are named below; transformers would print them, and raise without them.
            model, info = cls.from_pretrained(
                found.folder, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    except Exception as error:
        _require_objects(found.folder, ("generation_config.json",))
        why = "its weights do not fit its config" if "above report" in str(error) else reason(error)
        raise CheckpointError(f"{found.name} cannot be loaded: {why}") from error
    for name, held, wanted in sorted(info["mismatched_keys"]):
        refuse_misfit(found, name, tuple(held), tuple(wanted))
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{found.name} has no weights for {missing[0]}{more}, which {type(model).__name__} needs; "
            "check `architectures` and the number of layers in its config.json"
        )
    _refuse_nonfinite(model, found.name)
    _forget_path(model, found)
    return DenseModel(model.to(target).eval(), found.name, found.revision, found.folder, found.gguf, trust_remote_code)


def _require_objects(folder: Path, names: tuple[str, ...]) -> None:
    """Raise CheckpointError for the first of the files `names` that is there and holds no JSON object."""
    for name in names:
        if (folder / name).exists():
            read_object(folder / name, CheckpointError)


def usable_device(device: str) -> torch.device:
    """The device of that name. Raises UsageError where this machine has none."""
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(0, device=target)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError here
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        # Of other kinds of device torch tells how it was built, at length.
        why = f" ({reason(error)})" if device.startswith(("cuda", "meta")) else ""
        raise UsageError(f"device {shown(device)} cannot be used{why}; this machine has {', '.join(there)}") from error
    return target


def _refuse_converted(found: Source) -> None:
    if found.converted:
        raise CheckpointError(f"{found.name} is already a PEER model; give the dense model it came from")


def _refuse_nonfinite(model: PreTrainedModel, name: str) -> None:
    for path, parameter in model.named_parameters():
        if parameter.numel() and parameter.is_floating_point():
            low, high = torch.aminmax(parameter.detach())  # allocates nothing; NaN shows in both
            if not (low.isfinite() and high.isfinite()):
                kind, dtype = "NaN" if low.isnan() else "infinite", str(parameter.dtype)[6:]
                wider = ", or needs --dtype float32" if dtype != "float32" else ""
                raise CheckpointError(
                    f"{name}: the parameter {path} has {kind} values in {dtype}; the checkpoint is damaged{wider}"
                )


def _forget_path(model: PreTrainedModel, found: Source) -> None:
    """Keep local paths and GGUF leftovers out of whatever is saved from this model."""
    model.config._name_or_path = model.name_or_path = found.name
    if found.gguf:
        for leftover in ("_model_name_or_path", "quantization_config"):
            model.config.__dict__.pop(leftover, None)
        model.config.architectures = [type(model).__name__]


def _drop_keys(path: Path, keys: tuple[str, ...]) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    kept = {key: value for key, value in values.items() if key not in keys}
    path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_transformers() -> None:
    if Version(transformers.__version__) < Version(OLDEST_TRANSFORMERS):
        raise CheckpointError(
            f"peerify needs transformers {OLDEST_TRANSFORMERS} or newer, not {transformers.__version__}; "
            "run `pip install -U transformers`"
        )
