"""The model that a config asks for, on the meta device: which class it is, and whether the weights fit it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from peerify.checkpoint.source import Source, leaves
from peerify.checkpoint.weights import FLOATS, ONLY_FLOATS
from peerify.errors import CheckpointError
from peerify.reading import printable, reason, shown

try:
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
except ImportError:  # an internal module, which not every release has
    gguf_loader = None  # type: ignore[assignment]

MAX_MODULES = 300_000  # three times what the largest mixtures of experts have


def load_config(found: Source, trust_remote_code: bool) -> PretrainedConfig:
    """The config object.

    Raises:
        CheckpointError: transformers does not know it, cannot use it, or may not run its code.
    """
    if found.converted:
        from peerify.modeling.modeling_peer import register

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
        with quiet():
            if found.gguf:
                return AutoConfig.from_pretrained(found.folder, gguf_file=found.gguf)
            trust = trust_remote_code and not found.converted
            return AutoConfig.from_pretrained(found.folder, trust_remote_code=trust)
    except Exception as error:
        what = "metadata" if found.gguf else "config.json"
        raise CheckpointError(f"{found.name}: its {what} cannot be used: {_why(error, found)}") from error


def model_class(found: Source, config: PretrainedConfig) -> Any:
    """The class that the checkpoint names, so that BERT for masked words stays that; else the usual one for its type.

    An Auto class where that one is not as easily told, and for a model whose class its own repository defines.

    Raises:
        CheckpointError: it names a class that is not there.
    """
    name = next(iter(found.config.get("architectures") or config.architectures or []), "")
    if found.converted:
        from peerify.modeling import modeling_peer

        cls = getattr(modeling_peer, name, None)
        if not is_native(cls):
            raise CheckpointError(f"{found.name}: this peerify does not know the class {shown(name)}")
        return cls
    auto_map = found.config.get("auto_map") or {}
    if type(config).__module__.startswith("transformers_modules"):
        named = [auto for auto, ref in auto_map.items() if str(ref).endswith("." + name)]
        return getattr(transformers, next(iter(named), "AutoModelForCausalLM"), transformers.AutoModel)
    cls = getattr(transformers, name, None) if name else None
    if is_native(cls):
        return cls
    if name and not auto_map:
        usual: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        remedy = f"write {usual.__name__} there" if usual else "name the class that the model was saved from"
        raise CheckpointError(
            f"{found.name}: config.json names the architecture {shown(name)}, a model that transformers "
            f"{transformers.__version__} does not have; {remedy}"
        )
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModel"):
        usual = getattr(transformers, auto)._model_mapping.get(type(config), None)
        if is_native(usual) and isinstance(config, usual.config_class):
            return usual
        if usual is not None:  # several, or one that takes a part of the config: the Auto class knows more
            return getattr(transformers, auto)
    return transformers.AutoModel


def build(found: Source, config: PretrainedConfig, cls: Any, trust_remote_code: bool) -> PreTrainedModel:
    """The model on the meta device, in eval mode.

    Raises:
        CheckpointError: it cannot be built, or asks for other weights than `found` has.
    """
    try:
        with quiet(), torch.device("meta"), _few_modules():
            if is_native(cls):
                model = cls(copy.deepcopy(config))  # some classes write into the config that they are given
            else:
                model = cls.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        made_for = getattr(cls, "config_class", None)
        if made_for and not isinstance(config, made_for):
            why = f"{cls.__name__} goes with model_type {made_for.model_type}, not {config.model_type}"
        elif cls is transformers.AutoModel and not config.architectures:
            why = f"it names no architectures, and {config.model_type} has no usual one; name the model's class there"
        else:
            why = _why(error, found)
        raise CheckpointError(f"{found.name} cannot be built from its config: {why}") from error
    if is_native(cls) and found.elements:
        _check_shapes(found, model)
    return model.eval()


def is_native(cls: Any) -> bool:
    """Whether `cls` is a model's own class: neither an Auto class nor a base of models, which holds no weights."""
    return isinstance(cls, type) and issubclass(cls, PreTrainedModel) and not cls.__name__.endswith("PreTrainedModel")


def refuse_misfit(found: Source, name: str, held: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    """Raise CheckpointError for a tensor that has the shape `held` where the model has `wanted`."""
    what = "header" if found.gguf else "config.json"
    raise CheckpointError(
        f"{found.name}: {printable(name)} has the shape {_by(held)} in the file, and its {what} asks "
        f"for {_by(wanted)}; the two do not belong together"
    )


def _check_shapes(found: Source, skeleton: PreTrainedModel) -> None:
    """Refuse a config that asks for other weights than there are, before memory is taken for what it asks."""
    prefix = f"{skeleton.base_model_prefix}."
    wanted = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
    for name, (dtype, shape) in found.tensors.items():
        for known in (name, prefix + name, name.removeprefix(prefix)):
            if wanted.get(known, shape) != shape:
                refuse_misfit(found, name, shape, wanted[known])
            if known in wanted and dtype not in FLOATS:
                raise CheckpointError(f"{found.name} holds {printable(name)} as {dtype}; {ONLY_FLOATS}")
    asked = sum(math.prod(shape) for shape in wanted.values())
    # Weights that are computed, such as sines of positions, are stored in no safetensors file.
    if asked > 2 * found.elements + (0 if found.gguf else 100_000):
        what = "its header" if found.gguf else "its config.json"
        raise CheckpointError(
            f"{found.name}: {what} asks for {asked:,} parameters, and the file holds {found.elements:,} numbers; "
            "the two do not belong together"
        )


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "()"


def _why(error: Exception, found: Source) -> str:
    """The reason of a fault; where transformers looked up a value of the config in vain, the key that has it."""
    if isinstance(error, KeyError) and error.args:
        key = next((key for key, value in leaves(found.config) if value == error.args[0]), None)
        if key:
            return (
                f"{shown(key)} is {shown(error.args[0])}, which transformers {transformers.__version__} does not know"
            )
    return reason(error)


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


@contextmanager
def quiet() -> Iterator[None]:
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
