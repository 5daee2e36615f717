"""Fetching a result file: without the key, within a size, and never from inside the user's own network."""

from __future__ import annotations

import asyncio
import ipaddress
import socket

import httpx

from .errors import RemoteError, Unobtainable

MAX_FILE = 64 * 2**20  # bytes; a PNG of 2048 x 2048 in 8 bits is below 13 MiB
MAX_REDIRECTS = 5
FAKE = ipaddress.ip_network("198.18.0.0/15")  # what the DNS of some local proxies answers for every name (RFC 2544)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # an IPv4 address in the last 32 bits (RFC 6052)


class Interrupted(RemoteError):
    """The file did not arrive whole; trying again makes sense."""


async def fetch(url: str, trusted: str, connect: float, answer: float) -> bytes:
    """The bytes of a file.

    Args:
        url: where fal says that it is.
        trusted: the API's base address; its host alone may be private or without TLS.
        connect, answer: seconds.

    Raises:
        Unobtainable: it is gone.
        Interrupted: it did not arrive whole.
        RemoteError: it is too large, or the address leads somewhere private.
    """
    async with httpx.AsyncClient(timeout=httpx.Timeout(answer, connect=connect)) as http:
        for _ in range(MAX_REDIRECTS + 1):
            await _check_public(url, trusted)
            try:
                async with http.stream("GET", url) as response:
                    if not response.is_redirect:
                        return await _read(response)
                    url = str(response.url.join(response.headers.get("location", "")))
            except (httpx.TransportError, httpx.DecodingError, httpx.InvalidURL) as error:
                raise Interrupted(f"the file did not arrive whole ({type(error).__name__}).") from None
    raise RemoteError(f"the file's address redirects more than {MAX_REDIRECTS} times.")


async def _read(response: httpx.Response) -> bytes:
    if response.status_code in (403, 404, 410):
        raise Unobtainable(f"the file is gone from fal ({response.status_code}); fal keeps results for some days only.")
    if response.status_code != 200:
        raise Interrupted(f"the file's server answered {response.status_code}.")
    data = bytearray()
    async for chunk in response.aiter_bytes():
        data += chunk
        if len(data) > MAX_FILE:
            raise RemoteError(f"the file is larger than {MAX_FILE // 2**20} MiB; it was not read.")
    return bytes(data)


async def _check_public(url: str, trusted: str) -> None:
    """Raise unless the address is https to a public host, or the API's own host."""
    try:
        target, api = httpx.URL(url), httpx.URL(trusted)
    except httpx.InvalidURL:
        raise RemoteError("fal's response holds an address that is none.") from None
    if (target.scheme, target.host, target.port) == (api.scheme, api.host, api.port):
        return
    if target.scheme != "https" or not target.host:
        raise RemoteError(f"the file's address begins with {target.scheme}://{target.host}; only https is followed.")
    try:
        found = await asyncio.get_running_loop().getaddrinfo(target.host, target.port or 443, type=socket.SOCK_STREAM)
    except (socket.gaierror, UnicodeError):
        return  # unknown here; behind a proxy it may still be reached, and a private name it is not
    named = target.host.rpartition(".")[2][:1].isalpha()
    for *_, (host, *_) in found:
        address = ipaddress.ip_address(host.partition("%")[0])
        if not (_is_public(address) or (named and address in FAKE)):
            raise RemoteError(
                f"the file's address leads into a private network ({target.host}); it was not followed. The result "
                "lies at fal: see fal.ai/dashboard/requests."
            )


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address, and the IPv4 address that an IPv6 one leads to, belongs to the public internet."""
    if address.version == 6:
        inside = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        inside = inside or address.ipv4_mapped or address.sixtofour
        if inside is not None:
            return _is_public(inside)
    return address.is_global and not address.is_multicast
