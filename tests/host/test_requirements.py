"""requirements.txt beside ComfyUI's own: what installing it does to ComfyUI's environment."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
from comfy_host import ROOT
from test_package import COMFYUI_HAS

PIP = ("-m", "pip", "--disable-pip-version-check")


def pip(python, *args):
    """(whether pip succeeded, its output) with ComfyUI's Python."""
    result = subprocess.run([python, *PIP, *args], capture_output=True, text=True, timeout=300, check=False)
    return result.returncode == 0, result.stdout if result.returncode == 0 else result.stdout + result.stderr


@pytest.fixture(scope="module")
def installed(comfyui):
    """Versions in ComfyUI's environment by name of the package; skipped where pip cannot look anything up."""
    there, listing = pip(comfyui[1], "list", "--format", "json")
    if not there:
        pytest.skip("ComfyUI's Python has no pip, so nothing shows what an installation would change")
    reached, why = pip(comfyui[1], "install", "--dry-run", "--quiet", "--no-deps", "--ignore-installed", "filelock")
    if not reached:
        pytest.skip(f"pip reaches no package index: {why.strip().splitlines()[-1]}")
    return {canonical(entry["name"]): entry["version"] for entry in json.loads(listing)}


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def changes(python, installed, *wanted):
    """{package: (version there, version that pip would install)} of what is there and would not stay as it is."""
    done, report = pip(python, "install", "--dry-run", "--quiet", "--report", "-", *wanted)
    assert done, report
    planned = (entry["metadata"] for entry in json.loads(report)["install"])
    versions = {canonical(one["name"]): one["version"] for one in planned}
    return {name: (installed[name], version) for name, version in versions.items() if name in installed}


def test_no_version_of_comfyui_changes(comfyui, installed):
    assert changes(comfyui[1], installed, "-r", str(ROOT / "requirements.txt")) == {}


def test_a_requirement_that_changes_a_version_is_noticed(comfyui, installed):
    found = changes(comfyui[1], installed, f"tqdm<{installed['tqdm']}")
    assert list(found) == ["tqdm"] and found["tqdm"][0] == installed["tqdm"]


def test_comfyui_itself_asks_for_what_is_left_out(comfyui):
    lines = (comfyui[0] / "requirements.txt").read_text().splitlines()
    asked = {canonical(re.split(r"[<>=!~ #]", line)[0]) for line in lines}
    assert {canonical({"PIL": "pillow"}.get(module, module)) for module in COMFYUI_HAS} <= asked
