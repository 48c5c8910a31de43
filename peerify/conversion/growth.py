"""Give layers of a converted model a memory: many more experts, found by product keys, whose output is zero at first.

Nothing that the model computes changes, so nothing needs to recover: what is new is room to learn.

Suffixes: t tokens, d d_model.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from peerify.config.grow import GrowConfig
from peerify.conversion.calibration import Batch, StopForwardError, evaluating, hooked, on_device, token_batches
from peerify.conversion.memory_keys import fit_keys
from peerify.conversion.precision import fast_products
from peerify.discovery.selection import select
from peerify.errors import ConversionError
from peerify.modeling.peer_gathered import zeros
from peerify.modeling.peer_install import make_layer
from peerify.modeling.peer_memory import Memory, shared_pools
from peerify.modules import peer_layers
from peerify.progress import Progress, teller

TOKENS = 16384  # that keys are fitted to, from all over the calibration data
WIDE = 1024  # d_model, above which queries have 128 numbers instead of 64


@dataclass(frozen=True, kw_only=True, eq=False)
class Growth:
    """A grown model and what is known of it."""

    model: nn.Module
    layers: dict[str, dict[str, Any]]
    """Options of the memory in each layer that was given one, as in config.json."""
    bytes_fraction: float
    """Bytes of weights that a token reads in the PEER layers, memories included, over those of the dense layers."""
    macs_fraction: float
    """Multiply-adds of a token over theirs."""
    seconds: float


def plan_growth(model: nn.Module, config: GrowConfig) -> dict[str, dict[str, Any]]:
    """Options of the memory of each layer that is to have one, by path, in the model's order.

    Raises:
        ConversionError: the model has no PEER layer, or none that `config` names; a layer has a memory already, or more
            neurons than `config` asks for; layers that are to share a pool are of different forms.
    """
    found = peer_layers(model)
    if not found:
        raise ConversionError(f"{type(model).__name__} has no PEER layer to grow: convert the model first")
    paths = list(found)
    chosen = select(paths, range(len(paths)), config.layers, kind="PEER layer", where="config.json lists them")
    planned: dict[str, dict[str, Any]] = {}
    for path in (paths[i] for i in chosen):
        layer = found[path]
        if layer.memory is not None:
            raise ConversionError(f"{path} has a memory of {layer.memory.num_experts:,} experts already: leave it out")
        if config.num_experts < layer.num_experts:
            raise ConversionError(
                f"{path} has {layer.num_experts:,} experts, and a memory of {config.num_experts:,} is no growth: raise "
                "num_experts"
            )
        wide = 128 if layer.d_model > WIDE else 64
        planned[path] = {
            "num_experts": config.num_experts,
            "grid": list(config.rows_and_columns),
            "num_heads": config.num_heads,
            "topk": config.topk,
            "query_dim": config.query_dim or max(2, min(wide, layer.d_model // 2 * 2)),
        }
        first = next(iter(planned))
        if config.share_pool and path != first:
            planned[path]["pool_of"] = first
            if _form(layer) != _form(found[first]):
                raise ConversionError(f"{path} and {first} cannot share a pool: their experts are of different forms")
    return planned


def _form(layer: Any) -> tuple[Any, ...]:
    """What experts of two layers have in common where they can be of one pool."""
    pool = layer.pool
    return layer.d_model, pool.gate is None, repr(pool.act), pool.clamp


def grown_bytes(model: nn.Module, planned: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> int:
    """Bytes of the weights of `model` in that number type, with the tables of all planned pools."""
    layers = peer_layers(model)
    own = [path for path, options in planned.items() if "pool_of" not in options]
    vectors = {path: 2 if layers[path].pool.gate is None else 3 for path in own}
    tables = sum(planned[path]["num_experts"] * vectors[path] * layers[path].d_model for path in own)
    return (tables + sum(parameter.numel() for parameter in model.parameters())) * dtype.itemsize


def require_memory(needed: int, planned: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConversionError where this machine has less than the `needed` bytes of a grown model free."""
    free = psutil.virtual_memory().available
    if needed > free:
        experts = sum(options["num_experts"] for options in planned.values() if "pool_of" not in options)
        raise ConversionError(
            f"the model with {experts:,} new experts takes {needed / 1e9:,.1f} GB, and this machine has "
            f"{free / 1e9:,.1f} GB free: lower num_experts, take fewer layers, share_pool or dtype bfloat16"
        )


