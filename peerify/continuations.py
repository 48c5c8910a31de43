"""How a model goes on after a prompt, with a cache, beside the dense model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from peerify.modules import device_of, prefill


@torch.inference_mode()
def after_prefill(model: Any, dense: Any, windows_bt: torch.Tensor) -> float | None:
    """Perplexity of the second half of each window (b, t) at the budget, over the dense model's of that half.

    The first half is read with everything on, as a prompt is by default. None where a model keeps no cache of what it
    has read, or a half is less than two tokens.
    """
    half = windows_bt.shape[1] // 2
    if half < 2:
        return None
    loss = [0.0, 0.0]
    for row in windows_bt.split(1):
        for i, each in enumerate((model, dense)):
            ids = row.to(device_of(each))
            with prefill(each, everything=True):
                past = each(input_ids=ids[:, :half], use_cache=True).past_key_values
            if past is None:
                return None
            with prefill(each, everything=False):
                logits = each(input_ids=ids[:, half:-1], past_key_values=past, use_cache=True).logits[0]
            loss[i] += float(nn.functional.cross_entropy(logits.float(), ids[0, half + 1 :], reduction="sum"))
    return math.exp((loss[0] - loss[1]) / (len(windows_bt) * (windows_bt.shape[1] - half - 1)))
