"""The conversation with fal's queue: submit, status, result, cancel.

The HTTP is ours. fal-client repeats a POST up to ten times, also where the first was taken and only its answer was
lost; its handles ask on and on without a limit; and its client sends the key to a backup domain.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from . import limits
from .errors import (
    CANCELLED_KINDS,
    KINDS,
    AnswerLost,
    Cancelled,
    Failed,
    NoAnswer,
    NotAccepted,
    Refused,
    RemoteError,
    TooLarge,
    Unobtainable,
    error_kind,
    explain,
)
from .fields import EDIT_ENDPOINT
from .key import Secrets
from .limits import Waits, parse_json, within

ADDRESS = "KLEIN_CNS_FAL_URL"  # environment variable: another address in place of fal's hosts, for tests
ADDRESS_OF_FAL = "https://queue.fal.run"
APP = "/".join(EDIT_ENDPOINT.split("/")[:2])  # both endpoints are one app, and its requests lie under it
PLAIN = (("http", "127.0.0.1"), ("http", "localhost"), ("http", "::1"))  # this machine
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
QUEUED, RUNNING, DONE = "IN_QUEUE", "IN_PROGRESS", "COMPLETED"
PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR")


@dataclass(frozen=True)
class Answer:
    """An HTTP answer, read whole. ``body`` is its JSON, None where it is none."""

    status: int
    headers: httpx.Headers
    body: Any


@dataclass(frozen=True)
class Status:
    """A request as fal reports it.

    Args:
        state: `QUEUED`, `RUNNING` or `DONE`.
        position: counts the requests before this one; None where fal does not say it.
        log: holds the newest line of fal's log, or "".
        error, kind: describe a failure; None where fal says nothing of one.
    """

    state: str
    position: int | None = None
    log: str = ""
    error: str | None = None
    kind: str | None = None


class Queue:
    """fal's queue for one run; lives in one event loop.

    Usage::

        async with Queue(key) as queue:
            status = await queue.status(request_id)

    Args:
        key: opens the fal account; it is sent only to the API's own host.
        address: takes the place of fal's, http on loopback for tests; None takes fal's.
        waits: say how long to wait and how often to try.
        hide: list texts that no message may repeat, the prompt for one.

    Raises:
        NotAccepted: the address, or the environment's settings of the network, cannot be used.
    """

    def __init__(
        self,
        key: str,
        *,
        address: str | None = None,
        waits: Waits = Waits(),  # noqa: B008 - frozen
        hide: Sequence[str] = (),
    ) -> None:
        self.base = (address or ADDRESS_OF_FAL).rstrip("/")
        try:
            url = httpx.URL(self.base)
        except httpx.InvalidURL:
            raise NotAccepted(
                f"{ADDRESS} is {self.base!r}, which is not an address. Correct it or remove it."
            ) from None
        if not url.host or (url.scheme != "https" and (url.scheme, url.host) not in PLAIN):
            raise NotAccepted(f"{ADDRESS} is {self.base!r}; it must begin with https://, the key travels there.")
        self.key, self.address, self._waits, self._host = key, address, waits, url.host
        self.secrets = Secrets(key, hide)
        self.certificates = trusted_certificates()
        self._http = open_http(
            self.certificates,
            headers={"Authorization": f"Key {key}", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(waits.answer, connect=waits.connect),
        )

    async def __aenter__(self) -> Queue:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def submit(self, endpoint: str, arguments: dict[str, Any]) -> str:
        """POST once.

        Args:
            endpoint: names it as fal does.
            arguments: hold the JSON to send, as `Order.body` makes it.

        Returns:
            the request's id.

        Raises:
            NotAccepted: fal certainly did not take it.
            AnswerLost: the request left, and nobody knows whether fal took it.
        """
        try:
            timeout = httpx.Timeout(self._waits.submit, connect=self._waits.connect)
            work = self._exchange("POST", f"{self.base}/{endpoint}", json=arguments, timeout=timeout)
            answer = await within(self._waits.transfer, work)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            text, again = connection_fault(error, self._host)
            raise NotAccepted(text, retry_after=0.0 if again else None) from None
        except (httpx.TransportError, httpx.DecodingError, asyncio.TimeoutError, RemoteError) as error:
            raise AnswerLost(f"the answer to the submission was lost ({_name(error)}).") from None
        status, body = answer.status, answer.body
        if status in (408, 409) or status >= 500:  # some proxy's, or fal's own after it took the request
            raise AnswerLost(f"the submission was answered with {status} instead of a request id.")
        if status == 429:
            raise NotAccepted(self.explain(answer), _retry_after(answer))
        if 300 <= status < 400:
            raise NotAccepted(
                f"{self.base} redirects to {self.hide(_location(answer))}; the key is sent to the API's own host only."
            )
        if status >= 400:
            raise NotAccepted(self.explain(answer))
        request_id = body.get("request_id") if isinstance(body, dict) else None
        request_id = request_id or answer.headers.get("x-fal-request-id")
        if not (isinstance(request_id, str) and REQUEST_ID.fullmatch(request_id)):
            raise AnswerLost("fal's answer to the submission holds no request id.")
        return request_id

    async def status(self, request_id: str) -> Status:
        """How far a request is.

        Raises:
            NoAnswer: this look brought nothing.
            Unobtainable: fal does not know the request.
            Refused: fal does not accept the key.
        """
        try:
            answer = await self._look(f"{self._request(request_id)}/status?logs=1", self._waits.answer)
        except TooLarge as error:
            raise NoAnswer(str(error)) from None
        if answer.status in (404, 410):
            raise Unobtainable(
                f"fal does not know the request {request_id} (any more). If it was submitted with the key of another "
                "account, put that key back."
            )
        self._check_access(answer, request_id)
        status = _status(answer.body) if answer.status < 300 else None
        if status is None:
            raise NoAnswer(f"fal answered a look at the request with {answer.status} and no status.")
        return status

    async def result(self, request_id: str, status: Status) -> Any:
        """The JSON of a completed request's response.

        Raises:
            NoAnswer: this look brought nothing.
            Failed, Cancelled, Unobtainable: fal says that the request ended so.
            Refused: fal does not accept the key.
            TooLarge: the answer is larger than its limit, and was not read.
        """
        answer = await self._look(self._request(request_id), self._waits.transfer)
        kind = error_kind(answer.body, answer.headers) or status.kind
        told = status.error is not None or status.kind is not None
        if answer.status < 300 and answer.body is not None:
            return answer.body
        if answer.status in (404, 410):
            raise Unobtainable(f"the result of the request {request_id} is gone from fal.")
        self._check_access(answer, request_id)
        if answer.status == 499 or (answer.status >= 400 and kind in CANCELLED_KINDS):
            raise Cancelled(f"the request {request_id} was cancelled at fal.", certain=told)
        if answer.status >= 400 and (told or kind in KINDS or answer.status == 422):
            raise Failed(self.explain(answer, kind), certain=told or answer.status == 422)
        raise NoAnswer(f"fal answered the question for the result with {answer.status}.")

    async def cancel(self, request_id: str) -> bool:
        """Ask fal to cancel.

        Returns:
            whether fal will; False where the request was already completed.

        Raises:
            Unobtainable: fal does not know the request.
            RemoteError: fal could not be asked, or did not agree.
        """
        try:
            work = self._exchange("PUT", f"{self._request(request_id)}/cancel")
            answer = await within(self._waits.grace / 2, work)
        except (httpx.HTTPError, asyncio.TimeoutError, NoAnswer, TooLarge) as error:
            raise RemoteError(f"fal could not be asked to cancel ({_name(error)}).") from None
        if answer.status < 300:
            return True
        if answer.status == 400:
            return False
        if answer.status == 404:
            raise Unobtainable(f"fal does not know the request {request_id}.")
        if answer.status in (401, 403):
            raise RemoteError(self.explain(answer))
        raise RemoteError(f"fal answered the cancellation with {answer.status}.")

    def explain(self, answer: Answer, kind: str | None = None) -> str:
        """The sentence for a fault, without the key and the prompts."""
        return explain(answer.status, answer.body, kind or error_kind(answer.body, answer.headers), self.hide)

    def hide(self, text: str) -> str:
        """A server's words on one line, without the key and the prompts."""
        return self.secrets.hide(text)

    def _request(self, request_id: str) -> str:
        return f"{self.base}/{APP}/requests/{request_id}"

    def _check_access(self, answer: Answer, request_id: str) -> None:
        if answer.status in (401, 403):
            raise Refused(
                f"{self.explain(answer)} The request {request_id} was submitted and goes on at fal, which may charge "
                "for it."
            )

    async def _look(self, url: str, seconds: float) -> Answer:
        """GET. Raises NoAnswer where the connection fails, and TooLarge."""
        try:
            return await within(seconds, self._exchange("GET", url))
        except (httpx.HTTPError, asyncio.TimeoutError) as error:
            text = str(error) if isinstance(error, RemoteError) else connection_fault(error, self._host)[0]
            raise NoAnswer(text) from None

    async def _exchange(self, method: str, url: str, **options: Any) -> Answer:
        async with self._http.stream(method, url, **options) as response:
            data = await limits.read(response, limits.MAX_ANSWER, "fal's answer")
        return Answer(response.status_code, response.headers, parse_json(data))


