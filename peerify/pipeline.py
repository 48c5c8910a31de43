"""A whole recipe: convert, train, evaluate, publish; a stage that is done is not done again.

What was done is noted in the file `<output>.run.json` after every stage, with a fingerprint of what the stage was
asked for. A run that stopped in training goes on from its newest checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peerify.checkpoint.atomic import check_target, write_text
from peerify.checkpoint.files import MARKER
from peerify.checkpoint.record import read_record
from peerify.config.recipe import Recipe
from peerify.data import check_source
from peerify.errors import OutputError, UsageError
from peerify.progress import Progress
from peerify.reading import local_path, read_object, shown

STAGES = ("convert", "train", "eval", "push")


def run_recipe(recipe: Recipe, *, overwrite: bool = False, progress: Progress | None = None) -> dict[str, Any]:
    """Do what is left to do of `recipe`: convert always, train, eval and push where the recipe has a section for them.

    eval measures on train.evaluation.test (or data), against the dense model, and notes the result in the model's card.

    Args:
        overwrite: begin anew, and replace earlier results.

    Returns:
        ``{"output", "done": [stages], "skipped": [stages done before], "stopped": stage or None, stage: result}``.

    Raises:
        PeerifyError: see the stages; OutputError where an earlier result was made by another recipe.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("run works in one process: convert first, then launch `peerify train` in several")
    done: list[str] = []
    skipped: list[str] = []
    results: dict[str, Any] = {}
    notes = _Notes(local_path(f"{recipe.output.rstrip('/')}.run.json", OutputError), fresh=overwrite)
    work: dict[str, Callable[[], Mapping[str, Any]]] = {"convert": lambda: _convert(recipe, overwrite, progress)}
    final = recipe.output
    asked: dict[str, Any] = {"convert": _asked_of_conversion(recipe)}
    if recipe.train is not None:
        final = recipe.trained_output
        work["train"] = lambda: _train(recipe, overwrite, progress)
        asked["train"] = [
            asked["convert"],
            recipe.train.model_dump(mode="json", exclude={"loggers", "log_every", "checkpoints"}),
        ]
        if _test_text(recipe) is not None:
            work["eval"] = lambda: _evaluate(recipe, final, progress)
            asked["eval"] = asked["train"]
    if recipe.hub is not None:
        work["push"] = lambda: _push(recipe, final, progress)
        asked["push"] = [asked["train" if recipe.train else "convert"], recipe.hub.model_dump(mode="json")]
    _check(recipe, [stage for stage in work if not notes.holds(stage, _fingerprint(asked[stage]))], overwrite)
    stopped = None
    for stage, act in work.items():
        fingerprint = _fingerprint(asked[stage])
        where = {"convert": recipe.output, "train": final}.get(stage)
        if not done and notes.holds(stage, fingerprint) and (where is None or _exists(where)):
            results[stage] = notes.result(stage)
            skipped.append(stage)
            continue
        if stage == "convert" and not overwrite and _exists(recipe.output):
            _refuse_another(recipe)  # converted by hand, or before the note of it was written
            skipped.append(stage)
            continue
        if stage == "train" and recipe.hub is not None:
            _check_card(recipe)
        results[stage] = dict(act())
        if results[stage].get("stopped"):
            stopped = stage
            break
        notes.add(stage, fingerprint, results[stage])
        done.append(stage)
    return {"output": final, "done": done, "skipped": skipped, "stopped": stopped, **results}


class _Notes:
    """The file that says which stages are done."""

    def __init__(self, path: Path, *, fresh: bool) -> None:
        self.path = path
        self._stages: dict[str, Any] = {}
        if path.exists() and not fresh:
            remedy = "remove it, and what is done will be found out"
            self._stages = read_object(path, OutputError, remedy)
            for name, note in self._stages.items():
                if not isinstance(note, dict) or not isinstance(note.get("result"), dict):
                    raise OutputError(f"{path}: {shown(name)} is no note of a stage; {remedy}")

    def holds(self, stage: str, fingerprint: str) -> bool:
        """Whether `stage` was done, and asked for the same."""
        return bool(self._stages.get(stage, {}).get("fingerprint") == fingerprint)

    def result(self, stage: str) -> Any:
        """What `stage` returned."""
        return self._stages[stage]["result"]

    def add(self, stage: str, fingerprint: str, result: Mapping[str, Any]) -> None:
        """Note a stage, and forget those after it, which were done with an older result."""
        later = STAGES[STAGES.index(stage) + 1 :]
        self._stages = {name: note for name, note in self._stages.items() if name not in later}
        self._stages[stage] = {"fingerprint": fingerprint, "result": result}
        write_text(self.path, json.dumps(self._stages, indent=2) + "\n")


