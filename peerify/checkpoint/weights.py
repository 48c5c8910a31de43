"""The safetensors files of a model: which ones there are, and whether they are whole. Reads headers only."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path

from peerify.checkpoint.files import fault_of, require_own
from peerify.errors import CheckpointError
from peerify.reading import printable, read_object, reason, shown

MAX_HEADER = 100_000_000  # bytes; the safetensors format's own limit
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack")
FLOATS = ("F64", "F32", "F16", "BF16")
ONLY_FLOATS = f"only floating-point weights are read ({', '.join(FLOATS)})"
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Of tensors by name: number type, as safetensors calls it, and shape."""


def weight_files(folder: Path, label: str) -> list[str]:
    """Names of the safetensors files that hold the model in `folder`, in the order transformers looks.

    Raises:
        CheckpointError: the index cannot be read, or names what cannot be a file of the folder.
    """
    if (folder / "model.safetensors").exists():
        return ["model.safetensors"]
    if not (folder / INDEX).exists():
        return []
    return sorted(set(_weight_map(folder / INDEX, label).values()))


def check_weights(folder: Path, label: str) -> Shapes:
    """The tensors of the weights in `folder`: complete, undamaged safetensors files of floating-point numbers.

    Raises:
        CheckpointError: they are not; the file and the tensor are named.
    """
    names = weight_files(folder, label)
    if not names:
        raise CheckpointError(no_safetensors(label, (entry.name for entry in folder.iterdir())))
    for name in names:
        if fault_of(folder / name, folder) == "is not there":
            raise CheckpointError(
                f"{label}: the shard {printable(name)}, named in {INDEX}, is missing; download the model again"
            )
    require_own(folder, names, label, CheckpointError, "download the model again")
    tensors = {name: _tensors(folder / name) for name in names}
    if names != ["model.safetensors"]:
        for tensor, name in _weight_map(folder / INDEX, label).items():
            if tensor not in tensors[name]:
                raise CheckpointError(
                    f"{printable(folder / name)} lacks the tensor {printable(tensor)} that {INDEX} places in it; "
                    "download the model again"
                )
    return {key: value for of_file in tensors.values() for key, value in of_file.items()}


def no_safetensors(label: str, names: Iterable[str]) -> str:
    """The sentence for a model that has no safetensors, by what it holds instead."""
    names = sorted(names)
    ggufs = [name for name in names if name.lower().endswith(".gguf")]
    if ggufs:
        return f"{label} holds GGUF files; name one of them as the model, for example {label}/{printable(ggufs[0])}"
    pickles = [name for name in names if name.lower().endswith(PICKLES) and name != "training_args.bin"]
    if pickles:
        return (
            f"{label} holds its weights as {printable(pickles[0])}, a format that can run code when it is opened; "
            "only .safetensors and .gguf are read, so save it once with "
            "save_pretrained (safetensors is its default)"
        )
    return f"{label} has no weights: neither model.safetensors nor {INDEX} is there"


def _weight_map(index: Path, label: str) -> dict[str, str]:
    content, file = read_object(index, CheckpointError), printable(index)
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file} has no weight_map; download it again")
    if not isinstance(content.get("metadata"), dict):  # without it transformers reads no shard
        raise CheckpointError(f'{file} has no metadata; add "metadata": {{}} to it, or download it again')
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or name == ".." or "\0" in name:
            raise CheckpointError(f"{file} names a shard outside its own folder ({shown(name)})")
        if name.endswith(PICKLES):
            raise CheckpointError(no_safetensors(label, [name]))
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{file} names a shard that is no .safetensors file ({shown(name)})")
    return weight_map


def _tensors(path: Path) -> Shapes:
    """The tensors in a safetensors file, once its header and its size agree."""
    from safetensors import safe_open

    name = printable(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)}") from error
    if start == b"version ":
        raise CheckpointError(f"{name} is a Git LFS pointer, not the weights; run `git lfs pull`")
    length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER + 1
    if size >= 8 and length > MAX_HEADER:
        raise CheckpointError(f"{name} is not a safetensors file, or its header is corrupt")
    if size < 8 + length:
        raise CheckpointError(f"{name} is truncated: it ends inside its header; download it again")
    found = {}
    try:
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118  it is no mapping
                part = file.get_slice(key)
                found[key] = (part.get_dtype(), tuple(part.get_shape()))
    except Exception as error:  # a type of its own
        what = "is truncated or corrupt" if "incomplete" in str(error).lower() else "has a corrupt safetensors header"
        raise CheckpointError(f"{name} {what} ({reason(error)}); download it again") from error
    for key, (dtype, shape) in found.items():
        _refuse_type(name, key, dtype, shape)
    return found


def _refuse_type(file: str, key: str, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse weights that are no floating-point numbers. Masks and positions beside them may be integers.

    Only the model tells for certain what is a weight; see `peerify.checkpoint.skeleton`.
    """
    is_weight = key.endswith("weight") or (key.endswith("bias") and len(shape) == 1)
    if dtype in FLOATS or not (is_weight or dtype.startswith("C")):
        return
    if dtype.startswith("F"):
        raise CheckpointError(f"{file} is quantized: {printable(key)} is {dtype}; give the unquantized model")
    raise CheckpointError(f"{file} holds {printable(key)} as {dtype}; {ONLY_FLOATS}")
