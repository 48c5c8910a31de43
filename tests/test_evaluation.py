"""Perplexity, KL and usage against calculations written out by hand."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCABULARY, random_text, text_file, tiny_checkpoint, tiny_model, tiny_tokenizer
from torch import nn

from peerify.checkpoint.load import load_for_eval
from peerify.config.peer import PeerConfig
from peerify.continuations import continuation, continue_greedily, prompts_of
from peerify.conversion.model import convert
from peerify.data import load_windows
from peerify.errors import CheckpointError, DataError, UsageError
from peerify.evaluation import evaluate, evaluate_checkpoint, perplexity
from peerify.modeling.peer_layer import PEER
from peerify.modules import peer_layers
from peerify.usage import Used, summary


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
    divergences, agreed = [], 0
    for window in windows:
        pairs = zip(naive_log_probabilities(dense, window), naive_log_probabilities(model, window), strict=True)
        for p, q in pairs:
            divergences.append((p.exp() * (p - q)).sum().item())
            agreed += int(p.argmax() == q.argmax())
    against = evaluate(model, windows, against=dense, batch_size=2)["against"]
    assert against["kl"] == pytest.approx(sum(divergences) / len(divergences), rel=1e-4)
    assert against["agreement"] == pytest.approx(agreed / len(divergences))
    assert against["perplexity"] == pytest.approx(naive_perplexity(dense, windows), rel=1e-5)
    assert against["ratio"] == pytest.approx(perplexity(model, windows) / perplexity(dense, windows))


def test_a_model_does_not_differ_from_itself() -> None:
    model = tiny_model()
    result = evaluate(model, random_windows(2, 8), against=model)
    assert result["against"]["kl"] == pytest.approx(0, abs=1e-9)
    assert result["against"]["ratio"] == 1
    assert result["against"]["agreement"] == 1
    assert result["layers"] == []
    assert result["tokens"] == 16


def test_half_precision_logits_are_summed_in_fp32() -> None:
    model, windows = tiny_model(), random_windows(4, 16)
    rough = perplexity(model.to(torch.bfloat16), windows)
    assert rough == pytest.approx(perplexity(model.float(), windows), rel=0.05)


class Retrieving(nn.Module):
    """Stands where a feed-forward was: each token retrieves the experts whose projection is positive, and spends their
    share of the bytes and half of it of the multiply-adds."""

    def __init__(self, d_model: int, num_experts: int, never: int) -> None:
        super().__init__()
        self.num_experts, self.never = num_experts, never
        self.table = nn.Parameter(torch.randn(num_experts, d_model), requires_grad=False)
        self.seen: list[torch.Tensor] = []

    def active_experts(self, x_td: torch.Tensor) -> torch.Tensor:
        mask_tn = x_td @ self.table.T > 0
        mask_tn[:, : self.never] = False
        return mask_tn

    def usage(self, x_td: torch.Tensor) -> tuple[torch.Tensor, float, float]:
        mask_tn = self.active_experts(x_td)
        spent = mask_tn.float().mean().item()
        return mask_tn, spent, spent / 2

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
        assert row["bytes_fraction"] == pytest.approx(total / len(tokens) / layer.num_experts, rel=1e-6)
        assert row["macs_fraction"] == pytest.approx(row["bytes_fraction"] / 2)
        assert row["usage"] == pytest.approx(len(counter) / layer.num_experts)
        assert row["kl_uniform"] == pytest.approx(
            sum(share * math.log(share * layer.num_experts) for share in shares), rel=1e-6
        )
        assert row["effective_experts"] == pytest.approx(math.prod(share**-share for share in shares), rel=1e-6)
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
    # Six experts, a query for each head, and the sub-keys of each.
    dense, query, keys = 3 * 24 * 16, 2 * 8 * 16, 2 * (4 + 6) * 4
    assert row["bytes_fraction"] == pytest.approx((3 * 6 * 16 + query + keys) / dense)
    assert row["macs_fraction"] == pytest.approx((3 * 6 * 16 + query + keys) / dense)
    assert row["bytes_per_token"] == pytest.approx(dict.fromkeys(("p5", "p50", "p95"), row["bytes_fraction"]), abs=5e-4)


@pytest.fixture
def elastic() -> Any:
    """A model whose second and third feed-forward layers have budgets."""
    model = tiny_model()
    convert(model, PeerConfig(active=0.6, layers="1,2"), random_windows(8, 32))
    return model.eval()


def test_layers_with_budgets_are_counted_at_the_budget(elastic: Any) -> None:
    """In full where all is on, and else for every token, also where a sequence is read at once."""
    dense = copy.deepcopy(elastic)
    dense.set_active(1)
    layers = [elastic.model.layers[index].mlp for index in (1, 2)]
    seen: list[list[torch.Tensor]] = [[], []]
    for i, layer in enumerate(layers):
        layer.register_forward_hook(lambda _, args, __, i=i: seen[i].append(args[0].flatten(0, -2)))
    windows = random_windows(3, 12)
    for active in (0.6, 0.9, 1):
        elastic.set_active(active)
        for inputs in seen:
            inputs.clear()
        result = evaluate(elastic, windows, against=dense, batch_size=2)
        for layer, inputs, row in zip(layers, seen, result["layers"], strict=True):
            mask_tn, read, done = layer.usage(torch.cat(inputs))
            assert row["usage"] == pytest.approx(mask_tn.any(0).double().mean().item())
            assert row["bytes_fraction"] == pytest.approx(read)
            assert row["macs_fraction"] == pytest.approx(done)
            reads = sorted(layer.usage(x_d[None])[1] for x_d in torch.cat(inputs))  # of each token by itself
            assert (reads[0] == reads[-1]) == (active == 1)
            for percent in (5, 50, 95):
                at_most = reads[math.ceil(percent / 100 * len(reads)) - 1]
                assert row["bytes_per_token"][f"p{percent}"] == pytest.approx(at_most, abs=0.00051)
            assert layer.prefill_all
            assert layer.pool.observer is None
        assert (result["against"]["kl"] < 1e-9) == (active == 1)


def test_percentiles_are_those_of_all_tokens_one_by_one() -> None:
    used = Used(Retrieving(4, 3, never=0))
    assert [used.percentile(percent) for percent in (5, 50, 95)] == [0, 0, 0], "no tokens"
    parts = [torch.rand(random.randint(1, 60), dtype=torch.float64) ** 2 * 2 for _ in range(5)]
    for read_t in parts:
        used.add(torch.ones(len(read_t), 3, dtype=torch.bool), read_t, read_t)
    reads = sorted(torch.cat(parts).tolist())
    for percent in (1, 5, 50, 95, 100):
        assert used.percentile(percent) == pytest.approx(reads[math.ceil(percent / 100 * len(reads)) - 1], abs=0.00051)
    used.add(torch.ones(1000, 3, dtype=torch.bool), *[torch.full((1000,), 1e9)] * 2)
    assert used.percentile(95) == 10, "a layer that reads absurdly much takes no more memory"


def test_a_layer_that_no_token_reached_used_nothing() -> None:
    layer = Retrieving(16, 12, never=0)
    row = summary("mlp", layer, Used(layer))
    assert (row["usage"], row["effective_experts"]) == (0, 0)
    assert row["bytes_per_token"] == {"p5": 0, "p50": 0, "p95": 0}


def test_budgets_of_a_checkpoint(elastic: Any, tmp_path: Path) -> None:
    """Each row is what `evaluate` says at that budget, the first is the result; what comes after a prompt that was read
    with everything on is compared with the dense model there."""
    tiny_model().save_pretrained(tmp_path / "dense")  # another one, so that nothing is 1 by itself
    elastic.save_pretrained(tmp_path / "peer")
    for name in ("dense", "peer"):
        tiny_tokenizer().save_pretrained(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text(random_text(400))
    dense: Any = load_for_eval(tmp_path / "dense").model
    windows = load_windows([str(text)], tiny_tokenizer(), context=24, max_tokens=120)
    options = {"data": str(text), "context": 24, "max_tokens": 120}
    found = evaluate_checkpoint(str(tmp_path / "peer"), active=[0.8, 1.0], against=str(tmp_path / "dense"), **options)
    assert [row["active"] for row in found["budgets"]] == [0.8, 1.0]
    for row in found["budgets"]:
        elastic.set_active(row["active"])
        wanted = evaluate(elastic, windows, against=dense)
        assert row["perplexity"] == pytest.approx(wanted["perplexity"])
        assert {key: row[key] for key in ("ratio", "kl", "agreement")} == pytest.approx(
            {key: wanted["against"][key] for key in ("ratio", "kl", "agreement")}
        )
        for key in ("bytes_fraction", "macs_fraction"):
            assert row[key] == pytest.approx(sum(layer[key] for layer in wanted["layers"]) / 2)
        assert row["after_prefill"] == pytest.approx(naive_after_prefill(elastic, dense, windows), rel=1e-4)
        assert row["continuation"] == continued(elastic, dense, windows)
    assert found["perplexity"] == found["budgets"][0]["perplexity"]
    assert found["against"]["continuation"] == found["budgets"][0]["continuation"]
    same = evaluate_checkpoint(str(tmp_path / "dense"), against=str(tmp_path / "dense"), **options)
    assert same["against"]["continuation"] == {"mean": 32, "of": 32, "prompts": 5}, "also of models without budgets"

    (row,) = evaluate_checkpoint(str(tmp_path / "peer"), **options)["budgets"]
    assert row["active"] == 0.6, "the model's own"
    assert row["ratio"] is row["kl"] is row["agreement"] is row["continuation"] is row["after_prefill"] is None
    assert "budgets" not in evaluate_checkpoint(str(tmp_path / "dense"), **options)
    with pytest.raises(UsageError, match="--active is for models that were converted with copies as keys"):
        evaluate_checkpoint(str(tmp_path / "dense"), active=[0.5], **options)
    with pytest.raises(UsageError, match=r"--active 0\.01: give shares of 0\.\d+ to 1, by commas"):
        evaluate_checkpoint(str(tmp_path / "peer"), active=[0.01], **options)


def continued(model: Any, dense: Any, windows: torch.Tensor) -> dict[str, Any] | None:
    """What test_continuations.py compares with `generate`."""
    prompts, following = prompts_of(windows, [model, dense])
    dense_bn = continue_greedily(dense, prompts, following)
    assert dense_bn is not None
    return continuation(model, prompts, dense_bn)


def test_several_texts_are_what_each_gives_alone(elastic: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    elastic.save_pretrained("peer")
    tiny_checkpoint(tmp_path / "dense")
    tiny_tokenizer().save_pretrained("peer")
    texts = [str(text_file(tmp_path / name, 300)) for name in ("a.txt", "b.txt", "c.txt")]
    options: dict[str, Any] = {"context": 24, "max_tokens": 120}
    alone: dict[str, Any] = {}
    for asked in ({"active": [0.8, 1.0], "against": "dense"}, {"active": [0.7]}, {}):
        alone = {text: evaluate_checkpoint("peer", data=text, **asked, **options) for text in texts}
        calls: list[Any] = []
        together = evaluate_checkpoint(
            "peer", data=texts, **asked, **options, progress=lambda *call, calls=calls: calls.append(call)
        )
        assert together["texts"] == [alone[text] for text in texts]
        assert [row["data"] for row in together["texts"]] == ["a.txt", "b.txt", "c.txt"]
        assert together.keys() == {"model", "context", "against", "texts"}
        assert together["against"] == ({"model": "dense"} if "against" in asked else None)
        assert calls.count(("Loading peer", 0, 1)) == 1
        assert any(stage.startswith("Evaluating") and stage.endswith(", b.txt") for stage, _, _ in calls)
    assert evaluate_checkpoint("peer", data=texts[:1], **options) == alone[texts[0]]


def test_texts_that_cannot_be_told_apart_are_refused_before_a_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    texts = [str(text_file(folder / "a.txt", 50)) for folder in (tmp_path, tmp_path / "other")]
    with pytest.raises(UsageError, match=r"two texts have the name a\.txt, by which .*: rename one"):
        evaluate_checkpoint("no/model", data=texts)
    with pytest.raises(UsageError, match="no text was given to measure on"):
        evaluate_checkpoint("no/model", data=[])
    with pytest.raises(DataError, match=r"no such text file: .*gone\.txt"):
        evaluate_checkpoint("no/model", data=[texts[0], "gone.txt"])


def keep_to_budget(model: Any, *, always: bool) -> None:
    for layer in peer_layers(model).values():
        layer.prefill_all = not always


def naive_after_prefill(model: Any, dense: Any, windows: torch.Tensor) -> float:
    """Perplexity over the dense model's of each second half, token by token after the first was read at once."""
    loss = [0.0, 0.0]
    with torch.no_grad():
        for window in windows:
            half = len(window) // 2
            for i, each in enumerate((model, dense)):
                keep_to_budget(each, always=False)
                past = each(input_ids=window[None, :half], use_cache=True).past_key_values
                keep_to_budget(each, always=True)
                for at in range(half, len(window) - 1):
                    logits = each(input_ids=window[None, at : at + 1], past_key_values=past, use_cache=True).logits
                    loss[i] -= logits[0, 0].double().log_softmax(-1)[window[at + 1]].item()
    return math.exp((loss[0] - loss[1]) / (len(windows) * (windows.shape[1] - windows.shape[1] // 2 - 1)))


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
