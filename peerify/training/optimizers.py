"""Optimizers, and how the learning rate falls."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from torch import Tensor

from peerify.config.train import OptimizerConfig, StageConfig
from peerify.errors import UsageError
from peerify.training.groups import DECAYED
from peerify.training.tables import TABLES, RowOptimizer


def require_package(config: OptimizerConfig) -> None:
    """Raise UsageError where the package of this optimizer is not installed."""
    if config.name == "adamw8bit" and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            "optimizer.name adamw8bit needs bitsandbytes: pip install 'peerify[bitsandbytes]', or take adafactor"
        )


def build_optimizer(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer of a stage over `parameter_groups`.

    Raises:
        UsageError: one that is not installed.
    """
    tables = next((group for group in groups if group["name"] == TABLES), None)
    if tables is None:
        return _build(config, groups)
    rest = [group for group in groups if group is not tables]
    return RowOptimizer(_build(config, rest) if rest else None, tables, adagrad=config.tables == "rowwise_adagrad")


def _build(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=config.lr, scale_parameter=False, relative_step=False, warmup_init=False)
    if config.name == "adamw8bit":
        require_package(config)
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=config.lr, betas=config.betas)
        return optimizer
    if config.name == "galore":
        for group in groups:
            group["rank"] = config.rank if group["name"] == DECAYED else 0
        return GaLore(groups, lr=config.lr, betas=config.betas, update_every=config.update_every)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas)


def lr_factor(stage: StageConfig, step: int, steps: int) -> float:
    """Learning rate of `step` (from 0) of a stage of `steps`, as a share of the highest."""
    warmup = round(stage.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    done = (step - warmup + 1) / max(1, steps - warmup)
    fall = done if stage.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
    return 1 - (1 - stage.final_lr) * fall


class GaLore(torch.optim.Optimizer):
    """AdamW whose moments of matrices live in a low-rank subspace of the gradient: GaLore, 2403.03507, algorithm 2.

    Groups with a `rank` above 0 are projected, all others are plain AdamW. The shorter side of a matrix is projected;
    the subspace is that of the largest singular vectors of the gradient, found anew every `update_every` steps.
    """

    SCALE = 0.25  # the paper's alpha

    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        update_every: int = 200,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "rank": 0, "update_every": update_every}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient = parameter.grad
        assert gradient is not None
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] = state.get("step", torch.zeros(())) + 1
        step = int(state["step"])
        projected = group["rank"] > 0 and gradient.dim() == 2 and min(gradient.shape) > group["rank"]
        if projected:
            wide = gradient.shape[0] <= gradient.shape[1]
            if "basis" not in state or (step - 1) % group["update_every"] == 0:
                state["basis"] = _subspace(gradient if wide else gradient.T, group["rank"])
            basis = state["basis"].to(gradient.dtype)
            gradient = basis.T @ gradient if wide else gradient @ basis
        if "exp_avg" not in state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        mean, square = state["exp_avg"].lerp_(gradient, 1 - beta1), state["exp_avg_sq"]
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        change = mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])
        if projected:
            change = self.SCALE * (basis @ change if wide else change @ basis.T)
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-group["lr"])


def _subspace(gradient: Tensor, rank: int) -> Tensor:
    """The `rank` largest left singular vectors, (rows, rank), from the smaller Gram matrix: rows <= columns."""
    g = gradient.float()
    _, vectors = torch.linalg.eigh(g @ g.T)
    return vectors[:, -rank:].contiguous()
