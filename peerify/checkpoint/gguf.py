"""The header of a GGUF file, read without trusting any number in it.

Far quicker than gguf.GGUFReader, which makes arrays of every word of the vocabulary.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from peerify.errors import CheckpointError
from peerify.reading import printable, reason

_NUMBERS = dict(enumerate(("<B", "<b", "<H", "<h", "<I", "<i", "<f", "<?"))) | {10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS
_KEY_BYTES, _TENSOR_BYTES = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8  # the least that a pair and a tensor's entry can take


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself."""

    values: dict[str, Any]
    """Its key-value pairs, arrays left out."""
    elements: int
    """In all tensors together."""
    bytes: int
    """Size that the file must have."""


def read_gguf(path: Path) -> Header:
    """The header of a complete, unsplit GGUF file.

    Raises:
        CheckpointError: the file is no GGUF file, is damaged, truncated, or one of several parts.
    """
    name = printable(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{name} is not a regular file; give the path of a .gguf file")
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                raise CheckpointError(f"{name} is not a GGUF file: it does not start with GGUF")
            header = _Walk(file, status.st_size).header()
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {reason(error)}") from error
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{name} has a truncated or corrupt header ({reason(error)}); download it again"
        ) from error
    if status.st_size < header.bytes:
        raise CheckpointError(f"{name} is truncated: {status.st_size:,} bytes of {header.bytes:,}; download it again")
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise CheckpointError(f"{name} does not say its architecture (general.architecture)")
    shards = header.values.get("split.count", 1)
    if not isinstance(shards, int):
        raise CheckpointError(f"{name} has a split.count that is no number; download it again")
    if shards > 1:
        raise CheckpointError(
            f"{name} is one of {shards} parts of a model; join them first with `llama-gguf-split --merge`"
        )
    return header


class _Walk:
    """Goes through a header once. A count is held against the bytes that are left before anything is read for it."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size = file, size

    def header(self) -> Header:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        if self.number("<I") not in (2, 3):
            raise ValueError("its version is not 2 or 3")
        tensors, pairs = self.number("<Q"), self.number("<Q")
        self.expect(tensors, _TENSOR_BYTES, "tensors")
        self.expect(pairs, _KEY_BYTES, "keys")
        values = {}
        for _ in range(pairs):
            key = self.string().decode("utf-8")
            if key in values:
                raise ValueError(f"{printable(key)} twice")
            values[key] = self.value(self.number("<I"))
        end = total = 0
        for _ in range(tensors):
            self.string()
            dimensions = self.number("<I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"a tensor of {dimensions:,} dimensions")
            elements = math.prod(self.number("<Q") for _ in range(dimensions))
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.number("<I"))]
            total += elements
            end = max(end, self.number("<Q") + elements // block * block_bytes)
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError("general.alignment is no power of two")
        start = -(-self.file.tell() // alignment) * alignment if tensors else self.file.tell()
        return Header(values, total, start + end)

    def expect(self, count: int, least: int, what: str) -> None:
        """Whether `count` things of at least `least` bytes each fit into the rest of the file."""
        if count * least > self.size - self.file.tell():
            raise ValueError(f"{count:,} {what} in {self.size:,} bytes")

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.file.read(struct.calcsize(form)))[0]

    def string(self) -> bytes:
        length = self.number("<Q")
        self.expect(length, 1, "bytes of a text")
        return self.file.read(length)

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string().decode("utf-8", "replace")
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        inner, count = self.number("<I"), self.number("<Q")
        if inner == _ARRAY:
            raise ValueError("an array of arrays")  # which no writer makes
        if inner == _STRING:
            self.expect(count, 8, "texts of an array")
            for _ in range(count):
                self.string()
        else:
            width = struct.calcsize(_NUMBERS[inner])
            self.expect(count, width, "numbers of an array")
            self.file.seek(width * count, 1)
        return None
