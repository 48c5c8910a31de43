"""The smallest random model of any type that transformers knows, made from nothing but its config class.

`small_models(model_type)` yields one model per class that an Auto class builds for the type, with inputs that it
runs on. Widths are divided by one common factor, so that sizes which must agree still do; where the model does not
run that small, the next smaller factor is tried. Exceptions that no rule covers are in exceptions.py.
"""

from __future__ import annotations

import dataclasses
import gc
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from exceptions import INPUTS, OWN_TYPE_ONLY, VALUES
from inputs import candidates
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MOST_PARAMETERS = 100_000_000
VOCABULARY = 157  # no width, so that no head looks like a feed-forward layer
# (width factor, image size factor, layers), smallest model first; 0: as many layers as its config says
SCALES = ((16, 4, 2), (8, 4, 2), (8, 1, 2), (8, 4, 0), (16, 1, 0), (4, 1, 2), (2, 4, 2), (1, 1, 2), (1, 1, 0))
_worked: dict[str, list[tuple[int, int, int]]] = {}
"""By type, the scales to try for its next class."""

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
    r"stem_channels|stage_channels|stage_in_channels|stage_mid_channels|stage_out_channels|output_channels|pooler_\w+|"
    r"\w*(hidden|embed|embedding|intermediate|ffn|mlp|proj|projection|head|inner|latent|model|state)_(dim|dims|size|sizes|width|channels)|"
    r"\w*_(dim|rank|dims|width)|dim_\w+|\w+_lora_rank|\w*(encoder|decoder)_(ffn_dim|hidden_size)|\w+_feedforward|d_\w+)$"
)
_NOT_WIDTH = re.compile(
    r"^(num_|n_(?!embd|inner)|max_|min_|vocab|image|patch|window|kernel|stride|pool_size|seq|token_|input_size$|input_dim$|in_|"
    r"conv_kernel|linear_conv|d_conv|mask_time|mask_feature|block_size|batch|chunk|type_vocab|class|is_|feature_layer|"
    r"attn_conv|mel|spectrogram|feature_size|mamba_d_conv|head_mask|output_(hidden|att))|(_id|_ids|_index|_stride|_kernel|"
    r"_kernel_size|_kernel_dim|kernel_sizes|_heads|_layers|_token|(?<!upsample)_groups|num_channels|_ratio|vocab_size|window_size|patch_size|image_size|"
    r"chunk_size|codebook_size|seq_length|_seq_len|_types|_interval|block_size|channels_in|num_mel_bins|mel_dim|n_mels)$"
)
_EXPERTS = re.compile(
    r"^(num_experts|n_routed_experts|num_local_experts|moe_num_experts|num_routed_experts|n_experts|routed_experts|num_moe_experts|moe_n_experts)$"
)
_PER_TOKEN = re.compile(
    r"(experts_per_tok(en)?|moe_topk|moe_k|moe_top_k|top_k_experts|moe_router_topk|num_selected_experts|router_top_k|moe_num_active)$"
)
_VOCAB = re.compile(r"vocab(_size)?$")
_TOKEN = re.compile(r"(token_id|token_ids|token_index|_id|_idx|_tokens|token)$")
_IMAGE = re.compile(r"^(image_size|img_size|pretrain_image_size|crop_size|input_image_size|frame_size)$")
_POSITIONS = re.compile(
    r"^(max_position_embeddings|n_positions|max_sequence_length|n_ctx|max_seq_len|max_length_embeddings)$"
)


def auto_classes(model_type: str) -> dict[str, list[str]]:
    """Class name → the Auto classes that build it for `model_type`."""
    found: dict[str, list[str]] = {}
    for name, auto in sorted(vars(modeling_auto).items()):
        if name.startswith("AutoModel") and getattr(auto, "_model_mapping", None) is not None:
            classes = auto._model_mapping._model_mapping.get(model_type)
            for cls in [classes] if isinstance(classes, str) else list(classes or ())[:1]:
                if OWN_TYPE_ONLY.get(cls, model_type) == model_type:
                    found.setdefault(cls, []).append(name)
    return found


def small_config(model_type: str, width: int, image: int, layers: int) -> PreTrainedConfig:
    """The config of `model_type` with its widths divided by `width`, image sizes by `image` and few layers."""
    cls = CONFIG_MAPPING[model_type]
    values = VALUES.get(model_type, {})
    default = cls(**values.get("default", {}))
    tokens: dict[int, int] = {}
    return _shrunk(default, width, image, layers, tokens, values)


def _shrunk(
    config: PreTrainedConfig, width: int, image: int, layers: int, tokens: dict[int, int], values: dict[str, Any]
) -> PreTrainedConfig:
    cls = type(config)
    usual = _defaults(cls)
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        name = field.name
        value = config._getattr_without_heterogeneous_validation(name, None)
        if isinstance(value, PreTrainedConfig):
            part = values.get(name, {})
            changes[name] = _shrunk(value, width, image, layers, tokens, part if isinstance(part, dict) else {})
        elif field.init and name not in ("transformers_version", "dtype", "id2label", "label2id", "problem_type"):
            small = _small(name, value, width, image, layers, tokens)
            if small != value or (name in usual and usual[name] != value and _plain(value)):
                changes[name] = small
    changes.update({k: v for k, v in values.items() if k != "default" and not (isinstance(v, dict) and k in changes)})
    for name, value in _derived(config).items():
        changes.setdefault(name, _small(name, value, width, image, layers, tokens))
    small = cls(**changes)
    if hasattr(small, "use_cache"):
        small.use_cache = False
    if "mrope_section" in (getattr(cls, "ignore_keys_at_rope_validation", None) or ()):
        rope = small.rope_parameters
        head = getattr(small, "head_dim", None) or small.hidden_size // small.num_attention_heads
        nested = any(isinstance(value, dict) for value in rope.values())  # one for each kind of layer
        for part in rope.values() if nested else [rope]:
            half = int(head * part.get("partial_rotary_factor", 1)) // 2
            part["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]
    return small


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
    return isinstance(value, int | float | str | bool)


def _defaults(cls: type) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING}


