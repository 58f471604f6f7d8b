"""What ends a benchmark with a sentence and no figures."""

from __future__ import annotations


class BenchFailed(Exception):
    """Something that is to be measured did not start or did not answer."""