@torch.no_grad()
def grow(
    model: nn.Module,
    config: GrowConfig,
    calibration: Tensor | Sequence[Batch],
    *,
    progress: Progress | None = None,
) -> Growth:
    """Give PEER layers a memory, in place. What the model computes stays what it was, to the bit.

    Args:
        model: a converted model, as `convert` leaves it or loaded.
        config: which layers, how many new experts, how they are retrieved.
        calibration: windows of token ids (windows, context), or batches of keyword arguments for the model. Queries and
            sub-keys are fitted to what the layers get there.
        progress: called with (stage, done, total).

    Raises:
        ConversionError: see `plan_growth`; the new experts are more than this machine has memory for; activations are
            not finite.
    """
    start, tell = time.perf_counter(), teller(progress)
    planned = plan_growth(model, config)
    layers = peer_layers(model)
    require_memory(grown_bytes(model, planned, next(model.parameters()).dtype), planned)
    batches = token_batches(calibration, model) if isinstance(calibration, Tensor) else list(calibration)
    tell("Reading calibration inputs", 0, 1)
    inputs = layer_inputs(model, list(planned), batches)
    tell("Reading calibration inputs", 1, 1)
    entries = dict(_peer(model)["layers"])
    for number, (path, options) in enumerate(planned.items()):
        tell("Growing layers", number, len(planned))
        entries[path] = entries[path] | {"memory": options}
        memory = _build(layers[path], entries[path], inputs.pop(path), config.seed + number)
        if "pool_of" in options:
            memory.share(layers[options["pool_of"]].memory.pool)
        layers[path].memory = memory.train(layers[path].training)
    tell("Growing layers", len(planned), len(planned))
    model.config.peer = _peer(model) | {"layers": entries}  # type: ignore[union-attr, assignment]
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys |= shared_pools(model)  # type: ignore[operator]
    read, done = fractions(model)
    return Growth(
        model=model, layers=planned, bytes_fraction=read, macs_fraction=done, seconds=time.perf_counter() - start
    )


def _peer(model: Any) -> dict[str, Any]:
    """What config.json says of the PEER layers."""
    return dict(model.config.peer)


def fractions(model: nn.Module) -> tuple[float, float]:
    """Bytes and multiply-adds of a token in the PEER layers, over those of the dense layers that they replace."""
    layers = list(peer_layers(model).values())
    cost = [layer.d_ff * layer.d_model * (2 if layer.pool.gate is None else 3) for layer in layers]
    read, done = (
        sum(getattr(layer, name) * part for layer, part in zip(layers, cost, strict=True)) / sum(cost)
        for name in ("bytes_fraction", "macs_fraction")
    )
    return read, done


@torch.no_grad()
def layer_inputs(
    model: nn.Module, paths: Sequence[str], batches: Sequence[Batch], tokens: int = TOKENS
) -> dict[str, Tensor]:
    """What each layer gets on at least so many tokens from all over the batches: (t, d) by path, float32.

    Raises:
        ConversionError: a layer does not run on these inputs, or what it gets is not finite.
    """
    seen: dict[str, list[Tensor]] = {path: [] for path in paths}
    waiting: set[str] = set()

    def note(path: str) -> Any:
        def keep(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[path].append(args[0].detach().flatten(0, -2).float().clone())
            waiting.discard(path)
            if not waiting:
                raise StopForwardError

        return keep

    parameter = next(model.parameters())
    order = random.Random(0).sample(list(batches), len(batches))
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for path in paths:
            stack.enter_context(hooked(model.get_submodule(path).register_forward_pre_hook(note(path))))
        for batch in order:
            waiting = set(paths)
            with suppress(StopForwardError), fast_products(parameter):
                model(**on_device(batch, parameter.device))
            if sum(map(len, seen[paths[0]])) >= tokens:
                break
    for path, inputs in seen.items():
        if not inputs:
            raise ConversionError(f"{path} does not run on the calibration data: leave it out")
        if not all(x_td.isfinite().all() for x_td in inputs):
            raise ConversionError(f"{path}: its input on the calibration data is NaN or infinite")
    return {path: torch.cat(inputs) for path, inputs in seen.items()}


def _build(layer: Any, entry: dict[str, Any], x_td: Tensor, seed: int) -> Memory:
    """A memory for `layer`, on its device and in its number type; its tables are never there in another one."""
    own = layer.pool
    with torch.device("meta"):
        memory = make_layer(entry).memory
    assert memory is not None
    memory.to(own.u.dtype).to_empty(device=own.u.device)
    fit_keys(memory.keys, x_td, seed)
    if memory.pool_of is None:
        pool, generator = memory.pool, torch.Generator(own.u.device).manual_seed(seed)
        pool.act = copy.deepcopy(own.act)  # it may have parameters
        for table, like in ((pool.u, own.u), (pool.gate, own.gate)):
            if table is not None:  # as large as the neurons' own
                table.normal_(std=float(like.float().square().mean().sqrt()), generator=generator)
        on_cpu = pool.v.device.type == "cpu"  # where zeros take no memory until somebody writes to them
        pool.v = nn.Parameter(zeros(len(pool.v), memory.d_model, pool.v.dtype) if on_cpu else torch.zeros_like(pool.v))
    return memory
