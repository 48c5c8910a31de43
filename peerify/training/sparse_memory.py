"""Which experts learn a new text: those that it uses much more than other text does; all else stays as it is.

Sparse memory finetuning, 2510.15103, section 3: of each pool those experts learn that rank first by how much the new
text uses them, set against how much text of other kinds does. What is learned lies where other text hardly comes by.

What a token uses of an expert that keys retrieved is its gate. Where every expert takes part for every token, it is the
size of what the expert adds, |a_i| |v_i|.

Suffixes: b windows, t tokens, d d_model, n experts of a pool, m of them that learn, k retrieved.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from peerify.config.train import MemoryConfig
from peerify.errors import CheckpointError
from peerify.modules import peer_layers, prefill
from peerify.reading import printable
from peerify.training.data import PADDING

ROWS = "rows"  # entry of a checkpoint's optimizer state: which experts learn
AT_ONCE = 4  # windows of a forward pass that counts use
UNSEEN = 0.1  # of the mean use, which is added to each expert's
TABLES = ("u", "gate", "v", "u_bias", "gate_bias")


class Pool:
    """Experts that learn together: those of a layer, or of a memory, which several layers may have.

    Attributes:
        path: of the pool in the model.
        layers: paths of the layers whose tokens count.
        tables: what the pool has of `TABLES`, by name in the model; a row, or a number, for each expert.
    """

    def __init__(self, path: str, pool: nn.Module) -> None:
        self.path, self.layers = path, list[str]()
        own = {name: getattr(pool, name) for name in TABLES}
        self.tables: dict[str, nn.Parameter] = {f"{path}.{name}": own[name] for name in own if own[name] is not None}

    @property
    def num_experts(self) -> int:
        """n."""
        return len(next(iter(self.tables.values())))

    def learning(self, config: MemoryConfig) -> int:
        """m, of the share or number that is asked for: at least one expert, and at most all."""
        asked = config.experts * self.num_experts if config.experts <= 1 else config.experts
        return max(1, min(self.num_experts, round(asked)))


def pools_of(model: nn.Module) -> list[Pool]:
    """The pools whose experts may learn: of memories where the model has any, else of its layers."""
    layers = peer_layers(model)
    grown = {path: layer.memory.pool for path, layer in layers.items() if getattr(layer, "memory", None) is not None}
    pools: dict[int, Pool] = {}
    for path, pool in (grown or {path: layer.pool for path, layer in layers.items()}).items():
        inside = f"{path}.memory.pool" if grown else f"{path}.pool"
        pools.setdefault(id(pool), Pool(inside, pool)).layers.append(path)
    return list(pools.values())


def numbers_of(model: nn.Module, config: MemoryConfig) -> tuple[int, int]:
    """How many parameters learn, and how many the largest table has, whose gradient is whole for a moment."""
    pools = pools_of(model)
    learning = sum(
        pool.learning(config) * table.numel() // pool.num_experts for pool in pools for table in pool.tables.values()
    )
    return learning, max(table.numel() for pool in pools for table in pool.tables.values())


def choose(model: Any, config: MemoryConfig, new_bt: Tensor, background_bt: Tensor, autocast: Any) -> dict[str, Tensor]:
    """Path of each pool -> the experts that learn, (m,), in ascending order.

    Args:
        model: with everything on its device; left in eval mode.
        new_bt, background_bt: windows of token ids, PADDING where a window is not full.
        autocast: called for the context of a forward pass.
    """
    pools = pools_of(model)
    new, background = (use(model, pools, ids_bt, autocast) for ids_bt in (new_bt, background_bt))
    return {
        pool.path: rank(new[pool.path], background[pool.path])[: pool.learning(config)].sort().values for pool in pools
    }


def rank(new_n: Tensor, background_n: Tensor) -> Tensor:
    """Experts by their part of the divergence of the new text's use p from the background's q, p log(p / q): (n,).

    Both are shares of all use. Each expert is taken to be used a little more than it was, so that no share is zero.
    """

    def shares(use_n: Tensor) -> Tensor:
        more_n = use_n + UNSEEN * use_n.mean()
        return more_n / more_n.sum()

    p_n, q_n = shares(new_n), shares(background_n)
    return torch.special.xlogy(p_n, p_n / q_n).nan_to_num().argsort(descending=True, stable=True)


@torch.no_grad()
def use(model: Any, pools: list[Pool], ids_bt: Tensor, autocast: Any) -> dict[str, Tensor]:
    """Path of each pool -> how much the tokens use each of its experts: sums over tokens, float64 (n,)."""
    device = model.get_input_embeddings().weight.device
    total = {pool.path: torch.zeros(pool.num_experts, dtype=torch.float64, device=device) for pool in pools}
    layers = peer_layers(model)
    model.eval()
    real_t = torch.empty(0, dtype=torch.bool)

    def add(path: str, layer: Any, args: tuple[Tensor, ...]) -> None:
        total[path] += used(layer, args[0].flatten(0, -2)[real_t])

    with ExitStack() as hooks, prefill(model, everything=True):
        for pool in pools:
            for path in pool.layers:
                hook = layers[path].register_forward_pre_hook(partial(_call, partial(add, pool.path)))
                hooks.callback(hook.remove)
        for ids in ids_bt.split(AT_ONCE):
            real_t = (ids != PADDING).flatten().to(device)
            with autocast():
                model(input_ids=ids.clamp_min(0).to(device), use_cache=False)
    return {path: use_n.cpu() for path, use_n in total.items()}


def _call(add: Any, layer: Any, args: tuple[Tensor, ...]) -> None:
    add(layer, args)


def used(layer: Any, x_td: Tensor) -> Tensor:
    """How much the tokens use each expert of the pool that learns: a sum over tokens, float64 (n,)."""
    memory = getattr(layer, "memory", None)
    pool = layer.pool if memory is None else memory.pool
    if memory is not None or getattr(layer, "needs_routing", False):
        found = (layer if memory is None else memory).retrieve(x_td)
        use_n = torch.zeros(len(pool.u), dtype=torch.float64, device=x_td.device)
        use_n.index_add_(0, found.index_tk.flatten(), found.weight_tk.flatten().double())
        use_n[: pool.num_shared] += len(x_td)
        return use_n
    size_n = pool.products(x_td)[2].abs().sum(0, dtype=torch.float64)
    return size_n * pool.v.norm(dim=1)


class Rows:
    """The rows of tables that learn, as parameters of their own.

    The optimizer knows these alone: its state is of their size, and neither decay nor moments reach other rows. A
    table's gradient is whole only until its rows are taken out, while the backward pass goes on with the next layer.
    """

    def __init__(self, pools: list[Pool], rows: dict[str, Tensor]) -> None:
        self.rows = rows
        self.parameters: dict[str, nn.Parameter] = {}
        self._tables: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for pool in pools:
            for name, table in pool.tables.items():
                row_m = rows[pool.path].to(table.device)
                self.parameters[name] = nn.Parameter(table.detach()[row_m])
                self._tables[name] = table, row_m

    @contextmanager
    def taken(self) -> Iterator[None]:
        """While open, gradients of tables go to the rows that learn."""
        with ExitStack() as hooks:
            for name, (table, _) in self._tables.items():
                hooks.callback(table.register_post_accumulate_grad_hook(partial(self._take, name)).remove)
            yield

    def _take(self, name: str, table: Tensor) -> None:
        assert table.grad is not None
        row, gradient = self.parameters[name], table.grad[self._tables[name][1]]
        row.grad = gradient if row.grad is None else row.grad + gradient
        table.grad = None

    @torch.no_grad()
    def put(self) -> None:
        """Write what the rows have become into the tables."""
        for name, (table, row_m) in self._tables.items():
            table[row_m] = self.parameters[name]


def saved_rows(saved: dict[str, Any] | None, pools: list[Pool], config: MemoryConfig, where: str) -> dict[str, Tensor]:
    """The experts that a checkpoint in the middle of a stage says learn; takes the entry out of `saved`.

    Raises:
        CheckpointError: there is none, or it is not of this model and recipe.
    """
    found = saved.pop(ROWS, None) if saved is not None else None
    for pool in pools:
        row_m = found.get(pool.path) if found is not None else None
        if (
            not isinstance(row_m, Tensor)
            or row_m.dtype != torch.int64
            or row_m.shape != (pool.learning(config),)
            or not bool(((row_m[1:] > row_m[:-1]).all()) & (row_m[0] >= 0) & (row_m[-1] < pool.num_experts))
        ):
            fault = f"does not say which experts of {printable(pool.path)} learn"
            raise CheckpointError(f"{where} {fault}; remove it to go on from the checkpoint before")
    return {pool.path: found[pool.path] for pool in pools}  # type: ignore[index]
