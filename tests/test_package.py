"""The package as others meet it: files, imports, and the direction of imports inside."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import klein_cns
import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("sampler", "weights", "lora", "klein", "remote")
# What a package may import from its siblings (docs/architecture.md). "" is the root, which holds the version.
ALLOWED = {
    "sampler": set(),
    "weights": set(),
    "endpoint": set(),
    "lora": {"endpoint", "weights"},
    "klein": {"endpoint", "sampler", "weights", "lora"},
    "cli": {"commands"},
    "commands": {"", "sampler", "weights", "lora", "klein"},
    "remote": {"endpoint", "sampler"},
}
HOST_MODULES = ("comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution")
LATE = ("diffusers", "transformers", "peft", "fal_client", "accelerate", "matplotlib", "skimage")


# What every supported ComfyUI asks for itself, by module: so does requirements.txt of 0.11.0, the oldest.
COMFYUI_HAS = {"torch", "numpy", "PIL", "safetensors", "tqdm", "pydantic", "aiohttp"}
COMFYUI_IS = {
    "comfy",
    "comfy_api",
    "comfy_execution",
    "comfy_extras",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "server",
}
DIFFUSERS_HOST = {"diffusers", "transformers", "tokenizers", "packaging", "matplotlib", "skimage"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def git(*args):
    result = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def tracked():
    """The files that a clone holds."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a clone, so nothing says which files belong to it")
    return git("ls-files")


def sources():
    inside = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return [ROOT / "cli.py", ROOT / "commands.py", *inside]


def requirements():
    return [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]


def test_requirements_are_what_comfyui_lacks_and_the_nodes_need():
    """What only the diffusers host needs is imported late and only by klein/ and the scheduler."""
    imports = {
        (module.split(".")[0], path, at_top)
        for path in [ROOT / "__init__.py", *(ROOT / "nodes").glob("*.py"), *sources()]
        for level, module, at_top in imported(path)
        if level == 0 and module.split(".")[0] not in sys.stdlib_module_names
    }
    for module, path, at_top in imports:
        if module in DIFFUSERS_HOST:
            assert path.name == "scheduler.py" or (path.parent.name == "klein" and not at_top), path
    needed = {module for module, *_ in imports} - COMFYUI_HAS - COMFYUI_IS - DIFFUSERS_HOST
    lines = requirements()
    assert {re.split(r"[<>=!~]", line)[0].replace("-", "_") for line in lines} == needed
    assert set(lines) <= set(project()["project"]["dependencies"])


def test_what_the_registry_reads():
    whole = project()
    own, comfy = whole["project"], whole["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*(?:[-_.][a-z0-9]+)*", own["name"]) and "comfyui" not in own["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", own["version"]) and own["description"]
    assert own["license"] == "MIT" and [(ROOT / name).is_file() for name in own["license-files"]] == [True]
    assert "Operating System :: OS Independent" in own["classifiers"]
    # comfy-cli drops every accelerator where it does not know one; none stated means that ComfyUI decides
    assert not [line for line in own["classifiers"] if line.startswith("Environment ::")]
    assert comfy["PublisherId"] and comfy["DisplayName"] and comfy["requires-comfyui"] == ">=0.11.0"
    assert "web" not in comfy  # beside WEB_DIRECTORY everything would load twice


