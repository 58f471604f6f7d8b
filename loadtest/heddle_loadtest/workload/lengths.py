"""How many tokens prompts and answers have. Knows no prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.random import Generator

from heddle_loadtest.workload.spec import Between, FromTrace, Length, Lognormal


def draw_lengths(
    length: Length, num_requests: int, random: Generator, traced: Sequence[int] | None = None
) -> list[int]:
    """Tokens of each request, at least 1. `traced` are the trace's own, for `kind: trace`."""
    match length:
        case Between(low=low, high=high):
            drawn = random.integers(low, high, size=num_requests, endpoint=True)
        case Lognormal():
            exact = length.median * np.exp(length.sigma * random.standard_normal(num_requests))
            drawn = np.clip(np.rint(exact), length.low, length.high).astype(np.int64)
        case FromTrace():
            assert traced is not None, "checked before: lengths from a trace need arrivals from a trace"
            return [max(1, num_tokens) for num_tokens in traced[:num_requests]]
        case _:
            return [length] * num_requests
    lengths: list[int] = drawn.tolist()
    return lengths
