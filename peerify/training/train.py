"""From a recipe to a trained folder: what is checked before, what is put together, and what is written at the end."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.card import edited_card, write_card
from peerify.checkpoint.files import CARD
from peerify.checkpoint.load import DenseModel, load_dense, load_for_eval
from peerify.checkpoint.record import read_record, write_record
from peerify.config.recipe import Recipe
from peerify.config.train import TrainConfig
from peerify.config.yamlfile import flatten
from peerify.data import check_windows, load_windows, public_name
from peerify.errors import CheckpointError, PeerifyError, StoppedError, UsageError
from peerify.progress import Progress, teller
from peerify.training import loggers, state
from peerify.training.checks import check_space, check_start
from peerify.training.data import Windows
from peerify.training.distribution import accelerator_on, forget_processes, is_sharded
from peerify.training.groups import require_peer
from peerify.training.half import with_precision
from peerify.training.loop import Outcome, run_stages
from peerify.training.malloc import keep_freed_memory, return_freed_memory
from peerify.training.stage import ADAPTER, Run, plain_weights
from peerify.training.tables import require_memory
from peerify.training.use_plot import PICTURE, draw_use

logger = logging.getLogger(__name__)


def train_checkpoint(
    recipe: Recipe, *, resume: bool = False, overwrite: bool = False, progress: Progress | None = None
) -> dict[str, Any] | None:
    """Train the converted model in `recipe.output` as `recipe.train` says and write the result, whole or not at all.

    Checkpoints, the log and curves lie in the folder `<output>-run`. Interrupted by SIGINT or SIGTERM, the run writes
    a checkpoint and returns with "stopped" true and the signal's number; with `resume` it goes on from the newest one.

    Returns:
        ``{"output", "steps", "tokens", "final_loss", "perplexity", "best_step", "use", "stopped", "signal",
        "checkpoints"}``; output is None where the run stopped early, use is the last that `Use.report` told. None on
        all processes but the main one.

    Raises:
        PeerifyError: whatever is wrong with the recipe, the model, the text or the disk; TrainingError when the loss
            is NaN or jumps; StoppedError, without a message, in the other processes of a run that was stopped.
    """
    folder = recipe.run_folder
    check_start(recipe, resume=resume, overwrite=overwrite)
    checkpoints = state.Checkpoints(folder, recipe.training.checkpoints.keep)
    latest = checkpoints.latest() if resume else None
    begun = state.read_state(latest).recipe.get("train.precision") if latest is not None else None
    recipe = with_precision(recipe, begun)
    config = recipe.training
    described = {f"train.{key}": value for key, value in flatten(config.model_dump(mode="json")).items()}
    described |= {"model": recipe.model, "output": recipe.output}
    if latest is not None:
        state.check_same_recipe(_unrolled(state.read_state(latest).recipe), _unrolled(described), latest)
    names = loggers.chosen(config.loggers)
    accelerator = _accelerator(recipe, names, folder)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    try:
        tell = teller(progress if accelerator.is_main_process else None)
        _check_processes(config, accelerator)
        ours = load_for_eval(recipe.output, trust_remote_code=recipe.trust_remote_code)
        run = _prepare(recipe, accelerator, ours, checkpoints, latest, described, tell)
        try:
            outcome = run_stages(run, latest)
        finally:
            if run.log is not None:
                run.log.close()
        accelerator.end_training()
        if not accelerator.is_main_process:
            if outcome.signal:
                raise StoppedError("", outcome.signal)
            return None
        draw_use(folder / "log.jsonl", folder / PICTURE)
        result = _result(recipe, outcome)
        if not outcome.signal:
            assert outcome.checkpoint is not None
            tell("Writing", 0, 1)
            run.teacher = None  # its memory is wanted for what is written
            return_freed_memory()
            _write(run, recipe, ours, outcome.checkpoint, result)
            tell("Writing", 1, 1)
        return result
    finally:
        forget_processes()


def _prepare(
    recipe: Recipe,
    accelerator: Accelerator,
    ours: DenseModel,
    checkpoints: state.Checkpoints,
    latest: Path | None,
    described: dict[str, Any],
    tell: Progress,
) -> Run:
    """What the run needs: the teacher, texts, the folder of checkpoints and the log. Keeps no weights of `ours`."""
    config, folder = recipe.training, checkpoints.folder
    _check_model(ours, recipe)
    teacher = _teacher(recipe, accelerator, ours, tell)
    windows = Windows(config.data, ours.tokenizer, seed=config.seed, progress=tell)
    check_windows(torch.zeros(1, config.data.context, dtype=torch.int64), ours.model)
    test_bt = _test_windows(config, ours, tell)
    background_bt = _background_windows(config, ours, tell)
    check_space(config, ours.model, folder)
    # Each stage loads a model of its own; of this one only the files beside the weights are wanted from here on.
    ours.model.to(torch.device("meta"))  # type: ignore[arg-type]
    if accelerator.is_main_process:
        if latest is None:
            checkpoints.clear()
        else:
            checkpoints.prune()
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    accelerator.init_trackers(folder.name)
    from_step = state.read_state(latest).step if latest is not None else 0
    log = loggers.LogFile(folder / "log.jsonl", from_step=from_step) if accelerator.is_main_process else None
    return Run(
        config=config,
        accelerator=accelerator,
        make_model=lambda: load_for_eval(recipe.output, trust_remote_code=recipe.trust_remote_code).model,
        teacher=teacher,
        windows=windows,
        test_bt=test_bt,
        checkpoints=checkpoints,
        log=log,
        progress=tell,
        publish=_publisher(recipe, tell),
        recipe=described,
        background_bt=background_bt,
    )


def _result(recipe: Recipe, outcome: Outcome) -> dict[str, Any]:
    config, now = recipe.training, outcome.state
    return {
        "output": None if outcome.signal else recipe.trained_output,
        "steps": now.step,
        "tokens": now.step * config.batch_size * config.data.context,
        "final_loss": now.losses[-1] if now.losses else None,
        "perplexity": now.best_perplexity,
        "best_step": now.best_step if config.evaluation.keep_best else None,
        "use": now.use,
        "stopped": outcome.signal > 0,
        "signal": outcome.signal,
        "checkpoints": str(recipe.run_folder),
    }


def _unrolled(described: dict[str, Any]) -> dict[str, Any]:
    """Lists of sections as keys with numbers, so that a difference is named by its own key."""
    flat: dict[str, Any] = {}
    for key, value in described.items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for number, element in enumerate(value):
                flat |= {f"{key}.{number}.{inner}": item for inner, item in flatten(element).items()}
        else:
            flat[key] = value
    return flat


def _accelerator(recipe: Recipe, names: list[str], folder: Path) -> Accelerator:
    tracking = {"log_with": names or None, "project_dir": str(folder)}
    return accelerator_on(recipe.device, recipe.training.precision, **tracking)


def _check_processes(config: TrainConfig, accelerator: Accelerator) -> None:
    """Refuse what does not go together with several processes."""
    world = accelerator.num_processes
    share = config.batch_size // world
    if config.batch_size % world or (config.micro_batch_size and share % config.micro_batch_size):
        micro = f", {config.micro_batch_size} at a time" if config.micro_batch_size else ""
        raise UsageError(
            f"train.batch_size {config.batch_size} cannot be shared by {world} processes{micro}: make it a multiple "
            f"of {world * (config.micro_batch_size or 1)}"
        )
    sharded = is_sharded(accelerator)
    for number, stage in enumerate(config.stages):
        if world > 1 and stage.train in ("lisa", "memory"):
            other = "full" if stage.train == "lisa" else "peer"
            raise UsageError(f"train.stages.{number}: {stage.train} runs in one process: take {other}, or launch one")
        if sharded and stage.reseed:
            raise UsageError(
                f"train.stages.{number}.reseed needs whole tables, and FSDP shards them: set it to false, or launch "
                "with DDP"
            )
        if sharded and stage.optimizer.by_rows:
            raise UsageError(
                f"train.stages.{number}.optimizer.tables {stage.optimizer.tables} needs whole tables, and FSDP shards "
                "them: set it to same, or launch with DDP"
            )
        if sharded and stage.optimizer.name in ("galore", "adamw8bit"):
            raise UsageError(
                f"train.stages.{number}: {stage.optimizer.name} needs whole matrices, and FSDP shards them: take adamw"
            )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.FSDP,
        DistributedType.MULTI_CPU,
        DistributedType.MULTI_GPU,
    ):
        raise UsageError(
            f"training runs in one process, with DDP or with FSDP2, not with {accelerator.distributed_type.value}: "
            "use a configuration of recipes/accelerate"
        )


def _check_model(ours: DenseModel, recipe: Recipe) -> None:
    model: Any = ours.model
    if getattr(model.config, "is_encoder_decoder", False) or not model.can_generate():
        raise UsageError(f"{recipe.output} is a {type(model).__name__}: only causal language models can be trained")
    layers = {path: layer for path, layer in require_peer(model).items() if hasattr(layer, "keys")}
    for number, stage in enumerate(recipe.training.stages):
        require_memory(model, number, stage.optimizer)
        terms = stage.objectives
        wanted = {"balance_rate": stage.balance_rate, "objectives.load_balance": terms.load_balance}
        wanted["objectives.z_loss"] = terms.z_loss
        asked = [name for name, value in wanted.items() if value]
        if asked and not layers:
            raise UsageError(
                f"train.stages.{number}.{asked[0]} is for product keys, and experts of this model have copies as keys: "
                "drop it"
            )
        if stage.balance_rate and any(layer.keys.sub_key_bias is None for layer in layers.values()):
            raise UsageError(
                f"train.stages.{number}.balance_rate moves the sub-keys' biases, and these PEER layers have none "
                "(query batch norm): use objectives.load_balance"
            )


def _teacher(recipe: Recipe, accelerator: Accelerator, ours: DenseModel, tell: Progress) -> Any | None:
    if not any(stage.objectives.needs_teacher for stage in recipe.training.stages):
        return None
    tell(f"Loading {recipe.model}", 0, 1)
    dense = load_dense(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code).model
    tell(f"Loading {recipe.model}", 1, 1)
    theirs, own = (model.config.get_text_config().vocab_size for model in (dense, ours.model))
    if theirs != own:
        raise UsageError(
            f"model {recipe.model} has a vocabulary of {theirs} tokens and {recipe.output} one of {own}: name the "
            "dense model that was converted"
        )
    return dense.requires_grad_(False).to(accelerator.device)


def _test_windows(config: TrainConfig, ours: DenseModel, tell: Progress) -> torch.Tensor | None:
    wanted = config.evaluation
    if wanted.data is None:
        return None
    windows_bt = load_windows(
        [wanted.data], ours.tokenizer, context=config.data.context, max_tokens=wanted.tokens, progress=tell
    )
    check_windows(windows_bt, ours.model)
    return windows_bt


def _background_windows(config: TrainConfig, ours: DenseModel, tell: Progress) -> dict[int, torch.Tensor]:
    """Number of a stage with train: memory -> windows of its background text."""
    found = {}
    for number, stage in enumerate(config.stages):
        if stage.train == "memory":
            texts, context = stage.memory.background, config.data.context
            tokens = max(stage.memory.tokens, context * len(texts))
            found[number] = load_windows(texts, ours.tokenizer, context=context, max_tokens=tokens, progress=tell)
            check_windows(found[number], ours.model)
    return found


def _publisher(recipe: Recipe, tell: Progress) -> Callable[[Path, int], None] | None:
    """Pushes every N-th checkpoint where the recipe's `hub.every` asks for it; training goes on if that fails."""
    hub = recipe.hub
    if hub is None or hub.every is None:
        return None

    def publish(checkpoint: Path, number: int) -> None:
        from peerify.publishing.push import push_checkpoint

        if number % hub.every == 0:  # type: ignore[operator]
            try:
                steps = state.read_state(checkpoint).step
                push_checkpoint(
                    *(checkpoint, Path(recipe.output).expanduser(), hub),
                    steps=steps,
                    trust_remote_code=recipe.trust_remote_code,
                    progress=tell,
                )
            except PeerifyError as error:
                logger.warning("%s was not pushed, training goes on: %s", checkpoint.name, error)

    return publish


