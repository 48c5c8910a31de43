"""The dense model that everything is compared with, computed once for each window."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Reference(nn.Module):
    """A causal language model that remembers what enters its output embedding, (t, d) for each batch.

    The logits of a batch seen before are one product instead of a whole forward pass; to keep the logits themselves
    would take gigabytes. Where the logits are not just that product (softcapping), nothing is remembered.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.kept: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """An object with `logits`, (b, t, vocabulary)."""
        head = self.model.get_output_embeddings()
        key = str(tuple(input_ids.shape)).encode() + input_ids.cpu().numpy().tobytes()
        if key in self.kept:
            return SimpleNamespace(logits=head(self.kept[key]))
        seen: list[Tensor] = []
        hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            output = self.model(input_ids=input_ids, use_cache=use_cache)
        finally:
            hook.remove()
        if len(seen) == 1 and seen[0].shape[:-1] == input_ids.shape and torch.equal(head(seen[0]), output.logits):
            self.kept[key] = seen[0]
        return output

    def can_generate(self) -> bool:
        """As the model."""
        return bool(self.model.can_generate())

    def get_input_embeddings(self) -> nn.Module:
        """The model's."""
        return self.model.get_input_embeddings()  # type: ignore[no-any-return]
