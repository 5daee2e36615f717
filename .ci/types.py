"""Check the types of the package with mypy.

mypy takes a package's name from its folder. A clone may be called anything, and "klein-cns" is no valid module name, so
mypy reads a copy that carries the name of the installed package.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "klein_cns"


def main() -> int:
    """Run mypy on the copy; its exit status."""
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    with tempfile.TemporaryDirectory() as folder:
        for source in (path for place in (ROOT, *packages) for path in place.glob("*.py")):
            copy = Path(folder, PACKAGE, source.relative_to(ROOT))
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
        command = [
            sys.executable,
            "-m",
            "mypy",
            "--config-file",
            ROOT / "pyproject.toml",
            "--cache-dir",
            ROOT / ".mypy_cache",
            "--package",
            PACKAGE,
            *sys.argv[1:],
        ]
        return subprocess.run(command, cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
