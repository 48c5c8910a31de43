# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""The transformers classes of models with PEER layers.

This folder's files need torch and transformers only. They are part of the peerify package *and* are copied verbatim
beside the weights of every converted model, so that ``from_pretrained(..., trust_remote_code=True)`` works without
peerify. There are two layers. That of peer_elastic.py has experts with copies of few bits as keys (peer_copies.py,
peer_elastic_pool.py), that of peer_layer.py retrieves experts by product keys (peer_keys.py, peer_selection.py). Tables
of experts are in peer_experts.py. Either may have a memory of many more experts (peer_memory.py). What config.json says
of layers becomes layers in peer_install.py.
"""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers import PretrainedConfig, PreTrainedModel, conversion_mapping
from transformers.models.auto import configuration_auto

from .peer_elastic import ElasticPEER
from .peer_install import FORMAT, absent_attribute, install, layers_below, make_layer
from .peer_layer import PEER
from .peer_memory import shared_pools

# The files that travel beside the weights: this one, and what it imports. On one line, which peerify reads.
FILES = ("modeling_peer.py", "peer_choice_kernel.py", "peer_copies.py", "peer_cpu.py", "peer_cpu_kernel.py", "peer_cpu_vectors.py", "peer_elastic.py", "peer_elastic_pool.py", "peer_evaluation.py", "peer_experts.py", "peer_faster.py", "peer_full.py", "peer_full_kernel.py", "peer_gathered.py", "peer_gathered_gpu.py", "peer_gathered_gpu_kernel.py", "peer_gathered_kernel.py", "peer_gpu.py", "peer_gpu_kernel.py", "peer_inputs_kernel.py", "peer_install.py", "peer_kernels.py", "peer_keys.py", "peer_lanes.py", "peer_layer.py", "peer_many.py", "peer_many_kernel.py", "peer_memory.py", "peer_products.py", "peer_rounding_kernel.py", "peer_selection.py", "peer_topk.py", "peer_topk_kernel.py", "peer_triton.py", "peer_vectors.py")  # fmt: skip  # noqa: E501
PREFILL = ("all", "budget")
__all__ = ["FORMAT", "PeerModelMixin", "adopt", "make_layer", "register"]


def _own_part(config: PretrainedConfig, model_class: Any) -> PretrainedConfig:
    """`config`, or its text part where `model_class` is built from that.

    Auto classes load text models out of larger ones, with the config of the whole, which has the layers by their names
    in the whole.
    """
    dense = model_class.config_class.__base__
    if isinstance(config, dense) or config.sub_configs.get("text_config") is not dense:
        return config

    def inside(path: str) -> str:
        """The rest of a path that leads into the language model; empty for others."""
        below = (f".{path}".partition(f".{holder}.")[2] for holder in ("language_model", "text_model"))
        return next(filter(None, below), "")

    peer = config.peer  # type: ignore[attr-defined]
    own = {
        "format": peer["format"],
        "layers": layers_below(peer["layers"], inside),
        "identities": [inside(path) for path in peer["identities"] if inside(path)],
    }
    text = _adopt_config(copy.deepcopy(config.get_text_config()), model_class, own)
    for key in ("peer_active", "peer_prefill"):
        if hasattr(config, key):
            setattr(text, key, getattr(config, key))
    return text


class PeerModelMixin:
    """What a transformers class needs to hold PEER layers; comes before the architecture's own class."""

    def __init__(self, config: PretrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(_own_part(config, type(self)), *args, **kwargs)  # type: ignore[call-arg]

    def post_init(self) -> None:
        install(self, self.config.peer)  # type: ignore[arg-type, attr-defined]
        self.set_active(getattr(self.config, "peer_active", 1.0), getattr(self.config, "peer_prefill", "all"))  # type: ignore[attr-defined]
        # The models inside listed their tied weights when they still had the layers that are now replaced. Innermost
        # first: each list holds those of the children.
        for part in reversed([*self.modules()][1:]):  # type: ignore[attr-defined]
            if isinstance(part, PreTrainedModel) and hasattr(part, "all_tied_weights_keys"):
                part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=False)
                for name, child in part.named_children():
                    tied = getattr(child, "all_tied_weights_keys", None) or {}
                    part.all_tied_weights_keys.update({f"{name}.{k}": f"{name}.{v}" for k, v in tied.items()})
        super().post_init()  # type: ignore[misc]

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """As of transformers; the tables that memories of several layers share are tied as well."""
        tied: dict[str, str] = super().get_expanded_tied_weights_keys(all_submodels=all_submodels)  # type: ignore[misc]
        return tied | shared_pools(self)  # type: ignore[arg-type]

    def set_active(self, active: float, prefill: str | None = None) -> None:
        """Spend that share of the dense layers' bytes for each token from now on, in layers that have budgets.

        Args:
            active: 1 evaluates every expert in full. What memories read besides does not depend on it.
            prefill: "all" evaluates every expert where a sequence brings more than a few tokens at once, "budget" keeps
                to the budget there, too. None: as it is.

        Raises:
            ValueError: less than the layers' smallest budget, or no such way of prefill.
        """
        if prefill not in (None, *PREFILL):
            raise ValueError(f"prefill must be {' or '.join(PREFILL)}, not {prefill!r}")
        for layer in self.modules():  # type: ignore[attr-defined]
            if isinstance(layer, ElasticPEER):
                layer.set_active(active)
                layer.prefill_all = layer.prefill_all if prefill is None else prefill == "all"
        self.config.peer_active = active  # type: ignore[attr-defined]
        if prefill is not None:
            self.config.peer_prefill = prefill  # type: ignore[attr-defined]

    def initialize_weights(self) -> None:
        # The architecture's `_init_weights` knows nothing of these parameters, nor would a sub-model's be asked.
        for module in self.modules():  # type: ignore[attr-defined]
            if isinstance(module, PEER | ElasticPEER):
                module.reset_parameters()
        # For classes from elsewhere, transformers leaves out modules without parameters of their own; but some
        # architectures fill the buffers of their parts there (Falcon-H1).
        # Others initialise the layers of a block by name (V-JEPA 2): what is gone lets everything be done to it.
        self.is_custom_code = lambda: False
        PEER.__getattr__ = ElasticPEER.__getattr__ = absent_attribute  # type: ignore[assignment, method-assign]
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            del self.is_custom_code, PEER.__getattr__, ElasticPEER.__getattr__

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        # transformers copies the code of classes that came from a repository, not of registered ones.
        if kwargs.get("is_main_process", True):
            for name in FILES:
                shutil.copyfile(Path(__file__).parent / name, Path(save_directory) / name)


