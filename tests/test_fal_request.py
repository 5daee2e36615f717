"""What is sent to fal and what comes back: the endpoints' documents are the oracle."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from endpoint_facts import BOTH, EDIT_ALONE, PRESETS, REQUIRED, complete_request
from fal_runs import Machine, fal_fixture, order, with_a_new_field  # noqa: F401 - fixtures
from fal_server import KEY, answer, drop, png
from klein_cns.endpoint import IMAGE_SIZES
from klein_cns.remote import fields as fal_fields
from klein_cns.remote.errors import RemoteError
from klein_cns.remote.key import read_key
from klein_cns.remote.limits import within
from klein_cns.remote.order import (
    EditRequest,
    TextRequest,
    body,
    make_order,
    parse_image_urls,
    parse_lora_urls,
    pixel_digest,
)
from klein_cns.remote.results import decode, parse_response
from klein_cns.remote.route import choose
from klein_cns.remote.run import run_interruptibly
from klein_cns.remote.transfer import encode_png
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GIB = 2**30
KLEIN_FP8 = {"transformer": 9 * GIB, "text_encoder": 8 * GIB, "vae": GIB // 4}  # about the sizes of the usual files


@pytest.mark.parametrize("name", [*BOTH, *EDIT_ALONE])
def test_names_defaults_ranges_and_options_are_the_endpoints(name):
    kind, default, allowed = {**BOTH, **EDIT_ALONE}[name]
    base = {"prompt": "x", "image_urls": ["https://a/b.png"]}
    model = EditRequest.model_fields[name]
    assert model.is_required() if default is REQUIRED else model.default == default
    if kind in (int, float):
        low, high = allowed or (0, 2**64 - 1)
        for value in (low - 1, high + 1, float("nan"), "1", True):
            with pytest.raises(ValueError, match=name):
                EditRequest(**base, **{name: value})
        for value in (low, high):
            assert getattr(EditRequest(**base, **{name: kind(value)}), name) == value
    elif allowed:
        for value in allowed:
            assert getattr(EditRequest(**base, **{name: value}), name) == value
        with pytest.raises(ValueError, match=name):
            EditRequest(**base, **{name: "another"})
    elif kind is bool:
        for value in ("true", 1, None):
            with pytest.raises(ValueError, match=name):
                EditRequest(**base, **{name: value})


def test_each_endpoint_takes_its_own_fields_and_no_others():
    assert set(TextRequest.model_fields) == set(BOTH)
    assert set(EditRequest.model_fields) == set(BOTH) | set(EDIT_ALONE)
    assert tuple(IMAGE_SIZES) == PRESETS
    for size in (*PRESETS, {"width": 2016, "height": 1152}):
        assert body(TextRequest(prompt="x", image_size=size))["image_size"] == size
    for urls in ([], ["https://a/b.png"] * 5):
        with pytest.raises(ValueError, match="image_urls"):
            EditRequest(prompt="x", image_urls=urls)
    with pytest.raises(ValueError, match="loras"):
        EditRequest(prompt="x", image_urls=["https://a/b.png"], loras=[{"path": "a/b", "scale": 1.0}] * 4)


def test_a_whole_request_of_the_endpoint_is_one_of_ours():
    """Every field written out, with ints where the endpoint's own examples have them."""
    edit = complete_request("https://a/b.png")
    required = {name: edit[name] for name in ("prompt", "image_urls")}
    assert body(EditRequest(**edit)) == {**body(EditRequest(**required)), **edit}
    text = {name: edit[name] for name in edit if name in BOTH} | {"image_size": "landscape_4_3"}
    assert {name: body(TextRequest(**text))[name] for name in text} == text


def test_a_response_with_the_least_that_an_endpoint_sends_is_one():
    file = {"url": "https://a/b.png", "content_type": "image/png", "file_name": "b.png", "file_size": 4404019}
    for given in ({"images": [file], "prompt": ""}, {"images": [{"url": "https://a/b.png"}], "prompt": ""}):
        response, warnings = parse_response(given)
        assert response.images[0].url == "https://a/b.png"
        assert [line.split()[0] for line in warnings] == ["timings", "seed", "has_nsfw_concepts"]


