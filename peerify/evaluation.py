"""Perplexity, distance from the dense model and expert usage of a model on windows of tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peerify.continuations import after_prefill, continuation, continue_greedily, prompts_of
from peerify.data import check_windows
from peerify.details import Continuations, use_of
from peerify.errors import CheckpointError, DataError, UsageError
from peerify.modules import device_of, peer_layers, prefill
from peerify.progress import Progress, teller
from peerify.usage import counting, summary

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
    details: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity of `model`, its distance from the dense model `against`, and what its experts do.

    Both models see each batch in turn, so that no more than one batch of logits is ever held. A model with
    budgets keeps to its own for every token.

    Returns:
        ``{"perplexity", "tokens", "against", "layers"}``. tokens counts what was read. against is None or
        ``{"perplexity", "ratio", "kl", "agreement"}``, kl the mean KL(dense || model) per predicted token in nats,
        agreement the share of them for which both models find the same token most likely. Each
        PEER layer has ``{"path", "num_experts", "bytes_fraction", "macs_fraction", "usage", "kl_uniform",
        "effective_experts", "bytes_per_token"}``: the fractions are what a token took of the dense layer's bytes (in
        bfloat16) and multiply-adds, everything counted; usage is the share of experts evaluated at least once,
        kl_uniform the KL from uniform of how often each was (PEER paper, table 2), effective_experts exp of the entropy
        of that: so many experts, used equally often, would be as even. bytes_per_token is ``{"p5", "p50", "p95"}``: so
        many of a hundred tokens take at most that share of the dense layer's bytes, to 0.001. A grown layer also has
        "memory": ``{"num_experts", "usage", "kl_uniform", "effective_experts"}`` of its new experts. With `details`
        each has what `peerify.details.use_of` returns as well.

    Raises:
        CheckpointError, UsageError: see `perplexity`; also where the two vocabularies differ.
        DataError: no window.
    """
    models = [model] if against is None else [model, against]
    for each in models:
        _check(each, windows_bt)
    loss_m = [0.0] * len(models)
    kl, agreed = 0.0, 0
    done, total = 0, windows_bt.shape[0]
    tell = teller(progress)
    tell(STAGE, done, total)
    with counting(model) as used, prefill(model, everything=False):
        for batch_bt in windows_bt.split(batch_size):
            logits = [each(input_ids=batch_bt.to(device_of(each)), use_cache=False).logits for each in models]
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
                    agreed += int((ours.argmax(-1) == dense.argmax(-1)).sum())
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
            "agreement": agreed / predictions,
        },
        "layers": [
            summary(path, module, used[path]) | (use_of(module, used[path]) if details else {})
            for path, module in peer_layers(model).items()
        ],
    }


