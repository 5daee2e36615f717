"""Files to fal and from fal.

A small picture travels inside the request; the rest is put on fal's file servers. Results are fetched without the key,
within a size, and never from inside the user's own network.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import ipaddress
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import getproxies, proxy_bypass

import httpx
from PIL import Image

from . import limits
from .errors import Gone, Interrupted, NotAccepted, RemoteError
from .journal import Journal
from .limits import Waits, parse_json, within
from .order import Order, file_digest
from .queue import Answer, Queue, connection_fault, open_http

MAX_INLINE = 4 * 2**20  # bytes of a PNG; a larger one is uploaded
MAX_REDIRECTS = 5
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
FAKE = ipaddress.ip_network("198.18.0.0/15")  # what the DNS of some local proxies answers for every name (RFC 2544)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in the last 32 bits (RFC 6052)
PRIVATE = [  # which Python takes for public, some only before 3.13
    ipaddress.ip_network(text)
    for text in (
        "::/96",  # an IPv4 address in the last 32 bits, long given up (RFC 4291)
        "fec0::/10",  # site-local, given up but still in use (RFC 3879)
        "64:ff9b:1::/48",  # NAT64 inside a network (RFC 8215)
        "5f00::/16",  # segment routing inside a network (RFC 9602)
    )
]


@dataclass(frozen=True)
class Session:
    """Everything that the steps of a run share.

    Args:
        results: takes the pictures.
        progress: takes each line to show.
    """

    journal: Journal
    queue: Queue
    waits: Waits
    results: Path
    progress: Callable[[str], None]


async def addresses(session: Session, order: Order) -> tuple[list[str], list[str]]:
    """An address for each picture and each LoRA; a LoRA file or a large picture is uploaded, once for its content.

    Args:
        session: holds the queue and the journal of earlier uploads.
        order: holds the pictures and the LoRAs.

    Returns:
        the addresses of the pictures, and those of the LoRAs.

    Raises:
        NotAccepted: a picture or a file could not be read or uploaded.
    """
    pictures = [await _picture_address(session, picture) for picture in order.pictures]
    loras = [path if isinstance(path, str) else await _uploaded(session, path) for path, _ in order.loras]
    return pictures, loras


def encode_png(picture: Image.Image) -> bytes:
    """The picture as PNG: lossless, so fal edits the same pixels as the local nodes."""
    data = io.BytesIO()
    picture.convert("RGB").save(data, "PNG")
    return data.getvalue()


async def _picture_address(session: Session, picture: Image.Image | str) -> str:
    if isinstance(picture, str):
        return picture
    png = encode_png(picture)
    if len(png) > MAX_INLINE:
        return await _uploaded(session, png)
    return "data:image/png;base64," + base64.b64encode(png).decode()


async def _uploaded(session: Session, source: bytes | Path) -> str:
    digest = file_digest(source) if isinstance(source, Path) else hashlib.sha256(source).hexdigest()
    known = session.journal.uploaded(digest)
    if known and await _is_there(session, known):
        return known
    name = source.name if isinstance(source, Path) else "a picture"
    session.progress(f"uploading {name} to fal")
    url = await _upload(session.queue, source, name)
    if not (isinstance(url, str) and url.startswith(("https://", "http://"))):
        raise NotAccepted("fal's file server names no address for an upload. Nothing was submitted.")
    session.journal.keep_upload(digest, url)
    return url


async def _upload(queue: Queue, source: bytes | Path, name: str) -> Any:
    """Put a file, or a PNG, on the file servers; its address, which anyone who knows it can read.

    Raises:
        NotAccepted: it could not be.
    """
    import fal_client.client

    if queue.address:
        fal_client.client.REST_URL = fal_client.client.CDN_URL = queue.base
    client = fal_client.AsyncClient(key=queue.key)
    try:  # without a fallback, which sends the key along to the storage host
        if isinstance(source, Path):
            return await client.upload_file(source, fallback_repository=[])
        return await client.upload(source, "image/png", "picture.png", fallback_repository=[])
    except (
        httpx.HTTPError,
        httpx.InvalidURL,
        fal_client.client.FalClientError,
        OSError,
        ValueError,
        KeyError,
        TypeError,
    ) as error:
        response = getattr(error, "response", None)
        if response is not None:
            reason = queue.explain(Answer(response.status_code, response.headers, parse_json(response.content)))
        elif isinstance(error, httpx.TransportError):
            reason = connection_fault(error, "fal's file server")[0]
        else:
            reason = f"{type(error).__name__}."
        raise NotAccepted(f"{name} could not be uploaded to fal: {reason} Nothing was submitted.") from None


async def _is_there(session: Session, url: str) -> bool:
    """Whether an uploaded file can still be read; where that is unknown, it counts as readable."""
    try:
        async with open_http(session.queue.certificates, timeout=session.waits.connect) as http:
            return (await http.head(url)).status_code not in (403, 404, 410)
    except (httpx.HTTPError, httpx.InvalidURL):
        return True


async def fetch(url: str, *, trusted: str, certificates: ssl.SSLContext, waits: Waits) -> bytes:
    """The bytes of a file::

        await fetch(image.url, trusted=queue.base, certificates=queue.certificates, waits=Waits())

    Args:
        url: is the file's address, as fal gives it.
        trusted: is the API's base address; only its host may be private or without TLS.
        certificates: check TLS connections.
        waits: say how long to wait and how often to try.

    Raises:
        Gone, Interrupted: trying again makes sense.
        RemoteError: the file is too large, or the address leads somewhere private.
    """
    try:
        return await within(waits.transfer, _follow(url, trusted, certificates, waits))
    except asyncio.TimeoutError:
        raise Interrupted(f"the file did not arrive within {waits.transfer:g} s.") from None


async def _follow(url: str, trusted: str, certificates: ssl.SSLContext, waits: Waits) -> bytes:
    for _ in range(MAX_REDIRECTS + 1):
        addresses = await _check_public(url, trusted)
        found = await _get(url, addresses, certificates, waits)
        if isinstance(found, bytes):
            return found
        url = found
    raise RemoteError(f"the file's address redirects more than {MAX_REDIRECTS} times.")


async def _get(url: str, addresses: list[Address] | None, certificates: ssl.SSLContext, waits: Waits) -> bytes | str:
    """The file, or the address that it redirects to.

    Args:
        addresses: the addresses that were checked, one of which is connected to; None where the host's name will do.
    """
    target = httpx.URL(url)
    proxy = _proxy(target)
    timeout = httpx.Timeout(waits.answer, connect=waits.connect)
    ways = [target] if addresses is None or proxy else [target.copy_with(host=str(address)) for address in addresses]
    headers = {"Host": target.netloc.decode("ascii"), "Accept-Encoding": "identity"}
    fault: RemoteError = Interrupted(f"{target.host} has no address.")
    async with open_http(certificates, proxy=proxy, trust_env=False, timeout=timeout) as http:
        for way in ways:
            extensions = {} if way is target else {"sni_hostname": target.raw_host.decode("ascii")}
            try:
                async with http.stream("GET", way, headers=headers, extensions=extensions) as response:
                    if response.is_redirect:
                        return str(target.join(response.headers.get("location", "")))
                    return await _read(response)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                text, again = connection_fault(error, target.host)
                fault = Interrupted(f"the file did not arrive: {text}") if again else RemoteError(text)
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                raise Interrupted(f"the file did not arrive whole ({type(error).__name__}).") from None
    raise fault


async def _read(response: httpx.Response) -> bytes:
    if response.status_code in (403, 404, 410):
        raise Gone(f"the file is gone from fal ({response.status_code}); fal keeps results for some days only.")
    if response.status_code != 200:
        raise Interrupted(f"the file's server answered {response.status_code}.")
    return await limits.read(response, limits.MAX_FILE, "the file")


def _proxy(target: httpx.URL) -> str | None:
    """The proxy that the environment names for an address."""
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(target.host):
        return None
    return proxy if "://" in proxy else f"http://{proxy}"


async def _check_public(url: str, trusted: str) -> list[Address] | None:
    """The public addresses of the host of an https address; None where it is the API's own host.

    Raises:
        Interrupted: the name is not known at the moment.
        RemoteError: it is anything else.
    """
    try:
        target, api = httpx.URL(url), httpx.URL(trusted)
    except httpx.InvalidURL:
        raise RemoteError("fal's response holds an address that cannot be read.") from None
    if (target.scheme, target.host, target.port) == (api.scheme, api.host, api.port):
        return None
    if target.scheme != "https" or not target.host:
        raise RemoteError(f"the file's address begins with {target.scheme}://{target.host}; only https is followed.")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port or 443, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return []  # a proxy may know the name; without one nothing is connected to
    named = target.host.rpartition(".")[2][:1].isalpha()
    addresses = [ipaddress.ip_address(str(host).partition("%")[0]) for *_, (host, *_) in found]
    for address in addresses:
        if not (_is_public(address) or (named and address in FAKE)):
            raise RemoteError(
                f"the file's address leads into a private network ({target.host}); it was not followed. The result "
                "lies at fal: see fal.ai/dashboard/requests."
            )
    return sorted(set(addresses), key=lambda address: address.version)  # IPv6 that leads nowhere is common


def _is_public(address: Address) -> bool:
    """Whether an address, and the IPv4 address that an IPv6 one leads to, belongs to the public internet."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in NAT64:
            return _is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        for inside in (address.ipv4_mapped, address.sixtofour):
            if inside is not None:
                return _is_public(inside)
    return address.is_global and not address.is_multicast and not any(address in network for network in PRIVATE)
