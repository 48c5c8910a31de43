"""Where the files of an input model are, and whether they are sound. Reads headers only, builds nothing.

Everything that can be wrong with a checkpoint is found here, before a minute is spent on loading it.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from peerify.errors import CheckpointError
from peerify.files import MODEL_FILES, matching, require_own

MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
DTYPE_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
}
GGUF_NUMBERS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {
    10: "<Q",
    11: "<q",
    12: "<d",
}
GGUF_STRING, GGUF_ARRAY = 8, 9
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")


@dataclass(frozen=True)
class Source:
    """The files of one dense or converted checkpoint."""

    name: str  # fit for publishing: a Hub id, or the last part of a path
    revision: str | None  # the commit, for a Hub id
    folder: Path
    gguf: str | None = None  # name of the .gguf file inside `folder`
    config: dict[str, Any] = field(default_factory=dict)  # config.json; empty for GGUF

    @property
    def converted(self) -> bool:
        """Whether peerify wrote this checkpoint."""
        return "peer" in self.config or str(self.config.get("model_type", "")).startswith("peer_")


def open_source(source: str | Path, *, revision: str | None = None, weights: bool = True, code: bool = False) -> Source:
    """Find the files of `source` (Hub id, directory or .gguf file; a Hub id is downloaded) and check them.

    `weights=False` leaves the weights out: none is downloaded or checked. `code=True` downloads .py files.
    Raises CheckpointError, naming the file, for whatever is missing, truncated or not safetensors/GGUF.
    """
    text = str(source)
    path = Path(text).expanduser()
    if not text:
        raise CheckpointError("The model's name is empty: there is no such model")
    if path.is_dir():
        _require_own(path, text, code)
        found = Source(path.resolve().name, None, path, config=_read_config(path, text))
    elif path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise CheckpointError(f"{text}: no such file")
        _check_gguf(path)
        return Source(path.name, None, path.parent, gguf=path.name)
    elif path.exists():
        raise CheckpointError(f"{text} is neither a model directory nor a .gguf file")
    elif isinstance(source, Path) or text.startswith(("/", "./", "../", "~")):
        raise CheckpointError(f"{text}: no such file or directory")
    else:
        from peerify.hub_files import download

        path, commit = download(text, revision=revision, weights=weights, code=code)
        _require_own(path, text, code)
        found = Source(text, commit, path, config=_read_config(path, text))
    if weights:
        check_weights(found.folder, text)
    return found


def _require_own(folder: Path, label: str, code: bool) -> None:
    """Refuse links out of the folder under a name that is read: they would bring anybody's file into the output."""
    patterns = (*MODEL_FILES, "*.py") if code else MODEL_FILES
    remedy = "put the file itself there, or remove it"
    require_own(folder, matching(folder, patterns), label, CheckpointError, remedy)


def weight_files(folder: Path, label: str) -> list[str]:
    """Names of the safetensors files that hold the model in `folder`, in the order transformers looks."""
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return []
    return sorted(set(_weight_map(index, label).values()))


def check_weights(folder: Path, label: str) -> None:
    """Raise CheckpointError unless the weights in `folder` are complete, uncorrupted safetensors files."""
    names = weight_files(folder, label)
    if not names:
        raise CheckpointError(no_safetensors(label, (entry.name for entry in folder.iterdir())))
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{label}: the shard {name}, named in model.safetensors.index.json, is missing; "
                "download the model again"
            )
    tensors = {name: _safetensors_names(folder / name) for name in names}
    index = folder / "model.safetensors.index.json"
    if names != ["model.safetensors"]:
        for tensor, name in _weight_map(index, label).items():
            if tensor not in tensors[name]:
                raise CheckpointError(
                    f"{folder / name} lacks the tensor {tensor} that model.safetensors.index.json "
                    "places in it; download the model again"
                )


def no_safetensors(label: str, names: Iterable[str]) -> str:
    """The sentence for a model that has no safetensors, by what it holds instead."""
    names = sorted(names)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return f"{label} holds GGUF files; name one of them as the model, for example {label}/{ggufs[0]}"
    pickles = [name for name in names if name.lower().endswith(PICKLES) and name != "training_args.bin"]
    if pickles:
        return (
            f"{label} holds its weights as {pickles[0]}, a format that can run code when it is opened; "
            "only .safetensors and .gguf are read, so save it once with "
            "save_pretrained (safetensors is its default)"
        )
    return f"{label} has no weights: neither model.safetensors nor model.safetensors.index.json is there"


