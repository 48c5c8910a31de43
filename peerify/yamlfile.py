"""YAML and ``key=value`` as flat dotted keys, so that later sources override earlier ones key by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from peerify.errors import UsageError


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key} is written twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one; UsageError names file and line."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read the recipe {path}: {reason}") from None
    except (yaml.YAMLError, TypeError) as error:  # TypeError: a mapping or list used as a key
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UsageError(f"{path}{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{path}: a recipe is a mapping of keys to values, such as 'model: NAME'")
    return content


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1"]`` → ``{"a.b": 1}``, the values read as YAML; UsageError names the one at fault."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip()):
            raise UsageError(f"--set {override}: write it as key=value, for example --set convert.gates=sigmoid")
        try:
            values[key.strip()] = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError:
            raise UsageError(f"--set {override}: the value is not valid YAML; quote it") from None
    return flatten(values)


def flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` → ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and value:
            flat.update(flatten(value, key + "."))
        else:
            flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`; where a key and a part of it are both given, the later one wins."""
    tree: dict[str, Any] = {}
    node: Any
    for key, value in flat.items():
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            at = _place(node, section)
            if isinstance(node, dict):
                node.setdefault(at, {})
            child = node[at]
            if isinstance(child, dict | list):
                child = node[at] = child.copy()  # what came in stays as it was
            else:
                child = node[at] = {}
            node = child
        node[_place(node, name)] = value
    return tree


def _place(node: dict[str, Any] | list[Any], name: str) -> Any:
    """`stages.0.lr` reaches into a list that is there already; UsageError where the list is shorter."""
    if not isinstance(node, list):
        return name
    if not name.isdigit() or int(name) >= len(node):
        raise UsageError(f"--set: there is no element {name} in a list of {len(node)}; they are counted from 0")
    return int(name)
