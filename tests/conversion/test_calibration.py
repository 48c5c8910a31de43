"""What the walk hands out, against hooks on whole forward passes of the model as it stands at that moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny import FAMILIES, VOCAB, inputs_for
from torch import Tensor, nn
from transformers import PreTrainedModel, Wav2Vec2Config, Wav2Vec2Model

from peerify import PeerConfig, convert
from peerify.conversion import calibration
from peerify.conversion.calibration import SiteData, token_batches, walk
from peerify.conversion.feedforward import FeedForward, read_feedforward, replace
from peerify.discovery.sites import Site, find_feedforwards
from peerify.errors import ConversionError

# After a norm behind the layer its output is no longer simply added to the stream; Bloom adds the residual inside
# its MLP, so the block without its last linear is not the block without the layer.
NOT_ADDED = {"gemma3", "olmo2", "bert"}


class Damaged(nn.Module):
    """A stand-in for a converted layer: the dense one, somewhat off."""

    def __init__(self, ff: FeedForward) -> None:
        super().__init__()
        self.ff = ff
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return 0.9 * self.ff(hidden_states) + 0.05 * hidden_states.roll(1, -1)


def batches_for(model: PreTrainedModel, count: int = 3) -> list[dict[str, Tensor]]:
    return [inputs_for(model, seed=int(torch.randint(2**31, ()))) for _ in range(count)]


@torch.no_grad()
def hooked(model: nn.Module, site: Site, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Input and output of a site over whole forward passes."""
    x: list[Tensor] = []
    y: list[Tensor] = []
    end = site.down if site.identities else site.path
    hooks = [
        model.get_submodule(site.path).register_forward_pre_hook(lambda _, args: x.append(args[0].flatten(0, -2))),
        model.get_submodule(end).register_forward_hook(lambda _, args, out: y.append(out.flatten(0, -2).clone())),
    ]
    for batch in batches:
        model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(x), torch.cat(y)