def test_unknown_fields_of_a_response_are_kept():
    known = {"seed": 1, "prompt": "", "timings": {}, "has_nsfw_concepts": []}
    response, warnings = parse_response({"images": [{"url": "u", "blur": 3}], **known, "new": [1]})
    assert not warnings and response.model_extra == {"new": [1]} and response.images[0].model_extra == {"blur": 3}


def test_unknown_fields_of_a_request_and_bad_values_are_refused_by_name():
    for change, says in (
        ({"guidance_scale": 21.0}, "guidance_scale is 21.0"),
        ({"num_images": 5}, "num_images is 5"),
        ({"image_size": (100, 600)}, "width is 100"),
        ({"seed": -1}, "seed is -1"),
        ({"nonsense": 1}, "nonsense is 1"),
        ({"loras": [("a/b", float("inf"))]}, "loras.0.scale is inf"),
        ({"acceleration": "turbo"}, "is 'turbo'"),
    ):
        with pytest.raises(RemoteError, match=says):
            order(**change)


def test_half_a_character_is_refused_before_anything_is_sent():
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(RemoteError, match="holds half of a character"):
            order(**{name: "a \ud83d cat"})


def test_counts_are_said():
    with pytest.raises(RemoteError, match="5 pictures are given .* at most 4"):
        order(pictures=5)
    with pytest.raises(RemoteError, match="4 LoRAs are given .* at most 3"):
        order(loras=[("a/b", 1.0)] * 4)
    with pytest.raises(RemoteError, match="no picture: .*9b/base .* without LoRAs.*edit/lora takes LoRAs"):
        order(pictures=0, loras=[("a/b", 1.0)])


def test_the_endpoint_follows_the_pictures():
    assert order(pictures=0).endpoint == fal_fields.TEXT_ENDPOINT and order().endpoint == fal_fields.EDIT_ENDPOINT
    assert make_order({"prompt": "x", "image_size": "auto"}, ["https://a/b.png"]).endpoint == fal_fields.EDIT_ENDPOINT


def priced(size, *pictures, **more):
    sources = [picture if isinstance(picture, str) else Image.new("L", picture) for picture in pictures]
    return round(make_order({"prompt": "x", "image_size": size, **more}, sources).cost_usd, 9)


def test_cost_is_by_the_pixels():
    assert priced((1024, 1024), (99, 99)) == 0.04  # the document's example
    assert priced("landscape_4_3", num_images=4) == 0.06 and priced("auto") == 0.015
    assert priced("square_hd", "https://a/b.png") == 0.04 and priced((512, 768)) == 0.0075


def test_with_auto_the_price_is_an_upper_bound():
    """The result may have the input's size, or the megapixel that fal resizes it to."""
    for size in ((300, 300), (512, 512), (640, 480), (1024, 1024), (3000, 200)):
        assert priced("auto", size) == 0.04
    assert priced("auto", (2048, 1024), (99, 99)) == 0.08
    assert priced("auto", (4096, 1024)) == 0.06
    assert priced("auto", "https://a/b.png") == 0.1  # a picture that only fal sees: the largest


def test_a_limit_that_is_no_number_lets_nothing_pass(fal, tmp_path):
    with pytest.raises(RemoteError, match="more than max_cost_usd nan"):
        Machine(tmp_path, fal).run(max_cost_usd=float("nan"))
    assert fal.posts == 0


