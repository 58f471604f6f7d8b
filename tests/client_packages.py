"""Clients' packages in places of their own, installed once for each list of versions: some rule out the server's."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path

CLIENTS = Path(__file__).parent / "clients"
INSTALL_SECONDS = 900


def node_packages(cache: Path) -> Path:
    """A `node_modules` with what `clients/js/package-lock.json` lists."""
    lists = [CLIENTS / "js" / name for name in ("package.json", "package-lock.json")]

    def install(folder: Path) -> None:
        for each in lists:
            shutil.copy(each, folder)
        _run("npm", "ci", "--no-audit", "--no-fund", "--loglevel=error", folder=folder)

    return _installed_once(cache, "js", lists, install) / "node_modules"


def python_packages(cache: Path, name: str) -> Path:
    """The `bin` of a virtual environment with what `clients/<name>.txt` lists."""
    requirements = CLIENTS / f"{name}.txt"

    def install(folder: Path) -> None:
        _run(sys.executable, "-m", "venv", ".", folder=folder)
        _run("bin/python", "-m", "pip", "install", "--quiet", "--requirement", str(requirements), folder=folder)

    return _installed_once(cache, name, [requirements], install) / "bin"


def _installed_once(cache: Path, name: str, lists: Sequence[Path], install: Callable[[Path], None]) -> Path:
    """The folder that `install` fills, unless an earlier session has got to the end of it with the same lists."""
    digest = sha256(b"".join(each.read_bytes() for each in lists)).hexdigest()
    folder = cache / f"{name}-{digest[:16]}"
    if not (folder / "installed").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        install(folder)
        (folder / "installed").touch()
    return folder


def _run(*command: str, folder: Path) -> None:
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=INSTALL_SECONDS)
    assert process.returncode == 0, process.stdout + process.stderr
