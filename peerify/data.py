"""Text in, windows of tokens out, for calibration and evaluation alike.

The protocol that makes perplexities compare: join the text, tokenise it once without special tokens, cut it
into windows of `context` tokens that do not overlap, drop the remainder. Where the tokenizer puts a token before every
text, as Llama's and Gemma's do, each window begins with it: such models have never read a text without.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from peerify.errors import DataError, UsageError
from peerify.hub_calls import reachable
from peerify.progress import Progress
from peerify.reading import local_path, printable, reason, shown

logger = logging.getLogger(__name__)

SUFFIXES = (".txt", ".text", ".raw", ".md", ".jsonl", ".parquet")
HUB_DATASET = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+){0,2}")
MAX_DOCUMENT = 10_000_000  # characters of a line of JSON or a cell of parquet; War and Peace has 3 million
MAX_EXPANSION = 200  # bytes of text for one of a parquet file; zeros can be packed 30,000 to one
MAX_CHARACTERS_PER_TOKEN = 24  # far above any tokenizer's average on prose, code or CJK text

_SURROGATES = re.compile("[\ud800-\udfff]")


def read_text(spec: str, max_characters: int | None = None) -> str:
    """The text behind `spec`, whole, or its first `max_characters` characters.

    Args:
        spec: a .txt (.text, .raw, .md), .jsonl or .parquet file, the latter two with a "text" field or
            column, or a Hub dataset ``name``, ``name:config`` or ``name:config:split`` (train unless named),
            streamed. Rows are joined by blank lines.
        max_characters: enough is enough; None reads everything.

    Raises:
        DataError: no such file or dataset, a kind of file that is not read, no "text", or only whitespace.
    """
    pieces: list[str] = []
    length = 0
    for piece in read_pieces(spec, max_characters):
        separator = "\n\n" if pieces else ""
        pieces.append(separator + piece)
        length += len(separator) + len(piece)
        if max_characters is not None and length >= max_characters:
            break
    text = "".join(pieces)[:max_characters]
    if not text.strip():
        raise DataError(f"{printable(spec)} holds no text: give a file or dataset with some prose in it")
    return text


def tokenize(text: str, tokenizer: Any, context: int, max_tokens: int | None = None) -> torch.Tensor:
    """Windows (b, t) of int64 token ids, t = `context`; at most the first `max_tokens` tokens are used.

    What `beginning` returns stands before each window, and counts.

    Raises:
        UsageError: `max_tokens` is less than one window.
        DataError: the text is shorter than one window.
    """
    if max_tokens is not None and max_tokens < context:
        raise UsageError(f"{max_tokens} tokens are less than one window: ask for at least {context} (the context)")
    ids, first = token_ids(text, tokenizer), beginning(tokenizer)[: context - 1]
    each = context - len(first)
    count = len(ids) // each if max_tokens is None else min(len(ids) // each, max_tokens // context)
    if count == 0:
        raise DataError(
            f"the text is too short: {len(ids)} tokens, and one window takes {each}; give more text or a "
            "smaller --context"
        )
    windows_bt = torch.tensor(ids[: count * each], dtype=torch.int64).view(count, each)
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(count, -1), windows_bt], dim=1)


def beginning(tokenizer: Any) -> list[int]:
    """The tokens that the tokenizer puts before every text; none where it also puts some behind it."""
    try:
        plain, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    except Exception:  # of a tokenizer that somebody else made; the text itself will tell
        return []
    count = len(whole) - len(plain)
    return list(whole[:count]) if count > 0 and whole[count:] == plain else []


def token_ids(text: str, tokenizer: Any) -> list[int]:
    """The tokens of `text`, without special ones. Raises DataError where the tokenizer fails."""
    try:
        ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
    except Exception as error:  # of a tokenizer that somebody else made
        raise DataError(f"the tokenizer fails on the text ({reason(error)}): use the model's own tokenizer") from error
    return ids


def load_windows(
    specs: list[str],
    tokenizer: Any,
    *,
    context: int = 512,
    max_tokens: int | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """`read_text` and `tokenize` for one or several sources, which share `max_tokens` equally; (b, t) int64.

    A source with less text than its share gives what it has, with a warning in the log.

    Raises:
        UsageError: no source, or less than one window of tokens asked of each.
        DataError: see `read_text` and `tokenize`; the message names the source.
    """
    if not specs:
        raise UsageError("no text was given: name a .txt file or a Hub dataset such as wikitext:wikitext-2-raw-v1")
    if tokenizer is None:
        raise DataError("the model has no tokenizer: text cannot be turned into tokens")
    shares: list[int | None] = [None] * len(specs)
    if max_tokens is not None:
        windows, rest = divmod(max_tokens // context, len(specs))
        shares = [(windows + (i < rest)) * context for i in range(len(specs))]
        if 0 in shares:
            raise UsageError(
                f"{max_tokens} tokens are less than one window of {context} for each of {len(specs)} texts: "
                f"ask for at least {context * len(specs)}"
            )
    parts = []
    for done, (spec, share) in enumerate(zip(specs, shares, strict=True)):
        if progress is not None:
            progress("Tokenising the text", done, len(specs))
        text = read_text(spec, min(share * MAX_CHARACTERS_PER_TOKEN, sys.maxsize) if share is not None else None)
        try:
            part = tokenize(text, tokenizer, context, share)
        except DataError as error:
            raise DataError(f"{printable(spec)}: {error}") from None
        if share is not None and part.numel() < share:
            logger.warning(
                "%s has only %d of the %d tokens asked for; going on with those", printable(spec), part.numel(), share
            )
        parts.append(part)
    if progress is not None:
        progress("Tokenising the text", len(specs), len(specs))
    return torch.cat(parts)


def check_windows(windows_bt: torch.Tensor, model: Any) -> None:
    """Whether `model` can read these windows of token ids.

    Raises:
        UsageError: they are longer than the model's positions.
        DataError: they hold ids that the model has no embedding for.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and windows_bt.shape[1] > positions:
        raise UsageError(
            f"a context of {windows_bt.shape[1]} tokens is longer than the model's {positions} positions: "
            f"use --context {positions} or less"
        )
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and windows_bt.numel() and int(windows_bt.max()) >= vocabulary:
        raise DataError(
            f"the tokenizer gives token {int(windows_bt.max())} and the model knows {vocabulary}: "
            "the two do not belong together; put the model's own tokenizer files beside its weights"
        )


