"""What leaves a node is a plain exception: its type prints without a path."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar

PACK = __package__.rpartition(".")[0]  # under ComfyUI a name made from the path of this clone
Node = TypeVar("Node", bound=type)


def with_plain_errors(node: Node) -> Node:
    """The node class, changed so that no exception class of this pack leaves it.

    ComfyUI prints an exception's class with its module before the sentence, and the module of a pack is the path of its
    folder. An exception of the pack leaves as the built-in exception that it derives from, with the same sentence.
    Everything else passes as it is: ComfyUI tells interrupts and out of memory by their classes.
    """
    for name in ("execute", "check_lazy_status"):
        if name in vars(node):
            setattr(node, name, classmethod(_with_plain_errors(vars(node)[name].__func__)))
    return node


def _with_plain_errors(method: Callable[..., Any]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(method):

        @wraps(method)
        async def run_async(*args: Any, **kwargs: Any) -> Any:
            with _plain_errors():
                return await method(*args, **kwargs)

        return run_async

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _plain_errors():
            return method(*args, **kwargs)

    return run


@contextmanager
def _plain_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith(f"{PACK}."):
            raise
        plain = next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        # "from None", or the log would print the sentence a second time, as the cause
        raise plain(str(error)).with_traceback(error.__traceback__) from None
