"""What a library did not save, and the user says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choices:
    """None: not said."""

    first: int | None = None  # how many of a prompt's tokens a ReFT changes
    last: int | None = None
    activation: str | None = None  # of a ReFT, as transformers names it
    intervention: str | None = None  # which ReFT it is
