"""What is built from a clone: the wheel is the library and the command, the sdist holds everything and tests itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import klein_cns
import pytest
from test_package import PACKAGES, ROOT, git

pytestmark = pytest.mark.xdist_group("distribution")  # one process builds for both tests
NAME = f"klein_cns-{klein_cns.__version__}"
BUILD = "from setuptools import build_meta as backend; backend.build_sdist('dist'); backend.build_wheel('dist')"


def files_of_the_clone():
    """The tracked files and new ones that git does not ignore."""
    return [name for name in git("ls-files", "--cached", "--others", "--exclude-standard") if (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel, built from a copy as a fresh clone is."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone, so nothing says which files belong into the sdist")
    clone = tmp_path_factory.mktemp("clone")
    for name in files_of_the_clone():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    result = subprocess.run([sys.executable, "-c", BUILD], cwd=clone, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "Deprecat" not in result.stderr, result.stderr
    return clone / "dist"


def run_python(*args, path):
    """Run Python on what lies in ``path``, ahead of the development install."""
    environment = {**os.environ, "PYTHONPATH": str(path), "PYTEST_ADDOPTS": ""}
    result = subprocess.run(
        [sys.executable, *args], cwd=path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_is_the_library_and_the_command(built, tmp_path):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if not name.startswith(f"{NAME}.dist-info/")}
        wheel.extractall(tmp_path)
    modules = [path for place in (ROOT, *(ROOT / name for name in PACKAGES)) for path in place.glob("*.py")]
    assert names == {f"klein_cns/{path.relative_to(ROOT).as_posix()}" for path in modules}
    assert "klein-cns = klein_cns.cli:main" in (tmp_path / f"{NAME}.dist-info" / "entry_points.txt").read_text()
    where = run_python("-c", "import klein_cns; print(klein_cns.__file__, klein_cns.__version__)", path=tmp_path)
    assert where.split() == [str(tmp_path / "klein_cns" / "__init__.py"), klein_cns.__version__]
    assert run_python("-m", "klein_cns", "--version", path=tmp_path) == f"klein-cns {klein_cns.__version__}\n"


def test_the_sdist_holds_the_clone_and_its_tests_run(built, tmp_path):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {Path(name).relative_to(NAME).as_posix() for name in sdist.getnames() if name != NAME}
        sdist.extraction_filter = getattr(tarfile, "data_filter", None)  # Pythons of before June 2023 lack it
        sdist.extractall(tmp_path)
    assert names >= set(files_of_the_clone())
    (tmp_path / NAME).rename(tmp_path / "klein_cns")
    tests = [f"klein_cns/tests/{name}.py" for name in ("test_params", "test_masks", "test_schedules")]
    output = run_python("-m", "pytest", "-q", "-n0", "-c", "klein_cns/pyproject.toml", *tests, path=tmp_path)
    assert " passed" in output and "failed" not in output
