"""The command ``klein-cns``: its entry point, and how a run ends."""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that a sentence explains, 130 on Ctrl-C."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # Windows pipes cannot encode γ, and no pipe can encode a name that is not Unicode
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        args = _import_parser()().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"klein-cns: warning: {message}", file=sys.stderr)
            args.run(args)
    except (ValueError, OSError, MemoryError) as error:
        print(f"klein-cns: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say_interrupted()
        return INTERRUPTED
    return 0


def _import_parser() -> Callable[[], Any]:
    """Import what the commands need. It takes seconds, and a Ctrl-C that lands in an import can be swallowed there:
    until it is done, one ends the process at once."""
    before = signal.signal(signal.SIGINT, _end_at_once)
    try:
        from .commands import parser
    finally:
        signal.signal(signal.SIGINT, before)
    return parser


def _end_at_once(*_: object) -> None:
    _say_interrupted()
    os._exit(INTERRUPTED)


def _say_interrupted() -> None:
    print("klein-cns: interrupted; nothing more was written.", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
