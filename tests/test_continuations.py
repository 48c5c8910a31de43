"""Greedy continuations against `generate`, one prompt at a time."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, tiny_model

from peerify.config.peer import PeerConfig
from peerify.continuations import continuation, continue_greedily, prompts_of
from peerify.conversion.model import convert
from peerify.modules import peer_layers

FOLLOWING = 30


@pytest.fixture(scope="module")
def pair() -> tuple[Any, Any]:
    """A model whose feed-forward layers have budgets, and the dense one; in float64, where no two tokens are tied."""
    dense = tiny_model()
    model = copy.deepcopy(dense)
    convert(model, PeerConfig(active=0.6), torch.randint(VOCABULARY, (8, 32)))
    for each in (model, dense):
        each.generation_config.eos_token_id = None
    return model.eval().double(), dense.eval().double()


def keep_to_budget(model: Any, *, always: bool) -> None:
    for layer in peer_layers(model).values():
        layer.prefill_all = not always


def generated(model: Any, prompt: torch.Tensor, following: int) -> list[int]:
    """What `generate` adds to a prompt that is read with everything on, each token at the budget."""

    def before(_: Any, __: Any, given: dict[str, Any]) -> None:
        keep_to_budget(model, always=given["input_ids"].shape[1] == 1)

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    mask = torch.ones_like(prompt[None])
    try:
        ids = model.generate(prompt[None], attention_mask=mask, do_sample=False, max_new_tokens=following)
    finally:
        hook.remove()
        keep_to_budget(model, always=False)
    return ids[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


def alike(ours: list[int], theirs: list[int]) -> int:
    count = 0
    while count < len(ours) and ours[count] == theirs[count]:
        count += 1
    return count


def test_what_follows_is_what_generate_adds(pair: tuple[Any, Any]) -> None:
    """Each model alone, and for how long the two agree, though one only follows the other."""
    model, dense = pair
    prompts = torch.randint(VOCABULARY, (6, random.randint(9, 20)))
    dense_bn = continue_greedily(dense, prompts, FOLLOWING)
    assert dense_bn is not None
    texts = [generated(dense, prompt, FOLLOWING) for prompt in prompts]
    assert dense_bn.tolist() == texts
    lengths = []
    for active in (0.15, 0.3, 0.5, 0.7, 0.9, 1):
        model.set_active(active)
        ours = [generated(model, prompt, FOLLOWING) for prompt in prompts]
        own_bn = continue_greedily(model, prompts, FOLLOWING)
        assert own_bn is not None
        assert own_bn.tolist() == ours
        lengths.append([alike(*two) for two in zip(ours, texts, strict=True)])
        found = continuation(model, prompts, dense_bn)
        assert found == {"mean": pytest.approx(sum(lengths[-1]) / 6), "of": FOLLOWING, "prompts": 6}
        assert all(layer.prefill_all for layer in peer_layers(model).values())
    assert lengths[-1] == [FOLLOWING] * 6
    print(lengths)
