"""Speed of a converted model beside its dense one, in one run: tokens per second of `generate`, and of training.

Both models, and the dense one without the layers that were converted, take turns, so that what else the machine does
touches all alike. The third tells how fast layers that take no time would make the model (Amdahl's law).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from transformers import StoppingCriteria, StoppingCriteriaList

from peerify.errors import CheckpointError, UsageError
from peerify.evaluation import budgets_of
from peerify.memory import peak_mb
from peerify.modeling import peer_cpu, peer_triton
from peerify.modules import device_of, peer_layers
from peerify.progress import Progress, teller

STAGE = "Measuring"
CONTEXT = 64  # tokens, at most, of the prompts that are continued
Arm = Any  # a budget of the converted model, or one of:
DENSE, WITHOUT = "dense", "without"


def bench_checkpoint(
    source: str,
    *,
    against: str,
    active: Sequence[float] = (),
    batches: Sequence[int] = (1, 4, 16),
    prompt: int = 512,
    new: int = 32,
    repeats: int = 5,
    dtype: str = "float32",
    device: str = "cpu",
    train: Sequence[Literal["peer", "full"]] = (),
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Decode and prefill speeds of the converted model `source` and of the dense model `against`.

    Args:
        active: budgets, as shares of the dense layers' bytes; none: the model's own.
        batches: how many random prompts are continued at once.
        prompt: tokens of the prompt that is read at once.
        new: tokens by which `generate` continues others, greedily.
        repeats: measurements of each kind, after one that warms up.
        train: steps of training to measure as well: of the PEER layers ("peer"), of everything ("full").

    Returns:
        ``{"model", "against", "device", "dtype", "threads", "kernel", "memory", "peak_rss_mb", "decode", "prefill",
        "train"}``. kernel is None where a kernel serves all layers, else the reason why not. memory is
        ``{"dense", "converted"}``: bytes of the weights, and of what is kept beside them. peak_rss_mb is the most that
        this process held, with both of them, before steps of training. decode is a list of ``{"batch", "dtype",
        "active", "dense", "converted", "ratio", "spread", "limit", "of_limit"}``: medians in tokens per second; ratio
        the median of converted over dense, spread its least and its largest; limit what ratio would be if the converted
        layers took just their share of the dense ones' time; of_limit ratio over that. prefill is a list of
        ``{"tokens", "dtype", "active", "dense", "converted", "ratio", "spread", "first_token_s",
        "dense_first_token_s"}``, the last two in seconds. train is a list of ``{"tokens", "dtype", "trains", "active",
        "dense", "converted", "ratio", "spread"}``, tokens those of a step; see `step_seconds`.

    Raises:
        UsageError: the model is dense, or has no such budget, or the prompt is too long for it; see `check_step`.
        CheckpointError: see `load_for_eval`; also a model that generates no text.
        TrainingError: a step of training fails.
    """
    from peerify.checkpoint.load import load_for_eval
    from peerify.training.speed import check_step, step_seconds

    if train:
        check_step(prompt, dtype, device)
    options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    converted = load_for_eval(source, revision=revision, **options).model
    layers = peer_layers(converted)
    if not layers:
        raise UsageError(f"{source} is a dense model: bench compares a converted one with it")
    own = budgets_of(converted, active)
    shares: list[float] = list(active) or own or [1.0]
    dense = load_for_eval(against, **options).model
    names = (source, converted), (against, dense)
    result = bench_models(
        *names, active=shares, batches=batches, prompt=prompt, new=new, repeats=repeats, dtype=dtype, progress=progress
    )
    del dense, converted, layers, names  # training takes others, and their memory
    budgets = shares if own else [None]
    asked: dict[str, Any] = {"context": prompt, "repeats": repeats, "revision": revision, **options}
    rows = []
    for trains in train:
        tokens, theirs, of_budgets = step_seconds(
            source, against, shares=budgets, trains=trains, progress=progress, **asked
        )
        what = {"tokens": tokens, "dtype": dtype, "trains": trains}
        rows += [
            {**what, **_compared(theirs, ours, share, tokens)} for share, ours in zip(shares, of_budgets, strict=True)
        ]
    return {**result, "train": rows}


