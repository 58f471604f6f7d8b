"""The machine that figures come from, and how fast its memory is."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

PROBE_BYTES = 256 << 20  # far beyond any cache
NUM_PROBES = 5
PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "bitsandbytes", "peft")
REVISION_VARIABLE = "HEDDLE_REVISION"  # says it where the files are not in a repository
GIT_SECONDS = 10.0


class TooLittleRoom(Exception):
    """The machine lacks the disk or the memory that a measurement takes."""


def describe_machine() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
        "revision": source_revision(),
    }


def source_revision() -> str | None:
    """The commit of this checkout, "+" behind it where files differ from it; None where that cannot be told."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get(REVISION_VARIABLE)


def memory_bandwidth() -> float:
    """Bytes per second that one thread reads from memory: the best of a few sums over a large array."""
    values = np.ones(PROBE_BYTES // 8)
    return PROBE_BYTES / min(_seconds_to_sum(values) for _ in range(NUM_PROBES))


def check_room(folder: Path, disk_bytes: int, memory_bytes: int) -> None:
    """Raises `TooLittleRoom` where `folder`'s disk or the memory is too small."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < disk_bytes:
        raise TooLittleRoom(f"{_gib(disk_bytes)} of disk are needed in {folder} and {_gib(free_bytes)} are free.")
    if _memory_bytes() < memory_bytes:
        raise TooLittleRoom(f"{_gib(memory_bytes)} of memory are needed and this machine has {_gib(_memory_bytes())}.")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)
    return result.stdout.strip()


def _seconds_to_sum(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    started = time.perf_counter()
    values.sum()
    return time.perf_counter() - started


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not a Linux
        return platform.processor() or platform.machine()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
