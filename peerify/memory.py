"""Memory that this process has taken."""

from __future__ import annotations

import sys


def peak_mb() -> float | None:
    """The most memory that this process has held at once, in MB (10^6 bytes); None where the platform does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
        return peak / 1e6 if peak is not None else None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
