"""The recipe: one schema for YAML files, ``--set key=value`` and the promoted flags of the command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo

from peerify.errors import UsageError
from peerify.training.config import TrainConfig
from peerify.yamlfile import flatten, nest, parse_overrides, read_mapping

_RULES = ConfigDict(
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    coerce_numbers_to_str=True,  # YAML reads `layers: 4` and `revision: 1234567` as integers
    allow_inf_nan=False,
)


class PeerConfig(BaseModel):
    """What the converted layers look like. ``None`` means: chosen per layer from its shape."""

    model_config = _RULES

    PEER_PAPER: ClassVar[dict[str, Any]] = {
        "gates": "softmax",
        "joint_topk": False,
        "share_pool": True,
        "share_keys": True,
        "share_query": False,
        "query_norm": True,
        "rerank": "none",
        "num_shared": 0,
    }

    layers: str = Field(default="all", min_length=1)
    """Which feed-forward layers to convert: all, auto (with active or max_loss as the target: leaves dense what would
    have to stay nearly whole), middle, first-last, indices (0,4,9 or 12-18), path globs."""

    active: float | None = Field(default=0.5, gt=0, le=1)
    """Share of the dense layers' compute spent on experts per token, over all layers; not together with topk or
    max_loss."""

    allocation: Literal["uniform", "sensitivity"] = "sensitivity"
    """Active share of each layer: uniform, the same for all, or by sensitivity, more where errors cost more, at the
    same total; measuring that takes time, as much for little calibration text as for a lot."""

    max_loss: float | None = Field(default=None, gt=1)
    """Instead of active: ratio of perplexities that conversion may cost as predicted from each layer's sensitivity,
    such as 1.1; the least compute that keeps it is found."""

    preset: Literal["peer-paper"] | None = None
    """peer-paper: the PEER paper's own layer (Algorithm 1: shared keys, softmax gates, query batch norm)."""

    num_heads: int | None = Field(default=None, ge=1)
    """Query heads h."""

    topk: int | None = Field(default=None, ge=1)
    """Experts added up per head (k), instead of an active share."""

    candidates: int | None = Field(default=None, ge=1)
    """Experts retrieved per head before re-ranking shortlists the best of them."""

    shortlist: int | None = Field(default=None, ge=1)
    """Candidates per head whose activation is evaluated, before the topk that contribute most are added up; by default
    topk, where that is given. For gated experts."""

    num_experts: int | None = Field(default=None, ge=1)
    """Experts per layer; by default one per neuron of the dense layer."""

    grid: tuple[int, int] | None = None
    """Rows and columns of the product-key grid."""

    gates: Literal["unit", "softmax", "sigmoid"] | None = None
    """Gate on each expert's output: unit keeps copied neurons exact, softmax and sigmoid weigh by score."""

    joint_topk: bool | None = None
    """Share one budget of heads x topk over all heads instead of topk for each head."""

    share_pool: bool | None = None
    """All heads search the same experts (the paper) instead of disjoint parts."""

    share_keys: bool | None = None
    """All heads use the same sub-keys (the paper); needs share_pool."""

    num_shared: int | None = Field(default=None, ge=0)
    """Always-on experts, counted in num_experts; by default those whose peaks dwarf a whole token's activations."""

    query_dim: int | None = Field(default=None, ge=2, multiple_of=2)
    """Length of a query; its two halves meet the two sets of sub-keys."""

    share_query: bool | None = None
    """One low-rank query, met whole by the sub-keys of all heads, instead of a query of its own for each head."""

    query_norm: bool | None = None
    """Batch norm on the queries (the paper)."""

    rerank: Literal["auto", "gate", "up", "none"] = "auto"
    """Projection evaluated to re-rank candidates; auto picks per layer by calibration error."""

    refit: bool = True
    """Refit the experts' output vectors to what is retrieved, correcting the layers before as well."""

    refine_steps: int | None = Field(default=None, ge=0)
    """Gradient steps that refine router and experts of each layer on its own output; by default two passes."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random; the same seed gives the same bytes."""

    @field_validator("layers", mode="before")
    @classmethod
    def _join_list(cls, value: Any) -> Any:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else value

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, grid: tuple[int, int] | None) -> tuple[int, int] | None:
        if grid is not None and min(grid) < 1:
            raise ValueError("a grid has at least one row and one column")
        return grid

    @model_validator(mode="before")
    @classmethod
    def _defaults_yield(cls, data: Any) -> Any:
        # active and allocation have defaults, so only what was written down can contradict topk or max_loss.
        if not isinstance(data, dict):
            return data
        yields: dict[str, Any] = {}
        if data.get("topk") is not None:
            yields = {"active": None, "allocation": "uniform"}
        elif data.get("max_loss") is not None:
            yields = {"active": None}
        return yields | data

    @model_validator(mode="after")
    def _check_together(self) -> PeerConfig:
        for fault in (self._compute_fault(), self._pool_fault(), self._preset_fault()):
            if fault:
                raise ValueError(fault)
        return self

    def _compute_fault(self) -> str | None:
        if self.max_loss is not None and self.topk is not None:
            return "max_loss sets the compute of each layer: it does not go with topk/candidates"
        if self.max_loss is not None and self.active is not None:
            return "active and max_loss both set the compute: give one of them"
        if self.topk is not None and (self.layers == "auto" or self.allocation == "sensitivity"):
            return "layers auto and allocation sensitivity choose active shares: give active or max_loss, not topk"
        if self.allocation == "uniform" and (self.layers == "auto" or self.max_loss is not None):
            return "layers auto and max_loss give each layer a share of its own: drop allocation uniform"
        for name in ("candidates", "shortlist"):
            if getattr(self, name) is not None and self.topk is None:
                return f"{name} needs topk beside it: how many of the {name} to keep"
        if self.active is not None and self.topk is not None:
            return "active and topk/candidates both set the compute: give one of them"
        if self.active is None and self.topk is None and self.max_loss is None:
            return "give active (a share such as 0.5) or topk"
        if self.topk is None:
            return None
        sizes = {"topk": self.topk, "shortlist": self.shortlist, "candidates": self.candidates}
        given = [(name, size) for name, size in sizes.items() if size is not None]
        for (less, small), (more, large) in pairwise(given):
            if large < small:
                return f"{more} ({large}) must be at least {less} ({small})"
        if self.rerank == "none" and given[-1][1] > self.topk:
            return f"{given[-1][0]} above topk are re-ranked, so rerank cannot be none"
        return None

    def _pool_fault(self) -> str | None:
        reranks = self.rerank in ("gate", "up") or (self.candidates or self.shortlist or 0) > (self.topk or 0)
        if self.gates == "softmax" and reranks:
            return (
                "re-ranking does not go with softmax gates, which are normalised over what is retrieved: "
                "use gates unit or sigmoid, or rerank none without candidates"
            )
        if self.share_keys and self.share_pool is False:
            return "share_keys needs share_pool: heads with parts of their own have keys of their own"
        if self.share_query and (self.share_keys or self.query_norm or self.query_dim is None):
            return "share_query needs query_dim, and goes neither with share_keys nor with query_norm"
        if self.joint_topk and self.share_pool:
            return "joint_topk is for heads with parts of their own: it does not go with share_pool"
        if self.num_experts is None:
            return None
        if self.grid and self.share_pool and self.grid[0] * self.grid[1] < self.num_experts:
            return f"a grid of {self.grid[0]} x {self.grid[1]} has no room for {self.num_experts} experts"
        if (self.num_shared or 0) > self.num_experts:
            return f"num_shared ({self.num_shared}) is above num_experts ({self.num_experts})"
        wanted = (self.num_heads or 1) * (self.candidates or self.shortlist or self.topk or 0)
        if wanted > self.num_experts:
            return f"heads x top-k asks for {wanted} experts per token, there are {self.num_experts}"
        return None

    def _preset_fault(self) -> str | None:
        if self.preset is None:
            return None
        if (self.candidates or self.shortlist or self.topk) != self.topk:
            return "preset peer-paper evaluates what it retrieves: it takes no candidates"
        for name, value in self.PEER_PAPER.items():
            given = getattr(self, name)
            if name in self.model_fields_set and given not in (None, "auto", value):
                return f"preset peer-paper has {name} {value}, not {given}: drop one of the two"
        return None

    def expanded(self) -> PeerConfig:
        """The same configuration with the preset written out as single options (unchanged without one)."""
        return self.model_copy(update=self.PEER_PAPER) if self.preset else self


