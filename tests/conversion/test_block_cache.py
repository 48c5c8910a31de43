"""Blocks that answer from memory: the model's output is what it would be without them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import FAMILIES, inputs_for
from torch import nn

from peerify.conversion.block_cache import BlockCache
from peerify.discovery.sites import find_feedforwards


def first(output: Any) -> torch.Tensor:
    return output[0] if not hasattr(output, "logits") else output.logits


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_changed_layer_shows_as_it_would_in_a_full_run(family: str, seed: int) -> None:
    model = FAMILIES[family](seed).eval()
    sites = find_feedforwards(model)
    batches = [inputs_for(model, seed), inputs_for(model, seed + 1)]
    cache = BlockCache(model, sites)
    wanted = []
    for batch in batches:
        with cache.recording():
            wanted.append(first(model(**batch)))
    cache.check(lambda: float((first(model(**batches[0])) - wanted[0]).abs().max()), sites[-1])
    for site in (sites[0], sites[-1]):
        down = next(p for p in model.get_submodule(site.path).parameters() if p.dim() == 2)
        before = down.clone()
        down.mul_(0.5)
        for place, batch in enumerate(batches):
            full = first(model(**batch))
            assert not torch.allclose(full, wanted[place])
            with cache.answering(place, site):
                torch.testing.assert_close(first(model(**batch)), full)
        down.copy_(before)
    torch.testing.assert_close(first(model(**batches[0])), wanted[0])


class Block(nn.Module):
    """Passes on a sum beside its output."""

    def __init__(self, calls: Counter[str], share: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))
        self.calls, self.share = calls, share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls[str(id(self))] += 1
        x = x + self.mlp(x)
        if self.share is not None:
            self.share["sum"] = self.share["sum"] + x
            return x + self.share["sum"]
        return x


class Model(nn.Module):
    def __init__(self, secret: bool) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.share = {} if secret else None
        self.layers = nn.ModuleList(Block(self.calls, self.share) for _ in range(3))  # type: ignore[arg-type]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.share is not None:
            self.share["sum"] = torch.zeros_like(x)
        for layer in self.layers:
            x = layer(x)
        return x


@torch.no_grad()
@pytest.mark.parametrize("secret", [False, True])
def test_earlier_blocks_do_not_run_unless_they_pass_on_more(secret: bool) -> None:
    model, x = Model(secret), torch.randn(2, 5, 4)
    sites: Any = [type("Site", (), {"path": f"layers.{i}.mlp"}) for i in range(3)]
    cache = BlockCache(model, sites)
    with cache.recording():
        wanted = model(x)
    cache.check(lambda: float((model(x) - wanted).abs().max()), sites[-1])
    model.layers[1].mlp[2].weight.zero_()  # type: ignore[index, union-attr, operator]
    full = model(x)
    model.calls.clear()
    with cache.answering(0, sites[1]):
        assert torch.equal(model(x), full)
    assert len(model.calls) == (3 if secret else 2)
    model.calls.clear()
    model(x)
    assert len(model.calls) == 3