def trusted_certificates() -> ssl.SSLContext:
    """The certificates that TLS connections are checked against, by the environment's variables.

    Loading them takes a while.

    Raises:
        NotAccepted: one of the variables cannot be used.
    """
    try:
        return httpx.create_ssl_context()
    except OSError as error:  # ssl.SSLError is one
        raise NotAccepted(f"{_settings_fault(error)} Nothing was submitted.") from None


def open_http(certificates: ssl.SSLContext, **options: Any) -> httpx.AsyncClient:
    """A client that heeds the environment's variables of proxies, unless ``trust_env`` is false.

    Args:
        certificates: check TLS connections, as `trusted_certificates` loads them.
        options: go to ``httpx.AsyncClient``.

    Raises:
        NotAccepted: one of the variables cannot be used.
    """
    try:
        return httpx.AsyncClient(verify=certificates, **options)
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        raise NotAccepted(f"{_settings_fault(error)} Nothing was submitted.") from None


def connection_fault(error: Exception, host: str) -> tuple[str, bool]:
    """A sentence for a connection that failed, and whether trying again at once makes sense.

    Args:
        error: is what httpx raised.
        host: names the server in the sentence.
    """
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, ssl.SSLCertVerificationError):
            return (
                f"the certificate of {host} is not trusted here ({found.verify_message}). A proxy or a virus scanner "
                "that opens TLS connections does that: let SSL_CERT_FILE name a file with its certificate and restart, "
                "or exempt fal.run and fal.media from it.",
                False,
            )
        found = found.__cause__ or found.__context__
    if isinstance(error, httpx.ProxyError):
        return f"the proxy to {host} refuses ({_name(error)}). Correct {_named(PROXIES)} and restart.", True
    proxies = _named(PROXIES[:3], "")
    network = f"Connect to the network, or correct {proxies}," if proxies else "Connect to the network"
    return f"{host} cannot be reached ({_name(error)}). {network} and run again with the same seed.", True


