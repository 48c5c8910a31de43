"""YAML and ``key=value`` as flat dotted keys, so that later sources override earlier ones key by key."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from peerify.errors import PeerifyError, UsageError
from peerify.reading import local_path, printable, read_text, reason, shown

MAX_BYTES = 1_000_000  # of a recipe or the head of a card; PyYAML takes seconds for as much
MAX_VALUES = 10_000  # in a document, aliases written out; a few lines of aliases can stand for billions
MAX_DEPTH = 50
MAX_DIGITS = 300  # Python writes no number of more than 4,300 in decimal
# No sets, pairs or bytes: neither a recipe nor a card has a use for them.
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp")}
_MERGE = "tag:yaml.org,2002:merge"  # the key <<
_NUMBER = re.compile(r"[0-9]{1,9}")  # of an element in a list
_TOO_MANY = f"it stands for more than {MAX_VALUES:,} values"


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, where PyYAML would silently keep the last, and what has no end."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._values += index is not None or parent is None  # keys have no index
        if self._values > MAX_VALUES:  # before the rest is read, which takes seconds
            mark = self.peek_event().start_mark
            raise yaml.constructor.ConstructorError(problem=_TOO_MANY, problem_mark=mark)
        return super().compose_node(parent, index)

    def get_single_node(self) -> Any:
        node = super().get_single_node()
        if node is not None:
            _check(node, {}, [])
        return node


def _check(node: Any, counted: dict[int, int], above: list[int]) -> int:
    """How many values `node` stands for, aliases written out. Raises ConstructorError, which names the place."""

    def wrong(problem: str, at: Any = node) -> yaml.constructor.ConstructorError:
        return yaml.constructor.ConstructorError(problem=problem, problem_mark=at.start_mark)

    if id(node) in above:
        raise wrong("it refers to itself")
    if len(above) > MAX_DEPTH:
        raise wrong(f"it is nested more than {MAX_DEPTH} deep")
    if id(node) in counted:
        return counted[id(node)]
    if node.tag not in _TAGS:
        raise wrong(f"the tag {shown(node.tag)} is not read here")
    if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MAX_DIGITS:
        raise wrong(f"the number has more than {MAX_DIGITS} digits")
    inside = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        inside = [value for _, value in node.value]
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise wrong("a list or mapping cannot be a key", key)
            if key.tag != _MERGE:
                key.tag = "tag:yaml.org,2002:str"  # a key is a name, also where it is `no` or 1
            if key.value in seen:
                raise wrong(f"{printable(key.value)} is written twice", key)
            seen.add(key.value)
    total = counted[id(node)] = 1 + sum(_check(part, counted, [*above, id(node)]) for part in inside)
    if total > MAX_VALUES:
        raise wrong(_TOO_MANY)
    return total


def parse_yaml(text: str, where: str, fault: type[PeerifyError], *, first_line: int = 1) -> Any:
    """What the YAML in `text` says.

    Args:
        where: what the message begins with, such as the file's name.
        first_line: of `text`, in the file that it stands in.

    Raises:
        fault: it is not YAML, a key is written twice, it refers to itself, or its aliases stand for too many values.
    """
    if len(text) > MAX_BYTES:
        raise fault(f"{where}: it has more than {MAX_BYTES:,} characters, which no such text needs")
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise fault(f"{where}: it is nested too deeply to be read") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a number or date that is none
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + first_line}" if mark else ""
        problem = getattr(error, "problem", None) or reason(error)
        raise fault(f"{where}{line}: not valid YAML: {printable(str(problem))}") from None
    except (LookupError, AttributeError, TypeError):  # of PyYAML's constructors, as for !!bool x
        raise fault(f"{where}: not valid YAML: a value is not of the kind that its tag (!!) says") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} for an empty one; UsageError names file and line."""
    file = local_path(path, UsageError)
    try:
        text = read_text(file, UsageError, "give a YAML file", limit=MAX_BYTES)
    except UsageError as error:
        raise UsageError(f"the recipe {error}") from None
    content = parse_yaml(text, printable(path), UsageError)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UsageError(f"{printable(path)}: a recipe is a mapping of names to values, such as 'model: NAME'")
    return content


def parse_overrides(overrides: Iterable[str]) -> dict[str, Any]:
    """``["a.b=1"]`` → ``{"a.b": 1}``, the values read as YAML; UsageError names the one at fault."""
    values = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key.strip(), re.ASCII):
            raise UsageError(
                f"--set {shown(override)[1:-1]}: write it as key=value, for example --set convert.gates=sigmoid"
            )
        values[key.strip()] = parse_yaml(text, f"--set {printable(key.strip())}", UsageError)
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
        names = key.split(".")
        node = tree
        for section, below in pairwise(names):
            at = _place(node, section)
            child = node.get(at) if isinstance(node, dict) else node[at]
            if isinstance(child, dict | list):
                child = node[at] = child.copy()  # what came in stays as it was
            else:  # a number below it is the place in a list, whose one element may be a default
                child = node[at] = [{}] if _NUMBER.fullmatch(below) else {}
            node = child
        node[_place(node, names[-1])] = value
    return tree


def _place(node: dict[str, Any] | list[Any], name: str) -> Any:
    """`stages.0.lr` reaches into a list that is there already; UsageError where the list is shorter."""
    if not isinstance(node, list):
        return name
    if not _NUMBER.fullmatch(name) or int(name) >= len(node):
        raise UsageError(
            f"--set: there is no element {printable(name)} in a list of {len(node)}; they are counted from 0"
        )
    return int(name)
