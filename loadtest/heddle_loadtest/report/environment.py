"""Where and how a run ran, as its folder and its page tell it. Holds no key, no host's name and no path.

What cannot be found out on this system is None: a missing fact must not stop a run.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from heddle_loadtest.report.machine import cpu_name, memory_bytes, num_usable_cores, package_versions, source_revision

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
            "cpu": cpu_name(),
            "num_cores": os.cpu_count(),
            "num_usable_cores": num_usable_cores(),
            "memory_bytes": memory_bytes(),
            "system": f"{platform.system()} {platform.release()}",
        },
        "python": platform.python_version(),
        "packages": package_versions(_PACKAGES),
        "git_revision": source_revision(),
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
