"""The conversation with fal's queue: one POST that is never repeated blindly, then fal-client's own handles.

fal-client's ``submit`` repeats the POST up to ten times, also where the first was taken and only its answer was lost;
so the POST is ours. Its client also sends the key to a backup domain; so the HTTP client is ours too.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Sequence
from functools import cache
from typing import Any

import httpx

from .errors import (
    CANCELLED_KINDS,
    KINDS,
    AnswerLost,
    Cancelled,
    Failed,
    NotAccepted,
    RemoteError,
    Unobtainable,
    error_kind,
    explain,
)
from .fields import EDIT_ENDPOINT
from .interrupt import THREAD, within
from .session import Waits

ADDRESS = "KLEIN_CNS_FAL_URL"  # environment variable: another address in place of fal's hosts, for tests
QUEUE = "https://queue.fal.run"
PLAIN = (("http", "127.0.0.1"), ("http", "localhost"), ("http", "::1"))  # this machine
SHORTEST_HIDDEN = 4  # letters; a shorter prompt is part of any sentence
MAX_ANSWER = 256 * 2**20  # bytes; four inline PNGs of 2048 x 2048 are below 100 MiB
UNUSABLE = (  # an answer that is none: no connection, not JSON, not what fal-client reads
    httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError, AttributeError, asyncio.TimeoutError
)
REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


def _not_ours(record: logging.LogRecord) -> bool:
    return not record.threadName.startswith(THREAD)


logging.getLogger("httpx").addFilter(_not_ours)  # it would log every poll


class Api:
    """fal's queue for one run; lives in one event loop.

    Args:
        key: sent to the API's own host alone.
        address: another address in place of ``QUEUE`` (http on loopback for tests).
        hide: texts that no message may repeat, the prompt for one.
    """

    def __init__(self, key: str, address: str | None, waits: Waits, hide: Sequence[str] = ()) -> None:
        self.base = (address or QUEUE).rstrip("/")
        url = httpx.URL(self.base)
        if url.scheme != "https" and (url.scheme, url.host) not in PLAIN:
            raise NotAccepted(f"{ADDRESS} is {self.base!r}; it must begin with https://, the key travels there.")
        self.key, self.address, self._waits = key, address, waits
        quoted = [form for text in (key, *hide) for form in (text, repr(text)[1:-1], json.dumps(text)[1:-1])]
        forms = {" ".join(form.split()) for form in quoted}
        self._hidden = sorted((form for form in forms if len(form) >= SHORTEST_HIDDEN), key=len, reverse=True)
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Key {key}", "Accept-Encoding": "identity"},  # MAX_ANSWER counts what comes
            timeout=httpx.Timeout(waits.answer, connect=waits.connect),
            event_hooks={"response": [_bounded]},
        )

    async def __aenter__(self) -> Api:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def submit(self, endpoint: str, arguments: dict[str, Any]) -> str:
        """POST once; the request's id.

        Raises:
            NotAccepted: fal certainly did not take it.
            AnswerLost: it left, and what became of it is unknown.
        """
        try:
            limits = httpx.Timeout(self._waits.submit, connect=self._waits.connect)
            response = await self._http.post(f"{self.base}/{endpoint}", json=arguments, timeout=limits)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            text = f"{self.base} cannot be reached ({_name(error)}). Connect to the network and run again."
            raise NotAccepted(text, retry_after=0.0) from None
        except (httpx.TransportError, httpx.DecodingError, RemoteError) as error:
            raise AnswerLost(f"the answer to the submission was lost ({_name(error)}).") from None
        status, body = response.status_code, _json(response)
        if status in (408, 409) or status >= 500:  # some proxy's, or fal's own after it took the request
            raise AnswerLost(f"the submission was answered with {status} instead of a request id.")
        if status == 429:
            raise NotAccepted(self.explain(response, body), _retry_after(response))
        if 300 <= status < 400:
            host = httpx.URL(response.headers.get("location", "")).host or "nowhere"
            raise NotAccepted(f"{self.base} redirects to {host}; the key is sent to the API's own host only.")
        if status >= 400:
            raise NotAccepted(self.explain(response, body))
        request_id = body.get("request_id") if isinstance(body, dict) else None
        request_id = request_id or response.headers.get("x-fal-request-id")
        if not (isinstance(request_id, str) and REQUEST_ID.fullmatch(request_id)):
            raise AnswerLost("fal's answer to the submission holds no request id.")
        return request_id

    async def status(self, request_id: str) -> Any:
        """fal-client's ``Queued``, ``InProgress`` or ``Completed``; None where the answer was unusable.

        Raises:
            Unobtainable: fal does not know the request.
            RemoteError: the key is refused.
        """
        from fal_client.client import FalClientHTTPError

        try:
            return await within(self._waits.answer, self._handle(request_id).status(with_logs=True))
        except FalClientHTTPError as error:
            if error.status_code in (404, 410):
                raise Unobtainable(f"fal does not know the request {request_id} (any more).") from None
            if error.status_code in (401, 403):
                raise RemoteError(self.explain(error.response)) from None
        except UNUSABLE:
            pass  # a poll may fail in any way; the request goes on, and so does the polling
        return None

    async def result(self, request_id: str, error: str | None, kind: str | None) -> dict[str, Any] | None:
        """The response of a completed request; None where the answer was unusable.

        Args:
            error, kind: what the status said of a failure.

        Raises:
            Failed, Cancelled, Unobtainable: fal's last word on the request.
            RemoteError: the key is refused, or the answer too large.
        """
        from fal_client.client import FalClientHTTPError

        try:
            body = await self._handle(request_id).get()  # large with sync_mode: as long as bytes come, it may
            return body if isinstance(body, dict) else None
        except FalClientHTTPError as fault:
            self._raise_final(request_id, fault.response, error, kind)
        except UNUSABLE:
            pass
        return None

    async def cancel(self, request_id: str) -> bool:
        """Ask fal to cancel; whether it will, False where the request was already completed.

        Raises:
            Unobtainable: fal does not know the request.
            RemoteError: fal could not be asked.
        """
        from fal_client.client import FalClientHTTPError

        try:
            await within(self._waits.grace / 2, self._handle(request_id).cancel())
            return True
        except FalClientHTTPError as error:
            if error.status_code == 400:
                return False
            if error.status_code == 404:
                raise Unobtainable(f"fal does not know the request {request_id}.") from None
            raise RemoteError(self.explain(error.response)) from None
        except (httpx.HTTPError, asyncio.TimeoutError) as error:
            raise RemoteError(f"fal could not be asked to cancel ({_name(error)}).") from None

    def _handle(self, request_id: str) -> Any:
        from fal_client.client import AppId

        app = AppId.from_endpoint_id(EDIT_ENDPOINT)  # both endpoints are one app
        url = f"{self.base}/{app.owner}/{app.alias}/requests/{request_id}"
        return _handle_class()(request_id, url, f"{url}/status", f"{url}/cancel", self._http)

    def _raise_final(self, request_id: str, response: httpx.Response, error: str | None, kind: str | None) -> None:
        """Raise if the fault is fal's last word on the request, and not some trouble on the way."""
        status, body = response.status_code, _json(response)
        told, kind = bool(error or kind), error_kind(body, response.headers) or kind
        if status in (404, 410):
            raise Unobtainable(f"the result of the request {request_id} is gone from fal.")
        if status in (401, 403):
            raise RemoteError(self.explain(response, body))
        if status == 499 or kind in CANCELLED_KINDS:
            raise Cancelled(f"the request {request_id} was cancelled at fal.")
        if told or kind in KINDS or status == 422:
            raise Failed(self.explain(response, body, kind))

    def explain(self, response: httpx.Response, body: Any = None, kind: str | None = None) -> str:
        """The sentence for a fault, without what is to be hidden."""
        body = _json(response) if body is None else body
        return explain(response.status_code, body, kind or error_kind(body, response.headers), self.hide)

    def hide(self, text: str) -> str:
        """A server's words on one line, without the key and the prompts, however they are quoted."""
        text = " ".join(text.split())
        for hidden in self._hidden:
            text = text.replace(hidden, "...")
        return text


@cache
def _handle_class() -> Any:
    """fal-client's handle, which reads a status without logs or position too."""
    from fal_client.client import AsyncRequestHandle

    class Handle(AsyncRequestHandle):
        def _parse_status(self, data: dict[str, Any]) -> Any:
            return super()._parse_status({"logs": None, "queue_position": None, **data})

    return Handle


class _Bounded(httpx.AsyncByteStream):
    def __init__(self, stream: httpx.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        total = 0
        async for chunk in self._stream:
            total += len(chunk)
            if total > MAX_ANSWER:
                raise RemoteError(f"fal's answer is larger than {MAX_ANSWER // 2**20} MiB; it was not read.")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _bounded(response: httpx.Response) -> None:
    response.stream = _Bounded(response.stream)


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _retry_after(response: httpx.Response) -> float:
    """Seconds of ``Retry-After``, 0 where there is none; a date counts as none."""
    text = response.headers.get("retry-after", "")
    return float(text) if re.fullmatch("[0-9]+", text) else 0.0


def _name(error: BaseException) -> str:
    return str(error) if isinstance(error, RemoteError) else type(error).__name__