def is_hub_dataset(spec: str) -> bool:
    """Whether `spec` can only be the name of a Hub dataset: no file, and not what a missing file would be called."""
    path = local_path(spec, DataError)
    looks_local = path.suffix.lower() in SUFFIXES or path.is_absolute() or spec.startswith((".", "~"))
    return not path.exists() and not looks_local


def public_name(spec: str) -> str:
    """A text as others may see it: a local file by its name only."""
    return Path(spec).name if Path(spec).expanduser().exists() else spec


def check_source(spec: str) -> Path | None:
    """The file behind `spec`, or None for the name of a Hub dataset, which is not looked for.

    Raises:
        DataError: there is no such file, it is of no kind that is read, or no dataset can have that name.
    """
    path = local_path(spec, DataError)
    if path.is_dir():
        raise DataError(f"{printable(spec)} is a folder: name one .txt, .jsonl or .parquet file in it")
    if is_hub_dataset(spec):
        if not HUB_DATASET.fullmatch(spec):
            raise DataError(
                f"no such text file, and not the name of a Hub dataset (name or name:config): {printable(spec)}"
            )
        return None
    if not path.exists():
        raise DataError(f"no such text file: {printable(spec)}")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{printable(spec)}: only {', '.join(SUFFIXES)} files are read; rename it if it is plain text")
    if not path.is_file():
        raise DataError(f"{printable(spec)} is not a regular file: name a .txt, .jsonl or .parquet file")
    return path


