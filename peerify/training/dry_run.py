"""What a training run will do and take, from configs alone: no weights are read, no text."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from peerify.checkpoint.load import load_skeleton
from peerify.config.recipe import Recipe
from peerify.config.train import StageConfig, TrainConfig
from peerify.conversion.skeleton import converted_skeleton
from peerify.data import check_windows
from peerify.modules import peer_layers
from peerify.progress import Progress, teller
from peerify.training import groups
from peerify.training.checks import check_space, check_training
from peerify.training.footprint import idle_numbers, memory_of, table_costs
from peerify.training.half import with_precision
from peerify.training.sparse_memory import numbers_of
from peerify.training.tables import require_memory


def plan_training(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Trainable parameters, memory, tokens, steps and FLOPs of `recipe.train`.

    Memory (`memory_of`) and FLOPs are estimates for one process. Two FLOPs are one multiply-add; attention's own
    products are counted, too.

    Returns:
        ``{"parameters", "steps", "tokens", "batch_size", "context", "flops", "checkpoint_bytes", "tables", "stages":
        [...]}``; "tables" is what `table_costs` returns, and each stage has ``{"stage", "train", "steps", "tokens",
        "trainable", "groups": {name: parameters}, "objectives", "optimizer", "lr", "flops", "memory": {part: bytes,
        "total"}}``.

    Raises:
        PeerifyError: what the run itself would refuse: see `check_training`, `load_skeleton` and `check_space`.
    """
    config = with_precision(recipe).training
    check_training(recipe)
    tell = teller(progress)
    tell("Planning", 0, 1)
    dense = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    dense_parameters = _count(dense)
    model: Any = converted_skeleton(recipe, dense)
    groups.require_peer(model)
    check_space(config, model, recipe.run_folder)
    check_windows(torch.zeros(1, config.data.context, dtype=torch.int64), model)
    parameters = _count(model)
    stages, steps = [], config.steps_of_stages()
    for number, (stage, count) in enumerate(zip(config.stages, steps, strict=True)):
        require_memory(model, number, stage.optimizer)
        stages.append(_stage(model, config, number, stage, count, dense_parameters))
    tell("Planning", 1, 1)
    state = max(stage["memory"]["optimizer"] for stage in stages)
    return {
        "parameters": parameters,
        "steps": sum(steps),
        "tokens": sum(stage["tokens"] for stage in stages),
        "batch_size": config.batch_size,
        "context": config.data.context,
        "flops": sum(stage["flops"] for stage in stages),
        "checkpoint_bytes": config.checkpoints.keep * (4 * parameters + state) + 4 * parameters,
        "tables": table_costs(model, config),
        "stages": stages,
    }


def _stage(
    model: Any, config: TrainConfig, number: int, stage: StageConfig, steps: int, teacher: int
) -> dict[str, Any]:
    plain = stage.model_copy(update={"train": "peer"}) if stage.train == "peer+lora" else stage
    groups.select_trainable(model, plain)
    if stage.train == "lisa":
        groups.apply_lisa(model, groups.lisa_blocks(model, stage, 0, config.seed))
    counts = {
        group["name"]: sum(parameter.numel() for parameter in group["params"])
        for group in groups.parameter_groups(model, stage)
    }
    if stage.train == "memory":
        counts = {groups.EXPERTS: numbers_of(model, stage.memory)[0]}
    if stage.train == "peer+lora":
        counts["adapters"] = _adapter_parameters(model, stage.lora.rank)
    trainable, parameters = sum(counts.values()), _count(model)
    tokens = steps * config.batch_size * config.data.context
    needs_teacher = stage.objectives.needs_teacher
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings() is not None and model.get_output_embeddings().weight is embeddings
    # A look-up takes no products, nor do experts that are not found.
    used = parameters - (0 if tied else embeddings.numel()) - idle_numbers(model)
    text = model.config.get_text_config()
    attention = text.num_hidden_layers * config.data.context * text.hidden_size  # causal: half of all pairs, twice
    # Forward; backward to the inputs; backward to what trains; forward of the teacher.
    taught = _count_taught(model) if stage.train == "memory" else trainable  # gradients are of whole tables
    per_token = 2 * (2 * used + min(taught, used)) + (2 * teacher if needs_teacher else 0) + 8 * attention
    names = [name for name, weight in stage.objectives.model_dump(exclude={"kl_topk"}).items() if weight]
    return {
        "stage": number,
        "train": stage.train,
        "steps": steps,
        "tokens": tokens,
        "trainable": trainable,
        "groups": counts,
        "objectives": names,
        "optimizer": stage.optimizer.name,
        "lr": stage.optimizer.lr,
        "flops": per_token * tokens,
        "memory": memory_of(
            model,
            config,
            stage,
            parameters=parameters + counts.get("adapters", 0),
            trainable=trainable,
            teacher=teacher,
        ),
    }


def _adapter_parameters(model: Any, rank: int) -> int:
    inside = tuple(path + "." for path in peer_layers(model))
    return sum(
        rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(inside) and module is not model.get_output_embeddings()
    )


def _count_taught(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
