# Copyright 2026 The peerify authors. Licensed under the Apache License, Version 2.0.
"""What config.json's "peer" entry says of layers, as layers in a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .peer_elastic import ElasticPEER
from .peer_layer import PEER
from .peer_memory import make_memory

FORMAT = 2  # of the `peer` entry in config.json; raised when an older modeling_peer.py could not read it


def make_layer(options: dict[str, Any]) -> PEER | ElasticPEER:
    """A layer of what config.json says of it.

    Raises:
        ValueError: it says something that layers no longer have.
    """
    options, memory = dict(options), make_memory(options)
    options.pop("memory", None)
    layer = ElasticPEER(**options) if options.pop("kind", "product") == "elastic" else _product_keys(options)
    layer.memory = memory
    return layer


def _product_keys(options: dict[str, Any]) -> PEER:
    # Product keys had more options once. A layer that made no use of them is what it would be today.
    gone = {name: options.pop(name, None) for name in ("rerank", "share_query", "estimate", "shortlist", "candidates")}
    if gone["rerank"] or gone["share_query"] or gone["estimate"]:
        raise ValueError(
            "the model was converted by an older version of peerify with re-ranking or low-rank keys, which this one "
            "has not: convert it again, or load it with trust_remote_code=True, by the code beside its weights"
        )
    return PEER(**options)


class Removed(nn.Identity):
    """Where the second half of a feed-forward layer was that has no module of its own.

    Some architectures initialise the weights of its linear layers from above, by name: they find empty ones.
    """

    weight = property(lambda self: torch.empty(0, 1))
    bias = property(lambda self: torch.empty(0, 1))


def absent_attribute(layer: nn.Module, name: str) -> Any:
    """`PEER.__getattr__` while weights are initialised."""
    try:
        return nn.Module.__getattr__(layer, name)
    except AttributeError:
        return Removed()


def install(model: PreTrainedModel, peer: dict[str, Any]) -> None:
    """Put PEER layers and identities where `peer` says. Idempotent; parts that this model class lacks are passed over.

    Raises:
        ValueError: `peer` was written by a newer peerify, or names no module of this model.
    """
    if peer["format"] < FORMAT:
        raise ValueError(
            f"the model was converted by a version of peerify before 0.1 (format {peer['format']}, and this one reads "
            f"{FORMAT}): convert it again, or load it with trust_remote_code=True, by the code beside its weights"
        )
    if peer["format"] > FORMAT:
        raise ValueError(
            f"the config's `peer` entry has format {peer['format']} and this modeling_peer.py reads up to {FORMAT}: "
            "update peerify, or load with trust_remote_code=True to use the file beside the weights"
        )
    prefix = model.base_model_prefix + "."
    found: dict[str, PEER | ElasticPEER] = {}
    children = [name + "." for name, _ in model.named_children()]
    for path, new in [*peer["layers"].items(), *((path, None) for path in peer["identities"])]:
        # Heads of one architecture may hold the same base model under names of their own.
        below = path.partition(".")[2]
        renamed = (path.removeprefix(prefix), prefix + path, below, prefix + below)
        for candidate in (path, *renamed, *(child + path for child in children)):
            try:
                old = model.get_submodule(candidate)
            except AttributeError:
                continue
            if not isinstance(old, (PEER, ElasticPEER) if new is not None else nn.Identity):
                old = make_layer(new) if new is not None else Removed()
                model.set_submodule(candidate, old)
            if isinstance(old, PEER | ElasticPEER):
                found[path] = old
            break
    if peer["layers"] and not found:
        raise ValueError(f"none of the layers named in the config's `peer` entry exists in {type(model).__name__}")
    for path, layer in found.items():
        if layer.memory is not None and layer.memory.pool_of is not None:
            owner = found.get(layer.memory.pool_of)
            if owner is None or owner.memory is None or owner.memory.pool_of is not None:
                raise ValueError(f"the memory of {path} has the pool of {layer.memory.pool_of}, which has none")
            layer.memory.share(owner.memory.pool)


def layers_below(layers: dict[str, Any], inside: Callable[[str], str]) -> dict[str, Any]:
    """The layers of a part of the model, under their names in that part.

    Args:
        layers: of the whole model, by path.
        inside: the name in the part of a path in the whole; empty for what is not in it.
    """
    found = {}
    for path, layer in layers.items():
        memory = layer.get("memory")
        if memory and memory.get("pool_of"):
            layer = layer | {"memory": memory | {"pool_of": inside(memory["pool_of"])}}
        if inside(path):
            found[inside(path)] = layer
    return found
