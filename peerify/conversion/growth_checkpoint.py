"""Grow a model that was converted before: a folder in, a folder out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.card import edited_card, write_card
from peerify.checkpoint.files import CARD
from peerify.checkpoint.load import load_for_eval, load_skeleton
from peerify.checkpoint.record import read_record, write_record
from peerify.config.recipe import Recipe
from peerify.conversion.checkpoint import growth_record
from peerify.conversion.growth import grow, grown_bytes, plan_growth, require_memory
from peerify.data import check_source, check_windows, load_windows
from peerify.errors import CheckpointError
from peerify.memory import peak_mb
from peerify.progress import Progress, teller


def grow_checkpoint(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Grow the converted model in the folder `recipe.model` as `recipe.grow` says, and write it to `recipe.output`.

    Weights keep the number type that they are stored in, unless the recipe names another one.

    Returns:
        ``{"output", "layers": {path: options of its memory}, "bytes_fraction", "macs_fraction", "parameters",
        "seconds", "peak_rss_mb"}``; parameters counts all of the model, shared ones once.

    Raises:
        PeerifyError: whatever is wrong with the folder, the text, the recipe, the memory or the disk.
    """
    tell = teller(progress)
    config = recipe.growth
    for text in recipe.calibration.sources:
        check_source(text)
    skeleton: Any = load_skeleton(recipe.model, converted_too=True)
    planned = plan_growth(skeleton, config)
    dtype = recipe.dtype if "dtype" in recipe.model_fields_set else "auto"
    stored = getattr(skeleton.config, "dtype", None) or torch.float32
    needed = grown_bytes(skeleton, planned, stored if dtype == "auto" else getattr(torch, dtype))
    require_memory(needed, planned)
    read = [recipe.model, *recipe.calibration.sources]
    with atomic_folder(recipe.output, overwrite=recipe.overwrite, inputs=read, expected_bytes=needed) as folder:
        tell(f"Loading {recipe.model}", 0, 1)
        before = load_for_eval(recipe.model, dtype=dtype, device=recipe.device)
        tell(f"Loading {recipe.model}", 1, 1)
        assert before.files is not None
        record = read_record(before.files, CheckpointError)
        windows_bt = load_windows(
            recipe.calibration.sources,
            before.tokenizer,
            context=recipe.calibration.context,
            max_tokens=recipe.calibration.tokens,
            progress=progress,
        )
        check_windows(windows_bt, before.model)
        growth = grow(before.model, config, windows_bt, progress=progress)
        tell("Writing", 0, 1)
        before.save_processor(folder)
        before.model.save_pretrained(folder, max_shard_size=recipe.max_shard_size)
        record["growth"] = [*record.get("growth", []), growth_record(config, recipe.calibration, windows_bt)]
        record["bytes_fraction"], record["macs_fraction"] = growth.bytes_fraction, growth.macs_fraction
        if before.model.dtype != stored:
            record.pop("evaluation", None)  # of the model in another number type
        write_record(folder, record)
        card = edited_card(Path(recipe.output).expanduser()) or edited_card(before.files)
        if card is not None:  # what people wrote stays
            (folder / CARD).write_text(card, encoding="utf-8")
        write_card(folder)
        tell("Writing", 1, 1)
    return {
        "output": recipe.output,
        "layers": growth.layers,
        "bytes_fraction": growth.bytes_fraction,
        "macs_fraction": growth.macs_fraction,
        "parameters": sum(parameter.numel() for parameter in before.model.parameters()),
        "seconds": growth.seconds,
        "peak_rss_mb": peak_mb(),
    }