class CalibrationConfig(BaseModel):
    """The text that decides which neurons belong together."""

    model_config = _RULES

    data: str | list[str] | None = None
    """Calibration text: a .txt, .jsonl or .parquet file or a Hub dataset (name or name:config)."""

    tokens: int = Field(default=16384, ge=1)
    """Tokens of calibration text."""

    context: int = Field(default=512, ge=2)
    """Tokens per calibration window."""

    @property
    def sources(self) -> list[str]:
        """`data` as a list, empty when none was given."""
        return [self.data] if isinstance(self.data, str) else list(self.data or [])


class HubConfig(BaseModel):
    """Where and how the model is published."""

    model_config = _RULES

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

    include: list[str] = []
    """Patterns of file names to send, instead of all that belong to the model."""

    exclude: list[str] = []
    """Patterns of file names to leave out."""

    every: int | None = Field(default=None, ge=1)
    """While training, also push every N-th checkpoint, to the branch `checkpoints` unless revision names one."""


class Recipe(BaseModel):
    """Everything one conversion needs. Relative paths start at the working directory."""

    model_config = _RULES

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

    train: TrainConfig | None = None
    """Continued training of what was converted."""

    hub: HubConfig | None = None
    """Publishing, by `peerify push` and while training."""

    device: str = "cpu"
    """Where to compute: cpu, cuda, cuda:1, mps."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number type of the weights while converting and in the written files."""

    max_shard_size: str = Field(default="5GB", pattern=r"^\d+(\.\d+)?[KMGT]B$")
    """Largest size of one written .safetensors file."""

    overwrite: bool = False
    """Replace the output folder if it exists."""

    trust_remote_code: bool = False
    """Run Python code that comes with the input model."""

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
        values = flatten(read_mapping(Path(path))) if path is not None else {}
        origins = dict.fromkeys(values, str(path))
        spoken = parse_overrides(overrides) | {key: value for key, (_, value) in (flags or {}).items()}
        # What the command line says of the compute replaces what a recipe says of it in other words.
        ways = [{"convert.active"}, {"convert.topk", "convert.shortlist", "convert.candidates"}, {"convert.max_loss"}]
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
        if name == key or name.startswith(key + ".") or key.startswith(name + ".")
    }
    spoken_of = [origin for name, origin in said.items() if name.rpartition(".")[2] in message]
    origin = [path, *said.values(), *spoken_of][-1]
    rule = first["type"] == "value_error" and _is_section(_unnumbered(key))
    is_flag = origin is not None and origin.startswith("--") and origin != "--set"
    where = f"{origin}: " if origin else ""
    name = "" if (rule and "." not in key) or is_flag else f"{key}: "
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        return f"{where}unknown key {key}; {_suggest(key)}{more}"
    if first["type"] == "missing":
        return f"{where}{key} is missing: {describe(key)[:-1]}{more}"
    given = "" if rule else f", not {first['input']!r}"
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
