"""Text with pictures, videos and sounds, for models that have a tower for each of them.

`with_media(model)` asks the model's own get_image_features (…_video_…, …_audio_…) how many vectors its tower makes of
a picture, and puts as many placeholders into the text. What a tower takes is tried in the shapes that transformers'
processors produce; widths are read off the tower's first layer.
"""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from peerify.discovery.example_inputs import example_tokens, grid, image_shape, noise, tower_config

KINDS = {"image": ("image", "img", "im", "vision"), "video": ("video",), "audio": ("audio", "sound", "speech")}
_MAIN = {
    "image": ("pixel_values", "pixel_values_images"),
    "video": ("pixel_values_videos",),
    "audio": ("input_features", "input_values"),
}
_TYPE = {"image": 1, "video": 2, "audio": 3}


def with_media(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    """Inputs with everything that the model has a tower for, then with one of each."""
    parts = {kind: list(itertools.islice(_features(model, kind), 4)) for kind in KINDS}
    parts = {kind: found for kind, found in parts.items() if found}
    if len(parts) > 1:
        yield _together(model, {kind: found[0] for kind, found in parts.items()})
        for left_out in parts:
            if len(parts) > 2:
                yield _together(model, {kind: found[0] for kind, found in parts.items() if kind != left_out})
    for kind, found in parts.items():
        for one in found:
            yield _together(model, {kind: one})


Seen = tuple[dict[str, Any], int, int]  # arguments, placeholder, how many


def _together(model: PreTrainedModel, parts: dict[str, Seen]) -> dict[str, Any]:
    ids = example_tokens(model)
    types = torch.zeros_like(ids)
    inputs: dict[str, Any] = {}
    for kind, (seen, token, count) in parts.items():
        place = torch.full((1, count), token)
        # Text between two media, and before the first: models look for where one ends.
        ids = torch.cat([ids[:, :2], place, ids[:, 2:]], dim=1)
        types = torch.cat([types[:, :2], torch.full_like(place, _TYPE[kind]), types[:, 2:]], dim=1)
        inputs |= seen
    inputs["input_ids"] = ids
    accepted = inspect.signature(model.forward).parameters
    if "attention_mask" in accepted:
        inputs["attention_mask"] = torch.ones_like(ids)
    if "mm_token_type_ids" in accepted or "mm_token_type_ids" in _inner_arguments(model):
        inputs["mm_token_type_ids"] = types
    if "token_type_ids" in accepted or "token_type_ids" in _inner_arguments(model):
        inputs["token_type_ids"] = types.clamp(max=1)
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = example_tokens(model)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs


def _inner_arguments(model: PreTrainedModel) -> set[str]:
    """Arguments that the model passes on to a model inside it without naming them."""
    arguments = inspect.signature(model.forward).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
        return set()
    for inner in model.children():
        accepted = inspect.signature(inner.forward).parameters
        if isinstance(inner, PreTrainedModel) and "input_ids" in accepted:
            return set(accepted) | _inner_arguments(inner)
    return set()


def _features(model: PreTrainedModel, kind: str) -> Iterator[Seen]:
    """What a tower takes, its placeholder and how many of them stand for it."""
    name = f"get_{kind}_features"
    takes_anything = {"args", "kwargs"}
    owners = [m for m in model.modules() if hasattr(m, name)]  # outer ones pass on what they are given
    owners = [m for m in owners if not set(inspect.signature(getattr(m, name)).parameters) <= takes_anything]
    owner = owners[-1] if owners else None
    token = _placeholder(model.config, kind)
    if owner is None or token is None:
        return
    features_of = getattr(owner, name)
    accepted = set(inspect.signature(features_of).parameters)
    arguments = set(inspect.signature(model.forward).parameters) | _inner_arguments(model)
    width = model.get_input_embeddings().weight.shape[-1]
    for seen in media(model, kind, accepted | arguments):
        seen = {n: v for n, v in seen.items() if n in accepted | arguments}
        given = {n: v for n, v in seen.items() if n in accepted}
        main = next((n for n in _MAIN[kind] if n in seen), None)
        first = next(iter(inspect.signature(features_of).parameters))
        if main is not None and first not in given and first in ("pixel_values", "input_features"):
            given[first] = seen[main]
        if "input_ids" in accepted:
            given["input_ids"] = example_tokens(model)
        count = 0
        with suppress(Exception), torch.no_grad():
            count = _count(features_of(**given), width)
        if count:
            yield {n: v for n, v in seen.items() if n in arguments}, token, count


def _placeholder(config: PreTrainedConfig, kind: str) -> int | None:
    names = "|".join(KINDS[kind])
    pattern = re.compile(rf"^({names})(_(context|pad|patch|soft))?(_token)?_(id|index)$")
    for name, value in vars(config).items():
        if pattern.match(name) and isinstance(value, int):
            return value
    inner = (v for v in vars(config).values() if isinstance(v, PreTrainedConfig))
    found = next((t for part in inner if (t := _placeholder(part, kind)) is not None), None)
    return _placeholder(config, "image") if found is None and kind == "video" else found


def _count(made: Any, width: int) -> int:
    """How many vectors of this width there are in what a tower returned."""
    if isinstance(made, dict):
        made = made.get("pooler_output", None) if made.get("pooler_output", None) is not None else made[0]
    if isinstance(made, list | tuple):
        return sum(_count(m, width) for m in made if m is not None)
    count, rest = divmod(made.numel(), width)
    return made.shape[:-1].numel() if rest else count


def media(model: PreTrainedModel, kind: str, accepted: set[str]) -> Iterator[dict[str, Any]]:
    """Arguments for one picture, video or sound, in the shapes that towers take."""
    return _sounds(model) if kind == "audio" else _pictures(model, kind, accepted)


def _pictures(model: PreTrainedModel, kind: str, accepted: set[str]) -> Iterator[dict[str, Any]]:
    channels, height, width = image_shape(model)
    main = "pixel_values" if kind == "image" else "pixel_values_videos"
    if kind == "image" and "pixel_values_images" in accepted and "pixel_values" not in accepted:
        main = "pixel_values_images"
    grids = f"{kind}_grid_thw"
    sizes = torch.tensor([[height, width]])
    flat, thw = grid(model)
    count = int(thw.prod())
    if grids in accepted or "image_grid_hw" in accepted:
        more = {grids: thw, "image_grid_hw": thw[:, 1:], f"{kind}_merge_sizes": torch.tensor([2])}
        if main in accepted and "get_image_features" not in dir(model):
            yield {main: noise(1, count, flat), **more}  # ColQwen pads
        yield {main: noise(count, flat), **more}
        yield {main: noise(count, channels, flat // channels), **more}
        side = int((flat // channels) ** 0.5)
        if side * side * channels == flat:
            yield {main: noise(count, channels, side, side), **more}
        for one in (torch.tensor([1]), torch.tensor([2])):
            yield {main: noise(count, flat), **more, f"{kind}_merge_sizes": one}
    places = {"spatial_shapes": thw[:, 1:], "pixel_attention_mask": torch.ones(1, count, dtype=torch.long)}
    if "spatial_shapes" in accepted:
        yield {main: noise(1, count, flat), **places}
    if f"target_sizes{'' if kind == 'image' else '_videos'}" in accepted:  # all patches in one row
        side = int((flat // channels) ** 0.5)
        yield {main: noise(1, channels, side, 64 * side),
               "target_sizes": torch.tensor([[8, 8]]), "target_sizes_videos": torch.tensor([[8, 8]])}  # fmt: skip
    if f"{kind}_token_pooling" in accepted:  # which patches each token is made of
        side = height // getattr(tower_config(model), "patch_size", 14)
        pooling = torch.arange(4)[None]
        yield {main: noise(1, side * side, flat), f"{kind}_token_pooling": pooling,
               f"{kind}_grids": torch.tensor([[1, 1, 0, 0]] if kind == "image" else [[1, 1, 1]])}  # fmt: skip
    picture = noise(1, channels, height, width)
    mask = torch.ones(1, height, width, dtype=torch.long)
    if kind == "image":
        yield {main: picture}
        yield {main: picture, "image_sizes": sizes, "high_res_pixel_values": noise(1, channels, 1024, 1024)}
        for tiles in (1, 2, 3, 5):
            more = {"image_sizes": sizes, "pixel_attention_mask": mask[:, None].expand(-1, tiles, -1, -1)}
            tiled = picture[:, None].expand(-1, tiles, -1, -1, -1)
            yield {main: tiled, **more}
            yield {main: tiled, "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool)}
    for frames in {getattr(tower_config(model), "num_frames", None) or 2, 2, 8}:
        if kind == "video" and isinstance(frames, int):
            yield {main: noise(1, frames, channels, height, width)}
            yield {main: noise(frames, channels, height, width)}


def _sounds(model: PreTrainedModel) -> Iterator[dict[str, Any]]:
    config = model.config
    config = getattr(config, "thinker_config", config)
    names = ("audio_config", "encoder_config", "sound_config", "speech_config", "audio_encoder_config")
    audio = next((part for n in names if (part := getattr(config, n, None)) is not None), config)
    keys = ("num_mel_bins", "input_dim", "input_feat_size", "feature_size", "n_mels", "input_size", "d_input")
    parts = [audio, *(part for part in vars(audio).values() if isinstance(part, PreTrainedConfig))]
    bins = next((b for part in parts for n in keys if isinstance(b := getattr(part, n, None), int)), 80)
    bins *= getattr(audio, "num_stacked_frames", None) or 1
    positions = getattr(audio, "max_source_positions", None)
    for frames in dict.fromkeys((2 * positions if isinstance(positions, int) else 64, 64, 200, 3000)):
        mask = torch.ones(1, frames, dtype=torch.long)
        masks = dict.fromkeys(("input_features_mask", "feature_attention_mask", "padding_mask", "attention_mask"), mask)
        lengths = {
            "audio_feature_lengths": torch.tensor([frames]),
            "chunk_sample_lengths": torch.tensor([160 * frames]),
        }
        masks |= {"input_features_attention_mask": mask}
        sound = noise(1, bins, frames)
        for x in (sound, sound.transpose(1, 2), noise(1, 1, frames), noise(1, frames)):
            both = {"input_features": x, "input_values": x}
            yield {**both, **masks, **lengths}
            yield {**both, **masks, **lengths, "input_features_mask": mask.bool()}
            yield both
