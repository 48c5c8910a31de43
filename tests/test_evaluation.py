"""Perplexity, KL and usage against calculations written out by hand."""

from __future__ import annotations

import math
import random
from collections import Counter
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, tiny_model
from torch import nn

from peerify.errors import CheckpointError, DataError, UsageError
from peerify.evaluation import evaluate, perplexity
from peerify.modeling.peer_layer import PEER


def random_windows(rows: int, context: int) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, context))


def naive_log_probabilities(model: Any, window: torch.Tensor) -> list[torch.Tensor]:
    """log p(. | tokens before) for tokens 2..n of a window, by one forward pass for each prefix."""
    with torch.no_grad():
        return [
            model(input_ids=window[None, :end]).logits[0, -1].double().log_softmax(-1) for end in range(1, len(window))
        ]


def naive_perplexity(model: Any, windows: torch.Tensor) -> float:
    losses = [
        -logp[token].item()
        for window in windows
        for logp, token in zip(naive_log_probabilities(model, window), window[1:], strict=True)
    ]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_perplexity_is_the_textbook_one(family: str) -> None:
    model = tiny_model(family)
    windows = random_windows(random.randint(1, 5), random.randint(2, 12))
    expected = naive_perplexity(model, windows)
    assert abs(expected - VOCABULARY) > 0.5, "the model must not be a uniform one, which hides mistakes"
    assert perplexity(model, windows) == pytest.approx(expected, rel=1e-5)


def test_the_batch_size_and_the_softmax_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = tiny_model(), random_windows(5, 11)
    expected = perplexity(model, windows, batch_size=1)
    monkeypatch.setattr("peerify.evaluation.TOKENS_AT_ONCE", random.randint(1, 9))
    assert perplexity(model, windows, batch_size=3) == pytest.approx(expected, rel=1e-6)


def test_kl_is_from_dense_to_model() -> None:
    model, dense = tiny_model(), tiny_model()
    windows = random_windows(3, 9)
    divergences = []
    for window in windows:
        pairs = zip(naive_log_probabilities(dense, window), naive_log_probabilities(model, window), strict=True)
        divergences += [(p.exp() * (p - q)).sum().item() for p, q in pairs]
    against = evaluate(model, windows, against=dense, batch_size=2)["against"]
    assert against["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert against["perplexity"] == pytest.approx(naive_perplexity(dense, windows), rel=1e-5)
    assert against["ratio"] == pytest.approx(perplexity(model, windows) / perplexity(dense, windows))


def test_a_model_does_not_differ_from_itself() -> None:
    model = tiny_model()
    result = evaluate(model, random_windows(2, 8), against=model)
    assert result["against"]["kl"] == pytest.approx(0, abs=1e-9)
    assert result["against"]["ratio"] == 1
    assert result["layers"] == []
    assert result["tokens"] == 16


def test_half_precision_logits_are_summed_in_fp32() -> None:
    model, windows = tiny_model(), random_windows(4, 16)
    rough = perplexity(model.to(torch.bfloat16), windows)
    assert rough == pytest.approx(perplexity(model.float(), windows), rel=0.05)


class Retrieving(nn.Module):
    """Stands where a feed-forward was: each token retrieves the experts whose projection is positive."""

    active_fraction = 0.25

    def __init__(self, d_model: int, num_experts: int, never: int) -> None:
        super().__init__()
        self.num_experts, self.never = num_experts, never
        self.table = nn.Parameter(torch.randn(num_experts, d_model), requires_grad=False)
        self.seen: list[torch.Tensor] = []

    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        mask_tn = x_td @ self.table.T > 0
        mask_tn[:, : self.never] = False
        return mask_tn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        self.seen.append(hidden_states.detach().clone())
        return hidden_states


def test_usage_counts_every_retrieval_of_every_token() -> None:
    model = tiny_model()
    layers = {1: Retrieving(16, 12, never=3), 2: Retrieving(16, 30, never=0)}
    for index, layer in layers.items():
        model.model.layers[index].mlp = layer
    windows = random_windows(5, 7)
    result = evaluate(model, windows, batch_size=2)
    assert [row["path"] for row in result["layers"]] == ["model.layers.1.mlp", "model.layers.2.mlp"]
    for layer, row in zip(layers.values(), result["layers"], strict=True):
        counter: Counter[int] = Counter()
        tokens = [token for batch in layer.seen for window in batch for token in window]
        assert len(tokens) == windows.numel()
        for token in tokens:
            counter.update(layer.active_experts(token[None])[0].nonzero().flatten().tolist())
        total = sum(counter.values())
        shares = [count / total for count in counter.values()]
        assert row["num_experts"] == layer.num_experts
        assert row["active"] == 0.25
        assert row["usage"] == pytest.approx(len(counter) / layer.num_experts)
        assert row["kl_uniform"] == pytest.approx(
            sum(share * math.log(share * layer.num_experts) for share in shares), rel=1e-6
        )
    assert result["layers"][0]["usage"] <= 9 / 12


def test_peer_layers_are_counted_by_their_own_account() -> None:
    model = tiny_model()
    peer = PEER(16, 24, (4, 6), 2, 3, gated=True, activation="silu", gates="unit", query_dim=8, share_keys=False)
    model.model.layers[1].mlp = peer.eval()
    seen: list[torch.Tensor] = []
    peer.register_forward_hook(lambda _, args, __: seen.append(args[0].flatten(0, -2)))
    windows = random_windows(2, 3)
    (row,) = evaluate(model, windows)["layers"]
    retrieved = {
        i for x_td in seen for x_d in x_td for i in peer.active_experts(x_d[None])[0].nonzero().flatten().tolist()
    }
    assert 3 <= len(retrieved) < 24
    assert row["usage"] == pytest.approx(len(retrieved) / 24)
    assert (row["path"], row["num_experts"]) == ("model.layers.1.mlp", 24)
    assert row["active"] == pytest.approx(6 / 24)


def test_hooks_are_gone_afterwards_even_after_a_failure() -> None:
    model = tiny_model()
    layer = model.model.layers[0].mlp = Retrieving(16, 4, never=0)
    evaluate(model, random_windows(1, 4))
    assert not layer._forward_pre_hooks
    layer.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, random_windows(1, 4))
    assert not layer._forward_pre_hooks


def test_progress_counts_windows() -> None:
    calls: list[tuple[str, int, int]] = []
    perplexity(tiny_model(), random_windows(5, 4), batch_size=2, progress=lambda *call: calls.append(call))
    assert [call[1:] for call in calls] == [(0, 5), (2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_models_without_a_next_token_are_refused(family: str) -> None:
    with pytest.raises(CheckpointError, match=r"causal language models, and .* is not one"):
        perplexity(tiny_model(family), random_windows(1, 4))


def test_windows_longer_than_the_positions_are_refused() -> None:
    with pytest.raises(UsageError, match=r"65 tokens is longer than the model's 64 positions: use --context 64"):
        perplexity(tiny_model("gpt2"), random_windows(1, 65))


def test_nothing_to_predict_is_refused() -> None:
    for windows in (random_windows(3, 1), random_windows(0, 8)):
        with pytest.raises(DataError, match="nothing to predict"):
            perplexity(tiny_model(), windows)


def test_nan_logits_are_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="logits of LlamaForCausalLM are not finite"):
        perplexity(model, random_windows(2, 4))


def test_other_vocabularies_cannot_be_compared() -> None:
    with pytest.raises(CheckpointError, match="vocabularies of 260 and 300"):
        evaluate(tiny_model(), random_windows(1, 4), against=tiny_model(vocab_size=300))
