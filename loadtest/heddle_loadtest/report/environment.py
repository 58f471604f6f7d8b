"""Where and how a run ran, as its folder and its page tell it. Holds no key, no host's name and no path.

What cannot be found out on this system is None: a missing fact must not stop a run.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("heddle", "aiohttp", "msgspec", "numpy", "rich", "typer", "matplotlib")
_SECRET_OPTION = re.compile(r"--[a-z-]*(key|token|secret|password)$")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")  # https://user:password@host
_HIDDEN = "***"
_NUM_LISTED = 20


def describe_environment(
    *, target: str, style: str, model: str | None, arguments: Sequence[str], listed: Sequence[str] = ()
) -> dict[str, Any]:
    """The content of environment.json.

    `arguments` is the command line with the program first; values of options that are named after keys are left out.
    `listed` is the target's answer to GET /v1/models, of which the first twenty names are kept.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _as_utf8(" ".join(_without_secrets(arguments))),
        "target": {
            "url": _CREDENTIALS.sub("", target),
            "style": str(style),
            "model": None if model is None else _as_utf8(model),
            "listed": [_as_utf8(name) for name in listed[:_NUM_LISTED]],
            "num_listed": len(listed),
        },
        "machine": {
            "cpu": _cpu_name(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": _num_usable_cores(),
            "memory_bytes": _memory_bytes(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "python": platform.python_version(),
        "packages": dict(_versions()),
        "git_revision": _git_revision(),
    }


def _without_secrets(arguments: Sequence[str]) -> Iterator[str]:
    is_secret = False
    for index, argument in enumerate(arguments):
        name, equals, _ = argument.partition("=")
        if is_secret:
            yield _HIDDEN
        elif equals and _SECRET_OPTION.match(name):
            yield f"{name}={_HIDDEN}"
        else:
            yield _CREDENTIALS.sub("", Path(argument).name if index == 0 else argument)
        is_secret = not equals and not is_secret and _SECRET_OPTION.match(argument) is not None


def _as_utf8(text: str) -> str:
    """A command line may hold bytes that are no text, and a target may list names that are none."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or None)


def _num_usable_cores() -> int | None:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _versions() -> Iterator[tuple[str, str]]:
    for package in _PACKAGES:
        try:
            yield package, version(package)
        except PackageNotFoundError:
            continue


def _git_revision() -> str | None:
    """Of the checkout that this file is tracked in: a virtual environment may lie in one that is not heddle's."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    revision = _git("rev-parse", "HEAD")
    return f"{revision} with changes" if _git("status", "--porcelain", "--untracked-files=no") else revision


def _git(*arguments: str) -> str | None:
    command = ("git", "-C", str(Path(__file__).parent), *arguments)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
