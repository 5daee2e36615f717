"""Addresses for pictures and LoRAs: a small picture travels inside the request, the rest is put on fal's CDN."""

from __future__ import annotations

import hashlib
from pathlib import Path

import httpx

from .client import Answer, Api, connection_fault, open_http
from .errors import NotAccepted
from .limits import parse_json
from .order import Order, file_digest
from .pictures import data_uri, encode_png
from .session import Session

MAX_INLINE = 4 * 2**20  # bytes of a PNG; a larger one is uploaded


async def addresses(session: Session, order: Order) -> tuple[list[str], list[str]]:
    """An address for each picture and each LoRA; a LoRA file or a large picture is uploaded, once for its content."""
    pictures, loras = [], []
    for picture in order.pictures:
        png = picture if isinstance(picture, str) else encode_png(picture)
        inline = isinstance(png, bytes) and len(png) <= MAX_INLINE
        pictures.append(data_uri(png) if inline else await _address(session, png))
    for path, _ in order.loras:
        loras.append(await _address(session, path))
    return pictures, loras


async def _address(session: Session, source: str | bytes | Path) -> str:
    if isinstance(source, str):
        return source
    digest = file_digest(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    known = session.journal.uploaded(digest)
    if known and await _is_there(session.api, known, session.waits.connect):
        return known
    session.progress(f"uploading {source.name if isinstance(source, Path) else 'a picture'} to fal")
    url = await _upload(session.api, source)
    if not (isinstance(url, str) and url.startswith(("https://", "http://"))):
        raise NotAccepted("fal's file server names no address for an upload. Nothing was submitted.")
    session.journal.keep_upload(digest, url)
    return url


async def _upload(api: Api, source: Path | bytes) -> str:
    """Put a file, or a PNG, on the CDN; its address, which anyone who knows it can read.

    Raises:
        NotAccepted: it could not be.
    """
    import fal_client.client

    if api.address:
        fal_client.client.REST_URL = fal_client.client.CDN_URL = api.base
    client, named = fal_client.AsyncClient(key=api.key), isinstance(source, Path)
    only_cdn = {"fallback_repository": []}  # the other way sends the key along to the storage host
    try:
        if named:
            return await client.upload_file(source, **only_cdn)
        return await client.upload(source, "image/png", "picture.png", **only_cdn)
    except (
        httpx.HTTPError, httpx.InvalidURL, fal_client.client.FalClientError, OSError, ValueError, KeyError, TypeError
    ) as error:
        response = getattr(error, "response", None)
        if response is not None:
            reason = api.explain(Answer(response.status_code, response.headers, parse_json(response.content)))
        elif isinstance(error, httpx.TransportError):
            reason = connection_fault(error, "fal's file server")[0]
        else:
            reason = f"{type(error).__name__}."
        what = source.name if named else "a picture"
        raise NotAccepted(f"{what} could not be uploaded to fal: {reason} Nothing was submitted.") from None


async def _is_there(api: Api, url: str, seconds: float) -> bool:
    """Whether an uploaded file can still be read; what cannot be told counts as yes."""
    try:
        async with open_http(api.certificates, timeout=seconds) as http:
            return (await http.head(url)).status_code not in (403, 404, 410)
    except (httpx.HTTPError, httpx.InvalidURL):
        return True
