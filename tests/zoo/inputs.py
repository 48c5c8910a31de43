"""Inputs for any transformers model, those that use most of it first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import Tensor
from towers import with_media
from transformers import PreTrainedModel

from peerify.discovery import example_inputs as examples
from peerify.errors import ConversionError


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try in order."""
    if "MultipleChoice" in type(model).__name__:
        given = next(examples.candidates(model))
        yield {name: x[:, None].expand(-1, 2, -1) for name, x in given.items() if isinstance(x, Tensor)}
    if "input_ids" in examples.arguments(model):
        yield from with_media(model)
    with suppress(ConversionError):
        yield from examples.candidates(model)
