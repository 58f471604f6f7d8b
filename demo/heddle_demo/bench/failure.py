"""What ends a benchmark with a sentence and no figures."""

from __future__ import annotations


class BenchFailed(Exception):
    """Something that is to be measured did not start or did not answer."""


def require_at_least(least: int, options: dict[str, int | None]) -> None:
    """Raises BenchFailed for the first option, by its name on the command line, that is given and less."""
    for name, value in options.items():
        if value is not None and value < least:
            raise BenchFailed(f"{name} must be at least {least}, and is {value}.")
