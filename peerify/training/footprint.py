"""How much memory a stage of training will take, from shapes alone.

Suffixes: t tokens of a micro-batch, n experts, d d_model, v vocabulary.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from peerify.config.train import StageConfig, TrainConfig
from peerify.modeling.peer_elastic import ElasticPEER
from peerify.modeling.peer_layer import PEER
from peerify.modeling.peer_memory import Memory
from peerify.training.sparse_memory import numbers_of
from peerify.training.tables import memories

PROCESS = 450_000_000  # bytes of Python with torch, transformers and accelerate, before a model is loaded
# Bytes of optimizer state per trainable parameter.
STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 4.0, "galore": 8.0}
BY_ROWS = ("rowwise_adagrad", "sgd")  # optimizers of tables alone, whose gradients are of few rows
NORM_NUMBERS = 8  # float32 numbers a token leaves in a block's two norms and residual sums, in units of d_model


def memory_of(
    model: Any, config: TrainConfig, stage: StageConfig, *, parameters: int, trainable: int, teacher: int
) -> dict[str, int]:
    """Bytes that one process holds at the most demanding moment of a stage, part by part, and their "total".

    That moment is either the start of a step's backward pass, or the writing of a checkpoint, which copies weights and
    optimizer state when gradients and activations are gone: "checkpoint" is what it takes on top.

    Args:
        model: the converted model, on the meta device, with the stage's parameters set to train.
        config, stage: what will be done.
        parameters, trainable: numbers of parameters, adapters included in the latter.
        teacher: parameters of the dense teacher.
    """
    half = 2 if config.precision != "no" else 4
    tokens = (config.micro_batch_size or config.batch_size) * config.data.context
    text = model.config.get_text_config()
    norms = text.num_hidden_layers * NORM_NUMBERS * text.hidden_size
    bytes_per_token = half * _layer_numbers(model, stage) + 4 * norms
    if config.gradient_checkpointing:  # one block's, and what goes into each
        bytes_per_token = bytes_per_token // max(1, text.num_hidden_layers) + half * (
            text.num_hidden_layers * text.hidden_size
        )
    tables, found = table_numbers(model), _found_numbers(model, config)
    by_rows = tables if stage.optimizer.by_rows else 0
    kl = bool(stage.objectives.kl)
    # The logits, those of the tokens that have a next one, and the gradients of both; the teacher's likewise.
    logits = tokens * text.vocab_size * half * (4 + (2 if kl else 0))
    optimizer = optimizer_bytes(model, stage, trainable)
    held = {
        "process": PROCESS,
        "weights": 4 * parameters,
        "optimizer": optimizer,
        "teacher": 4 * teacher if stage.objectives.needs_teacher else 0,
    }
    step = {
        # For train: memory, of a table at a time until its rows are taken out.
        "gradients": 4 * (trainable + (numbers_of(model, stage.memory)[1] if stage.train == "memory" else 0))
        + (4 * (found - by_rows) if by_rows else 0),
        # Autocast keeps the half-precision copies of a step; kernels take the tables of memories as they are.
        "casts": 2 * (parameters - tables) if half == 2 else 0,
        "activations": tokens * bytes_per_token,
        "copies": 4 * _copied_numbers(model),
        "logits": logits,
    }
    checkpoint = max(0, 4 * parameters + optimizer - sum(step.values()))
    memory = held | step | {"checkpoint": checkpoint}
    return memory | {"total": sum(memory.values())}


def optimizer_bytes(model: Any, stage: StageConfig, trainable: int) -> int:
    """Of the optimizer's state, for so many parameters."""
    by_rows = table_numbers(model) if stage.optimizer.by_rows else 0
    of_tables = sum(state_bytes(*shape)[stage.optimizer.tables] for shape in _tables(model)) if by_rows else 0
    return round(STATE_BYTES[stage.optimizer.name] * (trainable - by_rows)) + of_tables


def table_costs(model: Any, config: TrainConfig) -> dict[str, Any] | None:
    """What the tables of memories take in training, by optimizer; None where the model has none.

    Returns:
        ``{"experts", "parameters", "state_bytes": {optimizer: bytes}, "gradient_bytes": {optimizer: bytes}}``: of whole
        tables, or at most of the rows that the tokens of one step can retrieve.
    """
    shapes = _tables(model)
    if not shapes:
        return None
    whole, rows = 4 * table_numbers(model), 4 * _found_numbers(model, config)
    states = [state_bytes(*shape) for shape in shapes]
    return {
        "experts": sum(experts for experts, _, _ in shapes),
        "parameters": table_numbers(model),
        "state_bytes": {name: sum(state[name] for state in states) for name in states[0]},
        "gradient_bytes": {name: rows if name in BY_ROWS else whole for name in states[0]},
    }


