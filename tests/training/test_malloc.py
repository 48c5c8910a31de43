"""On a CPU, training keeps the memory that it frees; what the user has set comes first."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33"
)

# Prints how many blocks of their own the system gave for 20 MB, before and after, and what the function says.
COUNT = """
import ctypes, torch
from peerify.training.malloc import keep_freed_memory

class Info(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info

def mapped():
    before = mallinfo().hblks
    kept.append(torch.empty(20 * 2**20, dtype=torch.uint8))
    return mallinfo().hblks - before

kept = []
print(mapped(), keep_freed_memory(), mapped())
"""


def count(**environment: str) -> str:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = subprocess.run(
        [sys.executable, "-c", COUNT], env=clean | environment, capture_output=True, text=True, check=True
    )
    return run.stdout.strip()


@needs_glibc
def test_large_blocks_come_from_the_heap() -> None:
    assert count() == "1 True 0"


@needs_glibc
@pytest.mark.parametrize(("name", "value"), [("MALLOC_ARENA_MAX", "4"), ("GLIBC_TUNABLES", "glibc.malloc.arena_max=4")])
def test_what_the_user_set_stays(name: str, value: str) -> None:
    assert count(**{name: value}) == "1 False 1"


def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from peerify.training import malloc as allocator

    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("no C library of this name"))
    assert not allocator.keep_freed_memory()
    allocator.return_freed_memory()
