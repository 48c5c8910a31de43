"""Text in, blocks of windows out: packed, mixed, in an order that depends on the seed alone, from any position on.

Every process of a run reads the same stream and takes its own rows of each block, so what a step sees does not depend
on how many processes there are. A position is a small JSON object; a stream put back to it goes on with the same
windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peerify.config.train import DataConfig, SourceConfig
from peerify.data import hub_dataset, is_hub_dataset, read_pieces, text_field, token_ids
from peerify.errors import DataError
from peerify.training.data_selection import most_informative

Ids = NDArray[np.int32]
Tokenise = Callable[[str], list[int]]
PADDING = -1  # in windows; becomes a token that is neither seen by others nor predicted


class Windows:
    """All windows of all texts, mixed by their weights."""

    def __init__(self, config: DataConfig, tokenizer: Any, *, seed: int, progress: Any = None) -> None:
        """Read what is not streamed.

        Raises:
            DataError: no source, a source that cannot be read, is empty, or is shorter than a window.
        """
        if not config.sources:
            raise DataError("train.data.sources is empty: name a text to train on, such as a .txt file")

        def tokenise(text: str) -> list[int]:
            return token_ids(text, tokenizer)

        end = tokenizer.eos_token_id
        self._weights = [source.weight for source in config.sources]
        self._taken = [0] * len(config.sources)
        self._parts: list[_Held | _Streamed] = []
        for number, source in enumerate(config.sources):
            if progress is not None:
                progress("Reading the text", number, len(config.sources))
            streaming = is_hub_dataset(source.path) if source.streaming is None else source.streaming
            if streaming and config.selection == "entropy":
                raise DataError(
                    f"{source.path} is streamed, and selection: entropy compares the windows of a whole text: "
                    "set streaming: false for it, or selection: all"
                )
            own_seed = int.from_bytes(hashlib.sha256(f"{seed} {number} {source.path}".encode()).digest()[:8], "little")
            kind = _Streamed if streaming else _Held
            self._parts.append(kind(source, config, tokenise, end, own_seed))
        if progress is not None:
            progress("Reading the text", len(config.sources), len(config.sources))

    def block(self, size: int) -> Ids:
        """The next `size` windows, (size, context) token ids, PADDING where a window is not full."""
        return np.stack([self._next() for _ in range(size)])

    def _next(self) -> Ids:
        """A window of the text that is furthest behind its share."""
        total = sum(self._taken) + 1
        share = [
            weight / sum(self._weights) * total - taken
            for weight, taken in zip(self._weights, self._taken, strict=True)
        ]
        which = max(range(len(share)), key=share.__getitem__)
        self._taken[which] += 1
        return self._parts[which].next()

    def position(self) -> dict[str, Any]:
        """Where the stream is; JSON."""
        return {"taken": list(self._taken), "parts": [part.position() for part in self._parts]}

    def seek(self, position: dict[str, Any]) -> None:
        """Go on where `position` was read.

        Raises:
            DataError: the texts are not those of the position.
        """
        taken: Any = position.get("taken")
        parts: Any = position.get("parts")
        if not _are_counts(taken) or not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
            raise DataError("the checkpoint does not say where in the texts it was: go on from the one before")
        if not len(taken) == len(parts) == len(self._parts):
            raise DataError("the checkpoint was made with another number of texts: restore train.data.sources")
        for part, where in zip(self._parts, position["parts"], strict=True):
            part.seek(where)
        self._taken = list(position["taken"])


class _Held:
    """A text tokenised once and kept: a new random order in every epoch."""

    def __init__(
        self, source: SourceConfig, config: DataConfig, tokenise: Tokenise, end: int | None, seed: int
    ) -> None:
        rows: Iterator[str]
        if is_hub_dataset(source.path):
            rows = (text_field(row, source.path) for row in hub_dataset(source.path, streaming=False))
        else:
            rows = read_pieces(source.path)
        packer = _Packer(config, tokenise, end)
        windows = [window for text in rows for window in packer.add(text)]
        windows += packer.rest()
        if not windows:
            raise DataError(
                f"{source.path} is too short to train on: {packer.tokens} tokens, and one window takes "
                f"{config.context}; give more text or a smaller train.data.context"
            )
        self.windows = np.stack(windows)
        self.source, self.shuffle, self.seed, self.at = source, config.shuffle, seed, 0
        if config.selection == "entropy":
            self.windows = self.windows[most_informative(self.windows, config.keep)]
        self.fingerprint = hashlib.sha256(self.windows.tobytes()).hexdigest()[:16]
        self._epoch, self._order = -1, np.arange(len(self.windows))

    def next(self) -> Ids:
        epoch, place = divmod(self.at, len(self.windows))
        if self.shuffle and epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
        self.at += 1
        window: Ids = self.windows[self._order[place]]
        return window

    def position(self) -> dict[str, Any]:
        return {"at": self.at, "fingerprint": self.fingerprint}

    def seek(self, position: dict[str, Any]) -> None:
        if position.get("fingerprint") != self.fingerprint:
            raise DataError(
                f"{self.source.path} is not the text that the checkpoint was made with: put it back, or start anew "
                "with --overwrite"
            )
        if not _are_counts([position.get("at")]):
            raise DataError(
                f"the checkpoint does not say where in {self.source.path} it was: go on from the one before"
            )
        self.at = position["at"]


class _Streamed:
    """A text read as training goes on; windows are drawn from a buffer. Starts again at its end."""

    def __init__(
        self, source: SourceConfig, config: DataConfig, tokenise: Tokenise, end: int | None, seed: int
    ) -> None:
        self.source, self.config, self.seed = source, config, seed
        self.packer = _Packer(config, tokenise, end)
        self.buffer: list[Ids] = []
        self.drawn, self.epoch = 0, 0
        self._hub = hub_dataset(source.path) if is_hub_dataset(source.path) else None
        self._row = 0  # read of a local file in this epoch
        self._rows = self._open()

    def _open(self) -> Iterator[str]:
        if self._hub is not None:
            self._hub.set_epoch(self.epoch)  # a state that was put back holds for its own epoch only
            return (text_field(row, f"the Hub dataset {self.source.path}") for row in self._hub)
        return read_pieces(self.source.path)

    def _fill(self) -> None:
        found = bool(self.buffer)
        while len(self.buffer) < (self.config.buffer if self.config.shuffle else 1):
            text = next(self._rows, None)
            if text is not None:
                self._row += 1
                self.buffer += self.packer.add(text)
                found = found or bool(self.buffer)
                continue
            if not found and not self.buffer:
                raise DataError(
                    f"{self.source.path} is too short to train on: it does not fill one window of "
                    f"{self.config.context} tokens; give more text or a smaller train.data.context"
                )
            self.epoch, self._row = self.epoch + 1, 0
            self._rows = self._open()
            if self.buffer:  # a text shorter than the buffer: draw from what there is
                return

    def next(self) -> Ids:
        if len(self.buffer) < (self.config.buffer if self.config.shuffle else 1):
            self._fill()
        which = 0
        if self.config.shuffle:
            which = int(np.random.default_rng([self.seed, self.drawn]).integers(len(self.buffer)))
        self.drawn += 1
        return self.buffer.pop(which)

    def position(self) -> dict[str, Any]:
        return {
            "drawn": self.drawn,
            "epoch": self.epoch,
            "row": self._row,
            "stream": self._hub.state_dict() if self._hub is not None else None,
            "left": [int(token) for token in self.packer.left],
            "buffer": [window.tolist() for window in self.buffer],
        }

    def seek(self, position: dict[str, Any]) -> None:
        windows, left = position.get("buffer"), position.get("left")
        counts = [position.get(key) for key in ("drawn", "epoch", "row")]
        whole = isinstance(windows, list) and all(
            _are_counts(window, least=PADDING) and len(window) == self.config.context for window in windows
        )
        if not (_are_counts(counts) and _are_counts(left) and whole):
            raise DataError(
                f"the checkpoint does not say where in {self.source.path} it was: go on from the one before"
            )
        self.drawn, self.epoch = position["drawn"], position["epoch"]
        self.packer.left = list(position["left"])
        self.buffer = [np.array(window, dtype=np.int32) for window in position["buffer"]]
        if self._hub is not None:
            self._hub.load_state_dict(position["stream"])
        self._rows = self._open()
        if self._hub is None:
            for _ in range(position["row"]):
                if next(self._rows, None) is None:
                    raise DataError(f"{self.source.path} is shorter than when the checkpoint was made: put it back")
        self._row = position["row"]


def _are_counts(values: Any, *, least: int = 0) -> bool:
    """Whether `values` are whole numbers from `least` on that fit an id or a seed."""
    return isinstance(values, list) and all(type(value) is int and least <= value < 2**31 for value in values)


class _Packer:
    """Documents in, full windows out; tokens that do not fill one wait for the next document."""

    def __init__(self, config: DataConfig, tokenise: Tokenise, end: int | None) -> None:
        self.context, self.cross, self.end = config.context, config.cross_documents, end
        self.tokenise = tokenise
        self.left: list[int] = []
        self.tokens = 0

    def add(self, text: str) -> list[Ids]:
        ids = self.tokenise(text)
        self.tokens += len(ids)
        if not ids:
            return []
        if self.cross:
            ids = self.left + ids + ([self.end] if self.end is not None else [])
        full = len(ids) // self.context * self.context
        windows = list(np.array(ids[:full], dtype=np.int32).reshape(-1, self.context))
        if self.cross:
            self.left = ids[full:]
        elif len(ids) - full > 1:  # a single token predicts nothing
            window = np.full(self.context, PADDING, dtype=np.int32)
            window[: len(ids) - full] = ids[full:]
            windows.append(window)
        return windows

    def rest(self) -> list[Ids]:
        """What is left at the end of a text that is read once is dropped, as in evaluation."""
        self.left = []
        return []
