"""The command ``klein-cns``: its entry point, and how a run ends."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 on success, 1 on an error that a sentence explains, 130 on Ctrl-C."""
    try:
        from .commands import parser  # late: importing torch takes seconds, in which Ctrl-C must end cleanly too

        args = parser().parse_args(argv)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"klein-cns: warning: {message}", file=sys.stderr)
            args.run(args)
    except (ValueError, OSError) as error:
        print(f"klein-cns: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("klein-cns: interrupted; nothing more was written.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
