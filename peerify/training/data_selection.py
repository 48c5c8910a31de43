"""Choose the windows that compress worst together: the entropy law of 2407.06645 (ZIP), with zlib on token ids.

Text that compresses badly says much in few bytes, and text that compresses badly *beside what is already chosen* says
something new. The paper's three nested greedy rounds, on windows instead of documents.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

POOL, SHORT, STEP = 400, 60, 20  # windows looked at again in each round, shortlisted of them, and taken
CONTEXT_BYTES = 32_000  # zlib looks no further back than this


def most_informative(windows: NDArray[np.int32], keep: float) -> NDArray[np.int64]:
    """Indices, in order, of the share `keep` of `windows` (n, context) that compress worst together."""
    wanted = max(1, round(keep * len(windows)))
    raw = [window.astype("<u4").tobytes() for window in windows]
    novelty = np.array([_ratio(data) for data in raw])  # high: compresses badly
    chosen: list[int] = []
    open_ = np.ones(len(raw), dtype=bool)
    tail = b""
    while len(chosen) < wanted:
        candidates = np.flatnonzero(open_)
        pool = candidates[np.argsort(-novelty[candidates], kind="stable")[:POOL]]
        for i in pool:  # the paper's lazy update: only those at the top are measured anew
            novelty[i] = _ratio(raw[i], tail)
        shortlist = list(pool[np.argsort(-novelty[pool], kind="stable")[:SHORT]])
        taken = b""
        for _ in range(min(STEP, len(shortlist), wanted - len(chosen))):
            best = max(shortlist, key=_against(raw, taken))
            shortlist.remove(best)
            chosen.append(int(best))
            open_[best] = False
            taken = (taken + raw[best])[-CONTEXT_BYTES:]
        tail = (tail + taken)[-CONTEXT_BYTES:]
    return np.sort(np.array(chosen))


def _against(raw: list[bytes], seen: bytes) -> Callable[[Any], float]:
    return lambda i: _ratio(raw[i], seen)


def _ratio(data: bytes, seen: bytes = b"") -> float:
    """Bytes that `data` takes after `seen`, as a share of its length."""
    packer = zlib.compressobj(6, zdict=seen) if seen else zlib.compressobj(6)
    return len(packer.compress(data) + packer.flush()) / len(data)
