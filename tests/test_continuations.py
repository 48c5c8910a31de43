"""Greedy continuations against `generate`, one prompt at a time."""

from __future__ import annotations

import copy
import random
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
    for active in (0.35, 0.5, 0.7, 0.9, 1):
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
    assert min(map(min, lengths)) < FOLLOWING, "they part somewhere, else this test says little"


def test_no_more_tokens_are_asked_for_once_all_have_parted(pair: tuple[Any, Any]) -> None:
    _, dense = pair
    prompts = torch.randint(VOCABULARY, (4, 12))
    dense_bn = continue_greedily(dense, prompts, FOLLOWING)
    assert dense_bn is not None
    dense_bn = dense_bn.clone()
    parting = [3, 0, 2, 3]
    for row, at in zip(dense_bn, parting, strict=True):
        row[at] = (row[at] + 1) % VOCABULARY
    calls: list[tuple[str, int, int]] = []
    found = continuation(dense, prompts, dense_bn, progress=lambda *call: calls.append(call))
    assert found == {"mean": sum(parting) / 4, "of": FOLLOWING, "prompts": 4}
    assert [call[1:] for call in calls] == [(1, FOLLOWING), (2, FOLLOWING), (3, FOLLOWING), (FOLLOWING, FOLLOWING)]


def test_without_a_cache_there_is_nothing_to_tell(pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, dense = pair
    forward = dense.forward
    monkeypatch.setattr(dense, "forward", lambda **given: forward(**given | {"use_cache": False}))
    prompts = torch.randint(VOCABULARY, (2, 5))
    assert continue_greedily(dense, prompts, 4) is None
    assert continuation(dense, prompts, torch.zeros(2, 4, dtype=torch.long)) is None


@pytest.mark.parametrize(
    ("windows", "context", "positions", "expected"),
    [
        (3, 512, 1024, (3, 64, 64)),
        (16, 100, 8192, (16, 64, 64)),
        (100, 20, 8192, (16, 20, 64)),  # windows shorter than a prompt
        (17, 64, 64, (16, 32, 32)),  # positions for no more
        (5, 8, 20, (5, 8, 10)),
    ],
)
def test_prompts_are_beginnings_of_windows_from_all_over_the_text(
    windows: int, context: int, positions: int, expected: tuple[int, int, int]
) -> None:
    windows_bt = torch.arange(windows)[:, None] * 1000 + torch.arange(context)
    models = [tiny_model(max_position_embeddings=positions), tiny_model(max_position_embeddings=9000)]
    for order in (models, models[::-1]):
        prompts_bt, following = prompts_of(windows_bt, order)
        assert (*prompts_bt.shape, following) == expected
        assert (prompts_bt % 1000 == torch.arange(expected[1])).all()
    rows = (prompts_bt[:, 0] // 1000).tolist()
    assert rows == sorted(set(rows))
    assert windows - rows[-1] <= max(1, windows // 8), "the last one is near the end"
