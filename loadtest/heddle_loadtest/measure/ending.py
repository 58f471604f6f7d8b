"""How a request ended, as far as figures care. Counts nothing."""

from __future__ import annotations

from enum import Enum

from heddle_loadtest.client.result import ABANDONED, RequestResult


class Ending(Enum):
    """The three are disjoint, and every request has one of them."""

    OK = "ok"
    FAILED = "failed"
    ABANDONED = "abandoned"  # the run was stopped while it was under way: nobody's fault, so part of no share


def ending_of(result: RequestResult) -> Ending:
    """The ending of one request."""
    if result.error is None:
        return Ending.OK
    return Ending.ABANDONED if result.error.code == ABANDONED else Ending.FAILED