@contextmanager
def no_whole_model(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lists the sites for which the whole model was run."""
    fallback: list[str] = []
    whole = calibration._whole_model

    def note(model: Any, body: Any, site: Site, batches: Any) -> SiteData:
        fallback.append(site.path)
        return whole(model, body, site, batches)

    with monkeypatch.context() as patch:
        patch.setattr(calibration, "_whole_model", note)
        yield fallback


def close(actual: Tensor, expected: Tensor) -> bool:
    return bool((actual - expected).norm() <= 1e-5 * expected.norm())


@pytest.mark.parametrize("family", ["llama", "opt", "bloom", "t5", "vit"])
def test_dense_walk_sees_what_the_model_sees(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing replaced: each site once, in order, with the input and output of a whole forward; block by block."""
    model = FAMILIES[family](seed=seed)
    sites, batches = find_feedforwards(model), batches_for(model)
    with no_whole_model(monkeypatch) as fallback:
        seen = list(walk(model, sites, batches))
    assert [data.site.path for data in seen] == [site.path for site in sites]
    assert fallback == []
    for data in seen:
        x_td, y_td = hooked(model, data.site, batches)
        assert close(data.x_td, x_td), data.site.path
        assert close(data.y_td, y_td), data.site.path
        assert data.correction_td is None or data.correction_td.abs().max() < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_walk_follows_the_converted_model(family: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each site replaced before the next is asked for: x is that of the half-converted model, y the dense layer's
    answer to it."""
    model = FAMILIES[family](seed=seed)
    sites, batches = find_feedforwards(model), batches_for(model)
    with no_whole_model(monkeypatch) as fallback:
        for i, data in enumerate(walk(model, sites, batches)):
            assert data.site == sites[i]
            x_td, y_td = hooked(model, data.site, batches)
            assert close(data.x_td, x_td), data.site.path
            assert close(data.y_td, y_td), data.site.path
            assert data.correction_td is None or family not in NOT_ADDED
            ff = read_feedforward(model, data.site)
            assert close(ff(data.x_td), data.y_td), data.site.path
            stand_in = Damaged(ff)
            with torch.no_grad():
                if i % 2:  # both as conversion does it, and as a caller who does not say what the new layer answers
                    data.converted_td = stand_in(data.x_td)
            replace(model, data.site, stand_in)
    assert fallback == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom"])
def test_correction_brings_the_stream_back(family: str, seed: int) -> None:
    """A layer that answers y + correction puts the dense model's stream back, so its logits too."""
    model = FAMILIES[family](seed=seed)
    sites, batches = find_feedforwards(model), batches_for(model, 2)
    with torch.no_grad():
        dense = [model(**batch).logits for batch in batches]
    for i, data in enumerate(walk(model, sites, batches)):
        ff = read_feedforward(model, data.site)
        if i < len(sites) - 1:
            replace(model, data.site, Damaged(ff))
            continue
        assert data.correction_td is not None
        assert data.correction_td.norm() > 1e-3 * data.y_td.norm()
        recital = Recited(data.y_td + data.correction_td)
        replace(model, data.site, recital)
    recital.start = 0  # the walk has listened to it already
    with torch.no_grad():
        recited = [model(**batch).logits for batch in batches]
    for actual, expected in zip(recited, dense, strict=True):
        assert (actual - expected).norm() <= 1e-4 * expected.norm()


class Recited(nn.Module):
    """Says what it was told, batch after batch."""

    def __init__(self, answer_td: Tensor) -> None:
        super().__init__()
        self.answer_td = answer_td
        self.start = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        tokens = hidden_states.flatten(0, -2).shape[0]
        answer_td = self.answer_td[self.start : self.start + tokens]
        self.start += tokens
        return answer_td.view(hidden_states.shape).clone()  # Falcon adds to it in place


@pytest.mark.parametrize("chosen", [[1], [0, 2], [2]])
def test_only_some_sites(chosen: list[int], seed: int) -> None:
    model = FAMILIES["llama"](seed=seed)
    found, batches = find_feedforwards(model), batches_for(model)
    sites = [found[i] for i in chosen]
    seen = []
    for data in walk(model, sites, batches):
        x_td, y_td = hooked(model, data.site, batches)
        assert close(data.x_td, x_td)
        assert close(data.y_td, y_td)
        replace(model, data.site, Damaged(read_feedforward(model, data.site)))
        seen.append(data.site)
    assert seen == sites


def test_batches_that_differ_in_shape_and_mask(seed: int) -> None:
    """Masks and lengths of its own for each batch: what blocks get besides hidden states is not the first batch's."""
    model = FAMILIES["bert"](seed=seed)
    batches = []
    for tokens in (12, 9, 12):
        batch = inputs_for(model, seed=seed + tokens, tokens=tokens)
        mask = torch.ones_like(batch["input_ids"])
        mask[1, torch.randint(3, tokens, ()) :] = 0
        batches.append({**batch, "attention_mask": mask})
    sites = find_feedforwards(model)
    for data in walk(model, sites, batches):
        x_td, y_td = hooked(model, data.site, batches)
        assert close(data.x_td, x_td)
        assert close(data.y_td, y_td)
        replace(model, data.site, Damaged(read_feedforward(model, data.site)))


def test_waveforms_stay_whole_and_other_values_pass() -> None:
    """A waveform cut to a few samples would be too short for the first convolution."""
    small = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    widths = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_conv_pos_embeddings": 4}
    config = Wav2Vec2Config(num_hidden_layers=2, num_conv_pos_embedding_groups=2, **small, **widths)
    model = Wav2Vec2Model(config).eval()
    batches = [{"input_values": torch.randn(2, 800), "output_attentions": False} for _ in range(2)]
    conversion = convert(model, PeerConfig(active=0.5, keys="product", refine_steps=2), batches)
    assert len(conversion.layers) == 2
    assert model(**batches[0]).last_hidden_state.isfinite().all()


def test_blocks_that_run_twice(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chain of blocks: the whole model is run for each site."""
    model = FAMILIES["bert"](seed=seed)
    encode = type(model.bert.encoder).forward
    blocks = list(model.bert.encoder.layer)

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        for block in blocks:
            hidden_states = 1.1 * block(hidden_states)
        return type(encode(self, hidden_states, *args, **kwargs))(last_hidden_state=hidden_states)

    sites, batches = find_feedforwards(model), batches_for(model)
    monkeypatch.setattr(model.bert.encoder, "forward", forward.__get__(model.bert.encoder))
    for data in walk(model, sites, batches):
        x_td, y_td = hooked(model, data.site, batches)
        assert close(data.x_td, x_td)
        assert close(data.y_td, y_td)
        replace(model, data.site, Damaged(read_feedforward(model, data.site)))


@pytest.mark.parametrize("where", ["embedding", "weight"])
def test_nan_names_the_layer(where: str, seed: int) -> None:
    model = FAMILIES["llama"](seed=seed)
    sites = find_feedforwards(model)
    if where == "embedding":
        model.model.embed_tokens.weight.data[:] = float("nan")
    else:
        model.model.layers[0].mlp.down_proj.weight.data[3, 5] = float("inf")
    with pytest.raises(ConversionError, match=r"^model\.layers\.0\.mlp: its (in|out)put"):
        list(walk(model, sites, batches_for(model)))


def test_leaves_the_model_as_it_was(seed: int) -> None:
    """Also when the caller stops half-way: no hooks, no changed mode, no changed cache setting, gradients on."""
    model = FAMILIES["gpt2"](seed=seed).train()
    sites = find_feedforwards(model)
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()}
    walking = walk(model, sites, batches_for(model))
    next(walking)
    assert torch.is_grad_enabled()
    walking.close()
    assert model.training
    assert model.config.use_cache
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in model.named_modules()} == before


@pytest.mark.parametrize(("count", "context"), [(1, 7), (6, 512), (7, 512), (64, 8), (3, 5000)])
def test_token_batches(count: int, context: int) -> None:
    model = FAMILIES["t5"]()
    windows_bt = torch.randint(VOCAB, (count, context))
    batches = token_batches(windows_bt, model)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), windows_bt)
    assert torch.equal(torch.cat([batch["decoder_input_ids"] for batch in batches]), windows_bt)
    assert len({batch["input_ids"].shape for batch in batches}) == 1
    assert batches[0]["input_ids"].numel() <= max(context, calibration.BATCH_TOKENS)
    assert "decoder_input_ids" not in token_batches(windows_bt, FAMILIES["gpt2"]())[0]
