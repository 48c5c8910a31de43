"""The command line: thin shells around library functions.

Results go to stdout, everything else to stderr. Only this package imports click; torch and transformers are imported
inside the commands only, so that ``--help`` is instant.
"""

from __future__ import annotations

import signal
from typing import Any

from peerify.cli import (  # noqa: F401  each adds its command
    bench,
    convert,
    densify,
    eval,
    grow,
    inspect,
    push,
    report,
    run,
    sweep,
    train,
)
from peerify.cli.base import cli
from peerify.errors import Terminated

__all__ = ["cli", "main"]


def main() -> None:
    """The console script."""

    def terminate(*_: Any) -> None:
        # The temporary folder goes and the target stays as it was, as after Ctrl-C.
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    cli(prog_name="peerify")
