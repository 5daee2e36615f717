"""The faults of a remote run, in sentences. A server's own words pass through here, and secrets do not.

RemoteError
    NotAccepted
    AnswerLost
    NoAnswer
    Refused
    Failed
        Cancelled
    Unobtainable
        NoPictures
    TooLarge
    Gone
    Interrupted
    Spoiled
JournalError
    Taken
OverLimit
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

RUN_AGAIN = "Run again with the same inputs and the same seed: that collects the same request and submits nothing."
RESUBMIT = (
    "Whether fal took it is unknown: your requests are listed at fal.ai/dashboard/requests. If it is there, give its "
    "id as recover_request_id; if not, turn on resubmit_lost. If fal took it all the same, both are charged."
)
RESUBMIT_GONE = (
    f"{RUN_AGAIN} Only if fal.ai/dashboard/requests shows no result either, turn on resubmit_lost: if it is still gone "
    "then, the next run submits it again and is charged again."
)
_SUBMIT_ANEW = "fal does not charge for that. Run again later with the same seed; that submits it again."
MAX_WORDS = 300  # letters of a server's sentence
MAX_FIELDS = 8  # entries of a 422 that are shown

KINDS = {  # fal's error types (request errors of the queue)
    "request_timeout": "it was not finished within fal's time limit",
    "startup_timeout": "no machine of fal's began it in time",
    "runner_scheduling_failure": "fal had no machine for it",
    "runner_connection_timeout": "fal's machine did not answer",
    "runner_connection_refused": "fal's machine did not answer",
    "runner_connection_error": "fal lost the connection to its machine",
    "runner_disconnected": "fal lost the connection to its machine",
    "runner_incomplete_response": "fal's machine broke off its answer",
    "runner_server_error": "the model failed on fal's machine",
    "internal_server_error": "the model failed on fal's machine",
    "internal_error": "fal failed inside",
}
CANCELLED_KINDS = ("client_cancelled", "client_disconnected")


class RemoteError(RuntimeError):
    """A remote run failed; the text is what a user reads."""


class NotAccepted(RemoteError):
    """fal certainly did not take the request.

    Args:
        text: tells a user why and what to do.
        retry_after: seconds after which trying again makes sense; None where it does not.
    """

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class AnswerLost(RemoteError):
    """Whether fal took the request is unknown."""


class NoAnswer(RemoteError):
    """One look at a request brought nothing that can be used; the request goes on."""


class Refused(RemoteError):
    """fal does not accept the key (any more), or the account's balance is exhausted."""


class Failed(RemoteError):
    """The request ended at fal without a result.

    Args:
        text: tells a user why.
        certain: whether one look is enough to believe it.
    """

    def __init__(self, text: str, certain: bool = False) -> None:
        super().__init__(text)
        self.certain = certain


class Cancelled(Failed):
    """The request was cancelled at fal."""


class Unobtainable(RemoteError):
    """fal took the request, and its result cannot be had (any more)."""


class NoPictures(Unobtainable):
    """An answer holds no picture, so it is not a result."""


class TooLarge(RemoteError):
    """An answer or a file is larger than its limit; it was not read."""


class Gone(RemoteError):
    """A file's server says that there is no such file, or that it may not be read; this may be temporary."""


class Interrupted(RemoteError):
    """A file did not arrive whole; trying again makes sense."""


class Spoiled(RemoteError):
    """A saved file is not a picture.

    Args:
        text: tells a user which file and what is wrong.
        index: counts the pictures of the request, from 0.
    """

    def __init__(self, text: str, index: int) -> None:
        super().__init__(text)
        self.index = index


class JournalError(RuntimeError):
    """The journal cannot be read or written; the text is the system's reason."""


class Taken(JournalError):
    """Another submission of the same inputs is alive."""


class OverLimit(Exception):
    """A submission would cost more than may be spent.

    Args:
        spent: counts the USD until now.
    """

    def __init__(self, spent: float) -> None:
        super().__init__(f"{spent:.4f}")
        self.spent = spent


def explain(status: int, body: Any, kind: str | None, hide: Callable[[str], str]) -> str:
    """One or two sentences for an HTTP fault of the API.

    >>> explain(402, None, None, str)
    'the balance of your fal account is exhausted. Top it up at fal.ai/dashboard/billing.'

    Args:
        status: gives the HTTP status.
        body: holds the parsed JSON; None where the answer holds no JSON.
        kind: gives fal's ``error_type``; None where there is none.
        hide: takes the key and the prompts out of a server's text.
    """
    detail = body.get("detail") if isinstance(body, Mapping) else None
    if status in (401, 403):
        return _access(detail)
    if status == 402:
        return "the balance of your fal account is exhausted. Top it up at fal.ai/dashboard/billing."
    if status == 413:
        return "fal refused the request as too large. Give fewer or smaller pictures."
    if status == 422:
        return f"fal refused an input: {_fields(detail, hide)}. Correct it."
    if status == 429:
        return (
            "fal answered that there are too many requests at once (429). Wait for the others, then run again with the "
            "same seed."
        )
    if kind in KINDS:
        return f"the request failed at fal: {KINDS[kind]} ({kind}). {_SUBMIT_ANEW}"
    if status >= 500:
        return f"fal failed ({status}{_quoted(detail, hide)}). {_SUBMIT_ANEW}"
    return f"fal refused the request ({status}{_quoted(detail, hide)})."


def error_kind(body: Any, headers: Mapping[str, str]) -> str | None:
    """fal's machine-readable ``error_type``, from the body or the header."""
    kind = body.get("error_type") if isinstance(body, Mapping) else None
    return kind if isinstance(kind, str) else headers.get("x-fal-error-type")


def _access(detail: Any) -> str:
    if isinstance(detail, str) and any(word in detail.lower() for word in ("balance", "locked", "billing")):
        return "the balance of your fal account is exhausted. Top it up at fal.ai/dashboard/billing."
    return "fal does not accept the key. Make one at fal.ai/dashboard/keys and put it where the old one is."


def _fields(detail: Any, hide: Callable[[str], str]) -> str:
    """Field and reason of each entry of a 422; never ``input``, which echoes the prompt."""
    if not isinstance(detail, list):
        return "it did not say which"
    found = []
    for entry in detail[:MAX_FIELDS]:
        if isinstance(entry, Mapping):
            place = entry.get("loc")
            where = hide(".".join(str(part) for part in place if part != "body") if isinstance(place, list) else "")
            reason = hide(str(entry.get("msg") or entry.get("type")))
            found.append(f"{where or 'the request'}: {_shortened(reason)}")
    return "; ".join(found) or "it did not say which"


def _quoted(detail: Any, hide: Callable[[str], str]) -> str:
    return f": {_shortened(hide(detail))}" if isinstance(detail, str) and detail else ""


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_WORDS else text[:MAX_WORDS] + "..."
