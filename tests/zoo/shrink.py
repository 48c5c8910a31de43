"""The config of any model type made small: widths divided by one common factor, few layers, small vocabulary."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from exceptions import VALUES
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

VOCABULARY = 157  # no width, so that no head looks like a feed-forward layer


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much smaller than its default config a model is."""

    width: int
    """Widths are divided by it."""
    image: int
    """Image sizes are divided by it."""
    layers: int
    """At most so many layers; 0: as many as the config says."""
    heads: bool = False
    """Fewer heads rather than narrower ones."""


_LAYERS = re.compile(r"(^|_)(n_?|num_)?\w*(layers?|depth|blocks)$")
_NOT_LAYERS = re.compile(
    r"feature_layer|layers_per|feat_extract|adapter_layers|_id|interval|kernel|frequency|start|end|max_window|post_layer"
)
_DEPTHS = re.compile(
    r"^(depths|num_blocks|stage_num_blocks|layers_per_stage|encoder_depths|block_sizes|block_repeats|num_blocks_per_stage)$"
)
_WIDTH = re.compile(
    r"^upsample_groups$|(^|_)(hidden|embed|embd|embedding|embeddings|intermediate|ffn|mlp|ff|proj|projection|projector|model|inner|head|latent|"
    r"latents|lora|classifier|expand|expansion|feature|output|decoder|encoder|fpn|conv|mask|text|vision|audio|rnn|state|"
    r"cross_attention|key|value|qk|v|out|attention|filter|channel|input|codebook|condition|speaker|quantizer|"
    r"feedforward|feed_forward|kv|block|stage|units|pair|rope|nope|width|bottleneck|transition|fusion|neck|token|representation|dimension|outer|merged|"
    r"cls_embed|adapter|query|nope_head|task|entity|lru|nhid|inter)_?(dim|dims|size|sizes|rank|width|widths|dim_size)?$"
    r"|^(d_model|d_ff|d_kv|n_embd|n_inner|d_inner|dim|dims|width|inner_dim|d_latents|d_embed|d_proj|embed_dims|hidden_sizes|channels|"
    r"out_channels|out_features|conv_dim|nope_dim|rope_dim|dim_feedforward|neck_hidden_sizes|fusion_hidden_size|"
    r"stem_channels|base_channels|downsample_channels|backbone_channel_list|hidden_size_global|\w+_in_channels|\w+_mid_channels|stage_channels|stage_in_channels|stage_mid_channels|stage_out_channels|output_channels|pooler_\w+|"
    r"\w*(hidden|embed|embedding|intermediate|ffn|mlp|proj|projection|head|inner|latent|model|state)_(dim|dims|size|sizes|width|channels)|"
    r"\w*_(dim|rank|dims|width)|dim_\w+|\w+_lora_rank|\w*(encoder|decoder)_(ffn_dim|hidden_size)|\w+_feedforward|d_\w+)$"
)
_NOT_WIDTH = re.compile(
    r"^(num_|n_(?!embd|inner)|pos_emb|init_pos_emb|max_|min_|vocab|image|patch|window|kernel|stride|pool_size|seq|token_|input_size$|input_dim$|in_|"
    r"conv_kernel|linear_conv|d_conv|mask_time|mask_feature|block_size|batch|chunk|type_vocab|class|is_|feature_layer|"
    r"attn_conv|mel|spectrogram|feature_size|mamba_d_conv|head_mask|output_(hidden|att))|(_id|_ids|_index|_stride|_kernel|"
    r"_kernel_size|_kernel_dim|kernel_sizes|_heads|_layers|_token|(?<!upsample)_groups|num_channels|_ratio|vocab_size|window_size|patch_size|image_size|"
    r"chunk_size|codebook_size|seq_length|_seq_len|_types|_interval|block_size|channels_in|num_mel_bins|mel_dim|n_mels)$"
)
_HEADS = re.compile(r"(^|_)(n_)?heads?$")
_HEAD_DIM = re.compile(r"head_(dim|size|width|channels)$|(rope|nope)(_head)?_dim$|^d_kv$")
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts|routed_experts|num_moe_experts|moe_n_experts)$"
)
_PLACEHOLDER = re.compile(r"^(image|video|audio|sound|img)(_context)?_token_(id|index)$")
_PER_TOKEN = re.compile(
    r"(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|moe_router_topk|num_selected_experts|router_top_k|moe_num_active)$"
)
_VOCAB = re.compile(r"vocab(_size)?$")
_TOKEN = re.compile(r"(token_id|token_ids|token_index|_id|_idx|_tokens|token)$")
_IMAGE = re.compile(r"^(image_size|img_size|pretrain_image_size|crop_size|input_image_size|frame_size)$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|max_length_embeddings)$"
)


def small_config(model_type: str, scale: Scale) -> PreTrainedConfig:
    """The config of `model_type` at this scale."""
    cls = CONFIG_MAPPING[model_type]
    values = VALUES.get(model_type, {})
    default = cls(**values.get("default", {}))
    tokens: dict[int, int] = {}
    return _shrunk(default, scale, tokens, values)