def test_the_fingerprint_follows_the_pixels_not_the_encoder(seed):
    import random

    noise = Image.frombytes("RGB", (20, 30), random.Random(seed).randbytes(20 * 30 * 3))
    again = decode(encode_png(noise))
    assert pixel_digest(noise) == pixel_digest(again) and noise.tobytes() == again.tobytes()
    assert pixel_digest(noise) != pixel_digest(noise.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
    assert pixel_digest(Image.new("RGB", (20, 30))) != pixel_digest(Image.new("RGB", (30, 20)))


def test_addresses_and_loras_are_read_line_by_line():
    assert parse_image_urls("\n https://a/1.png \n\ndata:image/png;base64,AA\n") == [
        "https://a/1.png",
        "data:image/png;base64,AA",
    ]
    assert parse_lora_urls("https://a/x.safetensors 0.5\nowner/name\nowner/name -1\n") == [
        ("https://a/x.safetensors", 0.5),
        ("owner/name", 1.0),
        ("owner/name", -1.0),
    ]
    for text in ("style.safetensors 1", "owner/name x", "owner/name 1 2", "/loras/style.safetensors"):
        with pytest.raises(RemoteError, match="lora_urls"):
            parse_lora_urls(text)
    for text in ("picture.png", "file:///etc/passwd", "https://a b"):
        with pytest.raises(RemoteError, match="image_urls"):
            parse_image_urls(text)


def test_the_key_comes_from_the_environment_else_from_its_file(tmp_path):
    file = tmp_path / "fal_key"
    with pytest.raises(RemoteError, match="no fal key. Make one at .* set the environment variable FAL_KEY, or write"):
        read_key({}, file)
    file.write_text(f" {KEY}\n")
    file.chmod(0o600)
    assert read_key({}, file) == KEY and read_key({"FAL_KEY": "other:key"}, file) == "other:key"
    file.write_text("new:key")  # no restart
    assert read_key({"FAL_KEY": " "}, file) == "new:key"
    for bad in ("two words", "line\nbreak", "schlüssel", "nul\0"):
        with pytest.raises(RemoteError) as error:
            read_key({"FAL_KEY": bad}, file)
        assert bad not in str(error.value) and "holds no fal key" in str(error.value)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RemoteError, match="cannot be read .UnicodeDecodeError."):
        read_key({}, file)
    if os.name == "posix":
        file.chmod(0o640)
        with pytest.raises(RemoteError, match="other users can read .*chmod 600"):
            read_key({}, file)


def test_a_lora_file_is_uploaded_once_by_its_content(fal, tmp_path):
    machine, lora, copied = Machine(tmp_path, fal), tmp_path / "style.safetensors", tmp_path / "renamed.safetensors"
    lora.write_bytes(b"weights")
    copied.write_bytes(b"weights")
    machine.run(order(loras=[(lora, 0.5)]))
    machine.run(order(loras=[(lora, 0.5)], seed=6))
    machine.run(order(loras=[(copied, 0.5)], seed=7))
    assert list(fal.uploads.values()) == [b"weights"]
    assert machine.run(order(loras=[(copied, 0.5)])).cost_usd == 0  # the same content is the same input
    lora.write_bytes(b"trained on")
    machine.run(order(loras=[(lora, 0.5)]))
    assert list(fal.uploads.values()) == [b"weights", b"trained on"] and len(fal.requests) == 4
    addresses = [path for _, path, headers in fal.seen if headers.get("Authorization", "").startswith("Key")]
    assert not any(path.startswith("/files/upload") for path in addresses)  # the CDN gets a token of its own


def test_an_upload_that_expired_is_made_again(fal, tmp_path):
    machine, lora = Machine(tmp_path, fal), tmp_path / "style.safetensors"
    lora.write_bytes(b"weights")
    machine.run(order(loras=[(lora, 0.5)]))
    fal.fail(file=answer(404))
    machine.run(order(loras=[(lora, 0.5)], seed=6))
    assert len(fal.uploads) == 2


def test_a_large_picture_is_uploaded_and_a_small_one_travels_inside(fal, tmp_path, monkeypatch):
    monkeypatch.setattr("klein_cns.remote.transfer.MAX_INLINE", 100)
    machine = Machine(tmp_path, fal)
    machine.run(order())
    [request] = fal.requests.values()
    assert request["body"]["image_urls"] == [f"{fal.url}/files/upload/0"]
    assert decode(fal.uploads["/files/upload/0"]).size == (64, 48)


@pytest.mark.parametrize("fault", [answer(401, {"detail": f"bad {KEY}"}), drop(), answer(500)])
def test_a_failed_upload_submits_nothing(fal, tmp_path, monkeypatch, fault):
    monkeypatch.setattr("fal_client.client.MAX_ATTEMPTS", 2)
    machine, lora = Machine(tmp_path, fal), tmp_path / "style.safetensors"
    lora.write_bytes(b"weights")
    fal.fail(token=itertools.repeat(fault), upload=itertools.repeat(fault))
    with pytest.raises(RemoteError, match="style.safetensors could not be uploaded .*Nothing was submitted") as error:
        machine.run(order(loras=[(lora, 0.5)]))
    assert fal.posts == 0 and not fal.requests and machine.state() is None and "secret" not in str(error.value)