def _write(run: Run, recipe: Recipe, ours: DenseModel, last: Path, result: dict[str, Any]) -> None:
    """The trained model's folder: the best weights or the last, the processor, the record and the card."""
    source = last
    if run.config.evaluation.keep_best and run.test_bt is not None and run.checkpoints.best.exists():
        source = run.checkpoints.best
    weights, found = state.read_weights(source), state.read_state(source)
    if found.step_in_stage:  # the best, in the middle of a stage
        weights = plain_weights(run, found.stage, weights)
    model: Any = run.make_model()
    state.put_weights(model, weights, str(source))
    with atomic_folder(result["output"], overwrite=True) as folder:
        ours.save_processor(folder)
        model.save_pretrained(folder, max_shard_size=recipe.max_shard_size)
        adapter = run.checkpoints.folder / ADAPTER
        if not run.config.stages[-1].lora.merge and adapter.exists():
            shutil.copytree(adapter, folder / ADAPTER)
        record: Any = read_record(Path(recipe.output).expanduser(), CheckpointError)
        settings = run.config.model_dump(mode="json", exclude={"output", "loggers", "checkpoints", "log_every"})
        for text in settings["data"]["sources"]:
            text["path"] = public_name(text["path"])
        if settings["evaluation"]["data"]:
            settings["evaluation"]["data"] = public_name(settings["evaluation"]["data"])
        for stage in settings["stages"]:
            stage["memory"]["background"] = [public_name(text) for text in stage["memory"]["background"]]
        kept = ("steps", "tokens", "final_loss", "perplexity", "best_step")
        record["training"] = {"recipe": settings, **{key: result[key] for key in kept}}
        record.pop("evaluation", None)  # of the model before it was trained
        write_record(folder, record)
        card = edited_card(Path(result["output"]).expanduser()) or edited_card(Path(recipe.output).expanduser())
        if card is not None:  # what people wrote stays, with the result that is replaced or the model that was trained
            (folder / CARD).write_text(card, encoding="utf-8")
        write_card(folder)
