"""Which heddle this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def heddle_version() -> str:
    """The installed version; a checkout that is not installed has none."""
    try:
        return version("heddle")
    except PackageNotFoundError:
        return "0+source"