def read_pieces(spec: str, max_characters: int | None = None) -> Iterator[str]:
    """The documents behind `spec` (see `read_text`), one after the other: a .txt file is one.

    `max_characters` is what is wanted of all of them: of a .txt file no more is read.

    Raises:
        DataError: see `read_text`.
    """
    path = check_source(spec)
    if path is None:
        return (text_field(row, f"the Hub dataset {printable(spec)}") for row in _explain_hub(spec, hub_dataset(spec)))
    reader = {".jsonl": _jsonl_rows, ".parquet": _parquet_rows}.get(path.suffix.lower())
    return _explain(spec, reader(path) if reader else _plain_text(path, max_characters))


def _explain(spec: str, pieces: Iterator[str]) -> Iterator[str]:
    try:
        yield from pieces
    except UnicodeDecodeError:
        raise DataError(f"{printable(spec)} is not UTF-8 text: convert it to UTF-8 first") from None
    except OSError as error:
        raise DataError(f"cannot read {printable(spec)}: {reason(error)}") from None


def _plain_text(path: Path, max_characters: int | None) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield file.read(max_characters if max_characters is not None else -1)


def _jsonl_rows(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT + 1), ""), 1):
            if len(line) > MAX_DOCUMENT:
                raise DataError(
                    f"{printable(path)}, line {number}: longer than {MAX_DOCUMENT:,} characters; is it JSON lines?"
                )
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise DataError(f"{printable(path)}, line {number}: not a JSON object") from None
            yield text_field(row, f"{printable(path)}, line {number}")


def _parquet_rows(path: Path) -> Iterator[str]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    size = path.stat().st_size
    most = max(1_000_000, MAX_EXPANSION * size)
    flood = (
        f"{printable(path)} has {size:,} bytes that stand for more than {most:,} of text: leave out what is repeated"
    )
    length = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if "text" not in file.schema_arrow.names:
                text_field(dict.fromkeys(file.schema_arrow.names), printable(path))
            # Not of the columns by themselves: to ask for those of a damaged file ends the process.
            groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
            if any(group.total_byte_size > most for group in groups):
                raise DataError(flood)
            for batch in file.iter_batches(batch_size=64, columns=["text"]):  # few, as each may be long
                for row in batch.to_pylist():
                    text = text_field(row, printable(path))
                    length += len(text)
                    if length > most:
                        raise DataError(flood)
                    yield text
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # pyarrow raises all of these
        raise DataError(f"{printable(path)} cannot be read as parquet: {reason(error)}") from None


def hub_dataset(spec: str, *, streaming: bool = True) -> Any:
    """The rows of a Hub dataset ``name``, ``name:config`` or ``name:config:split``.

    Raises:
        DataError: no such dataset, or no way to it.
    """
    if streaming and not reachable():  # the library itself would try for half a minute
        raise DataError(
            f"{printable(spec)} is no text file here, and the Hub, to look for such a dataset, cannot be reached"
        )
    import datasets

    name, config, split, *_ = [*spec.split(":"), None, None]
    try:
        return datasets.load_dataset(name, config, split=split or "train", streaming=streaming)
    except Exception as error:  # the library raises a dozen unrelated kinds, network errors among them
        raise _no_hub_dataset(spec, error) from None


def _explain_hub(spec: str, rows: Any) -> Iterator[Any]:
    try:
        yield from rows
    except Exception as error:
        raise _no_hub_dataset(spec, error) from None


def _no_hub_dataset(spec: str, error: Exception) -> DataError:
    return DataError(f"{printable(spec)} is no text file here, and as a Hub dataset it cannot be read: {reason(error)}")


def text_field(row: Any, where: str) -> str:
    """The string under "text" in a row; DataError where there is none."""
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        fields = f"; it has {shown(', '.join(map(str, row)))[1:-1]}" if isinstance(row, dict) and row else ""
        raise DataError(f'{where}: no "text" field with a string in it{fields}')
    if len(text) > MAX_DOCUMENT:
        raise DataError(f"{where}: a text of {len(text):,} characters, more than {MAX_DOCUMENT:,}; split it")
    # JSON can say half of a surrogate pair, which is no character and no tokenizer takes.
    return _SURROGATES.sub("\ufffd", text)
