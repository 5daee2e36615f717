"""The package as others meet it: files, imports, and the direction of imports inside."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sampler", "weights", "lora", "klein", "remote")
# What a package may import from its siblings (docs/architecture.md).
ALLOWED = {
    "sampler": set(),
    "weights": set(),
    "lora": {"weights"},
    "klein": {"sampler", "weights", "lora"},
    "cli": {"commands"},
    "commands": {"sampler", "weights", "lora", "klein"},
    "remote": {"sampler"},
}
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution")
LATE = ("diffusers", "transformers", "peft", "fal_client", "accelerate", "matplotlib", "skimage")


def project():
    if sys.version_info < (3, 11):
        pytest.skip("reading pyproject.toml needs tomllib of Python 3.11")
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources():
    inside = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return [ROOT / "cli.py", ROOT / "commands.py", *inside]


def test_requirements_are_the_projects_but_for_torch():
    dependencies = project()["project"]["dependencies"]
    assert [line for line in dependencies if not line.startswith("torch")] == (
        ROOT / "requirements.txt"
    ).read_text().split()


def test_what_the_registry_reads():
    whole = project()
    name, comfy = whole["project"]["name"], whole["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(?:[-_.][a-z0-9]+)*", name) and "comfyui" not in name
    assert re.fullmatch(r"\d+\.\d+\.\d+", whole["project"]["version"]) and whole["project"]["description"]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.11.0"
    assert "web" not in comfy  # beside WEB_DIRECTORY everything would load twice


def test_every_package_is_installed():
    listed = set(project()["tool"]["setuptools"]["packages"])
    assert listed == {"klein_cns", "klein_cns.nodes", *(f"klein_cns.{name}" for name in PACKAGES)}


def imported(path):
    """(level, module) of every import of a file, and whether it stands at the top of the module."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield node.level, node.module or "", id(node) in top
        elif isinstance(node, ast.Import):
            for name in node.names:
                yield 0, name.name, id(node) in top


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way_and_late(path):
    package = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for level, module, at_top in imported(path):
        first = module.split(".")[0]
        assert first != "klein_cns" and not (level == 0 and first in HOST_MODULES)
        if level == 2 or package in ("cli", "commands"):
            assert level == 0 or first in ALLOWED[package], f"{path} imports {module}"
        if at_top and first in LATE:
            assert path == ROOT / "sampler" / "scheduler.py"  # a diffusers class; itself imported late


def test_nodes_do_no_imports_of_their_siblings_internals():
    for path in sorted((ROOT / "nodes").glob("*.py")):
        for level, module, _ in imported(path):
            assert module.split(".")[0] != "klein_cns"
            assert level < 2 or module.split(".")[0] in PACKAGES, f"{path} imports {module}"


def run_python(code, cwd):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", ["klein_cns", *(f"klein_cns.{name}" for name in (*PACKAGES, "cli"))])
def test_importing_loads_no_heavy_library(module, tmp_path):
    code = f"import sys, {module}; print([name for name in {LATE!r} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_it_imports_whatever_the_folder_is_called(tmp_path):
    """As ComfyUI loads a pack: from a file, under a name made from its path, with modules of its own around."""
    folder = tmp_path / "My klein-nodes 2.0"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info"))
    code = f"""
import importlib.util, sys, types
sys.modules["nodes"] = sys.modules["lora"] = types.ModuleType("of ComfyUI")
spec = importlib.util.spec_from_file_location("pack_x", {str(folder / '__init__.py')!r},
                                              submodule_search_locations=[{str(folder)!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack_x"] = pack
spec.loader.exec_module(pack)
import pack_x.sampler, pack_x.klein, pack_x.lora
print(pack_x.sampler.CNSParams().s_churn, pack_x.klein.empirical_mu(16, 4) > 0, pack_x.lora.MAX_LORAS)
"""
    assert run_python(code, tmp_path) == "0.5 True 3"


def test_nothing_names_a_machine_or_a_registry():
    pattern = re.compile(r"/(root|home|work|Users)/\w|index-url|extra-index|files\.pythonhosted|pypi\.org")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    tracked = listing.stdout.splitlines()
    texts = [ROOT / name for name in tracked if name.endswith((".py", ".md", ".toml", ".txt", ".json", "run"))]
    for path in texts:
        if path != Path(__file__) and path.is_file():
            assert not pattern.search(path.read_text()), path
    assert not [name for name in tracked if name.endswith((".lock", ".ckpt", ".gguf", ".safetensors", ".pt"))]


def test_readme_lists_every_cns_parameter():
    from klein_cns.sampler import CNSParams

    readme = (ROOT / "README.md").read_text()
    for name, value in CNSParams().to_request().items():
        default = False if name == "enable_cns" else value
        spec = CNSParams.__dataclass_fields__[name if name == "enable_cns" else name.removeprefix("cns_")]
        row = re.search(rf"^\| `{name}` \| `(.+?)` \| (.+?) \| (.+) \|$", readme, re.M)
        assert row, name
        assert row.group(1) == str(default).lower() if isinstance(default, bool) else row.group(1) == str(default)
        if "min" in spec.metadata:
            assert row.group(2) == f"{spec.metadata['min']:g} to {spec.metadata['max']:g}"
        assert row.group(3) == spec.metadata["help"]


def test_every_node_has_a_help_page():
    ids = set(re.findall(r'node_id="(\w+)"', "".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))))
    assert ids == {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}


def test_remote_knows_the_cns_parameters_and_nothing_else_of_the_package():
    for path in sorted((ROOT / "remote").glob("*.py")):
        outside = {module for level, module, _ in imported(path) if level == 2}
        assert outside <= {"sampler.params"}, path


def test_what_makes_the_node_widgets_needs_no_library_of_the_remote_client(tmp_path):
    code = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('fal_client', 'httpx', 'pydantic', 'filelock')];"
        "import klein_cns.remote.fields, klein_cns.remote.route, klein_cns.remote; print('there')"
    )
    assert run_python(code, tmp_path) == "there"
