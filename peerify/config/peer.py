"""What a conversion makes: the options of the layers, checked against each other."""

from __future__ import annotations

import re
from typing import Any, ClassVar, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from peerify.reading import shown

_WHOLE = re.compile(r"\s*[+-]?[0-9](?:_?[0-9]){0,999}\s*")  # in quotes, which pydantic takes for a number
_SURROGATE = re.compile("[\ud800-\udfff]")  # what Python makes of bytes in a name that are not UTF-8
RULES = ConfigDict(
    extra="forbid",
    frozen=True,
    use_attribute_docstrings=True,
    coerce_numbers_to_str=True,  # YAML reads `layers: 4` and `revision: 1234567` as integers
    allow_inf_nan=False,
)


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, a number is a number, and a text can be written."""

    model_config = RULES

    @model_validator(mode="before")
    @classmethod
    def _values(cls, data: Any) -> Any:
        """`active: true` is no 1.0, and what no computer counts to is a mistake."""
        for name, value in data.items() if isinstance(data, dict) else ():
            kinds = _kinds(cls.model_fields[name].annotation) if name in cls.model_fields else set()
            for part in value if isinstance(value, list | tuple) else [value]:
                if isinstance(part, str) and _SURROGATE.search(part):
                    raise ValueError(f"{name} {shown(part)} is not UTF-8: rename it")
                if isinstance(part, bool) and kinds & {int, float} and bool not in kinds:
                    raise ValueError(f"{name} is a number, not {str(part).lower()}")
                number = int(part) if isinstance(part, str) and _WHOLE.fullmatch(part) else part
                if isinstance(number, int) and abs(number) >= 2**63 and kinds & {int, float}:
                    raise ValueError(f"{name} is {shown(part)}, which is too large")
        return data


def _kinds(annotation: Any) -> set[Any]:
    """All types named in an annotation."""
    return {annotation}.union(*(_kinds(part) for part in get_args(annotation)))


class PeerConfig(Section):
    """What the converted layers look like. An option that is not set is chosen for each layer from its shape."""

    PEER_PAPER: ClassVar[dict[str, Any]] = {
        "gates": "softmax",
        "joint_topk": False,
        "share_pool": True,
        "share_keys": True,
        "query_norm": True,
        "num_shared": 0,
    }

    layers: str = Field(default="all", min_length=1)
    """Which feed-forward layers to convert: all, auto (with active or max_loss as the target: leaves dense what would
    have to stay nearly whole), middle, first-last, indices (0,4,9 or 12-18), path globs."""

    active: float | None = Field(default=0.5, gt=0, le=1)
    """Share of the dense layers' bytes that a token reads, everything counted, over all layers; not together with topk
    or max_loss. With copies as keys the model can be set to others later."""

    allocation: Literal["uniform", "sensitivity"] = "sensitivity"
    """Active share of each layer: uniform, the same for all, or by sensitivity, more where errors cost more, at the
    same total; measuring that takes time, as much for little calibration text as for a lot."""

    max_loss: float | None = Field(default=None, gt=1)
    """Instead of active: ratio of perplexities that conversion may cost as predicted from each layer's sensitivity,
    such as 1.1; the smallest share that keeps it is found."""

    preset: Literal["peer-paper"] | None = None
    """peer-paper: the PEER paper's own layer (Algorithm 1: shared keys, softmax gates, query batch norm)."""

    keys: Literal["copies", "product"] | None = None
    """copies: each expert's key is a copy of its own vectors in a few bits, which serves any budget; product: the
    paper's product keys. By default copies, unless an option is given that only product keys have."""

    bits: int = Field(default=4, ge=2, le=8)
    """Bits of each number of the copies."""

    group: int = Field(default=64, ge=8, le=2**16)
    """Numbers of a copy that share a step."""

    num_heads: int | None = Field(default=None, ge=1)
    """Query heads h."""

    topk: int | None = Field(default=None, ge=1)
    """Experts added up per head (k), instead of an active share."""

    num_experts: int | None = Field(default=None, ge=1, le=2**31)
    """Experts per layer; by default one per neuron of the dense layer. With fewer the least important neurons go, with
    more the most important are split."""

    grid: tuple[int, int] | None = None
    """Rows and columns of the product-key grid."""

    gates: Literal["unit", "softmax", "sigmoid"] | None = None
    """Gate on each expert's output: unit, the default, keeps copied neurons exact; softmax and sigmoid weigh by
    score."""

    joint_topk: bool | None = None
    """Share one budget of heads x topk over all heads instead of topk for each head."""

    share_pool: bool | None = None
    """All heads search the same experts (the paper) instead of disjoint parts."""

    share_keys: bool | None = None
    """All heads use the same sub-keys (the paper); needs share_pool."""

    num_shared: int | None = Field(default=None, ge=0)
    """Always-on experts, counted in num_experts; by default those with rare, huge values, whose peaks dwarf a whole
    token's activations (less than 2 %)."""

    query_dim: int | None = Field(default=None, ge=2, le=2**16, multiple_of=2)
    """Length of a query; its two halves meet the two sets of sub-keys."""

    query_norm: bool | None = None
    """Batch norm on the queries (the paper)."""

    refit: bool | None = None
    """Refit the experts' output vectors to what product keys retrieve, correcting the layers before as well; by default
    with product keys."""

    refine_steps: int | None = Field(default=None, ge=0)
    """Gradient steps that refine product keys and experts of each layer on its own output; by default two passes over
    the calibration text, 0: closed form only."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of everything random; the same seed gives the same bytes."""

    PRODUCT: ClassVar[tuple[str, ...]] = (
        *("preset", "num_heads", "topk", "num_experts", "grid", "gates", "joint_topk"),
        *("share_pool", "share_keys", "num_shared", "query_dim", "query_norm"),
    )
    """Options that product keys have and copies have not."""

    @property
    def has_copies(self) -> bool:
        """Whether keys are copies of the experts."""
        return self.keys == "copies" or (self.keys is None and not self._of_product_keys())

    def _of_product_keys(self) -> list[str]:
        return [name for name in self.PRODUCT if getattr(self, name) is not None]

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
        for fault in (self._keys_fault(), self._compute_fault(), self._pool_fault(), self._preset_fault()):
            if fault:
                raise ValueError(fault)
        return self

    def _keys_fault(self) -> str | None:
        given = self._of_product_keys()
        if self.keys == "copies" and given:
            return f"{given[0]} is for product keys: drop it, or give keys product"
        if self.has_copies and (self.refit or self.refine_steps):
            return "refit and refine_steps are for product keys: copies have nothing to fit"
        fields = type(self).model_fields
        if not self.has_copies and any(getattr(self, name) != fields[name].default for name in ("bits", "group")):
            return "bits and group are for copies: drop them, or give keys copies"
        return None

    def _compute_fault(self) -> str | None:
        if self.max_loss is not None and self.topk is not None:
            return "max_loss sets the compute of each layer: it does not go with topk"
        if self.max_loss is not None and self.active is not None:
            return "active and max_loss both set the compute: give one of them"
        if self.topk is not None and (self.layers == "auto" or self.allocation == "sensitivity"):
            return "layers auto and allocation sensitivity choose active shares: give active or max_loss, not topk"
        if self.allocation == "uniform" and (self.layers == "auto" or self.max_loss is not None):
            return "layers auto and max_loss give each layer a share of its own: drop allocation uniform"
        if self.active is not None and self.topk is not None:
            return "active and topk both set the compute: give one of them"
        if self.active is None and self.topk is None and self.max_loss is None:
            return "give active (a share such as 0.5) or topk"
        return None

    def _pool_fault(self) -> str | None:
        if self.share_keys and self.share_pool is False:
            return "share_keys needs share_pool: heads with parts of their own have keys of their own"
        if self.joint_topk and self.share_pool:
            return "joint_topk is for heads with parts of their own: it does not go with share_pool"
        if self.num_experts is None:
            return None
        if self.grid and self.share_pool and self.grid[0] * self.grid[1] < self.num_experts:
            return f"a grid of {self.grid[0]} x {self.grid[1]} has no room for {self.num_experts} experts"
        if (self.num_shared or 0) > self.num_experts:
            return f"num_shared ({self.num_shared}) is above num_experts ({self.num_experts})"
        wanted = (self.num_heads or 1) * (self.topk or 0)
        if wanted > self.num_experts:
            return f"heads x top-k asks for {wanted} experts per token, there are {self.num_experts}"
        return None

    def _preset_fault(self) -> str | None:
        if self.preset is None:
            return None
        for name, value in self.PEER_PAPER.items():
            given = getattr(self, name)
            if name in self.model_fields_set and given not in (None, value):
                return f"preset peer-paper has {name} {value}, not {given}: drop one of the two"
        return None

    def expanded(self) -> PeerConfig:
        """The same configuration with the preset written out as single options (unchanged without one)."""
        return self.model_copy(update=self.PEER_PAPER) if self.preset else self
