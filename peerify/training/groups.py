"""What trains: which parameters, in which groups, and adapters on the rest.

Expert tables are embeddings rather than layers: a step of AdamW also moves rows that no token used, and decay would
pull them to zero, so they have a group of their own without decay, as does the router.
"""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from peerify.config.train import StageConfig
from peerify.errors import UsageError
from peerify.modules import blocks_around, peer_layers
from peerify.training.sparse_memory import Rows, pools_of
from peerify.training.tables import TABLES, memories

EXPERTS, ROUTER, DECAYED, REST = "experts", "router", "decayed", "rest"


def kind(name: str, parameter: nn.Parameter, peer_paths: set[str], *, by_rows: bool = False) -> str:
    """The group of a parameter, by its name in the model; `by_rows`: tables of memories have one of their own."""
    path = next((path for path in peer_paths if name.startswith(path + ".")), None)
    if path is not None:
        if by_rows and name.startswith(f"{path}.memory.pool."):
            return TABLES
        return ROUTER if name.startswith((f"{path}.keys.", f"{path}.memory.keys.")) else EXPERTS
    return DECAYED if parameter.dim() >= 2 else REST


def parameter_groups(model: nn.Module, stage: StageConfig, rows: Rows | None = None) -> list[dict[str, Any]]:
    """Groups for an optimizer, of what requires gradients: {"name", "params", "names", "lr", "weight_decay"}.

    Args:
        rows: for train: memory, what learns of the tables.
    """
    paths = set(peer_layers(model))
    optimizer = stage.optimizer
    if rows is not None:
        names, params = list(rows.parameters), list(rows.parameters.values())
        rate = optimizer.lr * optimizer.experts_scale
        return [{"name": EXPERTS, "params": params, "names": names, "lr": rate, "weight_decay": 0.0}]
    scale = {EXPERTS: optimizer.experts_scale, ROUTER: optimizer.router_scale, TABLES: optimizer.tables_scale}
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        group = kind(name, parameter, paths, by_rows=optimizer.by_rows)
        entry = groups.setdefault(
            group,
            {
                "name": group,
                "params": [],
                "names": [],
                "lr": optimizer.lr * scale.get(group, 1.0),
                "weight_decay": optimizer.weight_decay if group == DECAYED else 0.0,
            },
        )
        entry["params"].append(parameter)
        entry["names"].append(name)
    return [groups[name] for name in (EXPERTS, ROUTER, DECAYED, REST, TABLES) if name in groups]


def require_peer(model: nn.Module) -> dict[str, Any]:
    """The PEER layers; UsageError where there is none."""
    layers = peer_layers(model)
    if not layers:
        raise UsageError(
            "the model to train has no PEER layer: convert it first (peerify convert), or name the converted folder "
            "as `output`"
        )
    return layers


def select_trainable(model: nn.Module, stage: StageConfig) -> nn.Module:
    """Set what trains as the stage asks; returns the model, wrapped in adapters for peer+lora.

    Where tables of memories have an optimizer of their own, their gradients become sparse.

    Raises:
        UsageError: there is no PEER layer, or no linear layer for adapters.
    """
    layers = require_peer(model)
    if stage.train == "peer+lora":
        from peft import LoraConfig, get_peft_model

        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear)
            and not any(name.startswith(path + ".") for path in layers)
            and module is not model.get_output_embeddings()  # type: ignore[operator]
        ]
        if not targets:
            raise UsageError("train: peer+lora finds no linear layer outside PEER: set train: peer or full")
        lora = LoraConfig(
            r=stage.lora.rank, lora_alpha=stage.lora.alpha, lora_dropout=stage.lora.dropout, target_modules=targets
        )
        model = get_peft_model(model, lora)  # type: ignore[arg-type, assignment]
    paths = set(peer_layers(model))
    if stage.train == "memory":  # the whole tables, since gradients are theirs; see sparse_memory.py
        model.requires_grad_(False)
        for pool in pools_of(model):
            for table in pool.tables.values():
                table.requires_grad_(True)
        return model
    for memory in memories(model).values():
        memory.pool.sparse = stage.optimizer.by_rows
    for name, parameter in model.named_parameters():
        group = kind(name, parameter, paths, by_rows=stage.optimizer.by_rows)
        trains = group in (EXPERTS, ROUTER, TABLES) or stage.train in ("full", "lisa") or ".lora_" in name
        if group == ROUTER and stage.optimizer.router_scale == 0:
            trains = False
        if group == EXPERTS and (stage.optimizer.experts_scale == 0 or name.endswith(".input_rms")):
            trains = False  # no gradient ever reaches what was measured
        parameter.requires_grad_(trains)
    return model


def lisa_blocks(model: nn.Module, stage: StageConfig, step: int, seed: int) -> list[str]:
    """The blocks that train in full at `step` of the stage: a draw that depends on nothing else."""
    everything = blocks_around(model, peer_layers(model))
    draw = random.Random(f"{seed} {step // stage.lisa.every}")
    return sorted(draw.sample(everything, min(stage.lisa.blocks, len(everything))))


def apply_lisa(model: nn.Module, open_blocks: list[str]) -> set[str]:
    """Let only `open_blocks` train besides PEER, embeddings and head; returns the names of what does not train."""
    paths, closed = set(peer_layers(model)), set()
    every = blocks_around(model, peer_layers(model))
    for name, parameter in model.named_parameters():
        if kind(name, parameter, paths) in (EXPERTS, ROUTER):
            continue  # PEER always trains
        inside = next((block for block in every if name.startswith(block + ".")), None)
        parameter.requires_grad_(inside is None or inside in open_blocks)
        if not parameter.requires_grad:
            parameter.grad = None
            closed.add(name)
    return closed
