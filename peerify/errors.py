"""Every error a user is meant to read. The command line prints the message and exits with `exit_code`.

A message is one sentence that names the thing at fault, the key or the file, and the remedy.
"""

from __future__ import annotations


class PeerifyError(Exception):
    """Something the user can put right; the message is shown as it stands, without a traceback."""

    exit_code: int = 1


class UsageError(PeerifyError):
    """A wrong option, recipe key or combination of them."""

    exit_code = 2


class CheckpointError(PeerifyError):
    """The input model cannot be found, read or used."""


class ConversionError(PeerifyError):
    """The model was read, but cannot be converted as asked."""


class DataError(PeerifyError):
    """The text for calibration or evaluation cannot be found, read or used."""


class OutputError(PeerifyError):
    """The output folder cannot be written."""


class PublishError(PeerifyError):
    """The model could not be published, or did not arrive as it was sent."""


class TrainingError(PeerifyError):
    """Training cannot go on as the recipe says."""


class StoppedError(PeerifyError):
    """A run was stopped by a signal, and what it had done is safe."""

    def __init__(self, message: str, signal: int) -> None:
        """`message` may be empty, in processes that leave the speaking to another one."""
        super().__init__(message)
        self.exit_code = 128 + signal


class Terminated(KeyboardInterrupt):
    """SIGTERM: a polite kill cleans up like Ctrl-C."""
