"""Which request of a batch uses which adapter, by the popularities that Punica's figure 11 compares."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain, cycle, islice, repeat

SKEW = 1.5  # how many times as often the i-th adapter is asked for as the next

Mix = list[int | None]  # of each request the number of its adapter; None = the base


def base(batch: int, num_adapters: int) -> Mix:
    """Nobody uses an adapter."""
    return [None] * batch


def identical(batch: int, num_adapters: int) -> Mix:
    """All use the same one."""
    return [0] * batch


def distinct(batch: int, num_adapters: int) -> Mix:
    """Every request has its own, as far as there are adapters."""
    return list(islice(cycle(range(num_adapters)), batch))


def uniform(batch: int, num_adapters: int) -> Mix:
    """The square root of the batch's size many, each equally often."""
    return list(islice(cycle(range(min(math.isqrt(batch), num_adapters))), batch))


def skewed(batch: int, num_adapters: int) -> Mix:
    """Each `SKEW` times as often as the next; the least popular takes what is left."""
    counts = list[int]()
    while (left := batch - sum(counts)) > 0:
        is_last = len(counts) == num_adapters - 1
        counts.append(left if is_last else max(1, round(left * (1 - 1 / SKEW))))
    return list(chain.from_iterable(repeat(adapter, count) for adapter, count in enumerate(counts)))


MIXES: dict[str, Callable[[int, int], Mix]] = {
    "base": base,
    "identical": identical,
    "uniform": uniform,
    "skewed": skewed,
    "distinct": distinct,
}


def num_distinct(mix: Mix) -> int:
    """Different adapters in it."""
    return len(set(mix) - {None})
