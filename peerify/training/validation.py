"""Perplexity while a model trains."""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from peerify.modules import prefill
from peerify.training import objectives


@torch.no_grad()
def perplexity(model: Any, test_bt: Tensor, accelerator: Accelerator) -> float:
    """Of `model`, as distributed, at its budget, on windows of token ids (b, t), each process on its part."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)
    # Under FSDP every process takes part in every forward pass: equal counts, the last ones again if need be.
    world, rank = accelerator.num_processes, accelerator.process_index
    rounds = -(-len(test_bt) // world)
    for number in range(rounds):
        which = number * world + rank
        ids = test_bt[min(which, len(test_bt) - 1)][None].to(accelerator.device)
        with accelerator.autocast(), prefill(model, everything=False):
            logits = model(input_ids=ids, use_cache=False).logits
        logits, targets = objectives.shifted(logits, ids, torch.ones_like(ids, dtype=torch.bool))
        if which < len(test_bt):
            for rows, wanted in zip(logits.split(objectives.ROWS), targets.split(objectives.ROWS), strict=True):
                sums[0] += nn.functional.cross_entropy(rows.float(), wanted, reduction="sum").double().cpu()
            sums[1] += len(targets)
    if world > 1:
        sums = accelerator.reduce(sums.to(accelerator.device), "sum").cpu()
    return math.exp(min(float(sums[0] / sums[1]), 700.0))
