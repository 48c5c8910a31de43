"""The recipe: one schema for YAML files, ``--set key=value`` and the promoted flags of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator
from pydantic.fields import FieldInfo

from peerify.config.grow import GrowConfig
from peerify.config.peer import PeerConfig, Section
from peerify.config.train import TrainConfig
from peerify.config.yamlfile import flatten, nest, parse_overrides, read_mapping
from peerify.errors import OutputError, UsageError
from peerify.hub_calls import ref_fault
from peerify.reading import local_path, printable, shown


class CalibrationConfig(Section):
    """The text that decides how experts are arranged and retrieved."""

    data: str | list[str] | None = None
    """Calibration text: a .txt, .jsonl or .parquet file or a Hub dataset (name or name:config)."""

    tokens: int = Field(default=16384, ge=1)
    """Tokens of calibration text; more take longer, and less is lost."""

    context: int = Field(default=512, ge=2)
    """Tokens per calibration window."""

    @property
    def sources(self) -> list[str]:
        """`data` as a list, empty when none was given."""
        return [self.data] if isinstance(self.data, str) else list(self.data or [])


class HubConfig(Section):
    """Where and how the model is published."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """Repository on the Hugging Face Hub, user/name."""

    private: bool | None = None
    """Visibility of a repository that does not exist yet; one that exists must have it already."""

    revision: str | None = None
    """Branch to push to, made if need be; by default main."""

    tag: str | None = None
    """Name for the pushed commit, set once the model was loaded back from it."""

    create_pr: bool = False
    """Open a pull request against main instead of committing to it."""

    message: str | None = Field(default=None, min_length=1)
    """Title of the commit."""

    include: list[str] = Field(default_factory=list)
    """Patterns of file names to send, instead of all that belong to the model."""

    exclude: list[str] = Field(default_factory=list)
    """Patterns of file names to leave out."""

    @field_validator("revision", "tag")
    @classmethod
    def _check_ref(cls, name: str | None) -> str | None:
        if name is not None and (fault := ref_fault(name)):
            raise ValueError(fault)
        return name

    every: int | None = Field(default=None, ge=1)
    """While training, also push every N-th checkpoint, to the branch `checkpoints` unless revision names one."""


class Recipe(Section):
    """Everything one conversion needs. Relative paths start at the working directory."""

    model: str = Field(min_length=1)
    """Dense model: a Hub id, a directory or a .gguf file."""

    output: str = Field(min_length=1)
    """Folder to write."""

    revision: str | None = None
    """Branch, tag or commit of a Hub model."""

    convert: PeerConfig = PeerConfig()
    """The PEER layers."""

    calibration: CalibrationConfig = CalibrationConfig()
    """The calibration text."""

    grow: GrowConfig | None = None
    """New experts beside those that were converted."""

    train: TrainConfig | None = None
    """Continued training of what was converted."""

    hub: HubConfig | None = None
    """Publishing, by `peerify push` and while training."""

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights while converting and in the written files."""

    max_shard_size: str = "5GB"
    """Largest size of one written .safetensors file."""

    overwrite: bool = False
    """Replace the output folder, where peerify wrote it and nobody put anything else into it."""

    trust_remote_code: bool = False
    """Run Python code that comes with the input model."""

    @field_validator("max_shard_size")
    @classmethod
    def _check_size(cls, size: str) -> str:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([KMGT])B", size)
        if match is None or float(match[1]) * 1000 ** "_KMGT".index(match[2]) < 1000:
            raise ValueError("a size is written as 5GB or 500MB, at least 1KB")
        return size

    @field_validator("output")
    @classmethod
    def _refuse_gguf(cls, output: str) -> str:
        if output.lower().endswith(".gguf"):
            raise ValueError("a PEER model cannot be written as GGUF: llama.cpp has no PEER layer; name a folder")
        return output

    @field_validator("convert", "calibration", mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value  # `convert:` with nothing below it

    @property
    def training(self) -> TrainConfig:
        """The `train:` part. Raises UsageError where there is none."""
        if self.train is None:
            raise UsageError("the recipe has no train section: add `train:` with at least data.sources below it")
        return self.train

    @property
    def growth(self) -> GrowConfig:
        """The `grow:` part. Raises UsageError where there is none."""
        if self.grow is None:
            raise UsageError("how far to grow is not said: give --num-experts, or `grow:` with num_experts below it")
        return self.grow

    @property
    def trained_output(self) -> str:
        """Where the trained model is written."""
        return self.training.output or f"{self.output.rstrip('/')}-healed"

    @property
    def run_folder(self) -> Path:
        """Where checkpoints, the log and curves of a training lie."""
        return local_path(f"{self.trained_output}-run", OutputError)

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        overrides: Sequence[str] = (),
        flags: Mapping[str, tuple[str, Any]] | None = None,
    ) -> Recipe:
        """Read a recipe; later sources win: the file, then `overrides`, then `flags`.

        Args:
            path: a YAML file, or None for the defaults.
            overrides: ``"convert.topk=4"`` strings; the value is read as YAML.
            flags: dotted key → (the command-line flag to name in messages, value).

        Raises:
            UsageError: naming the file or flag, the key, and the remedy.
        """
        values = flatten(read_mapping(path)) if path is not None else {}
        origins = dict.fromkeys(values, printable(path or ""))
        spoken = parse_overrides(overrides) | {key: value for key, (_, value) in (flags or {}).items()}
        # What the command line says of the compute replaces what a recipe says of it in other words.
        ways = [{"convert.active"}, {"convert.topk"}, {"convert.max_loss"}]
        if any(way & spoken.keys() for way in ways):
            for way in ways:
                if not way & spoken.keys():
                    values = {key: value for key, value in values.items() if key not in way}
        values.update(spoken)
        for key in spoken:
            origins.pop(key, None)  # so that the dict's order is the order of speaking
            origins[key] = (flags or {}).get(key, ("--set",))[0]
        try:
            return cls.model_validate(nest(values))
        except ValidationError as error:
            raise UsageError(_one_sentence(error, origins, str(path) if path else None)) from None