def _exists(folder: str) -> bool:
    return (Path(folder).expanduser() / MARKER).exists()


def _fingerprint(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _asked_of_conversion(recipe: Recipe) -> dict[str, Any]:
    asked = {"model", "output", "revision", "convert", "calibration", "dtype", "max_shard_size"}
    return recipe.model_dump(mode="json", include=asked | ({"grow"} if recipe.grow else set()))


def _refuse_another(recipe: Recipe) -> None:
    """Whether the folder that is there was converted as the recipe says."""
    record = read_record(Path(recipe.output).expanduser(), OutputError)
    grown = record["growth"][-1]["recipe"] if record.get("growth") else {}
    asked = recipe.model_dump(mode="json")
    for section, made in (("convert", record["recipe"]["convert"]), ("grow", grown)):
        now = asked[section] or {}
        if made != now:
            key = next((key for key in {**now, **made} if made.get(key) != now.get(key)), "")
            raise OutputError(
                f"{recipe.output} was converted with another {section}.{key}: restore it, name another output, or pass "
                "--overwrite to begin anew"
            )


def _check(recipe: Recipe, stages: Sequence[str], overwrite: bool) -> None:
    """Refuse now what one of `stages` would refuse after hours. Raises what they raise."""
    if "convert" in stages and not (_exists(recipe.output) and not overwrite):
        if not recipe.calibration.sources:
            raise UsageError("the recipe has no calibration.data: name a .txt file or a Hub dataset to convert with")
        for text in recipe.calibration.sources:
            check_source(text)
        check_target(recipe.output, overwrite=overwrite or recipe.overwrite)
    if "train" in stages:
        from peerify.training.checks import check_training

        check_training(recipe)
    if "push" in stages and recipe.hub is not None:
        from peerify.publishing.transfer import need_token

        need_token(recipe.hub.repo)


def _check_card(recipe: Recipe) -> None:
    """Refuse before the training what push would refuse after it: a card without a licence. Raises PublishError."""
    from peerify.checkpoint.card import fresh_card
    from peerify.publishing.transfer import require

    require(fresh_card(Path(recipe.output).expanduser()))


def _convert(recipe: Recipe, overwrite: bool, progress: Progress | None) -> Mapping[str, Any]:
    from peerify.conversion.checkpoint import convert_checkpoint

    return convert_checkpoint(recipe.model_copy(update={"overwrite": overwrite or recipe.overwrite}), progress=progress)


def _train(recipe: Recipe, overwrite: bool, progress: Progress | None) -> Mapping[str, Any]:
    from peerify.training.state import Checkpoints
    from peerify.training.train import train_checkpoint

    begun = not overwrite and Checkpoints(recipe.run_folder, 1).latest() is not None
    result = train_checkpoint(recipe, resume=begun, overwrite=overwrite, progress=progress)
    assert result is not None
    return result


def _test_text(recipe: Recipe) -> str | None:
    return (recipe.train.evaluation.test or recipe.train.evaluation.data) if recipe.train is not None else None


def _evaluate(recipe: Recipe, final: str, progress: Progress | None) -> Mapping[str, Any]:
    from peerify.checkpoint.card import record_results
    from peerify.evaluation import evaluate_checkpoint

    data = _test_text(recipe)
    assert recipe.train is not None
    assert data is not None
    result = evaluate_checkpoint(
        final,
        data=data,
        against=recipe.model,
        context=recipe.train.data.context,
        max_tokens=recipe.train.evaluation.tokens,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        progress=progress,
    )
    record_results(Path(final).expanduser(), result)
    return result


def _push(recipe: Recipe, final: str, progress: Progress | None) -> Mapping[str, Any]:
    from peerify.publishing.push import push

    assert recipe.hub is not None
    settings = recipe.hub.model_dump(exclude={"repo", "every"})
    trust = recipe.trust_remote_code
    return push(final, recipe.hub.repo, **settings, trust_remote_code=trust, progress=progress)
