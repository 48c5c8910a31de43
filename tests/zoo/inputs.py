"""Inputs for any transformers model, from the names of the arguments of its `forward`."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from peerify.dataflow import example_inputs


def candidates(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs to try in order, those that use most of the model first."""
    arguments = inspect.signature(model.forward).parameters
    given: dict[str, Any] = {}
    with suppress(Exception):
        given = example_inputs(model)
    if "MultipleChoice" in type(model).__name__:
        yield {name: x[:, None].expand(-1, 2, -1) for name, x in given.items() if isinstance(x, Tensor)}
    if "input_ids" in arguments:
        yield from _multimodal(model, arguments, given)
    if given:
        yield given
    required = {n for n, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    tried: list[set[str]] = []
    for extra in (set(), _TEXT, _SEEN, _TEXT | _SEEN, _HEARD, _TEXT | _HEARD, _PATCHES, _SERIES, _MORE, _TEXT | _MORE):
        names = {n for n in required | extra if n in arguments and n in _MAKERS}
        if names and names not in tried:
            tried.append(names)
            ordered = sorted(names)
            for values in itertools.islice(itertools.product(*(_MAKERS[n](model) for n in ordered)), 16):
                yield dict(zip(ordered, values, strict=True))


def _multimodal(model: PreTrainedModel, arguments: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Text with placeholders for one picture or sound, as many as the tower makes of it."""
    kinds = (
        ("image", "pixel_values", ("image_token_id", "image_token_index", "img_token_id")),
        ("audio", "input_features", ("audio_token_id", "audio_token_index")),
        ("audio", "input_values", ("audio_token_id", "audio_token_index")),
    )
    for kind, name, tokens in kinds:
        features_of = getattr(model, f"get_{kind}_features", None) or getattr(
            getattr(model, "model", None), f"get_{kind}_features", None
        )
        token = next((t for n in tokens if isinstance(t := getattr(model.config, n, None), int)), None)
        if features_of is None or token is None or name not in arguments:
            continue
        accepted = inspect.signature(features_of).parameters
        for seen in _pictures(model) if kind == "image" else _sounds(model, name):
            seen = {n: v for n, v in seen.items() if n in arguments or n in accepted}
            with suppress(Exception), torch.no_grad():
                made = features_of(**{n: v for n, v in seen.items() if n in accepted})
                count = _rows(made)
                ids = _ids(model)
                ids = torch.cat([ids[:, :4], torch.full((1, count), token), ids[:, 4:]], dim=1)
                inputs = {"input_ids": ids, **{n: v for n, v in seen.items() if n in arguments}}
                if "attention_mask" in arguments:
                    inputs["attention_mask"] = torch.ones_like(ids)
                if "token_type_ids" in arguments or "mm_token_type_ids" in arguments:
                    which = "mm_token_type_ids" if "mm_token_type_ids" in arguments else "token_type_ids"
                    inputs[which] = (ids == token).long()
                if "decoder_input_ids" in given:
                    inputs["decoder_input_ids"] = given["decoder_input_ids"]
                if "use_cache" in given:
                    inputs["use_cache"] = False
                yield inputs


def _rows(made: Any) -> int:
    made = getattr(made, "pooler_output", made)
    if made is None:
        raise ValueError
    if isinstance(made, list | tuple):
        return sum(_rows(m) for m in made)
    return int(made.shape[:-1].numel())


def _vision(model: PreTrainedModel) -> Any:
    for name in ("vision_config", "vision_tower_config", "image_config", "backbone_config", "vq_config"):
        if getattr(model.config, name, None) is not None:
            return getattr(model.config, name)
    return model.config


def _image_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    vision = _vision(model)
    size = getattr(vision, "image_size", None) or getattr(model.config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    channels = getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3
    return channels if isinstance(channels, int) else 3, height, width


def _pictures(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    channels, height, width = _image_shape(model)
    vision = _vision(model)
    sizes = torch.tensor([[height, width]])
    picture = _noise(1, channels, height, width)
    yield {"pixel_values": picture}
    yield {"pixel_values": picture, "image_sizes": sizes}
    patch = getattr(vision, "patch_size", 14)
    patch = patch if isinstance(patch, int) else patch[-1]
    time = getattr(vision, "temporal_patch_size", 1)
    merge = getattr(vision, "spatial_merge_size", 2)
    rows = 2 * merge
    flat = _noise(rows * rows, channels * time * patch * patch)
    grid = torch.tensor([[1, rows, rows]])
    yield {"pixel_values": flat, "image_grid_thw": grid}
    yield {"pixel_values": flat.reshape(rows * rows, channels, time * patch, patch), "image_grid_thw": grid}
    yield {"pixel_values": flat.reshape(rows * rows, channels * time, patch, patch), "image_grid_thw": grid}
    yield {"pixel_values": picture[None], "image_sizes": sizes}
    yield {
        "pixel_values": picture[None],
        "image_sizes": sizes,
        "pixel_attention_mask": torch.ones(1, 1, height, width, dtype=torch.long),
    }


def _sounds(model: PreTrainedModel, name: str) -> Iterator[dict[str, Any]]:
    audio = getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None) or model.config
    bins = getattr(audio, "num_mel_bins", None) or getattr(audio, "input_dim", None) or 80
    for frames in (64, 2 * (getattr(audio, "max_source_positions", None) or 50), 3000):
        sound = _noise(1, frames) if name == "input_values" else _noise(1, bins, frames)
        for x in (sound, sound.transpose(1, -1)):
            length = frames
            mask = torch.ones(1, length, dtype=torch.long)
            yield {name: x, "input_features_mask": mask, "feature_attention_mask": mask, "padding_mask": mask,
                   "audio_feature_lengths": torch.tensor([length]), "input_features_attention_mask": mask}  # fmt: skip
            yield {name: x}


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _ids(model: PreTrainedModel) -> Tensor:
    from peerify.dataflow import _token_ids

    try:
        return _token_ids(model.config)
    except Exception:
        return torch.arange(20, 28)[None]


_TEXT = {"input_ids", "decoder_input_ids", "bbox", "visual_feats", "visual_pos"}
_SEEN = {"pixel_values", "bool_masked_pos", "pixel_values_videos", "task_inputs"}
_HEARD = {"input_features", "input_values"}
_PATCHES = {"hidden_states", "pixel_values", "grid_thw", "flattened_patches", "latents", "audio_codes"}
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
    frames = getattr(_vision(model), "num_frames", None) or getattr(model.config, "frames_per_clip", None) or 4
    return _noise(1, frames, *_image_shape(model))


def _boxes(model: PreTrainedModel) -> Tensor:
    return torch.tensor([[[i, i, i + 5, i + 3] for i in range(8)]])


def _find(config: Any, *names: str, default: int) -> int:
    """The first of the names that the config or one of its parts gives a number to."""
    parts = [v for v in vars(config).values() if isinstance(v, PreTrainedConfig)]
    for part in (config, *parts):
        for name in names:
            value = vars(part).get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
    return default


def _codes(model: PreTrainedModel) -> list[Tensor]:
    ids = _ids(model) % 50
    books = _find(model.config, "num_codebooks", "num_quantizers", "n_codebooks", "num_channels", default=4)
    return [ids, ids[..., None].expand(1, 8, books), ids.expand(books, 8), ids[:, None].expand(1, books, 8)]


def _patches(model: PreTrainedModel) -> Tensor:
    return next(seen["pixel_values"] for seen in _pictures(model) if "image_grid_thw" in seen)


def _grid(model: PreTrainedModel) -> Tensor:
    return next(seen["image_grid_thw"] for seen in _pictures(model) if "image_grid_thw" in seen)


def _images(model: PreTrainedModel) -> list[Tensor]:
    shape = _image_shape(model)
    pictures = [_noise(1, *shape), _noise(1, 2, *shape), _noise(1, shape[0], 64, 64), _noise(1, shape[0], 256, 256)]
    if getattr(_vision(model), "num_frames", None) or getattr(model.config, "frames_per_clip", None):
        pictures = [_video(model), *pictures]
    if "grid_thw" in inspect.signature(model.forward).parameters:
        pictures = [_patches(model), *pictures]
    return pictures


def _sound(model: PreTrainedModel) -> list[Tensor]:
    bins = _find(model.config, "num_mel_bins", "input_feat_per_channel", "input_dim", "feature_size", default=80)
    frames = 2 * _find(model.config, "max_source_positions", default=32)
    return [_noise(1, 64, bins), _noise(1, bins, frames), _noise(1, 8000), _noise(1, 1, 8000), _noise(1, 128, 160)]


def _series(model: PreTrainedModel) -> list[Tensor]:
    length = _find(model.config, "context_length", default=32)
    lags = getattr(model.config, "lags_sequence", None) or [0]
    channels = _find(model.config, "num_input_channels", "input_size", default=1)
    return [
        _noise(1, length, channels),
        _noise(1, length),
        _noise(1, length + max(lags)),
        _noise(1, length + max(lags), channels),
    ]


def _times(length: str) -> Any:
    def make(model: PreTrainedModel) -> list[Tensor]:
        lags = getattr(model.config, "lags_sequence", None) or [0]
        count = _find(model.config, length, default=8) + (max(lags) if length == "context_length" else 0)
        return [_noise(1, count, _find(model.config, "num_time_features", default=1))]

    return make


def _wide(*names: str, length: int = 16) -> Any:
    return lambda model: [
        _noise(1, length, _find(model.config, *names, "hidden_size", "d_model", "hidden_dim", default=32))
    ]


_MAKERS: dict[str, Any] = {
    "input_ids": _codes,
    "attention_mask": lambda model: [torch.ones(1, 8, dtype=torch.long)],
    "decoder_input_ids": _codes,
    "audio_codes": lambda model: [c % 8 for c in _codes(model)[::-1]],
    "task_inputs": lambda model: [torch.randint(1, 50, (1, _find(model.config, "task_seq_len", default=77)))],
    "bbox": lambda model: [_boxes(model)],
    "visual_feats": lambda model: [_noise(1, 4, _find(model.config, "visual_feat_dim", default=32))],
    "visual_pos": lambda model: [_noise(1, 4, 4)],
    "pixel_values": _images,
    "pixel_values_videos": lambda model: [_video(model), _video(model).transpose(1, 2)],
    "flattened_patches": lambda model: [_noise(1, 16, 2 + 3 * 16 * 16)],
    "input_features": _sound,
    "input_features_mask": lambda model: [torch.ones(1, 64, dtype=torch.long)],
    "input_values": lambda model: _sound(model)[2:] + _sound(model)[:2],
    "waveform": lambda model: [_noise(1, 8000)],
    "hidden_states": lambda model: (
        [_patches(model), *_wide("encoder_hidden_size")(model)]
        if "grid_thw" in inspect.signature(model.forward).parameters
        else _wide()(model)
    ),
    "grid_thw": lambda model: [_grid(model)],
    "latents": lambda model: [*_wide()(model), _wide()(model)[0].transpose(1, 2)],
    "inputs_embeds": _wide(),
    "encoder_hidden_states": _wide("encoder_hidden_size"),
    "query_embeds": _wide(length=8),
    "past_values": _series,
    "past_observed_mask": lambda model: [torch.ones_like(x) for x in _series(model)[-1:]],
    "past_time_features": _times("context_length"),
    "future_time_features": _times("prediction_length"),
    "future_values": lambda model: [_noise(1, _find(model.config, "prediction_length", default=8))],
    "inputs": lambda model: [_noise(1, 16, _find(model.config, "d_model", default=32)), *_images(model)],
    "noise_embeds": _wide(),
    "context_hidden_states": _wide(),
    "state": lambda model: [_noise(1, 32)],
    "action_embeds": _wide(),
}
