"""What no rule of build.py covers: config values and inputs of single types. Keep it short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 48}
_FOUR_LEVELS = {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}

VALUES: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 8},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "deepseek_v2": _MOE,
    "dots1": _MOE | {"n_shared_experts": 1},
    "esm": {"vocab_size": 64, "mask_token_id": 32, "pad_token_id": 1},
    "emu3": {"vocabulary_map": {"<image>": 4}},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "granitemoehybrid": {"shared_intermediate_size": 48},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "tapas": {"select_one_column": False},  # its logits are mostly -10,000 with it
    "wav2vec2-bert": {"vocab_size": 32},
    "wav2vec2-conformer": {"vocab_size": 32},
    "depth_anything": _FOUR_LEVELS,
    "prompt_depth_anything": _FOUR_LEVELS,
    "zoedepth": _FOUR_LEVELS,
    "chmv2": _FOUR_LEVELS,
    "tipsv2_dpt": _FOUR_LEVELS,
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "aya_vision": {"vision_config": {"num_attention_heads": 16}},
    "beit": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "data2vec-vision": {"out_indices": [1, 2, 3, 4], "num_hidden_layers": 4},
    "cohere_compass_text": {"rope_parameters": _ROPES},
    "cohere_compass": {"text_config": {"rope_parameters": _ROPES}},
    "chameleon": {"vocabulary_map": {"<image>": 4, "IMGIMGA": 5}},
    "gemma4_assistant": {"default": {"text_config": {"hidden_size_per_layer_input": 0}}},
}
"""Config values by model type; a dict inside is for the sub-config of that name, "default" for the config's own
defaults where these are refused."""


def _siglip2(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Flattened patches with their places."""
    vision = getattr(model.config, "vision_config", model.config)
    width = vision.num_channels * vision.patch_size**2
    return {
        "pixel_values": torch.randn(1, 16, width, generator=generator),
        "pixel_attention_mask": torch.ones(1, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]]),
    }


def _siglip2_pair(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.arange(20, 28)[None], **_siglip2(model, generator)}


INPUTS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("siglip2", "Siglip2Model"): _siglip2_pair,
    ("siglip2", "*"): _siglip2,
    ("siglip2_vision_model", "*"): _siglip2,
}
"""(model type, class name or "*") → function of (model, generator) that makes the inputs."""

OWN_TYPE_ONLY = {"JevForDecision": "jev"}
"""Classes that Auto classes name for other types as well, but which only take a config of their own."""
