"""What `peerify report` draws of an evaluation beside its figures: use of single experts, and bytes of single tokens.

Shape suffixes: b prompts, t their tokens, n tokens that follow.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from peerify.continuations import continue_greedily
from peerify.usage import Used, counting

PARTS = 64  # of a layer's experts, from the most used to the least
CELLS = 32  # rows and columns, at most, of a picture of a grid
SHOWN = 3  # prompts whose continuations are shown


def use_of(layer: Any, used: Used) -> dict[str, Any]:
    """How often the experts of a layer were read.

    Returns:
        ``{"ranked", "grid"}``. ranked: experts from the most used to the least, cut into at most PARTS equal parts, and
        of each part the mean share of tokens that read an expert of it. grid, of layers with product keys, else None:
        of each row and column, which neighbours share where there are more than CELLS, likewise.
    """
    share_n = used.count_n / max(1, used.tokens)
    ranked = share_n.sort(descending=True).values.tensor_split(min(PARTS, len(share_n)))
    grid = None
    if hasattr(layer, "keys"):
        rows, columns = layer.keys.grid
        own_n = share_n[getattr(layer, "num_shared", 0) :]
        heads = -(-len(own_n) // (rows * columns))
        cell_hab = torch.nn.functional.pad(own_n, (0, heads * rows * columns - len(own_n))).view(heads, rows, columns)
        size = min(CELLS, rows), min(CELLS, columns)
        grid = torch.nn.functional.adaptive_avg_pool2d(cell_hab.mean(0)[None], size)[0].tolist()
    return {"ranked": [part.mean().item() for part in ranked], "grid": grid}


def continue_with_bytes(model: Any, prompts_bt: torch.Tensor, following: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens that `model` adds to prompts, (b, n), and what each read of the layers' bytes to be found, (b, n).

    Bytes are over the dense layers', as means of layers. The first token is found by reading the prompt, which
    evaluates everything, so its bytes are NaN.
    """
    with counting(model) as used:
        for each in used.values():
            each.of_tokens = []
        found_bn = continue_greedily(model, prompts_bt, following)
    assert found_bn is not None  # the caller has continued these prompts before
    steps = found_bn.shape[1] - 1
    read_bn = torch.full(found_bn.shape, torch.nan, dtype=torch.float64)
    if steps:
        # The last entries are those of single tokens; what comes before is of the prompt.
        layers = [torch.stack((each.of_tokens or [])[-steps:], dim=1) for each in used.values()]
        read_bn[:, 1:] = torch.stack(layers).mean(0)
    return found_bn.cpu(), read_bn


class Continuations:
    """Continuations of a few prompts by the dense model and at each budget."""

    def __init__(self, tokenizer: Any, prompts_bt: torch.Tensor, dense_bn: torch.Tensor) -> None:
        self._tokenizer, self._prompts_bt, self._dense_bn = tokenizer, prompts_bt[:SHOWN], dense_bn[:SHOWN].cpu()
        self._rows: list[dict[str, Any]] = [
            {"prompt": tokenizer.decode(prompt), "dense": self._pieces(dense), "budgets": []}
            for prompt, dense in zip(self._prompts_bt, self._dense_bn, strict=True)
        ]

    def add(self, model: Any, active: float) -> None:
        """Continue the prompts at the budget that `model` has."""
        found_bn, read_bn = continue_with_bytes(model, self._prompts_bt, self._dense_bn.shape[1])
        alike_b = (found_bn == self._dense_bn).cumprod(dim=1).sum(dim=1)
        for i, row in enumerate(self._rows):
            read = [None if value != value else round(value, 4) for value in read_bn[i].tolist()]  # NaN is not itself
            told = {"active": active, "tokens": self._pieces(found_bn[i]), "bytes": read, "alike": int(alike_b[i])}
            row["budgets"].append(told)

    def told(self) -> list[dict[str, Any]]:
        """Of each prompt ``{"prompt", "dense": [text of each token], "budgets": [{"active", "tokens", "bytes",
        "alike"}]}``: texts and bytes (None: the first) of the tokens at each budget, and how many are the dense
        model's before the first that differs."""
        return self._rows

    def _pieces(self, ids_n: torch.Tensor) -> list[str]:
        """The text that each token adds: some tokenizers drop a blank where they decode a token by itself."""
        texts = [self._tokenizer.decode(ids_n[:end]) for end in range(len(ids_n) + 1)]
        return [after[len(before) :] for before, after in pairwise(texts)]