def _auto_classes() -> dict[str, type]:
    """The Auto classes that build models, by name."""
    from transformers.models.auto import modeling_auto

    return {
        name: value
        for name, value in vars(modeling_auto).items()
        if name.startswith("AutoModel") and getattr(value, "_model_mapping", None) is not None
    }


def _heads(model_type: str, preferred: str | None = None) -> dict[str, str]:
    """Auto class name -> class name, for every head that an architecture has."""
    heads = {}
    for auto, cls in _auto_classes().items():
        names = cls._model_mapping._model_mapping.get(model_type)  # type: ignore[attr-defined]
        if names:
            names = [names] if isinstance(names, str) else list(names)
            heads[auto] = str(preferred if preferred in names else names[0])
    return heads


def __getattr__(name: str) -> type:
    """Make `Peer<Class>` for a transformers class on demand (PEP 562), so that auto_map and pickle find it."""
    base_name = name.removeprefix("Peer")
    base = getattr(transformers, base_name, None) if base_name != name and base_name else None
    if not isinstance(base, type):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if issubclass(base, PretrainedConfig):
        members: dict[str, Any] = {
            "model_type": "peer_" + base.model_type,
            "__module__": __name__,
            "__qualname__": name,
        }
        cls = type(name, (base,), members)
        globals()[name] = cls
        _register(cls, base)
    elif issubclass(base, PreTrainedModel):
        dense_config: Any = base.config_class
        config_name = "Peer" + dense_config.__name__
        config_class: Any = globals().get(config_name) or __getattr__(config_name)
        members = {"config_class": config_class, "__module__": __name__, "__qualname__": name}
        cls = globals()[name] = type(name, (PeerModelMixin, base), members)
        # transformers skips the renaming of checkpoint keys for classes that are not its own.
        # Under the type where the original has it under the type: a model inside a model then counts once.
        for dense_key, key in ((base_name, name), (dense_config.model_type, config_class.model_type)):
            mapping = conversion_mapping.get_checkpoint_conversion_mapping(dense_key)
            if mapping is not None:
                conversion_mapping.register_checkpoint_conversion_mapping(key, mapping, overwrite=True)
    else:
        raise AttributeError(f"{base_name} is neither a configuration nor a model of transformers")
    return cls