def test_decoding_is_bounded():
    with pytest.raises(RemoteError, match="more than 16777216 pixels"):
        decode(png((4097, 4096)))
    with pytest.raises(RemoteError, match="not a PNG, JPEG or WebP"):
        decode(b"GIF89a" + bytes(20))
    with pytest.raises(RemoteError, match="cannot be decoded"):
        decode(png((300, 300))[:200])


@pytest.mark.parametrize(
    ("given", "branch", "why"),
    [
        (("local", None, {}, ["x"]), "local", "local: as chosen"),
        (("fal", 80 * GIB, {"a": 1}, []), "remote", "fal: as chosen"),
        (("auto", None, {"a": 1}, []), "remote", "no accelerator"),
        (("auto", 80 * GIB, {"a": 1}, ["klein.safetensors"]), "remote", "klein.safetensors does not exist"),
        (("auto", 80 * GIB, {}, []), "remote", "no Klein 9B Base Loader feeds local"),
        (
            ("auto", 12 * GIB, {"a": 10 * GIB}, []),
            "local",
            "its 12.0 GiB are enough for the largest part .*, a: 10.0 GiB x 1.2 = 12.0 GiB",
        ),
        (
            ("auto", 12 * GIB - 1, {"a": GIB, "b": 10 * GIB}, []),
            "remote",
            "too small; its 12.0 GiB are less than the largest part that must be there at once, b: 10.0 GiB x 1.2",
        ),
        *((("auto", memory * GIB, KLEIN_FP8, []), "local", "transformer: 9.0 GiB") for memory in (12, 16, 20, 24)),
        (("auto", 8 * GIB, KLEIN_FP8, []), "remote", "transformer: 9.0 GiB"),
    ],
)
def test_route(given, branch, why):
    route = choose(*given)
    assert route.branch == branch and re.search(why, route.why)


def test_run_interruptibly():
    async def work():
        return 5

    async def own_timeout():
        raise TimeoutError("of the work")

    class Interrupt(BaseException):
        pass

    assert run_interruptibly(work, lambda: None) == 5
    with pytest.raises(TimeoutError, match="of the work"):
        run_interruptibly(own_timeout, lambda: None)

    tidied, calls = [], itertools.count()

    async def slow():
        import asyncio

        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)
            tidied.append(True)

    def check():
        if next(calls) == 3:
            raise Interrupt

    began = time.monotonic()
    with pytest.raises(Interrupt):
        run_interruptibly(slow, check, every=0.05)
    assert tidied and time.monotonic() - began < 5


@pytest.mark.parametrize(
    ("host", "resolved", "followed"),
    [
        ("v3.fal.media", "151.101.1.1", True),
        ("v3.fal.media", "198.18.0.7", True),
        ("v3.fal.media", "10.0.0.1", False),
        ("198.18.0.7", "198.18.0.7", False),
        ("0xc6120007", "198.18.0.7", False),
        ("224.0.0.1", "224.0.0.1", False),
        ("v3.fal.media", "64:ff9b::9765:101", True),
        ("[64:ff9b::a00:1]", "64:ff9b::a00:1", False),
        ("[2002:a00:1::]", "2002:a00:1::", False),
        ("[2002:9765:101::]", "2002:9765:101::", True),
        ("[::ffff:10.0.0.1]", "::ffff:10.0.0.1", False),
        ("[::1]", "::1", False),
        ("[ff0e::1]", "ff0e::1", False),
        ("v3.fal.media", "2a04:4e42::1", True),
        ("v3.fal.media", "64:ff9b::c612:7", False),
        ("v3.fal.media", "fec0::1", False),
        ("[fec0::1]", "fec0::1", False),
        ("v3.fal.media", "feff::1", False),
        ("v3.fal.media", "::a00:1", False),
        ("[::a00:1]", "::a00:1", False),
        ("v3.fal.media", "::9765:101", False),
        ("v3.fal.media", "64:ff9b::a00:1", False),
        ("v3.fal.media", "64:ff9b::7f00:1", False),
        ("v3.fal.media", "64:ff9b:1::1", False),
        ("v3.fal.media", "fe80::1%eth0", False),
        ("v3.fal.media", "fd00::1", False),
    ],
)
def test_a_file_is_fetched_from_public_hosts_alone(monkeypatch, host, resolved, followed):
    """198.18.0.0/15 stands for every name behind a proxy with "fake-ip" DNS; as an address it is private."""
    import asyncio

    from klein_cns.remote.transfer import _check_public

    async def check():
        async def getaddrinfo(*_, **__):
            return [(None, None, None, "", (resolved, 443))]

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
        await _check_public(f"https://{host}/x.png", "https://queue.fal.run")

    if followed:
        asyncio.run(check())
    else:
        with pytest.raises(RemoteError, match="private network .*The result lies at fal"):
            asyncio.run(check())


