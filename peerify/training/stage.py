"""One stage of a training: the model with what trains in it, its optimizer, and what happens in a step.

Suffixes: b windows, t tokens of a window.
"""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peerify.config.train import StageConfig, TrainConfig
from peerify.errors import TrainingError
from peerify.memory import peak_mb
from peerify.progress import Progress
from peerify.training import groups, objectives, sparse_memory, state, tables, validation
from peerify.training.data import PADDING, Windows
from peerify.training.distribution import distribute, reshard, without_sync
from peerify.training.loggers import LogFile, flat
from peerify.training.optimizers import build_optimizer, lr_factor
from peerify.training.reseed import reseed
from peerify.training.straight_through import StraightThrough
from peerify.training.use import USE, Use

ADAPTER = "adapter"  # folder of adapters that are kept
RECENT = 20  # steps over which a loss counts as usual
HIGH = 3  # steps in a row that make a spike: a single one may be odd text


@dataclass(kw_only=True, eq=False)
class Run:
    """All that a run needs, made by `train.py`."""

    config: TrainConfig
    accelerator: Accelerator
    make_model: Callable[[], Any]
    """A fresh copy of the converted model, float32, on the CPU."""
    teacher: Any | None
    windows: Windows
    test_bt: Tensor | None
    """Windows for evaluation."""
    checkpoints: state.Checkpoints
    log: LogFile | None
    progress: Progress
    publish: Callable[[Path, int], None] | None
    """Called in the main process with checkpoints that hold a plain model, and their number."""
    recipe: dict[str, Any]
    """What a checkpoint must have been made with to go on from it."""
    background_bt: dict[int, Tensor] = field(default_factory=dict)
    """Number of a stage with train: memory -> windows of its background text."""
    select: Callable[[Any, StageConfig], Any] = groups.select_trainable
    """Sets what trains of a model; a dense one, as a measure of speed, has no PEER layers to go by."""