def _register(config_class: type, base: type) -> None:
    """Make the Auto classes know a Peer config: generic heads build their backbone with AutoModel.from_config."""
    transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)  # type: ignore[attr-defined]
    autos = _auto_classes()
    for auto, model_name in _heads(base.model_type).items():  # type: ignore[attr-defined]
        dense = getattr(transformers, model_name, None)
        if not isinstance(dense, type) or not issubclass(dense, PreTrainedModel):
            continue  # not exported, or a stand-in for what lacks a package
        # Some Auto classes name a model for a type whose config it cannot take: a part of a larger one, not its text.
        parts = {name: part for name, part in base.sub_configs.items() if name != "text_config"}  # type: ignore[attr-defined]
        if dense.config_class in parts.values():
            continue
        model = globals().get("Peer" + model_name) or __getattr__("Peer" + model_name)
        # Not by the Auto class's own `register`, which insists on the model's own config class: ShieldGemma 2 builds
        # Gemma 3 with its config.
        autos[auto]._model_mapping.register(config_class, model, exist_ok=True)  # type: ignore[attr-defined]


def adopt(model: PreTrainedModel, peer: dict[str, Any], active: float = 1.0) -> PreTrainedModel:
    """Make a dense model whose modules have been replaced an instance of its Peer class, in place.

    Args:
        model: an instance of a class of transformers; its PEER layers and identities are already in place.
        peer: the config entry: {"format", "layers": {path: options, see `make_layer`}, "identities": [path]}.
        active: see `PeerModelMixin.set_active`.

    Raises:
        ValueError: the class of `model` is not part of transformers.
    """
    name = type(model).__name__
    if getattr(transformers, name, None) is not type(model):
        raise ValueError(f"{name} is not a class of transformers: a converted model could not be loaded back")
    model.__class__ = globals().get("Peer" + name) or __getattr__("Peer" + name)
    _adopt_config(model.config, type(model), peer)
    model.set_active(active, PREFILL[0])  # type: ignore[operator]
    return model


def _adopt_config(config: PretrainedConfig, model_class: Any, peer: dict[str, Any]) -> PretrainedConfig:
    """Make a dense config that of a Peer class, in place, and say in it where the classes of this file are."""
    model_type, name = type(config).model_type, model_class.__name__
    config.__class__ = model_class.config_class
    config.__dict__.pop("model_type", None)  # an instance attribute of the dense type would shadow the class's
    config.peer = peer
    config.auto_map = {"AutoConfig": f"modeling_peer.{type(config).__name__}"}
    heads = _heads(model_type, name.removeprefix("Peer"))
    config.auto_map |= {auto: f"modeling_peer.Peer{head}" for auto, head in heads.items()}
    config.architectures = [name]
    return config


class _PeerConfigs(dict):  # type: ignore[type-arg]
    """Extra entries of transformers' config mapping: `peer_<type>` for every type it knows, made when asked for."""

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (isinstance(key, str) and self._base(key) is not None)

    def __missing__(self, key: str) -> type:
        base = self._base(key)
        if base is None:
            raise KeyError(key)
        return globals().get("Peer" + base) or __getattr__("Peer" + base)

    @staticmethod
    def _base(key: str) -> str | None:
        return (
            configuration_auto.CONFIG_MAPPING_NAMES.get(key.removeprefix("peer_")) if key.startswith("peer_") else None
        )


def register() -> None:
    """Let transformers load converted models of every architecture without trust_remote_code. Idempotent."""
    mapping = configuration_auto.CONFIG_MAPPING
    if not isinstance(mapping._extra_content, _PeerConfigs):
        mapping._extra_content = _PeerConfigs(mapping._extra_content)
