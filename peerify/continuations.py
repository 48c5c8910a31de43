"""How a model goes on after a prompt, with a cache, beside the dense model.

Shape suffixes: b windows or prompts, t their tokens, n tokens that follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from peerify.modules import device_of, prefill
from peerify.progress import Progress, teller

STAGE = "Continuing prompts"
PROMPTS, PROMPT, FOLLOWING = 16, 64, 64  # at most: prompts, the tokens of one, and those that follow it


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
                past = _read(each, ids[:, :half])[1]
            if past is None:
                return None
            with prefill(each, everything=False):
                logits = _read(each, ids[:, half:-1], past)[0][0]
            loss[i] += float(nn.functional.cross_entropy(logits.float(), ids[0, half + 1 :], reduction="sum"))
    return math.exp((loss[0] - loss[1]) / (len(windows_bt) * (windows_bt.shape[1] - half - 1)))


def prompts_of(windows_bt: torch.Tensor, models: Sequence[Any]) -> tuple[torch.Tensor, int]:
    """Beginnings of windows from all over the text (b, t), and how many tokens are to follow: what `models` have
    positions for, at most half of these to follow."""
    configs = [model.config.get_text_config() for model in models]
    positions = [getattr(config, "max_position_embeddings", None) or PROMPT + FOLLOWING for config in configs]
    following = min(FOLLOWING, min(positions) // 2)
    rows_bt = windows_bt[:: max(1, len(windows_bt) // PROMPTS)][:PROMPTS]
    return rows_bt[:, : min(PROMPT, min(positions) - following)], following


@torch.inference_mode()
def continue_greedily(
    model: Any,
    prompts_bt: torch.Tensor,
    following: int,
    *,
    along_bn: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor | None:
    """The token that `model` finds most likely after prompts (b, t), then the one after that, and so on: (b, n).

    Prompts are read as `generate` would read them. Then each token is at the budget, also where several prompts bring
    it at once. A token that ends a text is one like others: more follow it. None where the model keeps no cache.

    Args:
        following: n.
        along_bn: tokens that follow the prompts instead, whatever the model finds; once it has found another one after
            every prompt, no more are asked for, and n is less.
        progress: called as progress(stage, done, total).
    """
    tell = teller(progress)
    logits, past = _read(model, prompts_bt.to(device_of(model)))
    if past is None:
        return None
    found: list[torch.Tensor] = []
    alike_b = torch.ones(len(prompts_bt), dtype=torch.bool)
    with prefill(model, everything=False):
        while True:
            found.append(logits[:, -1].argmax(dim=-1))
            done = len(found)
            token_b = found[-1]
            if along_bn is not None:
                token_b = along_bn[:, done - 1].to(token_b.device)
                alike_b &= (found[-1] == token_b).cpu()
            if done == following or not alike_b.any():
                tell(STAGE, following, following)
                return torch.stack(found, dim=1)
            tell(STAGE, done, following)
            logits, past = _read(model, token_b[:, None], past)


def continuation(
    model: Any, prompts_bt: torch.Tensor, dense_bn: torch.Tensor, *, progress: Progress | None = None
) -> dict[str, Any] | None:
    """For how long `model` goes on after prompts as the dense model does.

    Args:
        dense_bn: what `continue_greedily` gave of the dense model.

    Returns:
        ``{"mean", "of", "prompts"}``: tokens before the first that differs, as a mean over prompts, of how many at
        most, and the number of prompts. None where the model keeps no cache.
    """
    # As long as all tokens are the dense model's, so is what `model` reads: no need to let it go its own way.
    limit = dense_bn.shape[1]
    found_bn = continue_greedily(model, prompts_bt, limit, along_bn=dense_bn, progress=progress)
    if found_bn is None:
        return None
    alike_bn = found_bn == dense_bn[:, : found_bn.shape[1]].to(found_bn.device)
    mean = alike_bn.cumprod(dim=1).sum(dim=1).double().mean().item()
    return {"mean": mean, "of": limit, "prompts": len(prompts_bt)}


def _read(model: Any, ids_bt: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]:
    """Logits (b, t, vocabulary) of tokens after those in the cache `past`, and the cache, or None without one."""
    before = {} if past is None else {"past_key_values": past}
    output = model(input_ids=ids_bt, use_cache=True, **before)
    return output.logits, getattr(output, "past_key_values", None)
