"""``python -m klein_cns`` is the command ``klein-cns``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
