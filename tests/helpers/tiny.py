"""Tiny random models of every family that peerify is tested on: one table, `FAMILIES`.

    model = FAMILIES["llama"](seed=0)
    inputs = inputs_for(model, seed=1)
    logits(model, inputs)

Float32, eval mode, two or three layers, widths of a few dozen, every bias non-zero (transformers starts
them at zero, which would hide a bias that got lost).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import PreTrainedModel

VOCAB = 128
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _family(head: str, config: str, **values: Any) -> Callable[..., PreTrainedModel]:
    """A function that builds the model; `changes` override the config, `device="meta"` leaves out weights."""

    def build(seed: int = 0, *, device: str = "cpu", **changes: Any) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(seed)
            settings = getattr(hf, config)(**{**SPECIAL, **values, **changes})
            model = getattr(hf, head)._from_config(settings, dtype=torch.float32).eval()
            if device != "meta":
                _randomise(model)
        return model

    return build


def _randomise(model: PreTrainedModel) -> None:
    """Larger weights than transformers starts with, so that every layer shows in the logits, and biases."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 2:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)


_ROPE = {  # the shape that most decoders since Llama share; three layers, grouped queries
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_MHA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_OPT = {**_MHA, "ffn_dim": 64, "word_embed_proj_dim": 32}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "relative_attention_num_buckets": 8,
}
_MOE = {
    **_ROPE,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
}

FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _family("LlamaForCausalLM", "LlamaConfig", **_ROPE, mlp_bias=True),
    "mistral": _family("MistralForCausalLM", "MistralConfig", **_ROPE, sliding_window=64),
    "qwen3": _family("Qwen3ForCausalLM", "Qwen3Config", **_ROPE, tie_word_embeddings=True),
    "gemma3": _family("Gemma3ForCausalLM", "Gemma3TextConfig", **_ROPE, sliding_window=64),
    "phi3": _family("Phi3ForCausalLM", "Phi3Config", **_ROPE),
    "olmo2": _family("Olmo2ForCausalLM", "Olmo2Config", **_ROPE),
    "gpt2": _family("GPT2LMHeadModel", "GPT2Config", vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": _family("GPTNeoXForCausalLM", "GPTNeoXConfig", **_MHA),
    "opt": _family("OPTForCausalLM", "OPTConfig", **_OPT),
    "opt-square": _family("OPTForCausalLM", "OPTConfig", **{**_OPT, "ffn_dim": 32}),
    "falcon": _family("FalconForCausalLM", "FalconConfig", **_MHA, bias=True),
    "bloom": _family("BloomForCausalLM", "BloomConfig", vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4),
    "bert": _family("BertForMaskedLM", "BertConfig", **_MHA),
    "t5": _family("T5ForConditionalGeneration", "T5Config", **_T5),
    "t5-gated": _family(
        "T5ForConditionalGeneration",
        "T5Config",
        **_T5,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    ),
    "vit": _family(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        num_labels=10,
    ),
}
"""Families whose every feed-forward layer can be converted."""

ROUTED: dict[str, Callable[..., PreTrainedModel]] = {
    "mixtral": _family("MixtralForCausalLM", "MixtralConfig", **_MOE, num_local_experts=4),
    "qwen2_moe": _family(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        **_MOE,
        num_experts=4,
        shared_expert_intermediate_size=40,
        mlp_only_layers=[0],
    ),
}
"""Mixtures of experts. Mixtral has no dense feed-forward; Qwen2-MoE one in layer 0 and shared ones above."""


def inputs_for(model: PreTrainedModel, seed: int = 0, *, rows: int = 2, tokens: int = 12) -> dict[str, Tensor]:
    """Random inputs of the model: keyword arguments for its forward."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        c = model.config
        return {"pixel_values": torch.randn(rows, c.num_channels, c.image_size, c.image_size, generator=generator)}

    def ids() -> Tensor:
        return torch.randint(len(SPECIAL), VOCAB, (rows, tokens), generator=generator)

    inputs = {"input_ids": ids()}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids()
    return inputs


@torch.no_grad()
def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """The model's logits in float32: (rows, tokens, vocabulary), or (rows, labels) for ViT."""
    scores: Tensor = model(**inputs).logits
    return scores.float()


@torch.no_grad()
def relative_error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖."""
    return ((actual - expected).norm() / expected.norm()).item()
