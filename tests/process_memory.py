"""What the kernel says of a process's memory."""

from __future__ import annotations

import re
from pathlib import Path


def peak_bytes(process: int | str) -> int:
    """The most resident memory that a process ever had; a process id or "self"."""
    match = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{process}/status").read_text(), re.MULTILINE)
    assert match, "this system does not tell the peak of resident memory"
    return int(match[1]) * 1024
