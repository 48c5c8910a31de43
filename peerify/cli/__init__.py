"""The command line: thin shells around library functions.

Results go to stdout, everything else to stderr. Only this package imports click; torch and transformers are imported
inside the commands only, so that ``--help`` is instant.
"""

from __future__ import annotations

import signal
import sys

from peerify.cli import convert, eval, inspect, push, run, train  # noqa: F401  each adds its command
from peerify.cli.base import cli

__all__ = ["cli", "main"]


def main() -> None:
    """The console script."""
    # A polite kill cleans up like an interrupt: the temporary folder goes, the target stays as it was.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cli(prog_name="peerify")
