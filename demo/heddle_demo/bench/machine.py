"""The machine that figures come from, and how fast its memory is."""

from __future__ import annotations

import os
import platform
import shutil
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from heddle_loadtest.report.machine import cpu_name, memory_bytes, package_versions, source_revision

PROBE_BYTES = 256 << 20  # far beyond any cache
NUM_PROBES = 5
PACKAGES = ("torch", "triton", "numpy", "numba", "transformers", "bitsandbytes", "peft")
REVISION_VARIABLE = "HEDDLE_REVISION"  # says it where the files are not in a repository


class TooLittleRoom(Exception):
    """The machine lacks the disk or the memory that a measurement takes."""


def describe_machine() -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
        **dict.fromkeys(PACKAGES) | package_versions(PACKAGES),
        "revision": source_revision() or os.environ.get(REVISION_VARIABLE),
    }


def memory_bandwidth() -> float:
    """Bytes per second that one thread reads from memory: the best of a few sums over a large array."""
    values = np.ones(PROBE_BYTES // 8)
    return PROBE_BYTES / min(_seconds_to_sum(values) for _ in range(NUM_PROBES))


def check_room(folder: Path, disk_bytes: int, wanted_bytes: int) -> None:
    """Raises `TooLittleRoom` where `folder`'s disk is short of `disk_bytes` or the memory of `wanted_bytes`."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < disk_bytes:
        raise TooLittleRoom(f"{_gib(disk_bytes)} of disk are needed in {folder} and {_gib(free_bytes)} are free.")
    there_bytes = memory_bytes()
    if there_bytes is not None and there_bytes < wanted_bytes:
        raise TooLittleRoom(f"{_gib(wanted_bytes)} of memory are needed and this machine has {_gib(there_bytes)}.")


def _seconds_to_sum(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    started = time.perf_counter()
    values.sum()
    return time.perf_counter() - started


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