def evaluate_checkpoint(
    source: str,
    *,
    data: str | Sequence[str],
    active: Sequence[float] = (),
    against: str | None = None,
    context: int = 512,
    max_tokens: int | None = None,
    batch_size: int = 2,
    details: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`evaluate` from names to numbers: loads `source` (dense or converted), the text and `against`.

    Returns:
        The dict of `evaluate` with ``"model"`` in it, and in ``"against"`` where there is one; ``"data"`` (a file by
        its name only) and ``"context"``; of a model with budgets also ``"budgets": [{"active", "bytes_fraction",
        "macs_fraction", "perplexity", "ratio", "kl", "agreement", "continuation", "after_prefill"}]``, each at a budget
        for every token, what is asked for first, which the rest of the dict is about.

        ratio, kl and agreement are None without `against`, and so are continuation, which is in ``"against"`` as well,
        and after_prefill. continuation is ``{"mean", "of", "prompts"}``: how many tokens the model adds to a prompt,
        always the most likely one, before the dense model would have added another, as a mean over prompts from all
        over the text and of how many at most. after_prefill is the perplexity of the second half of each window at the
        budget, the first half being read with everything on, over the dense model's of that half. Both are None where a
        model keeps no cache.

        With `details` layers have them, see `evaluate`, and of a model with budgets and `against` there is
        ``"continuations"``, see `peerify.details.Continuations.told`; None where a model keeps no cache.

        Of several texts: ``{"model", "context", "against", "texts"}``, against being None or ``{"model"}``, and texts
        a list of what each would give alone.

    Args:
        data: a text, or several.
        active: budgets, as shares of the dense layers' bytes; none: the model's own.
        max_tokens: of each text.
        details: tell also what `peerify report` draws.

    Raises:
        CheckpointError, DataError, UsageError: see `evaluate`, `load_windows` and `load_for_eval`; UsageError also
            where there is no text, or two have the same name.
    """
    from peerify.checkpoint.load import load_for_eval

    specs = [data] if isinstance(data, str) else list(data)
    check_texts(specs)

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
    budgets_of(ours.model, active)
    texts = load_texts(specs, ours.tokenizer, context=context, max_tokens=max_tokens, progress=progress)
    dense = (against, load(against, None).model) if against is not None else None
    tokenizer = ours.tokenizer if details else None
    return evaluate_texts(
        (source, ours.model), texts, dense,
        active=active, batch_size=batch_size, tokenizer=tokenizer, progress=progress,
    )  # fmt: skip


def check_texts(specs: Sequence[str]) -> None:
    """Tell what is wrong with the names of test texts before a large model is read.

    Raises:
        DataError: there is no such text.
        UsageError: no text is named, or two have the same name, by which results are told apart.
    """
    from peerify.data import check_source, public_name

    for spec in specs:
        check_source(spec)
    names = [public_name(spec) for spec in specs]
    if not names:
        raise UsageError("no text was given to measure on: name a .txt file or a Hub dataset")
    for i, name in enumerate(names):
        if name in names[:i]:
            raise UsageError(f"two texts have the name {name}, by which their results are told apart: rename one")


def load_texts(
    specs: Sequence[str], tokenizer: Any, *, context: int, max_tokens: int | None, progress: Progress | None = None
) -> dict[str, torch.Tensor]:
    """Name of a text (a file by its name only) -> its windows of token ids (b, context). Raises as `load_windows`."""
    from peerify.data import load_windows, public_name

    return {
        public_name(spec): load_windows([spec], tokenizer, context=context, max_tokens=max_tokens, progress=progress)
        for spec in specs
    }


def evaluate_texts(
    ours: tuple[str, Any],
    texts: Mapping[str, torch.Tensor],
    against: tuple[str, Any] | None = None,
    *,
    active: Sequence[float] = (),
    batch_size: int = 2,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `evaluate_checkpoint` returns, of models that are loaded.

    Args:
        ours: what the model is called, and the model.
        texts: of `load_texts`.
        against: likewise the dense model.
        active: see `evaluate_checkpoint`.
        tokenizer: of both models, for details; None: without them.
    """
    (source, model), dense = ours, against and against[1]
    own = budgets_of(model, active)
    results = []
    for name, windows_bt in texts.items():
        tell = progress if len(texts) == 1 else _labelled(progress, name)
        result = _at_budgets(model, dense, windows_bt, (active or own) if own else (), batch_size, tokenizer, tell)
        if against is not None:
            result["against"] = {"model": against[0], **result["against"]}
        results.append({"model": source, "data": name, "context": windows_bt.shape[1], **result})
    if len(results) == 1:
        return results[0]
    compared = {"model": against[0]} if against is not None else None
    return {"model": source, "context": results[0]["context"], "against": compared, "texts": results}


def _at_budgets(
    model: Any,
    dense: Any,
    windows_bt: torch.Tensor,
    shares: Sequence[float],
    batch_size: int,
    tokenizer: Any,
    progress: Progress | None,
) -> dict[str, Any]:
    """What `evaluate_checkpoint` says of one text; `shares`: budgets, none for a model that has no choice."""
    result: dict[str, Any] = {}
    rows, dense_bn, shown = [], None, None
    budgets: Sequence[float | None] = shares or [None]
    for share in budgets:
        tell = progress if share is None or len(shares) == 1 else _labelled(progress, f"{share:.4g} active")
        if share is not None:
            model.set_active(share)
        details = tokenizer is not None
        measured = evaluate(model, windows_bt, against=dense, batch_size=batch_size, details=details, progress=tell)
        after = None
        if dense is not None:
            after = after_prefill(model, dense, windows_bt) if share is not None else None
            prompts_bt, following = prompts_of(windows_bt, [model, dense])
            if dense_bn is None:  # the same at every budget
                dense_bn = continue_greedily(dense, prompts_bt, following, progress=progress)
            alike = continuation(model, prompts_bt, dense_bn, progress=tell) if dense_bn is not None else None
            measured["against"]["continuation"] = alike
            if details and share is not None and dense_bn is not None:
                shown = shown or Continuations(tokenizer, prompts_bt, dense_bn)
                shown.add(model, share)
        if share is not None:
            rows.append(_budget(share, measured) | {"after_prefill": after})
        result = result or measured
    if tokenizer is not None and shares and dense is not None:
        result["continuations"] = shown and shown.told()
    return result | ({"budgets": rows} if shares else {})


def budgets_of(model: Any, active: Sequence[float]) -> list[float]:
    """The budget that the model has, or none where it has no choice; UsageError where `active` cannot be had."""
    least = least_share(model)
    if least is None:
        if active:
            raise UsageError("--active is for models that were converted with copies as keys: this one has no budgets")
        return []
    for share in active:
        if not least <= share <= 1:
            raise UsageError(f"--active {share:g}: give shares of {least:g} to 1, by commas")
    return [float(model.config.peer_active)]


def least_share(model: Any) -> float | None:
    """The smallest budget that all layers have; None of a model that has no choice."""
    layers = [layer for layer in peer_layers(model).values() if getattr(layer, "budgets", None)]
    return max((layer.budgets[0].active for layer in layers), default=None)


def _budget(active: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    """A row of "budgets"."""
    layers, against = measured["layers"], measured["against"] or {}
    mean = {key: sum(layer[key] for layer in layers) / len(layers) for key in ("bytes_fraction", "macs_fraction")}
    compared = {key: against.get(key) for key in ("ratio", "kl", "agreement", "continuation")}
    return {"active": active, **mean, "perplexity": measured["perplexity"], **compared}


def _labelled(progress: Progress | None, label: str) -> Progress | None:
    return progress and (lambda stage, done, total: progress(f"{stage}, {label}", done, total))


def _check(model: Any, windows_bt: torch.Tensor) -> None:
    if windows_bt.shape[0] == 0 or windows_bt.shape[1] < 2:
        raise DataError("there is nothing to predict: perplexity takes windows of at least 2 tokens")
    config = model.config
    if getattr(config, "is_encoder_decoder", False) or not model.can_generate():
        raise CheckpointError(
            f"perplexity is defined for causal language models, and {type(model).__name__} is not one"
        )
    check_windows(windows_bt, model)


def _perplexity(mean_loss: float, model: nn.Module) -> float:
    if not math.isfinite(mean_loss):
        raise CheckpointError(
            f"the logits of {type(model).__name__} are not finite (NaN or infinity): try --dtype float32, "
            "and check the weights"
        )
    return math.exp(min(mean_loss, 700.0))  # e^709 is the largest double