def bench_models(
    ours: tuple[str, Any],
    against: tuple[str, Any],
    *,
    active: Sequence[float],
    batches: Sequence[int],
    prompt: int,
    new: int,
    repeats: int,
    dtype: str,
    prefill: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What `bench_checkpoint` returns, without "train", of models that are loaded.

    Args:
        ours: what the converted model is called, and the model.
        against: likewise the dense one.
        active: budgets; 1 alone for a model that has none.
        prefill: False: reading a prompt is not measured, and "prefill" is empty.

    Raises:
        UsageError: the prompt is too long for the model.
        CheckpointError: the dense model generates no text.
    """
    (source, converted), (other, dense) = ours, against
    layers, own = peer_layers(converted), budgets_of(converted, ())
    config, context = dense.config.get_text_config(), min(CONTEXT, prompt)
    if not dense.can_generate() or dense.config.is_encoder_decoder:
        raise CheckpointError(f"{other} generates no text: there is nothing to measure")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max(prompt, context + new) + 1 > positions:
        raise UsageError(f"--prompt {prompt} or --new {new} is more than the model's {positions} positions")

    tell = teller(progress)
    runs = [*([(1, prompt, 1)] if prefill else []), *((batch, context, new + 1) for batch in batches)]
    total, done = len(runs) * (repeats + 1), 0
    decode, read = [], []
    for batch, tokens, adds in runs:
        reads = adds == 1
        ids = torch.randint(config.vocab_size, (batch, tokens), device=device_of(dense))
        times: dict[Arm, list[float]] = {arm: [] for arm in (DENSE, *([] if reads else [WITHOUT]), *active)}
        for number in range(repeats + 1):
            tell(STAGE, done, total)
            for arm, of_arm in times.items():
                with _taking(arm, dense, converted, layers, own) as model:
                    seconds = _seconds(model, ids, adds)
                if number:  # the first one warms up
                    of_arm.append(seconds)
            done += 1
        for share in active:
            row = _compared(times[DENSE], times[share], share, tokens if reads else batch)
            if reads:
                first = {"first_token_s": tokens / row["converted"], "dense_first_token_s": tokens / row[DENSE]}
                read.append({"tokens": tokens, "dtype": dtype, **row, **first})
            else:
                decode.append({"batch": batch, "dtype": dtype, **_limited(row, times[DENSE], times[WITHOUT])})
    tell(STAGE, done, total)
    return {
        "model": source,
        "against": other,
        "device": str(device_of(dense)),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "kernel": kernel_status(converted, str(device_of(dense))),
        "memory": {DENSE: _held(dense), "converted": _held(converted)},
        "peak_rss_mb": peak_mb(),
        "decode": decode,
        "prefill": read,
    }


def kernel_status(model: nn.Module, device: str = "cpu") -> str | None:
    """Why the kernel for few tokens of that device does not serve all converted layers; None: it does."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        return f"there is none for {device}"
    on_cpu = kind == "cpu"
    pools = [layer.pool for layer in peer_layers(model).values() if hasattr(layer, "budgets")]
    misfits = [pool.misfit if on_cpu else pool.gpu_misfit for pool in pools]
    reasons = [reason for reason in misfits if reason]
    if not pools:
        return "the layers have no budgets"
    obstacle = peer_cpu.obstacle() if on_cpu else peer_triton.obstacle()
    return obstacle or (f"{len(reasons)} of {len(pools)} layers: {reasons[0]}" if reasons else None)


@contextmanager
def _taking(arm: Arm, dense: Any, converted: Any, layers: Mapping[str, Any], own: Sequence[float]) -> Iterator[Any]:
    """The model of an arm, as it is to be measured."""
    if isinstance(arm, float):
        if own:
            converted.set_active(arm)
        yield converted
        return
    stilled = [*layers, *converted.config.peer["identities"]] if arm == WITHOUT else []
    parts = [dense.get_submodule(path) for path in stilled]
    for part in parts:
        part.forward = _same
    try:
        yield dense
    finally:
        for part in parts:
            del part.forward


def _same(x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return x


class _Clock(StoppingCriteria):
    """When each token was there."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _seconds(model: Any, ids: torch.Tensor, new: int) -> float:
    """Seconds until the first token, or for each of the `new` tokens after it."""
    clock = _Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]), pad_token_id=0,
        )  # fmt: skip
    if new == 1:
        return clock.times[0] - start
    return (clock.times[-1] - clock.times[0]) / (new - 1)


def _compared(dense: Sequence[float], ours: Sequence[float], share: float, tokens: int) -> dict[str, Any]:
    """A row of what is found at a budget, from seconds for so many tokens."""
    ratios = [theirs / own for theirs, own in zip(dense, ours, strict=True)]
    return {
        "active": share,
        DENSE: tokens / statistics.median(dense),
        "converted": tokens / statistics.median(ours),
        "ratio": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
    }


def _limited(row: Mapping[str, Any], dense: Sequence[float], without: Sequence[float]) -> dict[str, Any]:
    """A row with what is possible, from seconds of the dense model with and without the layers that were converted."""
    whole, rest = statistics.median(dense), statistics.median(without)
    limit = whole / (whole - (1 - row["active"]) * max(0.0, whole - rest))
    return {**row, "limit": limit, "of_limit": row["ratio"] / limit}


def _held(model: nn.Module) -> int:
    """Bytes of weights, and of what PEER layers keep beside them to decode faster."""
    tensors = {id(each): each for each in (*model.parameters(), *model.buffers())}
    for layer in peer_layers(model).values():
        for kept in (getattr(layer.pool, name, None) for name in ("_packed", "_copies")):
            if kept is not None and kept.value is not None:
                tensors.update((id(each), each) for each in _tensors(kept.value))
    return sum(each.nbytes for each in tensors.values())


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for each in value if isinstance(value, tuple | list) else getattr(value, "tables", ()):
        yield from _tensors(each)