def test_the_icon_is_there_and_within_the_registrys_size():
    repository = project()["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    address = project()["tool"]["comfy"]["Icon"]
    base = f"https://raw.githubusercontent.com/{repository}/main/"
    assert address.startswith(base)
    drawing = ElementTree.parse(ROOT / address.removeprefix(base)).getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert 0 < int(drawing.get("width")) <= 800 and 0 < int(drawing.get("height")) <= 400


def test_one_search_finds_every_address_of_the_repository():
    repository = project()["project"]["urls"]["Repository"].removeprefix("https://github.com/")
    for name in tracked():
        if name.endswith((".md", ".toml", ".yml", ".yaml", ".py", ".json")):
            text = (ROOT / name).read_text(encoding="utf-8")
            found = re.findall(r"github(?:usercontent)?\.com/([\w.-]+/klein-cns)\b", text)
            assert set(found) <= {repository}, name


def test_the_registrys_archive_holds_what_runs_and_no_tests():
    """comfy-cli packs the tracked files without those that .comfyignore names."""
    files = set(tracked())
    left_out = set(git("ls-files", "--cached", "--ignored", "--exclude-from=.comfyignore"))
    packed = files - left_out
    assert not [name for name in packed if name.startswith(("tests/", "benchmarks/", "."))]
    runs = ("nodes/", "web/", "locales/", "example_workflows/", "subgraphs/", *(f"{name}/" for name in PACKAGES))
    needed = {name for name in files if name.startswith(runs) or ("/" not in name and name.endswith(".py"))}
    assert packed >= needed | {"pyproject.toml", "requirements.txt", "README.md", "LICENSE", "docs/icon.svg"}


def test_the_registrys_security_rules_hold_without_exceptions():
    rules = ["--isolated", "--ignore-noqa", "--select", "S102,S307,E702", "--target-version", "py310"]
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *rules, "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_the_version_stands_in_one_place():
    version = project()["project"]["version"]
    assert klein_cns.__version__ == version
    for name in ("README.md", "__init__.py", "cli.py", "commands.py"):
        assert version not in (ROOT / name).read_text(encoding="utf-8")
    command = [sys.executable, "-m", "klein_cns", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"klein-cns {version}\n"), result.stderr


def test_the_changelog_has_this_version_in_the_form_of_keep_a_changelog():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, re.M)
    assert versions[0] == ("Unreleased", "") and all(date for _, date in versions[1:])
    numbers = [tuple(map(int, name.split("."))) for name, _ in versions[1:]]
    assert numbers == sorted(numbers, reverse=True) and klein_cns.__version__ in dict(versions)
    headings = re.findall(r"^### (.+)$", text, re.M)
    assert headings and set(headings) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for name, _ in versions:
        assert re.search(rf"^\[{re.escape(name)}\]: https://", text, re.M), name


def test_nothing_outside_the_nodes_imports_them():
    for path in sources():
        assert not [module for level, module, _ in imported(path) if level and module.split(".")[0] == "nodes"]


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
            assert level < 2 or module.split(".")[0] in (*PACKAGES, "endpoint"), f"{path} imports {module}"


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
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build"))
    code = f"""
import importlib.util, sys, types
sys.modules["nodes"] = sys.modules["lora"] = types.ModuleType("of ComfyUI")
spec = importlib.util.spec_from_file_location("pack_x", {str(folder / "__init__.py")!r},
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
    names = tracked()
    texts = [ROOT / name for name in names if name.endswith((".py", ".md", ".toml", ".txt", ".json", "run"))]
    for path in texts:
        if path != Path(__file__) and path.is_file():
            assert not pattern.search(path.read_text()), path
    assert not [name for name in names if name.endswith((".lock", ".ckpt", ".gguf", ".safetensors", ".pt"))]


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


def test_remote_knows_the_endpoints_facts_the_cns_parameters_and_nothing_else_of_the_package():
    for path in sorted((ROOT / "remote").glob("*.py")):
        outside = {module for level, module, _ in imported(path) if level == 2}
        assert outside <= {"endpoint", "sampler.params"}, path


def test_what_makes_the_node_widgets_needs_no_library_of_the_remote_client(tmp_path):
    code = (
        "import sys; [sys.modules.__setitem__(name, None) for name in ('fal_client', 'httpx', 'pydantic', 'filelock')];"
        "import klein_cns.remote.fields, klein_cns.remote.route, klein_cns.remote; print('there')"
    )
    assert run_python(code, tmp_path) == "there"