def _settings_fault(error: Exception) -> str:
    """The fault in the environment's settings. It never names a proxy's address, which may hold a password."""
    if isinstance(error, ImportError):
        return (
            f"{_named(PROXIES)} asks for a SOCKS proxy, for which this Python lacks a package. Run: "
            "python -m pip install socksio"
        )
    if isinstance(error, OSError):  # ssl.SSLError is one
        name = next((name for name in CERTIFICATES if os.environ.get(name)), None)
        if name is None:
            return f"the list of trusted certificates cannot be read ({_name(error)}). Install certifi again."
        return (
            f"{name} is {os.environ[name]!r}, from which no certificates can be read ({_name(error)}). Correct it or "
            "remove it, and restart."
        )
    return (
        f"{_named(PROXIES)} cannot be used ({_name(error)}). A proxy is http://host:port or socks5://host:port; "
        "NO_PROXY lists hosts and addresses with commas between them, and no networks of IPv6 addresses. Correct it "
        "and restart."
    )


def _named(names: Sequence[str], none: str = "the system's proxy setting") -> str:
    """Those variables that are set, in words."""
    found = [name for name in names if os.environ.get(name) or os.environ.get(name.lower())]
    return " or ".join(found) or none


def _status(body: Any) -> Status | None:
    state = body.get("status") if isinstance(body, dict) else None
    if state not in (QUEUED, RUNNING, DONE):
        return None
    position, error, kind = (body.get(name) for name in ("queue_position", "error", "error_type"))
    return Status(
        state,
        position if isinstance(position, int) else None,
        _last_line(body.get("logs")),
        str(error) if error else None,
        str(kind) if kind else None,
    )


def _last_line(logs: Any) -> str:
    """The newest message of fal's logs, as far as they are what they should be."""
    last = logs[-1] if isinstance(logs, list) and logs else None
    message = last.get("message") if isinstance(last, dict) else None
    return message if isinstance(message, str) else ""


def _location(answer: Answer) -> str:
    try:
        return httpx.URL(answer.headers.get("location", "")).host or "nowhere"
    except httpx.InvalidURL:
        return "an unusable address"


def _retry_after(answer: Answer) -> float:
    """Seconds of ``Retry-After``, 0 where there is none; a date counts as none."""
    text = answer.headers.get("retry-after", "")
    return float(text) if re.fullmatch("[0-9]+", text) else 0.0


def _name(error: BaseException) -> str:
    return str(error).rstrip(".") if isinstance(error, RemoteError) else type(error).__name__
