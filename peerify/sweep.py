"""The price curve of a model: what each share loses, reads, computes and gains, before anything is kept.

A dense model is converted in memory, once, for that one conversion serves every share. Figures are those of
`peerify.evaluation` and `peerify.bench`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from peerify.bench import bench_models
from peerify.checkpoint.load import DenseModel, load_dense, load_for_eval
from peerify.checkpoint.source import open_source
from peerify.choice import MAX_LOSS, Wish, choose
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import load_for_conversion
from peerify.conversion.densify import densify
from peerify.conversion.model import convert
from peerify.errors import ConversionError, UsageError
from peerify.evaluation import check_texts, evaluate_texts, least_share, load_texts
from peerify.modules import device_of
from peerify.progress import Progress, teller

PROMPT, NEW = 64, 32  # tokens, at most: of the prompt that is continued to measure speed, and those that follow it


def sweep_checkpoint(
    recipe: Recipe,
    *,
    data: Sequence[str],
    active: Sequence[float],
    against: str | None = None,
    wish: Wish | None = None,
    speed: bool = True,
    repeats: int = 5,
    max_tokens: int | None = None,
    batch_size: int = 2,
    details: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure `recipe.model`, dense or converted, at each share, and say which one to take. Writes nothing.

    Args:
        recipe: how a dense model is converted; its output is not used. Of a converted model only the model, context,
            device and number type count.
        data: texts to measure on.
        active: shares of the dense layers' bytes.
        against: the dense model of a converted one; None: the converted one made dense again, which is the same as long
            as it was not trained.
        wish: None: a loss of at most MAX_LOSS.
        speed: measure how fast one token at a time is decoded.
        repeats: measurements of each speed.
        max_tokens: of each text.
        details: see `evaluate_checkpoint`.

    Returns:
        ``{"model", "converted", "against", "unreachable", "wish", "choice", "rows", "evaluation", "speed"}``.
        converted tells whether the model was when the sweep began; unreachable are shares that were asked for and are
        less than the layers can have; wish is ``{"max_loss", "min_speed"}``, choice ``{"active", "met", "said"}``,
        see `Choice`. rows is a list of ``{"active", "bytes_fraction", "macs_fraction", "ratio", "kl", "agreement",
        "tokens_per_s", "speed", "limit"}``, of several texts the one that loses most at that share; the last three are
        None where no speed was measured, else as "converted", "ratio" and "limit" of `bench_checkpoint`. evaluation is
        what `evaluate_checkpoint` returns, speed what `bench_checkpoint` does, or None.

    Raises:
        PeerifyError: whatever is wrong with model, texts, shares or recipe; UsageError also where a dense model has no
            calibration text, or a converted one has.
    """
    wish = wish or Wish(max_loss=MAX_LOSS)
    if wish.min_speed is not None and not speed:
        raise UsageError("--min-speed needs speeds: leave out --no-speed")
    check_texts(data)
    if not all(0 < share <= 1 for share in active) or all(share == 1 for share in active):
        raise UsageError("--active: give shares above 0 and up to 1, at least one of them below 1, by commas")
    found = open_source(recipe.model, revision=recipe.revision, weights=False, code=recipe.trust_remote_code)
    is_converted = found.converted
    load = _load_converted if is_converted else _convert
    ours, dense, name, texts, tokenizer = load(recipe, list(data), against, max_tokens, progress)
    active, unreachable = _reachable(ours, active)
    measured = evaluate_texts(
        (recipe.model, ours), texts, (name, dense),
        active=active, batch_size=batch_size, tokenizer=tokenizer if details else None, progress=progress,
    )  # fmt: skip
    timed = None
    if speed:
        positions = getattr(ours.config.get_text_config(), "max_position_embeddings", None) or PROMPT + NEW + 1
        prompt = min(PROMPT, positions // 2)
        timed = bench_models(
            (recipe.model, ours), (name, dense), active=active, batches=[1], prompt=prompt, prefill=False,
            new=min(NEW, positions - prompt - 1), repeats=repeats, dtype=recipe.dtype, progress=progress,
        )  # fmt: skip
        timed |= {"train": []}
    rows = merged(measured, timed)
    return {
        "model": recipe.model,
        "converted": is_converted,
        "against": name,
        "unreachable": unreachable,
        "wish": vars(wish),
        "choice": vars(choose(rows, wish)),
        "rows": rows,
        "evaluation": measured,
        "speed": timed,
    }


def _reachable(model: Any, active: Sequence[float]) -> tuple[list[float], list[float]]:
    """Shares that the layers can have, and those that are too small: told apart here, after the work of converting.

    Raises:
        UsageError: no share below 1 is left, or the model has no budgets.
    """
    least = least_share(model)
    if least is None:
        raise UsageError("a sweep is of models that were converted with copies as keys: this one has no budgets")
    reached = [share for share in active if share >= least]
    if all(share >= 1 for share in reached):
        raise UsageError(f"--active: these layers can read no less than a share of {least:g}: give some from there on")
    return reached, [share for share in active if share < least]


def merged(found: Mapping[str, Any], timed: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The rows of `sweep_checkpoint`, from an evaluation with budgets and against the dense model, and from speeds."""
    texts = found.get("texts", [found])
    decode = {row["active"]: row for row in (timed or {}).get("decode", []) if row["batch"] == 1}
    rows = []
    for of_share in zip(*(text["budgets"] for text in texts), strict=True):
        worst = max(of_share, key=lambda row: row["ratio"])
        fast = decode.get(worst["active"], {})
        rows.append(
            {key: worst[key] for key in ("active", "bytes_fraction", "macs_fraction", "ratio", "kl", "agreement")}
            | {"tokens_per_s": fast.get("converted"), "speed": fast.get("ratio"), "limit": fast.get("limit")}
        )
    return rows


def _convert(
    recipe: Recipe,
    data: list[str],
    against: str | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> tuple[Any, Any, str, dict[str, Any], Any]:
    """The converted model, the dense one, its name, and the windows of the test texts; and the tokenizer."""
    if against is not None:
        raise UsageError(f"--against is for converted models: {recipe.model} is dense itself")
    if not recipe.calibration.sources:
        raise UsageError(
            f"{recipe.model} is dense, and converting it needs calibration text: pass --calibration with a .txt file "
            "or a Hub dataset, or give a converted folder"
        )
    if not recipe.convert.has_copies:
        raise UsageError("a sweep needs layers that have budgets: leave convert.keys as it is")
    if recipe.convert.layers == "auto":
        raise UsageError("--layers auto chooses layers for one share, and a sweep is of many: name the layers")
    dense, windows_bt = load_for_conversion(recipe, progress)
    texts = _texts(data, dense, recipe, max_tokens, progress)
    ours = convert(copy.deepcopy(dense.model), recipe.convert, windows_bt, progress=progress).model.eval()
    return ours, dense.model, recipe.model, texts, dense.tokenizer


def _load_converted(
    recipe: Recipe,
    data: list[str],
    against: str | None,
    max_tokens: int | None,
    progress: Progress | None,
) -> tuple[Any, Any, str, dict[str, Any], Any]:
    """Likewise of a folder that was converted before."""
    if recipe.calibration.sources:
        raise UsageError(f"{recipe.model} is converted already: leave out --calibration")
    tell = teller(progress)
    options: dict[str, Any] = {"dtype": recipe.dtype, "device": recipe.device}
    options["trust_remote_code"] = recipe.trust_remote_code
    tell(f"Loading {recipe.model}", 0, 1)
    ours = load_for_eval(recipe.model, revision=recipe.revision, **options)
    tell(f"Loading {recipe.model}", 1, 1)
    texts = _texts(data, ours, recipe, max_tokens, progress)
    if against is not None:
        return ours.model, load_dense(against, **options).model, against, texts, ours.tokenizer
    try:
        dense: Any = densify(ours.model)
    except ConversionError as error:
        raise UsageError(f"name the dense model with --against, since {error}") from error
    return ours.model, dense.to(device_of(ours.model)), f"{recipe.model}, dense again", texts, ours.tokenizer


def _texts(
    data: list[str], model: DenseModel, recipe: Recipe, max_tokens: int | None, progress: Progress | None
) -> dict[str, Any]:
    context = recipe.calibration.context
    return load_texts(data, model.tokenizer, context=context, max_tokens=max_tokens, progress=progress)