def _shrunk(config: PreTrainedConfig, scale: Scale, tokens: dict[int, int], values: dict[str, Any]) -> PreTrainedConfig:
    cls = type(config)
    usual = _defaults(cls)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        value = config._getattr_without_heterogeneous_validation(name, None)
        if isinstance(value, PreTrainedConfig):
            part = values.get(name, {})
            changes[name] = _shrunk(value, scale, tokens, part if isinstance(part, dict) else {})
        elif field.init and name not in ("transformers_version", "dtype", "id2label", "label2id", "problem_type"):
            small = _small(name, value, scale, tokens)
            depth = vars(config).get("num_hidden_layers")
            if scale.layers and isinstance(depth, int) and depth > scale.layers:
                if isinstance(small, list | tuple) and len(small) == depth:  # one entry for each layer
                    small = small[: scale.layers]
                elif isinstance(small, dict) and name == "per_layer_config":
                    small = {k: v for k, v in small.items() if int(k) < scale.layers}
            if small != value or (name in usual and usual[name] != value and _plain(value)):
                changes[name] = small
    for name, value in values.items():
        if name != "default" and not (isinstance(value, dict) and name in changes):
            changes[name] = value(scale) if callable(value) else value
    for name, value in _derived(config).items():
        changes.setdefault(name, _small(name, value, scale, tokens))
    small = cls(**changes)
    if (
        "out_indices" not in values and getattr(config, "out_indices", None) and hasattr(small, "stage_names")
    ):  # of a backbone; no field of its class
        levels = [i for i in config.out_indices if i < len(small.stage_names)]
        small.out_indices = levels or small.out_indices
    _fit_towers(small)
    if hasattr(small, "use_cache"):
        small.use_cache = False
    if (
        "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ())
        and "rope_parameters" not in values
    ):
        rope = small.rope_parameters
        head = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
        nested = any(isinstance(value, dict) for value in rope.values())  # one for each kind of layer
        for part in rope.values() if nested else [rope]:
            half = int(head * part.get("partial_rotary_factor", 1)) // 2
            part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small


def _fit_towers(config: PreTrainedConfig) -> None:
    """Let towers put out what the text takes: the defaults of some types are those of models of different sizes."""
    width = getattr(getattr(config, "text_config", None), "hidden_size", None)
    for name in ("vision_config", "audio_config"):
        part = getattr(config, name, None)
        for key in ("out_hidden_size", "output_dim", "hidden_size" if hasattr(part, "embed_dim") else ""):
            if isinstance(width, int) and isinstance(getattr(part, key or "-", None), int):
                setattr(part, key, width)


def _derived(config: PreTrainedConfig) -> dict[str, int]:
    """What some architectures expect though their config leaves it out."""
    names = {field.name for field in dataclasses.fields(config)}
    values = vars(config)
    heads, width = values.get("num_attention_heads"), values.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(width, int):
        return {}
    found = {}
    if "head_dim" in names and values.get("head_dim") is None:
        found["head_dim"] = width // heads
    if "num_key_value_heads" in names and values.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = heads
    return found


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(isinstance(v, int | float | str | bool) for v in value)
    return isinstance(value, int | float | str | bool)


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _small(name: str, value: Any, scale: Scale, tokens: dict[int, int]) -> Any:
    width, image, layers = scale.width, scale.image, scale.layers
    if scale.heads and _HEAD_DIM.search(name):
        return value
    if scale.heads and _HEADS.search(name) and isinstance(value, int) and value > 1:
        return max(1, value // width)
    if isinstance(value, dict) and "mrope_section" in value and not scale.heads:  # parts of the width of a head
        sections = value["mrope_section"]
        if all(section % width == 0 for section in sections):
            return value | {"mrope_section": [section // width for section in sections]}
    if value is None and _PLACEHOLDER.match(name):
        return tokens.setdefault(hash(name), VOCABULARY - 10 - len(tokens))
    if isinstance(value, bool) or value is None or isinstance(value, str | float | dict):
        return value
    if isinstance(value, list | tuple):
        if not value:
            return value
        if _DEPTHS.match(name):
            return type(value)(min(v, 1) if layers and isinstance(v, int) else v for v in value)
        return type(value)(_small(name, v, scale, tokens) for v in value)
    if not isinstance(value, int):
        return value
    if _EXPERTS.match(name):
        return min(value, 4)
    if _PER_TOKEN.search(name):
        return min(value, 2)
    if name in ("n_group", "topk_group", "num_expert_group", "num_expert_groups"):
        return 1
    if name in ("first_k_dense_replace", "moe_layer_start_index"):
        return min(value, 1)
    if _VOCAB.search(name):
        return min(value, VOCABULARY)
    if _TOKEN.search(name) and value >= VOCABULARY:
        return tokens.setdefault(value, VOCABULARY - 10 - len(tokens))
    if _LAYERS.search(name) and not _NOT_LAYERS.search(name):
        return min(value, layers or value)
    if _IMAGE.match(name):
        return max(value // image, 16) if value >= 64 else value
    if _POSITIONS.match(name):
        return min(value, 1024)
    if _WIDTH.search(name) and not _NOT_WIDTH.search(name) and value % width == 0:
        return value // width
    return value


def own_config(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedConfig:
    """The config that the class takes: `config`, or the part of it for the text part of a larger model."""
    if not isinstance(config, cls.config_class):
        for field in dataclasses.fields(config):
            part = getattr(config, field.name, None)
            if isinstance(part, cls.config_class):
                return part
    return config