class Stage:
    """One stage: the model with what trains in it, its optimizer, and what happens in a step."""

    def __init__(self, run: Run, now: state.RunState, steps: int, checkpoint: Path | None) -> None:
        self.run, self.now, self.steps, self.checkpoint = run, now, steps, checkpoint
        self.config = run.config.stages[now.stage]
        accelerator = run.accelerator
        model = run.make_model()
        weights = state.read_weights(checkpoint) if checkpoint is not None else None
        _seed(run.config.seed, now.stage, 0)  # of new adapters
        if weights is not None and not now.step_in_stage:
            state.put_weights(model, weights, str(checkpoint))
        model = run.select(model, self.config)
        if weights is not None and now.step_in_stage:
            state.put_weights(model, weights, str(checkpoint))
        del weights
        saved = state.read_optimizer(checkpoint) if checkpoint is not None and now.step_in_stage else None
        self.rows = None
        if self.config.train == "memory":
            self.rows = self._learning(model.to(accelerator.device), saved)
        _prepare_modules(model, run.config)
        trains = self.config.optimizer.router_scale > 0 and self.rows is None
        terms = self.config.objectives
        with_losses = bool(terms.load_balance or terms.z_loss)
        self.router = StraightThrough(
            model,
            temperature=self.config.temperature if trains else None,
            every=1 if with_losses else self.config.router_every,
            with_losses=with_losses,
        )
        by_rows = self.config.optimizer.by_rows
        self.model = distribute(model, accelerator, leave=list(tables.tables_of(model)) if by_rows else [])
        self.tables = list(tables.tables_of(self.unwrapped).values()) if by_rows else []
        self.plain_optimizer = build_optimizer(
            self.config.optimizer, groups.parameter_groups(self.unwrapped, self.config, self.rows)
        )
        self.optimizer = accelerator.prepare_optimizer(self.plain_optimizer)  # which minds fp16's scale
        self.rates = [group["lr"] for group in self.plain_optimizer.param_groups]
        self.use = Use(nn.Module() if run.config.compile else self.unwrapped)  # what is compiled has no hooks
        if saved is not None:
            self.use.put_state(saved.pop(USE, None), str(checkpoint), main=accelerator.is_main_process)
            state.put_optimizer_state(self._trained(), self.plain_optimizer, saved, str(checkpoint))
        self.open = ExitStack()

    def _learning(self, model: Any, saved: dict[str, Any] | None) -> sparse_memory.Rows:
        """For train: memory, the rows that learn: as the checkpoint says, or by the text that comes next."""
        run, memory, pools = self.run, self.config.memory, sparse_memory.pools_of(model)
        if self.now.step_in_stage:
            return sparse_memory.Rows(pools, sparse_memory.saved_rows(saved, pools, memory, str(self.checkpoint)))
        here, windows = run.windows.position(), max(1, memory.tokens // run.config.data.context)
        new_bt = torch.from_numpy(run.windows.block(windows)).long()
        run.windows.seek(here)
        background_bt = run.background_bt[self.now.stage]
        chosen = sparse_memory.choose(model, memory, new_bt, background_bt, run.accelerator.autocast)
        return sparse_memory.Rows(pools, chosen)

    def _trained(self) -> dict[str, nn.Parameter]:
        """What the optimizer may move, by name."""
        return dict(self.unwrapped.named_parameters()) if self.rows is None else self.rows.parameters

    def __enter__(self) -> Stage:
        self.open.enter_context(self.router)
        self.open.enter_context(self.use.watching())
        if self.rows is not None:
            self.open.enter_context(self.rows.taken())
        return self

    def __exit__(self, *_: Any) -> None:
        self.open.close()
        self.run.accelerator.free_memory(self.model, self.optimizer)

    @property
    def unwrapped(self) -> Any:
        """The model without what Accelerate put around it."""
        return self.run.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def step(self) -> float:
        """One optimizer step; returns its loss."""
        run, now, config = self.run, self.now, self.config
        started = time.perf_counter()
        accelerator = run.accelerator
        _seed(run.config.seed, now.step + 1, accelerator.process_index)
        rate = lr_factor(config, now.step_in_stage, self.steps)
        for group, highest in zip(self.plain_optimizer.param_groups, self.rates, strict=True):
            group["lr"] = highest * rate
        if config.train == "lisa":
            self._lisa()
        self.model.train()
        logging = (now.step + 1) % run.config.log_every == 0 or now.step == 0
        terms = config.objectives
        self.router.recording = logging or bool(terms.load_balance or terms.z_loss or config.balance_rate)
        sums = self._backward(torch.from_numpy(run.windows.block(run.config.batch_size)).long())
        norm = None
        if run.config.clip:
            accelerator.unscale_gradients(self.optimizer)
            norm = tables.clip(self._trained().values(), run.config.clip)
        losses = self._losses(sums)
        self._check(losses["loss"], norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.rows is not None:
            self.rows.put()
        if config.balance_rate:
            self._balance()
        now.step += 1
        now.step_in_stage += 1
        now.position = run.windows.position()
        now.losses = [*now.losses, losses["loss"]][-(RECENT + HIGH - 1) :]
        if logging:
            seconds = time.perf_counter() - started
            tokens = run.config.batch_size * run.config.data.context
            self._log(losses | {"lr": self.config.optimizer.lr * rate, "tokens_per_s": tokens / seconds}, norm)
        self._count(run.config.usage_tokens)
        self.router.forget()
        return losses["loss"]

    def _backward(self, ids_bt: Tensor) -> Tensor:
        """Forward and backward of a block of windows; returns the sums of all losses over all processes.

        Sums over tokens are divided by the whole step's count, so neither the number of processes nor that of
        micro-batches changes the gradient.
        """
        accelerator = self.run.accelerator
        used_bt = ids_bt != PADDING
        predicted, tokens = int(used_bt[:, 1:].sum()), int(used_bt.sum())
        self.use.tokens += tokens
        world, rank = accelerator.num_processes, accelerator.process_index
        own = slice(rank * len(ids_bt) // world, (rank + 1) * len(ids_bt) // world)
        ids_bt, used_bt = ids_bt[own].to(accelerator.device), used_bt[own].to(accelerator.device)
        size = self.run.config.micro_batch_size or len(ids_bt)
        parts = list(zip(ids_bt.clamp_min(0).split(size), used_bt.split(size), strict=True))
        sums = torch.zeros(6, dtype=torch.float64)
        for number, (ids, used) in enumerate(parts):
            last = number == len(parts) - 1
            with nullcontext() if last else without_sync(self.model, accelerator):
                loss, pieces = self._loss(ids, used, predicted, tokens)
                # Data parallelism averages gradients over processes; ours are parts of one sum.
                accelerator.backward(loss * world)
            tables.in_order(*self.tables)
            sums += torch.stack([loss.detach().double().cpu(), *(piece.detach().double().cpu() for piece in pieces)])
        if world > 1:
            tables.add_up(self.tables, accelerator)
            sums = accelerator.reduce(sums.float().to(accelerator.device), "sum").double().cpu()
        return sums

    def _loss(self, ids: Tensor, used: Tensor, predicted: int, tokens: int) -> tuple[Tensor, list[Tensor]]:
        """The loss of a micro-batch, and its parts: next token, KL, layerwise, load balance, z."""
        terms = self.config.objectives
        ask = {"input_ids": ids, "use_cache": False, "output_hidden_states": terms.layerwise > 0}
        teacher = None
        if terms.needs_teacher:
            assert self.run.teacher is not None
            with torch.no_grad(), self.run.accelerator.autocast():
                teacher = self.run.teacher(**ask)
        with self.run.accelerator.autocast(), self.use.counting(used):
            ours = self.model(**ask)
        router = self.router.losses() if terms.load_balance or terms.z_loss else None
        return objectives.combined(terms, ours, teacher, router, ids, used, predicted=predicted, tokens=tokens)

    def _losses(self, sums: Tensor) -> dict[str, float]:
        terms = self.config.objectives
        values = dict(
            zip(("loss", "next_token", "kl", "layerwise", "load_balance", "z_loss"), sums.tolist(), strict=True)
        )
        return {name: value for name, value in values.items() if name == "loss" or getattr(terms, name)}

    def _check(self, loss: float, norm: Any) -> None:
        """Stop at a loss or gradient that is not a number, or a loss far above those before."""
        recent, limit = self.now.losses, self.run.config.spike
        fault = None
        if not math.isfinite(loss):
            fault = f"the loss is {loss}"
        elif norm is not None and self.run.config.precision != "fp16" and not math.isfinite(_number(norm)):
            fault = f"the gradient is {_number(norm)}"
        elif limit and len(recent) == RECENT + HIGH - 1:
            usual = sum(recent[:RECENT]) / RECENT
            if min(*recent[RECENT:], loss) > limit * usual:
                fault = f"the loss jumped to {loss:.3g} from a mean of {usual:.3g}"
        if fault:
            good = self.run.checkpoints.latest()
            where = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
            raise TrainingError(
                f"{fault} in step {self.now.step + 1} (stage {self.now.stage}); {where}; lower "
                f"train.stages.{self.now.stage}.optimizer.lr and start anew with --overwrite"
            )

    def _lisa(self) -> None:
        """Draw blocks anew when it is time, and forget what the optimizer knows of the others."""
        open_blocks = groups.lisa_blocks(self.unwrapped, self.config, self.now.step_in_stage, self.run.config.seed)
        closed = groups.apply_lisa(self.unwrapped, open_blocks)
        for name, parameter in self.unwrapped.named_parameters():
            if name in closed:
                self.plain_optimizer.state.pop(parameter, None)

    @torch.no_grad()
    def _balance(self) -> None:
        for path, step_hm in self.router.load_steps().items():
            bias = self.router.layers[path].keys.sub_key_bias
            step_hm = self.run.accelerator.reduce(step_hm, "mean")
            whole = bias.full_tensor() if isinstance(bias, state.DTensor) else bias
            state.assign(bias, whole + self.config.balance_rate * step_hm.sign() * step_hm.abs().amax(-1, keepdim=True))

    def _log(self, values: dict[str, float], norm: Any) -> None:
        run = self.run
        layers = self.router.statistics()
        if not run.accelerator.is_main_process:
            return
        row: dict[str, Any] = {"step": self.now.step, "stage": self.now.stage, **values}
        if "next_token" in values:
            row["perplexity"] = math.exp(min(values["next_token"], 700.0))
        if norm is not None:
            row["gradient_norm"] = _number(norm)
        row |= {"memory_mb": _memory_mb(run.accelerator.device), "layers": layers}
        self._write(row)

    def _count(self, window: int) -> None:
        """A line of the log about how evenly experts were found, when so many tokens were counted.

        At the end of a stage half as many are enough, or any number if there was no line before.
        """
        now = self.now
        if now.step_in_stage == self.steps:
            window = (window + 1) // 2 if now.use else 1
        if self.use.tokens < window:
            return
        again = self.config.reseed and now.step_in_stage < self.steps
        counts = self.use.total(self.run.accelerator) if again else {}
        now.use = self.use.report(self.run.accelerator)
        for path, found in tables.with_pools(self.unwrapped).items() if again else ():
            seed = self.run.config.seed + now.step
            now.use[path]["reseeded"] = reseed(found, counts[path], self.plain_optimizer, seed)
        if now.use and self.run.accelerator.is_main_process:
            self._write({"step": now.step, "stage": now.stage, "use": now.use})

    def _write(self, row: dict[str, Any]) -> None:
        if self.run.log is not None:
            self.run.log.write(row)
        self.run.accelerator.log(flat(row), step=self.now.step)

    def evaluate(self) -> None:
        """Perplexity on the test windows; keeps the best weights."""
        run, now = self.run, self.now
        assert run.test_bt is not None
        perplexity = validation.perplexity(self.model, run.test_bt, run.accelerator)
        reshard(self.unwrapped)
        if run.accelerator.is_main_process:
            self._write({"step": now.step, "stage": now.stage, "eval_perplexity": perplexity})
        if math.isfinite(perplexity) and (now.best_perplexity is None or perplexity < now.best_perplexity):
            now.best_perplexity, now.best_step = perplexity, now.step
            if run.config.evaluation.keep_best:
                weights = state.weights_of(self.unwrapped)
                if run.accelerator.is_main_process:
                    run.checkpoints.save_best(now, weights)

    def save(self) -> Path:
        """Write a checkpoint inside the stage."""
        weights = state.weights_of(self.unwrapped)
        optimizer = state.optimizer_state(self._trained(), self.plain_optimizer)
        if self.use.count_n:
            optimizer[USE] = self.use.state(self.run.accelerator)
        if self.rows is not None:
            optimizer[sparse_memory.ROWS] = {path: row_m.cpu() for path, row_m in self.rows.rows.items()}
        return self._save(weights, optimizer)

    def finish(self) -> Path:
        """Write the checkpoint that the next stage begins with: a plain model, adapters merged."""
        weights = state.weights_of(self.unwrapped)
        run, number = self.run, self.now.stage
        if run.accelerator.is_main_process:
            weights = plain_weights(run, number, weights)
        self.now.stage, self.now.step_in_stage = number + 1, 0
        return self._save(weights, None)

    def _save(self, weights: dict[str, Tensor], optimizer: dict[str, dict[str, Any]] | None) -> Path:
        run = self.run
        if run.accelerator.is_main_process:
            folder = run.checkpoints.save(self.now, weights, optimizer)
            plain = optimizer is None or self.config.train != "peer+lora"
            if run.publish is not None and plain:
                run.publish(folder, -(-self.now.step // run.config.checkpoints.every))
        run.accelerator.wait_for_everyone()
        latest = run.checkpoints.latest()
        assert latest is not None
        return latest


def plain_weights(run: Run, number: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of stage `number` by their names in the converted model: adapters are merged, or written beside."""
    stage = run.config.stages[number]
    if stage.train != "peer+lora":
        return weights
    model: Any = groups.select_trainable(run.make_model(), stage)
    state.put_weights(model, weights, "the trained model")
    if not stage.lora.merge:
        model.save_pretrained(run.checkpoints.folder / ADAPTER)
    return state.weights_of(model.merge_and_unload() if stage.lora.merge else model.unload())


def _prepare_modules(model: Any, config: TrainConfig) -> None:
    model.train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        model.compile()


def _seed(*numbers: int) -> None:
    """Random numbers that depend on the seed, the step and the process, and on nothing that happened before."""
    value = int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:8], "little")
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


def _number(value: Any) -> float:
    return float(value.full_tensor() if isinstance(value, state.DTensor) else value)


def _memory_mb(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_mb()
