"""Perplexity, distance from the dense model and expert usage of a model on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from peerify.data import check_windows
from peerify.errors import CheckpointError, DataError
from peerify.modules import peer_layers
from peerify.progress import Progress, teller

STAGE = "Evaluating"
TOKENS_AT_ONCE = 128  # rows of the vocabulary softmax held in fp32; bounds memory, changes no result


def perplexity(
    model: nn.Module, windows_bt: torch.Tensor, *, batch_size: int = 2, progress: Progress | None = None
) -> float:
    """exp of the mean negative log-likelihood of tokens 2…n of each window, in fp32.

    Args:
        model: a causal language model of transformers, in eval mode.
        windows_bt: token ids (b, t), each row a window of its own.
        batch_size: windows run at once.
        progress: called as progress(stage, done, total).

    Raises:
        CheckpointError: the model is not a causal language model, or its logits are not finite.
        UsageError: the windows are longer than the model's positions.
    """
    return float(evaluate(model, windows_bt, batch_size=batch_size, progress=progress)["perplexity"])


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    windows_bt: torch.Tensor,
    *,
    against: nn.Module | None = None,
    batch_size: int = 2,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model`, its distance from the dense model `against`, and what its experts do.

    Both models see each batch in turn, so that no more than one batch of logits is ever held.

    Returns:
        ``{"perplexity", "tokens", "against", "layers"}``. tokens counts what was read. against is None or
        ``{"perplexity", "ratio", "kl"}``, kl the mean KL(dense || model) per predicted token in nats. Each
        PEER layer has ``{"path", "num_experts", "active", "usage", "kl_uniform"}``: active is its share of
        the dense layer's compute, usage the share of experts evaluated at least once, kl_uniform the KL from
        uniform of how often each was (PEER paper, table 2).

    Raises:
        CheckpointError, UsageError: see `perplexity`; also where the two vocabularies differ.
        DataError: no window.
    """
    models = [model] if against is None else [model, against]
    for each in models:
        _check(each, windows_bt)
    loss_m = [0.0] * len(models)
    kl = 0.0
    done, total = 0, windows_bt.shape[0]
    tell = teller(progress)
    tell(STAGE, done, total)
    with _count_retrievals(model) as counts:
        for batch_bt in windows_bt.split(batch_size):
            logits = [each(input_ids=batch_bt.to(_device(each)), use_cache=False).logits for each in models]
            if len({tensor.shape[-1] for tensor in logits}) > 1:
                raise CheckpointError(
                    f"the two models have vocabularies of {logits[0].shape[-1]} and {logits[1].shape[-1]} "
                    "tokens: compare with the dense model that was converted"
                )
            targets = batch_bt[:, 1:].flatten()
            predicted = [tensor[:, :-1].flatten(0, 1) for tensor in logits]
            for start in range(0, len(targets), TOKENS_AT_ONCE):
                rows = slice(start, start + TOKENS_AT_ONCE)
                logp_m = [tensor[rows].float().log_softmax(dim=-1) for tensor in predicted]
                for i, logp in enumerate(logp_m):
                    picked = logp.gather(1, targets[rows, None].to(logp.device))
                    loss_m[i] -= picked.sum(dtype=torch.float64).item()
                if against is not None:
                    ours, dense = logp_m[0].to(logp_m[1].device), logp_m[1]
                    pointwise = nn.functional.kl_div(ours, dense, reduction="sum", log_target=True)
                    kl += pointwise.item()
            del logits, predicted
            done += batch_bt.shape[0]
            tell(STAGE, done, total)
    predictions = windows_bt.shape[0] * (windows_bt.shape[1] - 1)
    perplexity_m = [_perplexity(loss / predictions, each) for loss, each in zip(loss_m, models, strict=True)]
    return {
        "perplexity": perplexity_m[0],
        "tokens": windows_bt.numel(),
        "against": None
        if against is None
        else {
            "perplexity": perplexity_m[1],
            "ratio": perplexity_m[0] / perplexity_m[1],
            "kl": kl / predictions,
        },
        "layers": [_usage(path, module, counts[path]) for path, module in peer_layers(model).items()],
    }


def evaluate_checkpoint(
    source: str,
    *,
    data: str,
    against: str | None = None,
    context: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 2,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluate` from names to numbers: loads `source` (dense or converted), the text and `against`.

    Returns:
        The dict of `evaluate` with ``"model"`` in it, and in ``"against"`` where there is one; ``"data"`` (a file by
        its name only) and ``"context"``.

    Raises:
        CheckpointError, DataError, UsageError: see `evaluate`, `load_windows` and `load_for_eval`.
    """
    from peerify.checkpoint.load import load_for_eval
    from peerify.data import check_source, load_windows, public_name

    check_source(data)  # a wrong name is told before a large model is read

    def load(name: str, revision: str | None) -> Any:
        if progress is not None:
            progress(f"Loading {name}", 0, 1)
        loaded = load_for_eval(name, revision=revision, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        if progress is not None:
            progress(f"Loading {name}", 1, 1)
        return loaded

    # What can be refused without reading gigabytes is refused first.
    ours = load(source, revision)
    _check(ours.model, torch.zeros(1, 1).expand(1, context))
    windows_bt = load_windows([data], ours.tokenizer, context=context, max_tokens=max_tokens, progress=progress)
    dense = load(against, None) if against is not None else None
    result = evaluate(
        ours.model,
        windows_bt,
        against=dense.model if dense is not None else None,
        batch_size=batch_size,
        progress=progress,
    )
    if result["against"] is not None:
        result["against"] = {"model": against, **result["against"]}
    return {"model": source, "data": public_name(data), "context": context, **result}


def _check(model: Any, windows_bt: torch.Tensor) -> None:
    if windows_bt.shape[0] == 0 or windows_bt.shape[1] < 2:
        raise DataError("there is nothing to predict: perplexity takes windows of at least 2 tokens")
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise CheckpointError(
            f"perplexity is defined for causal language models, and {type(model).__name__} is not one"
        )
    check_windows(windows_bt, model)


def _device(model: Any) -> torch.device:
    return model.get_input_embeddings().weight.device  # type: ignore[no-any-return]


def _perplexity(mean_loss: float, model: nn.Module) -> float:
    if not math.isfinite(mean_loss):
        raise CheckpointError(
            f"the logits of {type(model).__name__} are not finite (NaN or infinity): try --dtype float32, "
            "and check the weights"
        )
    return math.exp(min(mean_loss, 700.0))  # e^709 is the largest double


@contextmanager
def _count_retrievals(model: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward adds to {path: how often each expert was retrieved (n, float64)}."""
    counts: dict[str, torch.Tensor] = {}
    hooks = []
    for path, layer in peer_layers(model).items():
        counts[path] = torch.zeros(layer.num_experts, dtype=torch.float64)

        def count(module: Any, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            mask_tn = module.active_experts(args[0].flatten(0, -2))
            counts[path] += mask_tn.sum(dim=0).cpu()

        hooks.append(layer.register_forward_pre_hook(count))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def _usage(path: str, layer: Any, counts_n: torch.Tensor) -> dict[str, Any]:
    share_n = counts_n / counts_n.sum().clamp_min(1)
    entropy = torch.special.entr(share_n).sum().item()
    return {
        "path": path,
        "num_experts": int(layer.num_experts),
        "active": float(layer.active_fraction),
        "usage": (counts_n > 0).double().mean().item(),
        "kl_uniform": max(0.0, math.log(len(counts_n)) - entropy),
    }
