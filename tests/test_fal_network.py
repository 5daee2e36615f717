"""The network as it is at users': proxies, certificates, private addresses, and servers that echo the key."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import ssl
import threading
import time
import urllib.parse

import pytest
import trustme
from fal_runs import PROMPT, QUICK, Machine, fal_fixture, order  # noqa: F401 - fixtures
from fal_server import KEY, FalServer, answer
from klein_cns.remote import transfer
from klein_cns.remote.errors import RemoteError
from klein_cns.remote.key import Secrets
from klein_cns.remote.queue import connection_fault, trusted_certificates

IDENTITY, SECRET = KEY.split(":")
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("NO_PROXY", "localhost,fd00::/8", "NO_PROXY cannot be used .*no networks of IPv6 addresses"),
        ("NO_PROXY", "fe80::/10", "NO_PROXY cannot be used"),
        ("ALL_PROXY", "socks5://user:hunter2@127.0.0.1:1080", "ALL_PROXY asks for a SOCKS proxy.*pip install socksio"),
        ("all_proxy", "socks5h://127.0.0.1:1080", "ALL_PROXY asks for a SOCKS proxy"),
        ("HTTPS_PROXY", "ftp://user:hunter2@127.0.0.1", "HTTPS_PROXY cannot be used"),
        (
            "SSL_CERT_FILE",
            "/nowhere/ca.pem",
            "SSL_CERT_FILE is '/nowhere/ca.pem', from which no certificates can be read",
        ),
        ("SSL_CERT_FILE", __file__, "SSL_CERT_FILE is .*, from which no certificates can be read .*remove it"),
    ],
)
def test_bad_settings_of_the_environment_are_one_sentence(fal, tmp_path, monkeypatch, name, value, says):
    monkeypatch.setenv(name, value)
    machine = Machine(tmp_path, fal)
    with pytest.raises(RemoteError, match=f"{says}.*Nothing was submitted.$") as error:
        machine.run()
    assert fal.posts == 0 and machine.state() is None and "hunter2" not in str(error.value)
    monkeypatch.delenv(name)
    assert machine.run().images


def test_a_proxy_that_does_not_answer_is_named(fal, tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://user:hunter2@127.0.0.1:9")
    with pytest.raises(RemoteError, match="cannot be reached .*Connect to the network, or correct HTTP_PROXY") as error:
        Machine(tmp_path, fal).run()
    assert "hunter2" not in str(error.value)


def tls_server(context):
    """A server on loopback that shakes hands and closes; (port, what arrived)."""
    listening, arrived = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                connection.settimeout(5)
                try:
                    if context is None:
                        arrived.append(connection.recv(4096))
                    else:
                        with context.wrap_socket(connection, server_side=True) as wrapped:
                            arrived.append(wrapped.recv(4096))
                except OSError as error:
                    arrived.append(error)

    threading.Thread(target=serve, daemon=True).start()
    return listening, arrived


def test_an_untrusted_certificate_is_said_to_be_one(fal, tmp_path):
    """As behind a company's proxy that opens TLS: the network is there."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    listening, _ = tls_server(context)
    machine = Machine(tmp_path, fal)
    machine.address = f"https://127.0.0.1:{listening.getsockname()[1]}"
    with pytest.raises(RemoteError, match="certificate of 127.0.0.1 is not trusted here .*SSL_CERT_FILE") as error:
        machine.run()
    listening.close()
    assert "Connect to the network" not in str(error.value) and machine.state() == "failed"
    assert not any("Trying again" in line for line in machine.said)


def test_what_is_no_certificate_fault_is_none():
    for fault, again in ((ConnectionRefusedError(), True), (ssl.SSLError("wrong version"), True)):
        text, said = connection_fault(fault, "queue.fal.run")
        assert "queue.fal.run cannot be reached" in text and said is again


