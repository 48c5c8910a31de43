"""What no rule of build.py covers: config values and inputs of single types. Keep it short."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_MOE = {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_intermediate_size": 48}
_FOUR_LEVELS = {"backbone_config": {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}}
_ROPES = {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")}

_VIBEVOICE = {"num_filters": 4}
_MASK_DECODER = {"vision_config": {"num_pos_feats": lambda scale: 128 // scale.width}}
_NINE = {"mm_tokens_per_image": 9}
_FOUR_BY_FOUR = {"vision_config": {"image_size": 64, "patch_size": 16}}


def _ernie_rope(scale: Any) -> dict[str, Any]:
    """Its first two sections are of one width."""
    return {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [22, 22, 20] if scale.heads else [1, 1, 2]}


VALUES: dict[str, dict[str, Any]] = {
    "gemma3": _NINE,
    "shieldgemma2": _NINE | {"yes_token_index": 20, "no_token_index": 21},
    "mllama": {
        "vision_config": {
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": lambda scale: 3 * 1280 // scale.width,
        }
    },
    "llama4": {
        "vision_config": {
            "intermediate_size": lambda scale: 4 * 768 // scale.width,
            "vision_output_dim": lambda scale: 4096 // scale.width,
        }
    },
    "granite_speech": {"projector_config": {"encoder_hidden_size": lambda scale: 1024 // scale.width}},
    "granite_speech_plus": {"projector_config": {"encoder_hidden_size": lambda scale: 1024 // scale.width}},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 120},
    "sam": _MASK_DECODER | {"prompt_encoder_config": {"image_embedding_size": lambda scale: 64 // scale.image}},
    "sam_hq": _MASK_DECODER | {"prompt_encoder_config": {"image_embedding_size": lambda scale: 64 // scale.image}},
    "depth_pro": {"patch_size": lambda scale: 384 // scale.image},
    "sam2": {
        "vision_config": {"backbone_feature_sizes": lambda scale: [[n // scale.image] * 2 for n in (256, 128, 64)]}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "longformer": {"sep_token_id": 20},
    "vibevoice_acoustic_tokenizer": {"num_filters": 4},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 4},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config": _VIBEVOICE, "semantic_tokenizer_encoder_config": _VIBEVOICE},
    "vibevoice": {"audio_config": _VIBEVOICE, "semantic_model_config": _VIBEVOICE},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": _ernie_rope}, "vision_config": {"num_heads": 4}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48, "num_experts_per_tok": 2}
    },
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        "vision_config": {
            "encoder_config": {
                "hidden_size": lambda scale: 896 // scale.width,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
            }
        },
    },
    "granite4_vision": {
        "vision_config": {"image_size": 64, "patch_size": 16},
        "image_grid_pinpoints": [[64, 64], [64, 128]],
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1, 1, 1, 1],
        "downsample_rate": "1/2",
    },
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 0}},
    "moonshine_streaming": {"num_key_value_heads": 8},
    "rf_detr": {"backbone_config": {"image_size": 224}, "num_queries": 10},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "t5gemma2_encoder": {"text_config": {"dropout_rate": 0.0}, "mm_tokens_per_image": 9},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8},
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 8, 4], "hidden_size": lambda scale: 768 // scale.width},
    "qwen3_omni_moe": {
        "talker_config": {"spatial_merge_size": 2, "text_config": {"shared_expert_intermediate_size": 48}}
    },
    "pp_doclayout_v2": {"class_thresholds": [0.5, 0.5], "class_order": [0, 1], "num_queries": 10},
    "zamba": {"layers_block_type": ["hybrid", "hybrid"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "hybrid_layer_ids": [1]},
    "nemo_speechlm": {"text_config": {"layers_block_type": ["linear_attention", "moe", "full_attention"]}},
    "lw_detr": {
        "projector_scale_factors": [1.0],
        "num_queries": 10,
        "backbone_config": {"image_size": 256, "num_hidden_layers": 4, "out_indices": [2, 4]},
    },
    "aria": {"projector_patch_to_query_dict": {1: 4, 49: 4}},
    "idefics3": _FOUR_BY_FOUR,
    "smolvlm": _FOUR_BY_FOUR,
    "modernvbert": _FOUR_BY_FOUR,
    "ultravbert": _FOUR_BY_FOUR,
    "colmodernvbert": {"vlm_config": _FOUR_BY_FOUR},
    "vipllava": {"vision_feature_layers": [-1, -2, -3, 0, 1]},
    "t5gemma2": {"encoder": _NINE},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0], "text_hidden_size": lambda scale: 4096 // scale.width},
        "vision_config": {"num_position_embeddings": None},
    },
    "autoformer": {"prediction_length": 8, "label_length": 4},
    "informer": {"prediction_length": 8},
    "time_series_transformer": {"prediction_length": 8},
    "deepseek_v2": _MOE,
    "dots1": _MOE | {"n_shared_experts": 1},
    "esm": {"vocab_size": 64, "mask_token_id": 32, "pad_token_id": 1},
    "emu3": {
        "vocabulary_map": {"<image>": 4, "<|extra_200|>": 5, **{f"<|visual token {i:06d}|>": 10 + i for i in range(8)}},
        "vq_config": {"codebook_size": 8},
    },
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
    "neomme": {"layer_types": ["sliding_attention", "full_attention"]},
    "xmod": {"default_language": "en_XX"},
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
    "gemma4_assistant": {
        "default": {"text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}}
    },
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


def _kosmos2(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """A picture stands for the first tokens after the beginning."""
    count = model.config.latent_query_num
    size = model.config.vision_config.image_size
    ids = torch.arange(count + 8)[None] % 40 + 20
    places = (torch.arange(count + 8)[None] > 0) & (torch.arange(count + 8)[None] <= count)
    picture = torch.randn(1, 3, size, size, generator=generator)
    return {"pixel_values": picture, "input_ids": ids, "image_embeds_position_mask": places.long()}


def _idefics(model: Any, generator: torch.Generator) -> dict[str, Any]:
    size = model.config.vision_config.image_size
    return {
        "input_ids": torch.arange(20, 28)[None],
        "attention_mask": torch.ones(1, 8, dtype=torch.long),
        "pixel_values": torch.randn(1, 1, 3, size, size, generator=generator),
        "image_attention_mask": torch.ones(1, 8, 1, dtype=torch.long),
        "use_cache": False,
    }


def _merged_patches(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Patches that are merged lie beside each other."""
    return {
        "pixel_values": torch.randn(4, 40, 40, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
    }


def _placed_patches(model: Any, generator: torch.Generator) -> dict[str, Any]:
    config = model.config
    side = int(config.pooling_kernel_size) * 2
    places = torch.cartesian_prod(torch.arange(side), torch.arange(side))[None]
    width = 3 * config.patch_size**2
    return {"pixel_values": torch.rand(1, side * side, width, generator=generator), "pixel_position_ids": places}


def _pages(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """Flattened patches, each after its row and column."""
    patches = torch.rand(1, 16, 770, generator=generator)
    patches[..., :2] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    return {"flattened_patches": patches, "decoder_input_ids": torch.arange(20, 28)[None]}


def _waves(model: Any, generator: torch.Generator) -> dict[str, Any]:
    return {"hidden_states": torch.randn(1, 1, 6400, generator=generator)}


def _decisions(model: Any, generator: torch.Generator) -> dict[str, Any]:
    config = model.config
    return {
        "states": torch.randn(1, 4, config.state_dim, generator=generator),
        "actions": torch.randn(1, 4, config.act_dim, generator=generator),
        "rewards": torch.randn(1, 4, 1, generator=generator),
        "returns_to_go": torch.randn(1, 4, 1, generator=generator),
        "timesteps": torch.arange(4)[None],
        "attention_mask": torch.ones(1, 4, dtype=torch.long),
    }


def _clip(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """A text and a short film."""
    film = torch.randn(1, model.config.num_frames, 3, 64, 64, generator=generator)
    mask = torch.ones(1, 8, dtype=torch.long)
    return {"input_ids": torch.arange(20, 28)[None], "attention_mask": mask, "pixel_values": film}


def _units(model: Any, generator: torch.Generator) -> dict[str, Any]:
    """What its text decoder made of eight tokens of two characters each."""
    return {
        "inputs_embeds": torch.randn(1, 8, model.config.hidden_size, generator=generator),
        "char_input_ids": torch.arange(16)[None] + 4,
        "char_count_per_id": torch.full((1, 8), 2),
    }


INPUTS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("siglip2", "Siglip2Model"): _siglip2_pair,
    ("siglip2", "*"): _siglip2,
    ("kosmos-2", "*"): _kosmos2,
    ("idefics", "*"): _idefics,
    ("inkling2_vision", "*"): _merged_patches,
    ("gemma4_vision", "*"): _placed_patches,
    ("vibevoice_acoustic_tokenizer_encoder", "*"): _waves,
    ("tvp", "*"): _clip,
    ("decision_transformer", "*"): _decisions,
    ("pix2struct", "Pix2StructForConditionalGeneration"): _pages,
    ("siglip2_vision_model", "*"): _siglip2,
    ("seamless_m4t_v2", "SeamlessM4Tv2TextToUnitForConditionalGeneration"): _units,
}
"""(model type, class name or "*") → function of (model, generator) that makes the inputs."""

OWN_TYPE_ONLY = {"JevForDecision": "jev"}
"""Classes that Auto classes name for other types as well, but which only take a config of their own."""

REASONS = {
    "gemma4_assistant": "it takes the keys and values of the model that it assists",
    "gemma4_unified_assistant": "it takes the keys and values of the model that it assists",
    "jev": "its inputs are questions with marked options, which only its processor makes",
    "sam3_tracker_video": "it takes a session of its processor",
    "sam3_video": "it takes a session of its processor",
    "edgetam_video": "it takes a session of its processor",
    "glm_image_vqmodel": "it has no forward pass",
    "pp_ocrv5_server_det": "its default config leaves out what its neck needs",
    "pp_ocrv6_medium_det": "its default config leaves out what its neck needs",
    "pp_ocrv6_small_det": "its widths stop agreeing when they are divided, and its default is too large",
    "pp_ocrv5_mobile_rec": "its head takes pictures of one size only",
    "pp_ocrv5_server_rec": "its head takes pictures of one size only",
    "qwen3_omni_moe": "its default config leaves out values that its talker needs",
    "gemma3n_audio": "its widths stop agreeing when they are divided, and its default is too large",
    "reformer": "as a decoder it needs another config",
    "qwen2_5_omni": "the dense model itself does not survive save and load",
}
"""Why a type could not be built or run, where the last error does not say it."""
