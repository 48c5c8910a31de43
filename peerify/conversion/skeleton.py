"""The converted, or grown, model that a recipe asks for, on the meta device: what it has, before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peerify.checkpoint.load import load_skeleton
from peerify.config.peer import PeerConfig
from peerify.config.recipe import Recipe
from peerify.conversion.growth import plan_growth
from peerify.conversion.sizing import plan_layer
from peerify.discovery.sites import Site, find_feedforwards, select_sites
from peerify.errors import ConversionError
from peerify.modeling.peer_elastic import Budget, ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_memory import Memory
from peerify.modules import peer_layers


def converted_skeleton(recipe: Recipe, dense: Any, *, made: bool = True) -> Any:
    """`dense`, a model on the meta device, as `recipe` converts and grows it, in place.

    As if all layers got the same share: their sizes differ little by it.

    Args:
        made: take what lies in the recipe's output, if it is there.

    Raises:
        PeerifyError: what the conversion itself would refuse; see `load_skeleton`.
    """
    if made and (Path(recipe.output).expanduser() / "config.json").exists():
        return load_skeleton(recipe.output, converted_too=True)
    sites = select_sites(find_feedforwards(dense), recipe.convert.layers)
    for site in sites:
        if not site.convertible:
            raise ConversionError(f"{site.path} cannot be converted: {site.reason}")
        with torch.device("meta"):
            layer = _elastic(site, recipe.convert) if recipe.convert.has_copies else _product(site, recipe.convert)
        # Where the dense layer's parts are spliced in, they stay beside it, which counts them too often.
        dense.set_submodule(site.path, layer)
    if recipe.grow is not None:
        grow_skeleton(dense, plan_growth(dense, recipe.grow))
    return dense


def grow_skeleton(model: nn.Module, planned: Mapping[str, Mapping[str, Any]]) -> None:
    """Give layers of a model on the meta device the memories that `plan_growth` planned, in place."""
    layers = peer_layers(model)
    for path, options in planned.items():
        layer = layers[path]
        with torch.device("meta"):
            memory = Memory(layer.d_model, gated=layer.pool.gate is not None, **options)
        if memory.pool_of is not None:
            memory.share(layers[memory.pool_of].memory.pool)
        layer.memory = memory


def _elastic(site: Site, config: PeerConfig) -> ElasticPEER:
    layer = ElasticPEER(
        site.d_model, site.d_ff, activation=site.activation, gated=site.kind == "gated",
        bits=config.bits, group=min(config.group, site.d_model),
    )  # fmt: skip
    active = config.active or 0.5  # to reach a loss, calibration text will tell
    layer.budget = None if active == 1 else Budget(active, inputs=1.0, price=1.0, bytes=active, macs=active)
    return layer


def _product(site: Site, config: PeerConfig) -> PEER:
    return PEER(**plan_layer(
        config, path=site.path, d_model=site.d_model, d_ff=site.d_ff, gated=site.kind == "gated",
        activation=site.activation,
    ))  # fmt: skip