def test_the_address_that_was_checked_is_the_one_connected_to(monkeypatch):
    """A name may lead elsewhere a moment later (DNS rebinding): it is looked up once, and TLS asks for the name."""
    listening, arrived = tls_server(None)
    port, asked = listening.getsockname()[1], []

    async def main():
        loop = asyncio.get_running_loop()
        real = loop.getaddrinfo

        async def getaddrinfo(host, *more, **options):
            if host in ("127.0.0.1", b"127.0.0.1"):  # what was checked: nothing is looked up for it
                return await real(host, *more, **options)
            asked.append(host)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1" if len(asked) == 1 else "10.0.0.1", port))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        monkeypatch.setattr(transfer, "_is_public", lambda address: str(address) == "127.0.0.1")
        with pytest.raises(RemoteError):
            url = f"https://v3.fal.media:{port}/x.png"
            await transfer.fetch(url, trusted="https://queue.fal.run", certificates=trusted_certificates(), waits=QUICK)

    asyncio.run(main())
    listening.close()
    assert asked == ["v3.fal.media"]
    assert b"v3.fal.media" in arrived[0]  # the server name of the TLS greeting


def test_a_file_comes_over_tls_under_its_own_name(monkeypatch, tmp_path):
    """The certificate is checked for the name, though the connection is made to an address."""
    ca = trustme.CA()
    ca.cert_pem.write_to_path(tmp_path / "ca.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    monkeypatch.setattr(transfer, "_is_public", lambda address: True)

    def fetched(certified):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        ca.issue_cert(certified).configure_cert(context)
        server = FalServer()
        server._server.socket = context.wrap_socket(server._server.socket, server_side=True)
        url = f"https://v3.fal.media:{server._server.server_port}/files/x.png"

        async def main():
            async def getaddrinfo(host, port, **_):
                return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

            monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
            certificates = trusted_certificates()
            return await transfer.fetch(url, trusted="https://queue.fal.run", certificates=certificates, waits=QUICK)

        try:
            return asyncio.run(main()), server
        finally:
            server.close()

    data, server = fetched("v3.fal.media")
    assert data == server.picture and server.seen[0][2]["Host"].startswith("v3.fal.media:")
    with pytest.raises(RemoteError, match="certificate of v3.fal.media is not trusted"):
        fetched("elsewhere.example")


def test_a_proxy_gets_the_name_and_an_excepted_host_none(monkeypatch):
    """NO_PROXY counts for the name, though the connection is made to an address."""
    import httpx

    monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:3128")
    assert transfer._proxy(httpx.URL("https://v3.fal.media/x")) == "http://127.0.0.1:3128"
    monkeypatch.setenv("NO_PROXY", "fal.media")
    assert transfer._proxy(httpx.URL("https://v3.fal.media/x")) is None


def echoes():
    both = (KEY, IDENTITY, SECRET)
    yield from both
    for text in both:
        yield urllib.parse.quote(text, safe="")
        yield urllib.parse.quote(text, safe="").lower()
        for around in ("{}", "Key {}", "x{}", "xy{}", '{{"key": "{}"}}', "Basic {} and more"):
            data = around.format(text).encode()
            yield base64.b64encode(data).decode()
            yield base64.urlsafe_b64encode(data).decode().rstrip("=")


def readable(shown):
    """Every text that a reader gets out of a message: as it stands, and each run of base64 in it decoded."""
    yield shown
    for word in shown.replace("...", " ").split():
        for start in range(4):
            for alphabet in (word, word.translate(str.maketrans("-_", "+/"))):
                part = alphabet[start:]
                try:
                    yield base64.b64decode(part[: len(part) // 4 * 4]).decode("latin-1")
                except ValueError:
                    continue


@pytest.mark.parametrize("echo", sorted(set(echoes())))
def test_the_key_is_hidden_in_every_form(echo):
    hidden = Secrets(KEY).hide(f"Invalid key {echo}")
    assert "..." in hidden
    for text in readable(hidden):
        text = urllib.parse.unquote(text).lower()
        assert not any(
            part.lower()[i : i + 12] in text
            for part in (IDENTITY[:11] + ":", SECRET)
            for i in range(max(len(part) - 11, 1))
        )


def test_a_key_that_fal_echoes_is_in_no_sentence_and_no_file(fal, tmp_path):
    machine = Machine(tmp_path, fal)
    echo = base64.b64encode(f"Key {KEY}".encode()).decode()
    said = []
    for number, (status, body) in enumerate(
        (
            (400, {"detail": f"bad {urllib.parse.quote(KEY)}"}),
            (400, {"detail": f"half {SECRET}"}),
            (422, {"detail": [{"loc": ["body", IDENTITY], "msg": f"header {echo}"}]}),
            (307, None),
        )
    ):
        fal.fail(submit=answer(status, body, Location=f"https://{SECRET}.example.com/"))
        with pytest.raises(RemoteError) as error:
            machine.run(order(seed=number))
        said.append(str(error.value))
    line = {"status": "IN_PROGRESS", "logs": [{"message": f"authorization {echo} {SECRET}"}]}
    fal.fail(status=answer(202, line, accept=True))
    fal.respond = lambda response: {**response, "debug": {"key": KEY, "header": echo}}
    found = machine.run(order(seed=9))
    texts = [*said, *machine.said, found.response, *found.warnings]
    texts += [path.read_bytes().decode("latin-1") for path in tmp_path.rglob("*") if path.is_file()]
    for text in texts:
        assert SECRET not in text and IDENTITY not in text and echo[8:40] not in text


@pytest.mark.parametrize(
    "detail",
    [
        [{"loc": None, "msg": "x"}],
        [{"loc": 5, "msg": None}],
        [None, 5, "x"],
        {"msg": "x"},
        5,
        "a \ud83d cat",
        [{"loc": ["body", "prompt"], "msg": "x"}] * 5000,
    ],
)
def test_a_fault_of_any_shape_is_a_sentence(fal, tmp_path, detail):
    for number, status in enumerate((400, 403, 422, 429)):
        fal.fail(submit=[answer(status, {"detail": detail}, Retry_After="99")])
        with pytest.raises(RemoteError) as error:
            Machine(tmp_path / str(status), fal).run(order(seed=number))
        assert str(error.value).endswith(".") and len(str(error.value)) < 4000
        str(error.value).encode()


def test_a_cancellation_that_fails_does_not_contradict_itself(fal, tmp_path):
    class Interrupt(BaseException):
        pass

    fal.queued = 10**6
    for number, status in enumerate((500, 503, 401, 429, 302)):
        fal.reached["status"].clear()
        fal.fail(cancel=lambda handler, proceed, status=status: handler.reply(status, {"detail": "no"}, {}))
        machine = Machine(tmp_path / str(number), fal)

        def check():
            if fal.reached["status"].is_set():
                raise Interrupt

        with pytest.raises(Interrupt):
            machine.run(check=check)
        said = machine.said[-1]
        assert "may go on and be charged" in said and "does not charge" not in said and "run again later" not in said
        assert str(status) in said or "key" in said
        assert list(fal.requests)[-1] in said and "same seed" in said


def test_an_answer_to_the_submission_that_drips_is_no_endless_wait(fal, tmp_path):
    def drip(handler, proceed):
        _, body, _ = proceed()
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        for letter in json.dumps(body):
            handler.wfile.write(letter.encode())
            handler.wfile.flush()
            time.sleep(0.1)

    from dataclasses import replace

    fal.fail(submit=drip)
    machine, began = Machine(tmp_path, fal), time.monotonic()
    with pytest.raises(RemoteError, match="Whether fal took it is unknown"):
        machine.run(waits=replace(QUICK, transfer=0.5))
    assert time.monotonic() - began < 5 and fal.posts == 1


def test_prompts_stay_hidden_beside_the_key():
    assert Secrets(KEY, [PROMPT]).hide(f"{PROMPT} with {KEY}") == "... with ..."
    assert Secrets("", ["a"]).hide("a b") == "a b"