def state_bytes(experts: int, d_model: int, vectors: int) -> dict[str, int]:
    """Optimizer -> bytes of its state for so many tables (n, d), in float32.

    Adafactor keeps a number for each row and each column, as row-wise Adagrad does for each row; but each of its steps
    reads and writes whole tables.
    """
    numbers = experts * d_model * vectors
    return {
        "adamw": 8 * numbers,
        "adafactor": 4 * vectors * (experts + d_model),
        "rowwise_adagrad": 4 * vectors * experts,
        "sgd": 0,
    }


def table_numbers(model: Any) -> int:
    """Parameters of the tables of memories."""
    return sum(experts * d_model * vectors for experts, d_model, vectors in _tables(model))


def _tables(model: Any) -> list[tuple[int, int, int]]:
    """(experts, d_model, vectors of each) of the pools of memories."""
    owners = [memory for memory in memories(model).values() if memory.pool_of is None]
    return [(memory.num_experts, memory.d_model, memory.vectors) for memory in owners]


def _found_numbers(model: Any, config: TrainConfig) -> int:
    """Numbers in the rows that the tokens of a step retrieve at most."""
    found: dict[int, int] = {}  # pool -> how often it is read
    for memory in memories(model).values():
        pairs = config.batch_size * config.data.context * memory.num_heads * memory.topk
        found[id(memory.pool)] = found.get(id(memory.pool), 0) + pairs
    owners = [memory for memory in memories(model).values() if memory.pool_of is None]
    return sum(min(memory.num_experts, found[id(memory.pool)]) * memory.d_model * memory.vectors for memory in owners)


def _layer_numbers(model: Any, stage: StageConfig) -> int:
    """Numbers that the linear and PEER layers keep for a token's backward pass."""
    total = 0
    head = model.get_output_embeddings()
    inside: set[int] = set()
    for module in model.modules():
        if isinstance(module, PEER | ElasticPEER):
            inside |= {id(part) for part in module.modules()}
            total += _peer_numbers(module, stage) if isinstance(module, PEER) else _elastic_numbers(module)
            total += 0 if module.memory is None else _memory_numbers(module.memory)
        elif isinstance(module, nn.Linear) and module is not head and id(module) not in inside:
            total += module.out_features
    return total


def _elastic_numbers(layer: ElasticPEER) -> int:
    # Of each expert: its projections, the activated one, and what multiplies its output vector; at a budget also
    # whether it was read.
    in_full = 2 if layer.pool.gate is None else 4
    return (in_full if layer.budget is None else in_full + 1) * layer.num_experts + layer.d_model


def _memory_numbers(memory: Memory) -> int:
    # Of each retrieved expert: its projections, the activated one, their product, its weight, the weighted activation,
    # and its number, which takes the place of two. Rows are not copied where kernels read them.
    assert memory.keys.query_proj is not None
    retrieved = memory.num_heads * memory.topk
    return (6 if memory.vectors == 2 else 8) * retrieved + memory.keys.query_proj.out_features + memory.d_model


def idle_numbers(model: Any) -> int:
    """Numbers in the tables of memories that a token does not meet."""
    met = sum(memory.num_heads * memory.topk * memory.vectors * memory.d_model for memory in memories(model).values())
    return table_numbers(model) - met


def _copied_numbers(model: Any) -> int:
    """Numbers of the coarse and the fine copies of one layer's experts: no layer keeps those of a step."""
    pools = [layer.pool for layer in model.modules() if isinstance(layer, ElasticPEER) and layer.budget is not None]
    tables = [[table for table in (pool.u, pool.gate, pool.v) if table is not None] for pool in pools]
    return 2 * max((sum(table.numel() for table in group) for group in tables), default=0)


def _peer_numbers(layer: PEER, stage: StageConfig) -> int:
    # Of each expert: its projections, the activated one, their product, its weight, and the weighted activation.
    numbers = (4 if layer.pool.gate is None else 6) * layer.num_experts + layer.d_model
    if layer.gates == "unit" and layer.needs_routing and stage.optimizer.router_scale > 0:
        # Of each token that teaches the router its queries, and each expert's score; where heads search one pool, the
        # scores of all heads and the largest.
        scores = layer.num_heads + 1 if layer.share_pool and layer.num_heads > 1 else 1
        queries = 0 if layer.keys.query_proj is None else layer.keys.query_proj.out_features
        numbers += (scores * (layer.num_experts - layer.num_shared) + queries) // stage.router_every
    return numbers