def _small(name: str, value: Any, width: int, image: int, layers: int, tokens: dict[int, int]) -> Any:
    if isinstance(value, dict) and "mrope_section" in value:  # parts of the width of a head
        sections = value["mrope_section"]
        if all(section % width == 0 for section in sections):
            return value | {"mrope_section": [section // width for section in sections]}
    if isinstance(value, bool) or value is None or isinstance(value, str | float | dict):
        return value
    if isinstance(value, list | tuple):
        if not value:
            return value
        if _DEPTHS.match(name):
            return type(value)(min(v, 1) if layers and isinstance(v, int) else v for v in value)
        return type(value)(_small(name, v, width, image, layers, tokens) for v in value)
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


@dataclasses.dataclass
class Built:
    """A model, or why there is none."""

    class_name: str
    autos: list[str]
    model: PreTrainedModel | None
    inputs: dict[str, Any]
    problem: str


def small_models(model_type: str, only: str | None = None) -> Iterator[Built]:
    """For each class of the type: the smallest model that runs, with its inputs, or the reason why none does."""
    for name, autos in auto_classes(model_type).items():
        if only is None or name == only:
            yield build(model_type, name, autos)
            gc.collect()


def build(model_type: str, class_name: str, autos: list[str], seed: int = 0) -> Built:
    """The smallest model of one class that runs."""
    problem = ""
    cls = getattr(transformers, class_name, None)
    if cls is None or not isinstance(cls, type) or not issubclass(cls, PreTrainedModel):
        return Built(class_name, autos, None, {}, missing(class_name, cls))
    for width, image, layers in _worked.get(model_type, list(SCALES)):
        torch.manual_seed(seed)
        try:
            config = own_config(cls, small_config(model_type, width, image, layers))
            with torch.device("meta"):
                count = sum(p.numel() for p in cls._from_config(config, dtype=torch.float32).parameters())
            if count > MOST_PARAMETERS:
                problem = problem or f"{count / 1e6:.0f}M parameters at the smallest size that its config allows"
                continue
        except Exception as error:
            if isinstance(error, ImportError):
                return Built(class_name, autos, None, {}, missing(class_name, cls, error))
        try:
            config = own_config(cls, small_config(model_type, width, image, layers))
            model = cls._from_config(config, dtype=torch.float32).eval()
            randomise(model)
        except ImportError as error:
            return Built(class_name, autos, None, {}, missing(class_name, cls, error))
        except Exception as error:
            problem = f"build: {first_line(error)}"
            continue
        for inputs in candidate_inputs(model, model_type):
            try:
                with torch.no_grad():
                    out = tensors(model(**inputs))
                if out and all(t.isfinite().all() for t in out):
                    _worked[model_type] = [(width, image, layers), *SCALES]
                    return Built(class_name, autos, model, inputs, "")
                problem = "run: its outputs are not finite" if out else "run: no tensors come out"
            except ImportError as error:
                return Built(class_name, autos, None, {}, missing(class_name, cls, error))
            except Exception as error:
                problem = f"run: {first_line(error)}"
        del model
    _worked.setdefault(model_type, list(SCALES[:1]))
    return Built(class_name, autos, None, {}, problem)


def missing(class_name: str, cls: Any, error: Exception | None = None) -> str:
    """Which package a class needs."""
    if error is None:
        try:
            cls.from_pretrained("none")
        except Exception as raised:
            error = raised
    found = re.search(r"requires the (.+?) library|No module named '([\w.]+)'|pip install ([\w-]+)", str(error))
    package = next((g for g in found.groups() if g), "") if found else first_line(error)
    return f"needs {package}"


def first_line(error: BaseException | None) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text}"[:200]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Weights large enough that every layer shows in the output; biases and norms that are not 0 and 1."""
    done: set[int] = set()
    for name, parameter in model.named_parameters():
        if id(parameter) in done or not parameter.is_floating_point():
            continue
        done.add(id(parameter))
        if parameter.dim() >= 2 and "embed" not in name:
            parameter.normal_(std=parameter[0].numel() ** -0.5)
        elif name.endswith("bias") and parameter.dim() == 1:
            parameter.normal_(std=0.1)
        elif name.endswith("weight") and parameter.dim() == 1:
            parameter.uniform_(0.7, 1.3)
        elif parameter.dim() == 1 and re.search(r"scale|gamma|lambda", name) and not re.search(r"logit", name):
            parameter.uniform_(0.5, 1.0)


def tensors(output: Any) -> list[Tensor]:
    """All floating-point tensors in a model's output, in order."""
    if isinstance(output, Tensor):
        return [output.float()] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        output = list(output.values())
    if isinstance(output, list | tuple):
        return [t for o in output for t in tensors(o)]
    if isinstance(output, transformers.cache_utils.Cache) or not hasattr(output, "__dict__"):
        return []
    return []


def candidate_inputs(model: PreTrainedModel, model_type: str) -> Iterator[dict[str, Any]]:
    """Inputs to try, in order: what example_inputs makes, then what the exceptions table says."""
    generator = torch.Generator().manual_seed(1)
    make = INPUTS.get((model_type, type(model).__name__)) or INPUTS.get((model_type, "*"))
    if make is not None:
        yield make(model, generator)
        return
    yield from candidates(model)
