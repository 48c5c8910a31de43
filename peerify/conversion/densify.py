"""Back to dense: a converted model as an ordinary model of the class that it was made from.

A PEER layer whose experts are single neurons with unit gates is a feed-forward layer of which a token uses a part. With
every expert kept it is that feed-forward layer, in another order of its neurons. A memory that has not learned anything
adds nothing, and is left out.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.load import load_for_eval, load_skeleton
from peerify.conversion.feedforward import write_feedforward
from peerify.discovery.sites import Site, find_feedforwards
from peerify.errors import ConversionError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.modules import peer_layers
from peerify.progress import Progress, teller
from peerify.reading import shown


def densify_checkpoint(
    folder: str, output: str, *, max_shard_size: str = "5GB", progress: Progress | None = None
) -> dict[str, Any]:
    """Write the converted model in `folder` to `output` as a dense checkpoint, whole or not at all.

    Returns:
        ``{"output", "architecture", "layers"}``.

    Raises:
        PeerifyError: `folder` is no converted model, one of its layers cannot be dense again, or `output` exists.
    """
    tell = teller(progress)
    with atomic_folder(output, inputs=[folder]) as temporary:
        _require_peer(load_skeleton(folder, converted_too=True))  # before any weight is read
        tell(f"Loading {folder}", 0, 1)
        converted = load_for_eval(folder, dtype="auto")
        tell(f"Loading {folder}", 1, 1)
        dense = densify(converted.model)
        tell("Writing", 0, 1)
        converted.save_processor(temporary)
        dense.save_pretrained(temporary, max_shard_size=max_shard_size)
        tell("Writing", 1, 1)
    return {"output": output, "architecture": type(dense).__name__, "layers": list(peer_layers(converted.model))}


@torch.no_grad()
def densify(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model that computes what `model` computes with every expert kept.

    Args:
        model: a converted model; it stays as it is, and shares no memory with the result.

    Raises:
        ConversionError: it is no converted model, or one of its layers is no dense layer with every expert kept.
    """
    _require_peer(model)
    layers, dense = peer_layers(model), _dense_model(model)
    sites = {site.path: site for site in find_feedforwards(dense)}
    for path, layer in layers.items():
        if path not in sites:
            raise ConversionError(f"{path} is no feed-forward layer of {type(dense).__name__}: it cannot become dense")
        fault = _fault(layer, sites[path])
        if fault:
            raise ConversionError(f"{path} cannot become dense: {fault}")
    _copy_the_rest(model, dense, [sites[path] for path in layers])
    for path, layer in layers.items():
        site, pool = sites[path], layer.pool
        write_feedforward(
            dense, site, pool.u, pool.gate, pool.v, pool.u_bias, pool.gate_bias, layer.bias,
            learned=pool.act if site.learned else None,
        )  # fmt: skip
    return dense


def _require_peer(model: PreTrainedModel) -> None:
    if not peer_layers(model) or not hasattr(model.config, "peer"):
        raise ConversionError(f"{type(model).__name__} has no PEER layer: it is dense already")


def _dense_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the dense class with the same config, its weights not set."""
    name = type(model).__name__.removeprefix("Peer")
    dense_class: Any = getattr(transformers, name)
    config_class: Any = type(model.config).__mro__[1]
    values = model.config.to_dict()
    for key in ("peer", "peer_active", "peer_prefill", "auto_map", "model_type", "architectures"):
        values.pop(key, None)
    return dense_class._from_config(config_class.from_dict(values), dtype=model.dtype).eval()  # type: ignore[no-any-return]


def _fault(layer: PEER | ElasticPEER, site: Site) -> str:
    """Why `layer` is not the feed-forward layer at `site` in another order; empty if it is."""
    if getattr(layer, "gates", "unit") != "unit":
        return f"{layer.gates} gates weigh its experts, which neurons of a dense layer have no place for"
    if layer.memory is not None and layer.memory.pool.v.any():
        experts = f"{layer.memory.num_experts:,} experts"
        return f"its memory of {experts} has learned, which neurons of a dense layer have no place for"
    if layer.num_experts != site.d_ff:
        return f"it has {layer.num_experts:,} experts, and the dense layer {site.d_ff:,} neurons"
    return site.reason


def _copy_the_rest(model: nn.Module, dense: nn.Module, sites: list[Site]) -> None:
    """Everything outside the PEER layers, by name."""
    parts = {part.path for site in sites for part in (site.up, site.gate) if part} | {site.down for site in sites}
    parts |= {site.learned for site in sites if site.learned}
    # A PEER layer may have the place of what is one part in the dense model, and parameters of the same name.
    inside = tuple(path + "." for path in peer_layers(model))
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(inside)}
    missing, _ = dense.load_state_dict(rest, strict=False)
    left = [name for name in missing if not any(name.startswith(part + ".") for part in parts)]
    if left:
        raise ConversionError(f"the converted model has no {shown(left[0])}, which {type(dense).__name__} needs")
