"""Talking to the Hub: what is worth another try, what an error means for the user, and no token in any text."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import TypeVar

from peerify.errors import PeerifyError, PublishError
from peerify.reading import reason, shown

PATIENCE_S = 60.0  # waiting, in all, without getting any further
ANSWER_S = 10.0  # until a Hub that does not answer counts as gone
PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)  # 409, 412: somebody is or was committing
# The Xet client reports every refusal as a lost connection, with the status in the text.
_XET_STATUS = re.compile(r"HTTP status \w+ error \((\d{3})")
Result = TypeVar("Result")


class Retry:
    """How long to go on in spite of a Hub that is busy, down or gone."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Something was achieved: be as patient as at first."""
        self._waited, self._pause = 0.0, 1.0

    def call(self, attempt: Callable[[], Result]) -> Result:
        """Call `attempt` until it succeeds; its last error when it cannot, or when waiting was in vain.

        `attempt` has to be fit for repetition: it may have been carried out without an answer.
        """
        while True:
            try:
                return attempt()
            except PeerifyError:
                raise
            except Exception as error:
                pause = _pause(error, self._pause)
                if pause is None or self._waited + pause > PATIENCE_S:
                    raise
                time.sleep(pause)
                self._waited += pause
                self._pause = min(8.0, 2 * self._pause)


def reachable() -> bool:
    """Whether anything answers at the Hub's address, found out by one request.

    The client itself would try for half a minute before it says that there is no network.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=ANSWER_S)
    except Exception as error:  # whatever else went wrong, the call that is wanted will say so
        return not _is_connection(error)
    return True


def need_hub(repo: str) -> None:
    """Raise PublishError where nothing answers at the Hub's address."""
    if not reachable():
        raise PublishError(_unreachable(repo))


def ref_fault(name: str) -> str | None:
    """Why git takes no branch or tag of this name (git check-ref-format); None where it does."""
    bad = re.search(r"[\x00-\x20\x7f~^:?*\[\\\ud800-\udfff]|\.\.|@\{|//|^[-/]|/$|\.$|\.lock(/|$)|(^|/)\.|^@$|^$", name)
    return f"git takes no name such as {shown(name)}: use letters, digits, - and ." if bad else None


def status_of(error: BaseException) -> int | None:
    """The HTTP status that `error`, or the error it wraps, is about."""
    seen: BaseException | None = error
    while seen is not None:
        status = getattr(getattr(seen, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
        if isinstance(seen, ConnectionError) and (said := _XET_STATUS.search(str(seen))):
            return int(said[1])
        seen = seen.__cause__
    return None


def retry_after(error: BaseException) -> float | None:
    """Seconds that the Hub asked to wait."""
    seen: BaseException | None = error
    while seen is not None and getattr(seen, "response", None) is None:
        seen = seen.__cause__
    value = seen.response.headers.get("Retry-After") if seen is not None else None  # type: ignore[attr-defined]
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _pause(error: BaseException, usual: float) -> float | None:
    """Seconds until another try; None: it would fail again."""
    status = status_of(error)
    if status is not None:
        return (retry_after(error) or usual) if status in PASSING else None
    return usual if _is_connection(error) else None


def _is_connection(error: BaseException) -> bool:
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | TimeoutError):
            return True
        # The client's HTTP library has changed its name before, and raises errors of its own.
        if any(cls.__name__ == "TransportError" for cls in type(seen).__mro__):
            return True
        seen = seen.__cause__
    return False


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what the Hub and its client raise into a PublishError of one sentence."""
    try:
        yield
    except PeerifyError:
        raise
    except Exception as error:
        raise PublishError(redact(_explain(error, repo))) from error


def _explain(error: BaseException, repo: str) -> str:
    status, said = status_of(error), _said(error)
    detail = f" ({said})" if said else ""
    if status == 401:
        return f"{repo}: the Hub does not accept your token{detail}; log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"{repo}: your token may not write there{detail}; use one with write permission, your own namespace, "
            "or --create-pr"
        )
    if status == 404:
        return f"{repo}: the Hub does not find it{detail}; check the name, and that your token may see it"
    if status in (409, 412):
        return f"{repo}: other changes are being made to it just now{detail}; push again"
    if status == 429:
        wait = retry_after(error)
        when = f"in {wait:.0f} s" if wait else "later"
        return f"{repo}: the Hub has had too many requests from you (429); push again {when}"
    if status is not None and status >= 500:
        return f"{repo}: the Hub failed with status {status}{detail}; push again later, and it goes on where it was"
    if status is not None:
        return f"{repo}: the Hub refused with status {status}{detail}"
    if _is_connection(error):
        return _unreachable(repo)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "No space left" in str(error):
        return f"{repo}: the disk is full; free some space (HF_HOME says where the Hub's files are kept)"
    if type(error).__name__ == "OfflineModeIsEnabled":
        return _unreachable(repo)
    return f"{repo}: {reason(error)}"


def _unreachable(repo: str) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return f"{repo}: HF_HUB_OFFLINE is set, so the Hub cannot be reached; unset it"
    return f"{repo}: the Hub at {constants.ENDPOINT} cannot be reached; push again later, and it goes on where it was"


def _said(error: BaseException) -> str:
    """What the server said, if anything."""
    seen: BaseException | None = error
    while seen is not None:
        message = getattr(seen, "server_message", None)
        if message:
            return _line(str(message)).rstrip(".")
        seen = seen.__cause__
    return ""


def _line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def redact(text: str) -> str:
    """`text` without the user's Hub token, wherever it came from. Imports nothing."""
    hub = sys.modules.get("huggingface_hub")
    if hub is None:
        return text
    try:
        token = hub.get_token()
    except Exception:  # a token file that cannot be read holds nothing that could have been printed
        token = None
    return text.replace(token, "<token>") if token else text