def _read_config(folder: Path, label: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        names = [entry.name for entry in folder.iterdir()]
        if "adapter_config.json" in names:
            raise CheckpointError(
                f"{label} is a PEFT adapter, not a model; merge it into its base first "
                "(merge_and_unload, then save_pretrained)"
            )
        if any(name.lower().endswith(".gguf") for name in names):
            raise CheckpointError(no_safetensors(label, names))
        raise CheckpointError(f"{label} has no config.json, so it is not a transformers model directory")
    config = _read_json(path)
    if not config.get("model_type"):
        raise CheckpointError(f"{path} has no model_type, so transformers cannot tell its architecture")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
        raise CheckpointError(
            f"{label} is already quantized{f' ({method})' if method else ''}; give the unquantized model"
        )
    return config


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object; download it again")
    return value


def _weight_map(index: Path, label: str) -> dict[str, str]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; download it again")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{index} names a shard outside its own folder ({name!r})")
        if not name.endswith(".safetensors"):
            raise CheckpointError(no_safetensors(label, [name]))
    return weight_map


def _safetensors_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, once its header and its size agree."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
            if start == b"version ":
                raise CheckpointError(f"{path} is a Git LFS pointer, not the weights; run `git lfs pull`")
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
            if size >= 8 and length > MAX_HEADER:
                raise CheckpointError(f"{path} is not a safetensors file, or its header is corrupt")
            if size < 8 + length:
                raise CheckpointError(f"{path} is truncated: it ends inside its header; download it again")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        end = 0
        for entry in header.values():
            begin, stop = entry["data_offsets"]
            bits = DTYPE_BITS.get(entry["dtype"])  # a type younger than this list goes unchecked
            if begin > stop or (bits and math.prod(entry["shape"]) * bits != 8 * (stop - begin)):
                raise ValueError("offsets")
            end = max(end, stop)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has a corrupt safetensors header; download it again") from error
    if size < 8 + length + end:
        raise CheckpointError(f"{path} is truncated: {size:,} bytes of {8 + length + end:,}; download it again")
    if size > 8 + length + end:
        raise CheckpointError(
            f"{path} is corrupt: {size:,} bytes where its header says {8 + length + end:,}; download it again"
        )
    return set(header)


def _check_gguf(path: Path) -> None:
    """Raise CheckpointError unless `path` is a complete, unsplit GGUF file."""
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{path} is not a GGUF file: it does not start with GGUF")
            values, end = _walk_gguf(file)
        size = path.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} has a truncated or corrupt header; download it again") from error
    if size < end:
        raise CheckpointError(f"{path} is truncated: {size:,} bytes of {end:,}; download it again")
    if "general.architecture" not in values:
        raise CheckpointError(f"{path} does not say its architecture (general.architecture)")
    shards = values.get("split.count", 1)
    if shards > 1:
        raise CheckpointError(
            f"{path} is one of {shards} parts of a model; join them first with `llama-gguf-split --merge`"
        )


def gguf_metadata(path: Path) -> dict[str, Any]:
    """The key-value pairs in the header of a sound GGUF file, arrays left out."""
    with path.open("rb") as file:
        file.seek(4)  # the magic
        return _walk_gguf(file)[0]


def _walk_gguf(file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Metadata (arrays left out) and the size in bytes that the header promises.

    Far quicker than gguf.GGUFReader, which makes arrays of every word of the vocabulary.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    def number(form: str) -> Any:
        return struct.unpack(form, file.read(struct.calcsize(form)))[0]

    def string() -> str:
        length = number("<Q")
        if length > MAX_HEADER:
            raise ValueError("string length")
        raw = file.read(length)
        if len(raw) < length:
            raise ValueError("string")
        return raw.decode("utf-8", "replace")

    def value(kind: int) -> Any:
        if kind == GGUF_STRING:
            return string()
        if kind == GGUF_ARRAY:
            inner, count = number("<I"), number("<Q")
            if inner in (GGUF_STRING, GGUF_ARRAY):
                for _ in range(count):
                    value(inner)
            else:
                file.seek(struct.calcsize(GGUF_NUMBERS[inner]) * count, 1)
            return None
        return number(GGUF_NUMBERS[kind])

    if number("<I") not in (2, 3):
        raise ValueError("version")
    tensors, pairs = number("<Q"), number("<Q")
    values = {}
    for _ in range(pairs):
        key = string()
        values[key] = value(number("<I"))
    end = 0
    for _ in range(tensors):
        string()
        elements = math.prod(number("<Q") for _ in range(number("<I")))
        block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(number("<I"))]
        end = max(end, number("<Q") + elements // block * block_bytes)
    alignment = values.get("general.alignment", 32)
    return values, -(-file.tell() // alignment) * alignment + end
