"""Damage a valid file in ways that hostile, truncated and mistaken ones are damaged.

`mutants(data, seed, count)` gives the same ones for the same arguments.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Iterator
from typing import Any

HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 10**12, 0, 1)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 5, 2**31, 2**63, 10**12, 10**400, 0.5, -1.5, 1e300, float("nan"), float("inf")),
    *(
        "",
        "x",
        "\0",
        "../../etc/passwd",
        "a" * 10_000,
        "\ud800",
        "é",
        [],
        {},
        [5],
        {"a": 1},
        [[]],
        [None],
        ["x"] * 1000,
    ),
)


def mutants(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged versions of `data`, which is binary or text of any kind."""
    for number in range(count):
        yield _damage(data, random.Random(f"{seed} {number}"))


def json_mutants(text: str, seed: int, count: int) -> Iterator[str]:
    """`count` versions of the JSON in `text` that are JSON still: values of another kind, huge, nested or missing."""
    for number in range(count):
        yield _damage_tree(json.loads(text), random.Random(f"{seed} {number}"))


def _damage(data: bytes, rng: random.Random) -> bytes:
    raw = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not raw:
            return bytes(rng.randbytes(8))
        at = _place(len(raw), rng)
        kind = rng.randrange(8)
        if kind == 0:
            raw[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            raw[at] = rng.randrange(256)
        elif kind == 2:
            del raw[at:]
        elif kind == 3:
            del raw[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            start = _place(len(raw), rng)
            raw[at:at] = raw[start : start + rng.randrange(1, 200)]
        elif kind == 5:
            form = rng.choice(("<I", "<Q"))
            number = rng.choice(HUGE) % 256 ** struct.calcsize(form)
            raw[at : at + struct.calcsize(form)] = struct.pack(form, number)
        elif kind == 6:
            raw[at:at] = rng.choice((b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000, b"\0" * 9, b"\xff\xfe", b"NaN"))
        else:
            raw[at : at + 1] = rng.randbytes(rng.randrange(1, 9))
    return bytes(raw)


def _place(size: int, rng: random.Random) -> int:
    """Anywhere, and more often near the start, where headers are."""
    return rng.randrange(size) if rng.random() < 0.3 else rng.randrange(min(size, 256 if rng.random() < 0.5 else 4096))


def _damage_tree(tree: Any, rng: random.Random) -> str:
    for _ in range(rng.choice((1, 1, 2, 3))):
        holders = list(_holders(tree))
        if not holders:
            break
        holder = rng.choice(holders)
        key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        kind = rng.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[key] = [holder[key]]
        elif kind == 2 and isinstance(holder, dict):
            holder[rng.choice(("", "x", "__metadata__", "model_type", "\0", "a" * 300))] = holder.pop(key)
        elif kind == 3 and isinstance(holder[key], int | float):
            holder[key] = rng.choice((-1, 2, 1000, 10**9)) * holder[key]
        else:
            holder[key] = copy.deepcopy(rng.choice(ODD))
    return json.dumps(tree)


def _holders(tree: Any) -> Iterator[Any]:
    """All mappings and lists in `tree` that hold something."""
    if isinstance(tree, dict | list) and tree:
        yield tree
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _holders(value)
