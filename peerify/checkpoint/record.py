"""The shape of peerify.json, which is read and written here.

It says how a converted model was made, and what was measured of it. It lies in folders that strangers hand out, so
what is read is checked before anything uses it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config
from typing_extensions import NotRequired, TypedDict

from peerify.checkpoint.atomic import write_text
from peerify.checkpoint.files import MARKER
from peerify.errors import PeerifyError
from peerify.reading import printable, read_object, shown

MORE = ConfigDict(extra="allow", allow_inf_nan=False)


@with_config(MORE)
class Origin(TypedDict):
    """The dense model."""

    model: str
    revision: NotRequired[str | None]
    base_model: NotRequired[str]
    license: NotRequired[str]
    license_name: NotRequired[str]
    license_link: NotRequired[str]
    language: NotRequired[str | list[str]]
    pipeline_tag: NotRequired[str]


@with_config(MORE)
class Texts(TypedDict):
    """The part of a recipe that names texts, as others may see them."""

    data: list[str]


@with_config(MORE)
class Asked(TypedDict):
    """The recipe of a conversion."""

    model: NotRequired[str]
    convert: dict[str, Any]
    calibration: Texts


@with_config(MORE)
class Seen(TypedDict):
    """The calibration data that was used."""

    tokens: NotRequired[int]
    sha256: NotRequired[str]
    inputs: NotRequired[int]


@with_config(MORE)
class Continuation(TypedDict):
    """How many tokens both models add to a prompt before they part, of how many at most."""

    mean: float
    of: int


@with_config(MORE)
class Against(TypedDict):
    """A comparison with the dense model."""

    model: NotRequired[str]
    perplexity: float
    ratio: float
    kl: NotRequired[float | None]
    continuation: NotRequired[Continuation | None]


@with_config(MORE)
class Result(TypedDict):
    """What `peerify eval` measured."""

    data: NotRequired[str | None]
    context: NotRequired[int]
    tokens: int
    perplexity: float
    against: NotRequired[Against | None]


@with_config(MORE)
class Results(TypedDict):
    """Likewise, on several texts."""

    texts: Annotated[list[Result], Field(min_length=1)]


@with_config(MORE)
class TrainedOn(TypedDict):
    """One text of a training."""

    path: str


@with_config(MORE)
class TrainingData(TypedDict):
    """The texts of a training."""

    sources: NotRequired[list[TrainedOn]]


@with_config(MORE)
class TrainingRecipe(TypedDict):
    """The recipe of a training."""

    data: NotRequired[TrainingData]


@with_config(MORE)
class Training(TypedDict):
    """Continued training, done or still going on."""

    steps: int
    tokens: NotRequired[int]
    unfinished: NotRequired[bool]
    recipe: NotRequired[TrainingRecipe]


@with_config(MORE)
class Growth(TypedDict):
    """How layers were given memories: the recipe, and the data that fitted their keys."""

    recipe: dict[str, Any]
    calibration: Seen
    data: list[str]


@with_config(MORE)
class Record(TypedDict):
    """peerify.json. Keys that this version does not know are kept."""

    peerify: str
    versions: dict[str, str]
    source: Origin
    recipe: Asked
    calibration: Seen
    bytes_fraction: float
    macs_fraction: float
    layer_errors: Mapping[str, float | None]
    files: NotRequired[list[str]]
    evaluation: NotRequired[list[Result]]
    growth: NotRequired[list[Growth]]
    training: NotRequired[Training | None]


_RECORD: TypeAdapter[Record] = TypeAdapter(Record)
_RESULT: TypeAdapter[Result] = TypeAdapter(Result)
_RESULTS: TypeAdapter[Results] = TypeAdapter(Results)


def read_record(folder: Path, fault: type[PeerifyError]) -> Record:
    """What peerify.json in `folder` says.

    Raises:
        fault: it cannot be read, or is not what peerify writes; the key is named.
    """
    path = folder / MARKER
    remedy = "convert again"
    content = checked(_RECORD, read_object(path, fault, remedy), str(path), fault, remedy)
    training = content.get("training")
    if training and not training.get("unfinished") and not {"tokens", "recipe"} <= training.keys():
        raise fault(f"{printable(path)}: training has no tokens or no recipe; {remedy}")
    if not {"tokens", "inputs"} & content["calibration"].keys():
        raise fault(f"{printable(path)}: calibration has neither tokens nor inputs; {remedy}")
    for name in content.get("files", []):
        parts = PurePosixPath(name).parts
        usable = parts and all(part not in ("..", "/") and len(part.encode()) < 256 for part in parts)
        if not usable or "\0" in name or "\\" in name:
            raise fault(f"{printable(path)}: files names {shown(name)}, which is no file of the folder; {remedy}")
    return content


def check_result(result: Any, where: str, fault: type[PeerifyError]) -> Result | Results:
    """`result`, once it is known to be what `peerify eval --json` writes. Raises `fault`, which begins with `where`."""
    adapter: TypeAdapter[Any] = _RESULTS if isinstance(result, dict) and "texts" in result else _RESULT
    return cast("Result | Results", checked(adapter, result, where, fault, "give what `peerify eval --json` writes"))


def write_record(folder: Path, record: Record) -> None:
    """Write peerify.json, whole or not at all. Raises OutputError where it may not be written, or the disk is full."""
    write_text(folder / MARKER, json.dumps(record, indent=2, allow_nan=False) + "\n")


def checked(adapter: TypeAdapter[Any], value: Any, where: str, fault: type[PeerifyError], remedy: str) -> Any:
    """`value` as it stands, once it has the adapter's shape, finite numbers and texts that can be written."""
    try:
        adapter.validate_python(value, strict=True)
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise fault(f"{printable(where)}: {printable(key)}: {_said(first)}; {remedy}") from None
    except UnicodeEncodeError:
        raise fault(f"{printable(where)} holds text that is no Unicode; {remedy}") from None
    if not all(math.isfinite(number) for number in _floats(value)):
        raise fault(f"{printable(where)} holds a number that is not finite; {remedy}")
    return cast(Any, value)


def _said(first: Any) -> str:
    message = first["msg"][:1].lower() + first["msg"][1:]
    return message if first["type"] == "missing" else f"{message}, not {shown(first['input'])}"


def _floats(tree: Any) -> list[float]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, list):
        return [number for part in tree for number in _floats(part)]
    return [tree] if isinstance(tree, float) else []
