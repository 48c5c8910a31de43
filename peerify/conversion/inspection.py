"""What a conversion would do, from config and headers alone, and what one has done. Reads no weights."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peerify.checkpoint.load import load_skeleton
from peerify.checkpoint.source import why_no_weights
from peerify.config.peer import PeerConfig
from peerify.conversion.allocation import planned_fractions
from peerify.conversion.elastic import typical_cost
from peerify.discovery.sites import Site, survey
from peerify.errors import CheckpointError, ConversionError, UsageError
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.progress import Progress, teller
from peerify.reading import printable, read_object


def inspect_model(
    source: str,
    *,
    active: float = 0.5,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The feed-forward layers of a dense model, and what they would cost per token as PEER layers.

    Args:
        source: a Hub id, a directory or a .gguf file.
        active: share of the dense layer's bytes that a token is to read.
        progress: called as progress(stage, done, total).

    Returns:
        ``{"model", "model_type", "parameters", "active", "feedforwards": [...], "totals", "unseen", "weights"}``.
        Each layer has ``{"path", "kind", "d_model", "d_ff", "activation", "convertible", "reason", "parameters",
        "bytes_per_token", "flops_per_token"}``; the last two are ``{"dense", "converted"}``, with weights read once
        per token, those of experts in bfloat16, and two FLOPs for each multiply-add; how the budget divides is likely
        before calibration text is seen, not known. totals sums the layers that can be converted. "unseen"
        has, by path, models inside the model ("": the model itself) of which not all could be run from the config
        alone, with the reason. weights is None, or the reason why convert could not read them; config and weights
        that do not belong together are refused.

    Raises:
        UsageError: `active` is not in (0, 1].
        CheckpointError: see `load_skeleton`.
    """
    if not 0 < active <= 1:
        raise UsageError(f"--active {active} is not a share: give a number above 0 and at most 1")
    tell = teller(progress)
    tell("Finding feed-forward layers", 0, 1)
    model = load_skeleton(source, revision=revision, trust_remote_code=trust_remote_code)
    config = PeerConfig(active=active)
    sites, unseen = _survey(model)
    rows = [_row(site, config) for site in sites]
    tell("Finding feed-forward layers", 1, 1)
    able = [row for row in rows if row["convertible"]]
    totals: dict[str, Any] = {"convertible": len(able), "parameters": sum(row["parameters"] for row in able)}
    for key in ("bytes_per_token", "flops_per_token"):
        totals[key] = {when: sum(row[key][when] for row in able) for when in _COSTS}
    return {
        "model": printable(source),
        "model_type": model.config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "active": active,
        "feedforwards": rows,
        "totals": totals,
        "unseen": unseen,
        "weights": why_no_weights(source),
    }


def converted_layers(folder: str | Path) -> list[dict[str, Any]]:
    """The PEER layers of the converted model in `folder`: its config's entries with path and cost.

    bytes_fraction and macs_fraction are of the dense layer's, for each token, at the budget that the config has.
    """
    config = read_object(Path(folder).expanduser() / "config.json", CheckpointError, "convert again")
    rows = []
    for path, options in config["peer"]["layers"].items():
        read, done = planned_fractions(options, config.get("peer_active", 1.0))
        rows.append({**options, "path": path, "bytes_fraction": read, "macs_fraction": done})
    return rows


_FEW_PARAMETERS = 200_000_000
"""Of a model that is made with random weights, where its config alone does not say what it runs: 0.8 GB."""


def _survey(model: PreTrainedModel) -> tuple[list[Site], dict[str, str]]:
    """`survey` of a model on the meta device; what cannot be run there is run with random weights if it is small.

    A model that cannot be run at all has no sites, and the reason at "".
    """
    try:
        found = survey(model)
    except ConversionError as error:
        found = [], {"": str(error)}
    if "" not in found[1] or model.num_parameters() > _FEW_PARAMETERS:
        return found
    with suppress(Exception), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        real = survey(type(model)._from_config(model.config, dtype=torch.float32).eval())
        if len(real[0]) >= len(found[0]):
            return real
    return found


_COSTS = ("dense", "converted")
BYTES = 2  # of a number in bfloat16


def _row(site: Site, config: PeerConfig) -> dict[str, Any]:
    gated = site.kind == "gated"
    weights = (3 if gated else 2) * site.d_model * site.d_ff
    read, done = 1.0, 1.0
    if site.convertible:
        with torch.device("meta"):
            layer = ElasticPEER(
                site.d_model, site.d_ff, gated=gated, bits=config.bits, group=min(config.group, site.d_model)
            )
        read, done = typical_cost(layer, config.active or 1.0)
    return {
        "path": site.path,
        "kind": site.kind,
        "d_model": site.d_model,
        "d_ff": site.d_ff,
        "activation": site.activation,
        "convertible": site.convertible,
        "reason": site.reason or None,
        "parameters": site.parameters,
        "bytes_per_token": {"dense": weights * BYTES, "converted": round(read * weights * BYTES)},
        "flops_per_token": {"dense": weights * 2, "converted": round(done * weights * 2)},
    }
