"""Small inputs for any transformers model, from its config and the names of its arguments."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from peerify.errors import ConversionError

_GRID = 4  # patches in each direction; towers merge 2 x 2 of them


def arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the model's forward pass."""
    return inspect.signature(model.forward).parameters


def candidates(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Inputs to try in order: `example_inputs`, then by the names of the arguments of its `forward`.

    Raises ConversionError, like `example_inputs`, for what is not a transformers model.
    """
    if not isinstance(model, PreTrainedModel):
        raise ConversionError(f"{type(model).__name__} is not a transformers model: pass example inputs")
    problem: Exception | None = None
    try:
        yield example_inputs(model)
    except (ConversionError, AttributeError, TypeError, ValueError) as error:  # a config unlike the rules
        problem = error
    accepted = arguments(model)
    required = {n for n, p in accepted.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    sets: list[set[str]] = [
        *(set(), _TILED, _TEXT | _TILED, _TEXT, _SEEN, _TEXT | _SEEN),
        *(_HEARD, _TEXT | _HEARD, _PATCHES, _SERIES, _MORE, _TEXT | _MORE),
        {"inputs_embeds", "decoder_input_ids"},  # a decoder of what another model made
    ]
    tried: list[set[str]] = []
    for extra in sets:
        names = {n for n in required | extra if n in accepted and n in _MAKERS}
        if names and names not in tried:
            tried.append(names)
            ordered = sorted(names)
            for values in itertools.islice(itertools.product(*(_MAKERS[n](model) for n in ordered)), 24):
                yield dict(zip(ordered, values, strict=True))
    if problem is not None and not tried:
        raise ConversionError(f"cannot make example inputs of {type(model).__name__}: pass example inputs") from problem


def example_inputs(model: nn.Module) -> dict[str, Any]:
    """Small inputs for any transformers model, made from its config: a few tokens, one picture, …

    Raises ConversionError if the config does not say what the model takes.
    """
    assert isinstance(model, PreTrainedModel)
    config = model.config
    accepted = inspect.signature(model.forward).parameters
    main = model.main_input_name
    if main not in accepted and main in ("pixel_values", "input_ids"):  # towers that take flattened patches
        main = next((name for name in ("hidden_states", "input_features", main) if name in accepted), main)
    if main == "input_ids":
        inputs: dict[str, Any] = {"input_ids": token_ids(config)}
        if "attention_mask" in accepted:  # without one, models look for padding among the tokens
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    else:
        # torch.linspace rather than random numbers: nobody's random state is touched.
        shape = _patches_shape(model) if "grid_thw" in accepted else _feature_shape(main, config)
        length = int(torch.Size(shape).numel())
        inputs = {main: torch.linspace(-1, 1, length, dtype=model.dtype).reshape(shape)}
    if "grid_thw" in accepted:
        inputs["grid_thw"] = torch.tensor([[1, _GRID, _GRID]])
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(config)
        if main == "input_ids" and isinstance(config.eos_token_id, int):
            inputs["input_ids"][:, -1] = config.eos_token_id  # where classifiers of this kind look
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def token_ids(config: Any) -> Tensor:
    """Eight token ids that mean nothing special to the model: (1, 8)."""
    text = config.get_text_config()
    special: set[int] = set()  # padding, image placeholders and the like make models do other things
    for key, value in [*config.to_dict().items(), *text.to_dict().items()]:
        if key.endswith(("_token_id", "_token_index")):
            special.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    plain = [i for i in range(min(text.vocab_size, len(special) + 10)) if i not in special] or [0]
    return torch.tensor([[plain[i % len(plain)] for i in range(8)]])  # one row: no padding token is needed


def _patches_shape(model: PreTrainedModel) -> tuple[int, ...]:
    """One picture as flattened patches: as many numbers each as the model's first layer reads."""
    first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)), None)
    if first is None:
        raise ConversionError(f"{type(model).__name__} has no layer that reads patches: pass example inputs")
    return _GRID * _GRID, first.weight[0].numel()