@cache
def _schema() -> dict[str, FieldInfo]:
    """Every dotted key, sections included, in order; elements of lists without their number."""

    def walk(model: type[BaseModel], prefix: str) -> dict[str, FieldInfo]:
        found = {}
        for name, field in model.model_fields.items():
            found[prefix + name] = field
            inner = _model_in(field.annotation)
            found |= walk(inner, f"{prefix}{name}.") if inner else {}
        return found

    return walk(Recipe, "")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The section behind `Section`, `Section | None` and `list[Section]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((model for part in get_args(annotation) if (model := _model_in(part))), None)


def _is_section(key: str) -> bool:
    return key in _schema() and _model_in(_schema()[key].annotation) is not None


def _unnumbered(key: str) -> str:
    return re.sub(r"\.\d+(?=\.|$)", "", key)


def valid_keys() -> list[str]:
    """Every dotted key a recipe may hold, in order."""
    return [key for key in _schema() if not _is_section(key)]


def describe(key: str) -> str:
    """The documentation of one dotted key, the only place it is written."""
    return str(_schema()[_unnumbered(key)].description)


def _one_sentence(error: ValidationError, origins: Mapping[str, str], path: str | None) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    known = [n for n in range(1, len(location) + 1) if _unnumbered(".".join(location[:n])) in _schema()]
    length = max(known, default=0) + (first["type"] == "extra_forbidden")
    key = ".".join(location[: max(1, length)])
    message = first["msg"].removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    # A rule over several keys is blamed on the one said last, of those it speaks of if there are any.
    said = {
        name: origin
        for name, origin in origins.items()
        if not key or name == key or name.startswith(key + ".") or key.startswith(name + ".")
    }
    spoken_of = [origin for name, origin in said.items() if name.rpartition(".")[2] in message]
    origin = [path, *said.values(), *spoken_of][-1]
    rule = first["type"] == "value_error" and (not key or _is_section(_unnumbered(key)))
    is_flag = origin is not None and origin.startswith("--") and origin != "--set"
    where = f"{origin}: " if origin else ""
    name = "" if (rule and "." not in key) or is_flag else f"{key}: "
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {printable(key)}; {_suggest(key)}{more}"
    if first["type"] == "missing":
        return f"{where}{key} is missing: {describe(key)[:-1]}{more}"
    given = "" if rule else f", not {shown(first['input'])}"
    return f"{where}{name}{message}{given}{more}"


def _suggest(key: str) -> str:
    key = _unnumbered(key)
    parent, _, name = key.rpartition(".")
    siblings = [known for known in _schema() if known.rpartition(".")[0] == parent]
    own = {known.rpartition(".")[2]: known for known in siblings}
    by_name = {known.rpartition(".")[2]: known for known in reversed(valid_keys())}
    near = [own[match] for match in difflib.get_close_matches(name, own, 1, 0.7)]
    near = near or difflib.get_close_matches(key, valid_keys(), 1, 0.8)
    near = near or [by_name[match] for match in difflib.get_close_matches(name, by_name, 1, 0.7)]
    if near:
        return f"did you mean {near[0]}?"
    return "valid keys are " + ", ".join(siblings or Recipe.model_fields)
