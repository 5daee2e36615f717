"""What leaves a node: the pack's own exceptions as built-in ones, everything else as it is."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import traceback
from pathlib import Path

import pytest
from klein_cns.lora import LoraError
from klein_cns.remote.errors import NotAccepted, RemoteError


class Interrupt(BaseException):
    pass


@pytest.fixture(params=["klein_cns", "/somewhere/custom_nodes/klein-cns (2)"])
def with_plain_errors(request, monkeypatch):
    """The decorator as ComfyUI imports it from a clone of this name; it lacks ComfyUI here, so it is loaded alone."""
    spec = importlib.util.spec_from_file_location(
        f"{request.param}.nodes.plain_errors", Path(__file__).parents[1] / "nodes" / "plain_errors.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    for error in (LoraError, RemoteError, NotAccepted):
        monkeypatch.setattr(error, "__module__", error.__module__.replace("klein_cns", request.param))
    return module.with_plain_errors


def node(error):
    """A node in each of the two ways, which raises ``error`` wherever ComfyUI calls it."""

    class Plain:
        @classmethod
        def execute(cls, **inputs):
            raise error

        @classmethod
        def check_lazy_status(cls, **inputs):
            raise error

    class Asynchronous:
        @classmethod
        async def execute(cls, **inputs):
            await asyncio.sleep(0)
            raise error

    return Plain, Asynchronous


def raised(with_plain_errors, error, expected):
    """What leaves each method."""
    plain, asynchronous = map(with_plain_errors, node(error))
    for call in (plain.execute, plain.check_lazy_status, lambda: asyncio.run(asynchronous.execute())):
        error.__traceback__ = None  # of the call before
        with pytest.raises(expected) as left:
            call()
        yield left.value


@pytest.mark.parametrize(
    ("error", "plain"),
    [(LoraError("a sentence."), ValueError), (RemoteError("a sentence."), RuntimeError),
     (NotAccepted("a sentence.", 3.0), RuntimeError)],
)  # fmt: skip
def test_an_error_of_the_pack_leaves_as_the_built_in_that_it_is(with_plain_errors, error, plain):
    for left in raised(with_plain_errors, error, plain):
        assert type(left) is plain and str(left) == "a sentence."
        log = "".join(traceback.format_exception(left))
        assert log.count("a sentence.") == 1
        assert log.count("raise error\n") == 1, "the place is in the log, once"


@pytest.mark.parametrize("error", [Interrupt(), asyncio.CancelledError(), KeyError("x"), MemoryError(), OSError(2, "")])
def test_everything_else_passes_as_it_is(with_plain_errors, error):
    assert all(left is error for left in raised(with_plain_errors, error, type(error)))


def test_what_a_node_returns_and_says_of_itself_stays(with_plain_errors):
    @with_plain_errors
    class Returns:
        @classmethod
        def execute(cls, steps: int, **more: int) -> int:
            """Its words."""
            return steps + len(more)

    assert Returns.execute(steps=3, other=1) == 4 and Returns.execute.__doc__ == "Its words."