def test_an_interrupt_in_the_very_moment_of_an_answer_is_no_answer():
    import asyncio

    async def main():
        answer = asyncio.get_running_loop().create_future()
        waiting = asyncio.ensure_future(within(60, answer))
        await asyncio.sleep(0.01)
        answer.set_result("in time")
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert await within(1, asyncio.sleep(0, "done")) == "done"
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, asyncio.sleep(60))

    asyncio.run(main())


def test_the_address_is_all_that_tests_change(fal, tmp_path):
    """Without an address the same code speaks to fal's own hosts."""
    import asyncio

    import fal_client
    from klein_cns.remote.queue import Queue

    async def url(address):
        async with Queue(KEY, address=address) as queue:
            return queue._request("some-id"), await fal_client.AsyncClient(key=KEY).get_handle(
                fal_fields.EDIT_ENDPOINT, "some-id"
            )

    ours, real = asyncio.run(url(None))
    assert (f"{ours}/status", ours, f"{ours}/cancel") == (real.status_url, real.response_url, real.cancel_url)
    assert ours == "https://queue.fal.run/fal-ai/flux-2/requests/some-id"
    assert asyncio.run(url(fal.url))[0] == f"{fal.url}/fal-ai/flux-2/requests/some-id"
    for wrong in ("http://queue.fal.run", "ftp://127.0.0.1", "https://[::1", "https://", "queue.fal.run"):
        with pytest.raises(RemoteError, match="KLEIN_CNS_FAL_URL is"):
            asyncio.run(url(wrong))


@pytest.mark.parametrize("address", [None, 5, "", "ftp://a/b", "javascript:x"])
def test_an_upload_without_an_address_submits_nothing(fal, tmp_path, monkeypatch, address):
    monkeypatch.setattr(fal, "upload", lambda data: (200, {"access_url": address}, {}))
    machine, lora = Machine(tmp_path, fal), tmp_path / "style.safetensors"
    lora.write_bytes(b"weights")
    with pytest.raises(RemoteError, match="names no address for an upload. Nothing was submitted"):
        machine.run(order(loras=[(lora, 0.5)]))
    assert fal.posts == 0 and machine.state() is None


def test_a_new_field_of_the_endpoint_is_one_line(tmp_path):
    """It is checked, it decides what is bought, and its value travels; the widget is tested on ComfyUI."""
    with_a_new_field(tmp_path / "klein_cns")
    code = f"""
import json, sys
from pathlib import Path
sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parent)!r}]
from fal_runs import Machine, order, with_a_new_field
from fal_server import FalServer
import klein_cns.remote.errors
fal = FalServer()
machine = Machine(Path({str(tmp_path)!r}), fal)
for softness in (1.5, 0.25, 1.5):
    machine.run(order(softness=softness))
machine.run(order())
try:
    order(softness=2.5)
except klein_cns.remote.errors.NotAccepted as error:
    print(error)
print(json.dumps([request["body"]["softness"] for request in fal.requests.values()]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    refused, sent = done.stdout.splitlines()
    assert "softness is 2.5" in refused and sent == "[1.5, 0.25, 0.5]"


def test_remote_has_no_circle_of_imports():
    """Imports inside functions and for type checking count too."""
    imports = {}
    for path in (ROOT / "remote").glob("*.py"):
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        modules = [node.module or alias.name for node in found if node.level == 1 for alias in node.names]
        imports[path.stem] = set(modules)
    assert {"run", "queue", "journal"} <= set(imports)
    while imports:
        free = {name for name, needed in imports.items() if not needed & set(imports)}
        assert free, f"a circle among {sorted(imports)}"
        imports = {name: needed for name, needed in imports.items() if name not in free}
