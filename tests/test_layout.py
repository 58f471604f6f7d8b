"""The shape of the repository: imports flow one way, policy has no torch, the tree in ARCHITECTURE.md is real."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {name: ROOT / name / f"heddle_{name}" for name in ("kernels", "adapters", "server", "loadtest", "demo")}
MAY_IMPORT: dict[str, set[str]] = {
    "kernels": set(),
    "adapters": {"kernels"},
    "server": {"kernels", "adapters"},
    "loadtest": set(),
    "demo": {"server", "adapters", "kernels", "loadtest"},
}
COMPOSITION_ROOTS = {  # `heddle demo` and `heddle bench` are commands of the server's own program
    Path("server/heddle_server/bench_cli.py"),
}

TORCH_FREE = [
    "adapters/heddle_adapters/page_pool.py",
    "adapters/heddle_adapters/eviction.py",
    "adapters/heddle_adapters/host_tier.py",
    "adapters/heddle_adapters/residency.py",
    "adapters/heddle_adapters/loader.py",
    "adapters/heddle_adapters/compile_worker.py",
    "adapters/heddle_adapters/store.py",
    "adapters/heddle_adapters/checkpoint.py",
    "server/heddle_server/engine/scheduler.py",
    "server/heddle_server/engine/kv_cache.py",
    "server/heddle_server/engine/sequence.py",
    "server/heddle_server/engine/fairness.py",
    "server/heddle_server/api/overload.py",
    "loadtest/heddle_loadtest/workload.py",
]
METHOD_NAMES = re.compile(r"lora|ia3|reft", re.IGNORECASE)
GENERIC = [
    *("page_pool", "run_allocator", "eviction", "host_tier", "residency", "tracked_adapter", "loader", "mix", "tier"),
    *("canonical", "packed_adapter", "packer", "rows_file", "row_compiler", "compile_worker", "device_rows"),
    *("store", "store_index", "store_folder", "catalog", "author", "names", "content_folder", "checkpoint", "digest"),
]


def imported_modules(file: Path) -> set[str]:
    """Names of all modules that a file imports at run time, wherever in the file."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_flow_one_way(package: str) -> None:
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for file in files:
        if file.relative_to(ROOT) in COMPOSITION_ROOTS:
            continue
        used = {m.group(1) for name in imported_modules(file) if (m := re.match(r"heddle_(\w+)", name))}
        forbidden = used - MAY_IMPORT[package] - {package}
        assert not forbidden, f"{file.relative_to(ROOT)} imports {forbidden}"


@pytest.mark.parametrize(("half", "other"), [("api", "engine"), ("engine", "api")])
def test_the_two_processes_share_messages_only(half: str, other: str) -> None:
    for file in (PACKAGES["server"] / half).glob("*.py"):
        crossing = {name for name in imported_modules(file) if name.startswith(f"heddle_server.{other}")}
        assert not crossing, f"{file.relative_to(ROOT)} imports {crossing}"


@pytest.mark.parametrize("file", TORCH_FREE)
def test_policy_is_free_of_torch(file: str) -> None:
    script = (
        f"import sys, importlib; importlib.import_module({module_name(file)!r}); "
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    path = ":".join(str(folder.parent) for folder in PACKAGES.values())
    result = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, check=False)
    assert result.returncode == 0, f"{file} brings torch in"


@pytest.mark.parametrize("stem", GENERIC)
def test_generic_layers_name_no_method(stem: str) -> None:
    text = (PACKAGES["adapters"] / f"{stem}.py").read_text()
    assert not METHOD_NAMES.search(text), f"{stem}.py knows a method's name: {METHOD_NAMES.findall(text)}"


def test_no_module_lies_directly_in_a_package_root() -> None:
    """transformers and bitsandbytes look for a package called `kernels`; ours must not be importable as one."""
    for folder in PACKAGES.values():
        assert not list(folder.parent.glob("*.py"))


def test_the_annotated_tree_is_the_tracked_tree() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    modules = {
        line for line in tracked.stdout.splitlines() if line.endswith(".py") and not line.startswith("tests/")
    } - {line for line in tracked.stdout.splitlines() if line.endswith(("__init__.py", "__main__.py"))}
    assert annotated_tree() == modules


def test_every_source_the_dockerfile_copies_exists() -> None:
    lines = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text().splitlines() if line.startswith("COPY ")]
    sources = [source for line in lines for source in line]
    assert sources
    for source in sources:
        assert (ROOT / source).exists(), f"the Dockerfile copies {source}, which is not there"


def annotated_tree() -> set[str]:
    """Python files named in ARCHITECTURE.md's annotated tree: a line `  folder/` opens a folder, two blanks a level."""
    page = (ROOT / "ARCHITECTURE.md").read_text()
    match = re.search(r"```text\nheddle/\n(.*?)```", page, re.DOTALL)
    assert match, "ARCHITECTURE.md has no annotated tree"
    files, folders = set[str](), list[str]()
    for line in match.group(1).splitlines():
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2 - 1
        name = line.split()[0]
        folders = folders[:depth]
        if name.endswith("/"):
            folders.append(name)
        elif name.endswith(".py"):
            files.add("".join(folders) + name)
    return files


def module_name(file: str) -> str:
    _, package, *rest = Path(file).with_suffix("").parts
    return ".".join([package, *rest])