def _feature_shape(main: str, config: Any) -> tuple[int, ...]:
    vision = getattr(config, "vision_config", None) or config
    audio = getattr(config, "audio_config", None) or config
    if main == "pixel_values":
        size = getattr(vision, "image_size", 224)
        height, width = (size, size) if isinstance(size, int) else size
        return 1, getattr(vision, "num_channels", 3), height, width
    if main == "input_features" and hasattr(audio, "num_mel_bins"):
        return 1, audio.num_mel_bins, 2 * getattr(audio, "max_source_positions", 64)
    if main == "input_values" and hasattr(audio, "num_mel_bins"):
        return 1, getattr(audio, "max_length", 64), audio.num_mel_bins
    if main == "input_values":
        return 1, 4000
    raise ConversionError(f"cannot make example {main} from the config: pass example inputs")


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def example_tokens(model: PreTrainedModel) -> Tensor:
    """Eight tokens none of which is special."""
    try:
        return token_ids(model.config)
    except Exception:
        return torch.arange(20, 28)[None]


def tower_config(model: PreTrainedModel) -> Any:
    """The config of the part that sees, or the model's own."""
    config = model.config
    for name in ("vlm_config", "thinker_config", "encoder"):
        inner = getattr(config, name, None)
        config = inner if isinstance(inner, PretrainedConfig) else config
    for name in ("vision_config", "vision_tower_config", "image_config", "backbone_config", "vq_config"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    return config


def tower(model: PreTrainedModel) -> nn.Module:
    """The part of the model that sees."""
    wanted = type(tower_config(model))
    return next((m for m in model.modules() if type(getattr(m, "config", None)) is wanted), model)


def image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Channels, height, width."""
    vision = tower_config(model)
    size = getattr(vision, "image_size", None) or getattr(model.config, "image_size", None) or 64
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return channels if isinstance(channels, int) else 3, height, width


def grid(model: PreTrainedModel) -> tuple[int, Tensor]:
    """Width of a flattened patch, and the grid of patches of one picture."""
    vision = tower_config(model)
    merge = getattr(vision, "spatial_merge_size", None) or getattr(vision, "merge_size", None) or 2
    merge = merge if isinstance(merge, int) else 2
    first = next((m for m in tower(model).modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)), None)
    width = 588 if first is None else first.weight[0].numel()
    return width, torch.tensor([[1, 2 * merge, 2 * merge]])


_TEXT = {"input_ids", "qformer_input_ids", "decoder_input_ids", "bbox", "visual_feats", "visual_pos"}
_SEEN = {"pixel_values", "bool_masked_pos", "pixel_values_videos", "task_inputs"}
_TILED = {"pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"}
_HEARD = {"input_features", "input_values"}
_PATCHES = {"target_sizes", "hidden_states", "pixel_values", "grid_thw", "flattened_patches", "latents", "audio_codes"}
_SERIES = {"past_values", "past_time_features", "past_observed_mask", "future_values", "future_time_features", "inputs"}
_MORE = {
    "hidden_states",
    "inputs_embeds",
    "encoder_hidden_states",
    "query_embeds",
    "input_features_mask",
    "input_features",
}


def _video(model: PreTrainedModel) -> Tensor:
    frames = getattr(tower_config(model), "num_frames", None) or getattr(model.config, "frames_per_clip", None) or 4
    return noise(1, frames, *image_shape(model))


def _boxes(model: PreTrainedModel) -> Tensor:
    return torch.tensor([[[i, i, i + 5, i + 3] for i in range(8)]])


def _find(config: Any, *names: str, default: int) -> int:
    """The first of the names that the config or one of its parts gives a number to."""
    parts = [v for v in vars(config).values() if isinstance(v, PretrainedConfig)]
    for part in (config, *parts):
        for name in names:
            value = vars(part).get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _codes(model: PreTrainedModel) -> list[Tensor]:
    ids = example_tokens(model) % 50
    books = _find(model.config, "num_codebooks", "num_quantizers", "n_codebooks", "num_channels", default=4)
    return [ids, ids[..., None].expand(1, 8, books), ids.expand(books, 8), ids[:, None].expand(1, books, 8)]


def _patches(model: PreTrainedModel) -> list[Tensor]:
    """One picture as flattened patches."""
    width, thw = grid(model)
    count = int(thw.prod())
    channels = image_shape(model)[0]
    side = int((width // channels) ** 0.5)
    square = [noise(count, channels, side, side)] if side * side * channels == width else []
    return [noise(count, width), *square]


def _images(model: PreTrainedModel) -> list[Tensor]:
    shape = image_shape(model)
    pictures = [noise(1, *shape), noise(1, 2, *shape), noise(1, shape[0], 64, 64), noise(1, shape[0], 256, 256)]
    pictures += [noise(1, shape[0], shape[2], shape[2]), noise(1, shape[0], 48, 320)]
    if getattr(tower_config(model), "num_frames", None) or getattr(model.config, "frames_per_clip", None):
        pictures = [_video(model), *pictures]
    if {"grid_thw", "image_grid_thw"} & set(inspect.signature(model.forward).parameters):
        pictures = [*_patches(model), *pictures]
    if "target_sizes" in inspect.signature(model.forward).parameters:
        side = _find(model.config, "patch_size", default=14)
        pictures = [noise(1, shape[0], side, 64 * side)]
    if "aspect_ratio_mask" in inspect.signature(model.forward).parameters:
        pictures = [noise(1, 1, 4, *shape)]
    return pictures


def _square(model: PreTrainedModel) -> Tensor:
    channels, _, width = image_shape(model)
    return noise(1, channels, width, width)


def _masked_patches(model: PreTrainedModel) -> list[Tensor]:
    """Every second patch of a picture or a video is hidden."""
    patch = _find(model.config, "patch_size", default=16)
    frames = _find(model.config, "num_frames", default=1) // _find(model.config, "tubelet_size", default=1)
    _, height, width = image_shape(model)
    count = max(1, frames) * (height // patch) * (width // patch)
    return [torch.arange(count)[None] % 2 == 0]


def _sound(model: PreTrainedModel) -> list[Tensor]:
    first = next((m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv1d)), None)
    width = 80 if first is None else first.weight.shape[1]
    bins = _find(
        model.config,
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_feat_per_channel",
        "input_dim",
        "feature_size",
        "input_size",
        default=80,
    )
    frames = 2 * _find(model.config, "max_source_positions", default=32)
    bins *= getattr(model.config, "num_stacked_frames", None) or 1
    return [noise(1, 64, bins), noise(1, bins, frames), noise(1, 8000), noise(1, 1, 8000), noise(1, 128, 160),
            noise(1, 200, width), noise(1, bins, 200), noise(1, 64, 128), noise(1, 1, 1001, bins),
            noise(1, bins, 400), noise(1, 9600), noise(1, 1, 9600)]  # fmt: skip


def _series(model: PreTrainedModel) -> list[Tensor]:
    length = _find(model.config, "context_length", default=32)
    lags = getattr(model.config, "lags_sequence", None) or [0]
    channels = _find(model.config, "num_input_channels", "input_size", default=1)
    return [
        noise(1, length, channels),
        noise(1, length),
        noise(1, length + max(lags)),
        noise(1, length + max(lags), channels),
    ]


def _times(length: str) -> Any:
    def make(model: PreTrainedModel) -> list[Tensor]:
        lags = getattr(model.config, "lags_sequence", None) or [0]
        count = _find(model.config, length, default=8) + (max(lags) if length == "context_length" else 0)
        return [noise(1, count, _find(model.config, "num_time_features", default=1))]

    return make


def _wide(*names: str, length: int = 16) -> Any:
    return lambda model: [
        noise(1, length, _find(model.config, *names, "hidden_size", "d_model", "hidden_dim", default=32))
    ]


_MAKERS: dict[str, Any] = {
    "input_ids": _codes,
    "attention_mask": lambda model: [torch.ones(1, 8, dtype=torch.long)],
    "decoder_input_ids": _codes,
    "qformer_input_ids": lambda model: [example_tokens(model) % 50],
    "audio_codes": lambda model: [c % 8 for c in _codes(model)[::-1]],
    "task_inputs": lambda model: [torch.randint(1, 50, (1, _find(model.config, "task_seq_len", default=77)))],
    "bbox": lambda model: [_boxes(model)],
    "visual_feats": lambda model: [noise(1, 4, _find(model.config, "visual_feat_dim", default=32))],
    "visual_pos": lambda model: [noise(1, 4, 4)],
    "pixel_values": _images,
    "aspect_ratio_ids": lambda model: [torch.ones(1, 1, dtype=torch.long)],
    "aspect_ratio_mask": lambda model: [torch.ones(1, 1, 4, dtype=torch.long)],
    "mask": lambda model: [torch.ones(1, 64, dtype=torch.bool)],
    "pixel_values_videos": lambda model: [_video(model), _video(model).transpose(1, 2)],
    "flattened_patches": lambda model: [noise(1, 16, 2 + 3 * 16 * 16).abs()],  # the first two are row and column
    "input_features": _sound,
    "input_features_mask": lambda model: [torch.ones(1, n, dtype=torch.long) for n in (64, 400)],
    "input_values": lambda model: _sound(model)[2:] + _sound(model)[:2] + _wide()(model),
    "waveform": lambda model: [noise(1, 8000)],
    "hidden_states": lambda model: (
        [*_patches(model), *_wide("encoder_hidden_size")(model)]
        if "grid_thw" in inspect.signature(model.forward).parameters
        else [*_wide()(model), _sound(model)[0]]
    ),
    "grid_thw": lambda model: [grid(model)[1]],
    "image_grid_thw": lambda model: [grid(model)[1]],
    "merge_sizes": lambda model: [torch.tensor([1]), torch.tensor([2])],
    "target_sizes": lambda model: [torch.tensor([[8, 8]])],
    "past_values_padding": lambda model: [torch.zeros(1, _find(model.config, "context_length", default=32))],
    "codebook_idx": lambda model: [1],
    "audio_mel": _sound,
    "audio_mel_mask": lambda model: [torch.zeros(1, n, dtype=torch.bool) for n in (64, 200)],
    "input_lengths": lambda model: [torch.tensor([64])],
    "freq": lambda model: [torch.zeros(1, 1, dtype=torch.long)],
    "prompt_pixel_values": lambda model: [_square(model)],
    "prompt_masks": lambda model: [_square(model)],
    "bool_masked_pos": _masked_patches,
    "latents": lambda model: [*_wide()(model), _wide()(model)[0].transpose(1, 2)],
    "inputs_embeds": _wide(),
    "encoder_hidden_states": _wide("encoder_hidden_size"),
    "query_embeds": _wide(length=8),
    "past_values": _series,
    "past_observed_mask": lambda model: [torch.ones_like(x) for x in _series(model)[2:]],
    "past_time_features": _times("context_length"),
    "future_time_features": _times("prediction_length"),
    "future_values": lambda model: [noise(1, _find(model.config, "prediction_length", default=8))],
    "inputs": lambda model: [noise(1, 16, _find(model.config, "d_model", default=32)), *_images(model)],
    "noise_embeds": _wide(),
    "context_hidden_states": lambda model: [x.repeat(1, 1, n) for n in (1, 2, 5) for x in _wide()(model)],
    "state": lambda model: [noise(1, 32)],
    "action_embeds": _wide(),
}
