"""docs/options.md, written from the schema of the recipe: python docs/write_options.py, or `make docs`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peerify.cli.base import PROMOTED, PROMOTED_TO_GROW
from peerify.config.recipe import Recipe

DOCUMENT = Path(__file__).parent / "options.md"

_HEAD = """\
# Options

<!-- Written by `make docs` from the schema of the recipe; do not edit. -->

Every option is a key of a recipe, which is a YAML file. The same keys can be set on the command line, with
`--set KEY=VALUE`, and some have a flag of their own. What the command line says wins over the recipe:

```
peerify convert --recipe recipes/smollm2-135m/convert-50.yaml --calibration text.txt --set convert.gates=sigmoid
```

`N` is the number of an element of a list, from 0 on: `--set train.stages.0.optimizer.lr=5e-5`. In Python the keys below
`convert` are the fields of `peerify.PeerConfig`, and those below `grow` of `peerify.GrowConfig`; their flags are those
of `peerify grow`. An empty default means that nothing is set; the text says what happens
then. The [glossary](glossary.md) explains the words.
"""

_NAMES = {"str": "text", "int": "integer", "float": "number"}
_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most", "multiple_of": "multiple of"}


def render() -> str:
    """The whole document."""
    return "\n".join([_HEAD, *_section("", Recipe, None)])


def _section(prefix: str, model: type[BaseModel], default: Any) -> Iterator[str]:
    """The lines of one section of the recipe and of those below it."""
    if prefix:
        yield f"## `{prefix.rstrip('.')}`\n\n{_one_line(model.__doc__)}"
        if default:
            yield f"Without this section: `{yaml.safe_dump(default, default_flow_style=True).strip()}`.\n"
        else:
            yield ""
    yield "| key | flag | values | default | meaning |\n|---|---|---|---|---|"
    flags = {key: flag for flag, key in [*PROMOTED.items(), *PROMOTED_TO_GROW.items()]}
    below: list[Iterator[str]] = []
    for name, field in model.model_fields.items():
        key = prefix + name
        inner, many = _section_in(field.annotation)
        if inner is not None:
            below.append(_section(f"{key}.N." if many else f"{key}.", inner, _said(field.default)))
            continue
        flag = f"`{flags[key]}`" if key in flags else ""
        cells = [f"`{key}`", flag, _values(field), _shown(field), _one_line(field.description)]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
    yield ""
    for lines in below:
        yield from lines


def _section_in(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section that a field holds, if it holds one, and whether it holds a list of them."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    for part in get_args(annotation):
        inner, many = _section_in(part)
        if inner is not None:
            return inner, many or get_origin(annotation) is list
    return None, False


def _said(default: Any) -> Any:
    """What the default of a section says beyond the defaults of its keys."""
    return default.model_dump(mode="json", exclude_unset=True) if isinstance(default, BaseModel) else None


def _values(field: FieldInfo) -> str:
    bounds = [
        f"{word} {_number(getattr(rule, name))}"
        for rule in field.metadata
        for name, word in _BOUNDS.items()
        if getattr(rule, name, None) is not None
    ]
    return ", ".join([_kind(field.annotation), *bounds])


def _number(bound: float) -> str:
    power = int(bound).bit_length() - 1
    return f"2^{power}" if bound == 2**power and power > 10 else f"{bound}"


def _kind(annotation: Any) -> str:
    """The type of a value in words."""
    parts = [part for part in get_args(annotation) if part is not type(None)]
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{part}`" for part in parts)
    if get_origin(annotation) is list:
        return f"list of {_kind(parts[0])}"
    if get_origin(annotation) is tuple:
        return f"{len(parts)} × {_kind(parts[0])}"
    if parts:
        return " or ".join(_kind(part) for part in parts)
    return "`true`, `false`" if annotation is bool else _NAMES[annotation.__name__]


def _shown(field: FieldInfo) -> str:
    """The default as YAML writes it."""
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return ""
    value = list(default) if isinstance(default, tuple) else default
    text = yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()
    return f"`{text}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
