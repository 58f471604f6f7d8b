"""One thing that was looked at, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Check:
    """A line of the doctor's report."""

    name: str
    status: Status
    found: str
    remedy: str = ""  # what to do; nothing where all is well
