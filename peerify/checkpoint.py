"""Open a model (Hub, directory, GGUF); write a folder atomically."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from peerify.errors import CheckpointError, UsageError
from peerify.files import PROCESSOR_FILES, matching, require_own
from peerify.output import atomic_folder
from peerify.reading import printable, reason, shown
from peerify.source import Source, open_source

try:
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
except ImportError:  # an internal module, which not every release has
    gguf_loader = None  # type: ignore[assignment]

__all__ = ["DenseModel", "atomic_folder", "load_dense", "load_for_eval", "load_skeleton"]

OLDEST_TRANSFORMERS = "5.17"
MAX_MODULES = 300_000  # three times what the largest mixtures of experts have
DTYPES = ("float32", "bfloat16", "float16", "auto")
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
            with _quiet():
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

    Raises CheckpointError, as `load_dense` does, for what the config shows.
    """
    _require_transformers()
    found = open_source(source, revision=revision, weights=False, code=trust_remote_code)
    if not converted_too:
        _refuse_converted(found)
    config = _load_config(found, trust_remote_code)
    return _build(found, config, _model_class(found, config), trust_remote_code)


def _build(found: Source, config: PretrainedConfig, cls: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in eval mode."""
    try:
        with _quiet(), torch.device("meta"), _few_modules():
            if _is_native(cls):
                model = cls(copy.deepcopy(config))  # some classes write into the config that they are given
            else:
                model = cls.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise CheckpointError(f"{found.name} cannot be built from its config: {reason(error)}") from error
    return model.eval()


def _is_native(cls: Any) -> bool:
    """Whether `cls` is a model's own class, not an Auto class."""
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel)


@contextmanager
def _few_modules() -> Iterator[None]:
    """Stop a model that is being built once it has more modules than any model; a config may ask for millions."""
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise ValueError(f"it has more than {MAX_MODULES:,} modules")

    handle = register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


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
    target = _device(device)
    _require_transformers()
    found = open_source(source, revision=revision, code=trust_remote_code)
    if not converted_too:
        _refuse_converted(found)
    config = _load_config(found, trust_remote_code)
    options: dict[str, Any] = {"config": config, "dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if found.gguf:
        options["gguf_file"] = found.gguf
        if hasattr(transformers, "GgufConfig"):  # older releases always dequantize
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        options |= {"use_safetensors": True, "trust_remote_code": trust_remote_code}
    cls = _model_class(found, config)
    if _is_native(cls):
        options.pop("trust_remote_code", None)
        _check_shapes(found, _build(found, config, cls, trust_remote_code))
    try:
        with _quiet():
            model, info = cls.from_pretrained(found.folder, output_loading_info=True, **options)
    except Exception as error:
        raise CheckpointError(f"{found.name} cannot be loaded: {reason(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{found.name} has no weights for {missing[0]}{more}, which {type(model).__name__} needs; "
            "check `architectures` in its config.json"
        )
    _refuse_nonfinite(model, found.name)
    _forget_path(model, found)
    return DenseModel(model.to(target).eval(), found.name, found.revision, found.folder, found.gguf, trust_remote_code)


def _check_shapes(found: Source, skeleton: PreTrainedModel) -> None:
    """Refuse a config that asks for other weights than there are, before memory is taken for what it asks."""
    prefix = f"{skeleton.base_model_prefix}."
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    for name, (_, shape) in found.tensors.items():
        for known in (name, prefix + name, name.removeprefix(prefix)):
            if wanted.get(known, shape) != shape:
                raise CheckpointError(
                    f"{found.name}: {printable(name)} has the shape {_by(shape)} in the file, and its config.json asks "
                    f"for {_by(wanted[known])}; the two do not belong together"
                )
    asked = sum(math.prod(shape) for shape in wanted.values())
    if asked > 2 * found.elements + 1_000_000:  # tied weights are stored once
        what = "its header" if found.gguf else "its config.json"
        raise CheckpointError(
            f"{found.name}: {what} asks for {asked:,} parameters, and the file holds {found.elements:,} numbers; "
            "the two do not belong together"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


def _load_config(found: Source, trust_remote_code: bool) -> PretrainedConfig:
    """The config object. Refuses what transformers does not know and may not run."""
    if found.converted:
        from peerify.modeling_peer import register

        register()
    elif not found.gguf:
        model_type = found.config["model_type"]
        known = model_type in transformers.CONFIG_MAPPING
        if not known and not found.config.get("auto_map"):
            raise CheckpointError(
                f"{found.name}: transformers {transformers.__version__} does not know the architecture "
                f"{shown(model_type)}; a newer transformers might"
            )
        if not known and not trust_remote_code:
            raise CheckpointError(
                f"{found.name} runs code from its own repository (auto_map in config.json); read that code, "
                "then pass --trust-remote-code"
            )
    try:
        with _quiet():
            if found.gguf:
                return AutoConfig.from_pretrained(found.folder, gguf_file=found.gguf)
            trust = trust_remote_code and not found.converted
            return AutoConfig.from_pretrained(found.folder, trust_remote_code=trust)
    except Exception as error:
        what = "metadata" if found.gguf else "config.json"
        raise CheckpointError(f"{found.name}: its {what} cannot be used: {reason(error)}") from error


def _model_class(found: Source, config: PretrainedConfig) -> Any:
    """The class that the checkpoint names, so that BERT for masked words stays that; else an Auto class."""
    name = next(iter(found.config.get("architectures") or config.architectures or []), "")
    if found.converted:
        import peerify.modeling_peer as modeling

        cls = getattr(modeling, name, None)
        if cls is None:
            raise CheckpointError(f"{found.name}: this peerify does not know the class {shown(name)}")
        return cls
    auto_map = found.config.get("auto_map") or {}
    if type(config).__module__.startswith("transformers_modules"):
        named = [auto for auto, ref in auto_map.items() if str(ref).endswith("." + name)]
        return getattr(transformers, next(iter(named), "AutoModelForCausalLM"), transformers.AutoModel)
    cls = getattr(transformers, name, None) if name else None
    if _is_native(cls):
        return cls
    if name and not auto_map:
        usual: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        remedy = f"write {usual.__name__} there" if usual else "name the class that the model was saved from"
        raise CheckpointError(
            f"{found.name}: config.json names the architecture {shown(name)}, which transformers "
            f"{transformers.__version__} does not have; {remedy}"
        )
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"):
        if type(config) in getattr(transformers, auto)._model_mapping:
            return getattr(transformers, auto)
    return transformers.AutoModel


def _device(device: str) -> torch.device:
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise ValueError("it holds no numbers")
        torch.empty(0, device=target)
    except Exception as error:  # torch raises RuntimeError, AssertionError or NotImplementedError here
        there = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        there += ["mps"] * torch.backends.mps.is_available()
        raise UsageError(
            f"device {shown(device)} cannot be used ({reason(error)}); this machine has {', '.join(there)}"
        ) from error
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


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' bars and warnings, for peerify shows its own; restored on leaving."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    gguf_tqdm = getattr(gguf_loader, "tqdm", None)  # a bar that no setting reaches
    if gguf_tqdm:
        gguf_loader.tqdm = partial(gguf_tqdm, disable=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if gguf_tqdm:
            gguf_loader.tqdm = gguf_tqdm
        if bars:
            transformers_logging.enable_progress_bar()
