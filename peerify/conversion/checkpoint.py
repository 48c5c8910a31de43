"""Write a converted model's folder: weights, code, tokenizer, a record of how it was made, and a card."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import peerify
from peerify.checkpoint.atomic import atomic_folder
from peerify.checkpoint.card import edited_card, write_card
from peerify.checkpoint.files import CARD
from peerify.checkpoint.load import DenseModel, load_dense, load_skeleton
from peerify.checkpoint.provenance import provenance
from peerify.checkpoint.record import Growth, Record, Seen, read_record, write_record
from peerify.config.grow import GrowConfig
from peerify.config.peer import PeerConfig
from peerify.config.recipe import CalibrationConfig, Recipe
from peerify.conversion.growth import grow, grown_bytes, plan_growth, require_memory
from peerify.conversion.model import Conversion, convert
from peerify.conversion.skeleton import converted_skeleton
from peerify.data import check_source, check_windows, load_windows, public_name
from peerify.errors import ConversionError, OutputError
from peerify.memory import peak_mb
from peerify.progress import Progress, teller


def convert_checkpoint(recipe: Recipe, *, progress: Progress | None = None) -> dict[str, Any]:
    """Load the dense model, convert it, grow it if asked to, and write it to `recipe.output`, whole or not at all.

    Returns:
        ``{"output", "layers", "bytes_fraction", "macs_fraction", "predicted_ratio", "seconds", "peak_rss_mb",
        "layer_errors"}``; predicted_ratio is null where no sensitivities were measured. With `recipe.grow` also
        ``"grown": {path: options of its memory}``.

    Raises:
        PeerifyError: whatever is wrong with the model, the text, the recipe or the output folder.
    """
    tell = teller(progress)
    read = [recipe.model, *recipe.calibration.sources]
    needed = _require_room_to_grow(recipe)
    with atomic_folder(recipe.output, overwrite=recipe.overwrite, inputs=read, expected_bytes=needed) as folder:
        dense, windows_bt = load_for_conversion(recipe, progress)
        card = _card_to_keep(recipe.output, dense)
        conversion = convert(dense.model, recipe.convert, windows_bt, progress=progress)
        grown, note = {}, None
        if recipe.grow is not None:
            growth = grow(conversion.model, recipe.grow, windows_bt, progress=progress)
            conversion = dataclasses.replace(
                conversion,
                bytes_fraction=growth.bytes_fraction,
                macs_fraction=growth.macs_fraction,
                seconds=conversion.seconds + growth.seconds,
            )
            grown = {"grown": growth.layers}
            note = growth_record(recipe.grow, recipe.calibration, windows_bt)
        tell("Writing", 0, 1)
        resolved = recipe.model_dump(mode="json", exclude={"output", "overwrite", "device", "grow", "train", "hub"})
        resolved["calibration"]["data"] = [public_name(spec) for spec in recipe.calibration.sources]
        _write_model(folder, conversion, dense, resolved, _seen(windows_bt), recipe.max_shard_size, card, note)
        tell("Writing", 1, 1)
    return grown | {
        "output": recipe.output,
        "layers": list(conversion.layers),
        "bytes_fraction": conversion.bytes_fraction,
        "macs_fraction": conversion.macs_fraction,
        "predicted_ratio": conversion.predicted_ratio,
        "seconds": conversion.seconds,
        "peak_rss_mb": peak_mb(),
        "layer_errors": conversion.layer_errors,
    }


def _require_room_to_grow(recipe: Recipe) -> int:
    """Bytes that the grown model will take, 0 where it is not to grow.

    Raises:
        PeerifyError: `recipe.grow` asks for what cannot be, or for more than this machine has memory for.
    """
    if recipe.grow is None:
        return 0
    dense = load_skeleton(recipe.model, revision=recipe.revision, trust_remote_code=recipe.trust_remote_code)
    anew = recipe.model_copy(update={"grow": None})
    model = converted_skeleton(anew, dense, made=False)
    planned = plan_growth(model, recipe.grow)
    needed = grown_bytes(model, planned, getattr(torch, recipe.dtype))
    require_memory(needed, planned)
    return needed


def growth_record(config: GrowConfig, calibration: CalibrationConfig, windows_bt: Tensor) -> Growth:
    """What peerify.json says of a growth."""
    data = [public_name(spec) for spec in calibration.sources]
    return {"recipe": config.model_dump(mode="json"), "calibration": _seen(windows_bt), "data": data}


def load_for_conversion(recipe: Recipe, progress: Progress | None) -> tuple[DenseModel, Tensor]:
    """The dense model of `recipe`, and its calibration text as windows of token ids (windows, context).

    Raises:
        PeerifyError: whatever is wrong with the model or the text.
    """
    tell = teller(progress)
    for text in recipe.calibration.sources:
        check_source(text)  # a wrong name is told before a large model is read
    tell(f"Loading {recipe.model}", 0, 1)
    dense = load_dense(
        recipe.model,
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
    )
    tell(f"Loading {recipe.model}", 1, 1)
    if getattr(dense.model, "main_input_name", "input_ids") != "input_ids":
        raise ConversionError(
            f"{recipe.model} reads {dense.model.main_input_name}, not text: "
            "calibrate it from Python, peerify.convert(model, config, [batches of its inputs])"
        )
    windows_bt = load_windows(
        recipe.calibration.sources,
        dense.tokenizer,
        context=recipe.calibration.context,
        max_tokens=recipe.calibration.tokens,
        progress=progress,
    )
    check_windows(windows_bt, dense.model)
    return dense, windows_bt


def save(
    folder: str | Path,
    conversion: Conversion,
    dense: DenseModel,
    config: PeerConfig,
    calibration: Tensor | Sequence[Mapping[str, Any]],
    *,
    data: Sequence[str] = (),
    max_shard_size: str = "5GB",
    overwrite: bool = False,
) -> None:
    """Write a model that was converted from Python as `peerify convert` would, ready for `peerify push`.

    Args:
        conversion: what `convert` returned for `dense.model`, `config` and `calibration`.
        dense: what `load_dense` returned: its tokenizer or processor is copied, its licence and id noted.
        data: what the calibration data is called, for the model card: Hub datasets, or file names.

    Raises:
        OutputError: `folder` exists (and `overwrite` is not set, or peerify did not write it), or the disk is full.
    """
    resolved = {
        "model": dense.source,
        "revision": dense.revision,
        "convert": config.model_dump(mode="json"),
        "calibration": {"data": list(data)},
    }
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        card = _card_to_keep(folder, dense)
        _write_model(temporary, conversion, dense, resolved, _seen(calibration), max_shard_size, card)


def _write_model(
    folder: Path,
    conversion: Conversion,
    dense: DenseModel,
    recipe: Any,
    seen: Seen,
    max_shard_size: str,
    card: str | None,
    growth: Growth | None = None,
) -> None:
    """All files of a converted model. The same conversion writes the same bytes: no dates, no local paths."""
    dense.save_processor(folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    conversion.model.save_pretrained(folder, max_shard_size=max_shard_size)  # type: ignore[operator]
    record: Record = {
        "peerify": peerify.__version__,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        },
        "source": provenance(dense),
        "recipe": recipe | {"model": dense.source},
        "calibration": seen,
        "bytes_fraction": conversion.bytes_fraction,
        "macs_fraction": conversion.macs_fraction,
        "layer_errors": conversion.layer_errors,
        "files": files,  # of the source model, beside the weights
    }
    if growth is not None:
        record["growth"] = [growth]
    write_record(folder, record)
    if card is not None:
        (folder / CARD).write_text(card, encoding="utf-8")
    write_card(folder)


def _card_to_keep(out: str | Path, dense: DenseModel) -> str | None:
    """The card of the folder that is replaced, where people wrote something into it.

    Raises:
        OutputError: what they wrote is about another model.
    """
    folder = Path(out).expanduser()
    card = edited_card(folder)
    if card is not None and read_record(folder, OutputError)["source"]["model"] != dense.source:
        raise OutputError(
            f"{folder / CARD} was edited, and is about another model; move it away, or choose another place"
        )
    return card


def _seen(calibration: Tensor | Sequence[Mapping[str, Any]]) -> Seen:
    """How much calibration data there was: of windows of token ids also which."""
    if isinstance(calibration, Tensor):
        raw = calibration.cpu().numpy().astype("<i8").tobytes()
        return {"tokens": calibration.numel(), "sha256": hashlib.sha256(raw).hexdigest()}
    return {"inputs": sum(len(next(iter(batch.values()))) for batch in calibration)}
