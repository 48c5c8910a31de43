"""Where the files of an input model are, and whether they are sound. Reads headers only, builds nothing.

Everything that can be wrong with a checkpoint is found here, before a minute is spent on loading it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peerify.checkpoint.files import MODEL_FILES, matching, require_own
from peerify.checkpoint.gguf import read_gguf
from peerify.checkpoint.layer_options import check_layers
from peerify.checkpoint.weights import Shapes, check_weights, no_safetensors, weight_files
from peerify.errors import CheckpointError
from peerify.reading import local_path, printable, read_object, reason, shown

MAX_LAYERS = 512  # in all parts together; no model has half of them, and following the data through takes 20 ms each
MAX_LABELS = 1_000_000  # transformers makes up a name for each
MAX_SIZE = 2**31  # of any width or count in a config
DTYPES = ("float64", "float32", "float16", "bfloat16", "auto")
_LAYERS = re.compile(r"(num|n)_(?!.*per_layer).*layers?|layers|num_blocks|depth|depths|(num|n)_.*blocks|block_count")
_SIZES = re.compile(
    r".*(size|dim|width|heads?|experts?|channels?|embd|inner|ff|positions?|embeddings|length|count|rank)|(num|n|d)_.*"
)
_POSITIVE = re.compile(r"hidden_size|d_model|n_embd|embedding_length|num_attention_heads|n_head")


@dataclass(frozen=True)
class Source:
    """The files of one dense or converted checkpoint."""

    name: str  # fit for publishing: a Hub id, or the last part of a path
    revision: str | None  # the commit, for a Hub id
    folder: Path
    gguf: str | None = None  # name of the .gguf file inside `folder`
    config: dict[str, Any] = field(default_factory=dict)  # config.json; empty for GGUF
    tensors: Shapes = field(default_factory=dict)  # of the weights, where they were looked at; empty for GGUF
    elements: int = 0  # in the weights, where they were looked at

    @property
    def converted(self) -> bool:
        """Whether peerify wrote this checkpoint."""
        return "peer" in self.config or str(self.config.get("model_type", "")).startswith("peer_")


def open_source(source: str | Path, *, revision: str | None = None, weights: bool = True, code: bool = False) -> Source:
    """Find the files of `source` (Hub id, directory or .gguf file; a Hub id is downloaded) and check them.

    `weights=False` downloads no weights, and takes none, incomplete or damaged ones for no fault of what is asked for.
    `code=True` downloads .py files.
    Raises CheckpointError, naming the file, for whatever is missing, truncated, not safetensors/GGUF or no file of the
    folder.
    """
    text = str(source)
    if not text:
        raise CheckpointError("The model's name is empty: there is no such model")
    path = local_path(text, CheckpointError)
    label = printable(text)
    commit = None
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {reason(error)}") from error
    if path.suffix.lower() == ".gguf" and not is_folder:
        if not exists:
            raise CheckpointError(f"{label}: no such file")
        header = read_gguf(path)
        check_sizes(label, {key.rpartition(".")[2]: value for key, value in header.values.items()})
        return Source(printable(path.name), None, path.parent, gguf=path.name, elements=header.elements)
    if exists and not is_folder:
        raise CheckpointError(f"{label} is neither a model directory nor a .gguf file")
    if path.is_symlink() and not exists:
        raise CheckpointError(f"{label} is a link that leads nowhere")
    # What cannot be printed is no Hub id either.
    if not exists and (isinstance(source, Path) or text.startswith(("/", "./", "../", "~")) or label != text):
        raise CheckpointError(f"{label}: no such file or directory")
    if not exists:
        from peerify.checkpoint.download import download

        path, commit = download(text, revision=revision, weights=weights, code=code)
    patterns = (*MODEL_FILES, "*.py") if code else MODEL_FILES
    try:
        names = matching(path, patterns)
    except OSError as error:
        raise CheckpointError(f"{label} cannot be read: {reason(error)}") from error
    # A link out of the folder under a name that is read would bring anybody's file into the output.
    require_own(path, names, text, CheckpointError, "put the file itself there, or remove it")
    config = _read_config(path, label)
    tensors = check_weights(path, label) if weights else _weights_there(path, label)
    if weights and "adapter_config.json" in names:
        raise CheckpointError(
            f"{label} holds a PEFT adapter beside its weights (adapter_config.json); merge it, or move it away"
        )
    elements = sum(math.prod(shape) for _, shape in tensors.values())
    return Source(printable(path.resolve().name) if exists else text, commit, path, None, config, tensors, elements)


def why_no_weights(source: str) -> str | None:
    """Why the model `source` could not be converted for want of readable weights; None where nothing speaks against it.

    Of a repository on the Hub only the names are looked at, where the Hub answers.
    """
    path = local_path(source, CheckpointError)
    if path.is_dir():
        try:
            check_weights(path, printable(source))
        except CheckpointError as error:
            return str(error)
    if path.exists():
        return None
    from peerify.checkpoint.download import list_files

    names = list_files(source, None)
    return None if not names or any(name.endswith(".safetensors") for name in names) else no_safetensors(source, names)


def _weights_there(folder: Path, label: str) -> Shapes:
    """What `check_weights` finds; nothing where it would raise."""
    try:
        return check_weights(folder, label) if weight_files(folder, label) else {}
    except CheckpointError:
        return {}


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
    config, file = read_object(path, CheckpointError, limit=10_000_000), printable(path)
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if not model_type:
        raise CheckpointError(f"{file} has no model_type, so transformers cannot tell its architecture")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{file}: model_type is a name such as llama, not {shown(model_type)}")
    if not isinstance(config.get("auto_map") or {}, dict):
        raise CheckpointError(f"{file}: auto_map names a class for each Auto class, and is {shown(config['auto_map'])}")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise CheckpointError(f"{file}: architectures is a list of class names, not {shown(architectures)}")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "") if isinstance(quantization, dict) else ""
        raise CheckpointError(
            f"{label} is already quantized{f' ({shown(method)[1:-1]})' if method else ''}; give the unquantized model"
        )
    dtype = config.get("dtype", config.get("torch_dtype"))
    if dtype is not None and not isinstance(dtype, dict) and str(dtype).removeprefix("torch.") not in DTYPES:
        raise CheckpointError(f"{file}: dtype {shown(dtype)} is not one of {', '.join(DTYPES)}; is the file damaged?")
    check_sizes(file, config)
    if "peer" in config:
        check_layers(config, file, CheckpointError)
    return config


def check_sizes(label: str, config: dict[str, Any]) -> None:
    """Refuse sizes that no model has, before anything is built with them. Raises CheckpointError."""
    layers = 0.0
    for key, value in leaves(config):
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if _POSITIVE.fullmatch(key) and value < 1:
            raise CheckpointError(f"{label}: {shown(key)} is {shown(value)}, and must be at least 1")
        is_depth = _LAYERS.fullmatch(key)
        most = MAX_LAYERS if is_depth else MAX_LABELS if key == "num_labels" else MAX_SIZE
        if (is_depth or key == "num_labels" or _SIZES.fullmatch(key)) and not abs(value) <= most:
            raise CheckpointError(f"{label}: {shown(key)} is {shown(value)}, more than {most:,}; is the file damaged?")
        layers += max(value, 0) if is_depth else 0
    if layers > MAX_LAYERS:
        raise CheckpointError(f"{label} has {layers:,.0f} layers in all, more than {MAX_LAYERS}; is the file damaged?")


def leaves(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values below `tree` that are no objects or lists, with the key that they stand under."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from leaves(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from leaves(value, key)
    else:
        yield key, tree
