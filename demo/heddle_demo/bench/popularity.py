"""Who asks for which adapter: endless draws of names, the same for the same seed. Knows no time and no server."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

Draws = Iterator[str]
Popularity = Callable[[Sequence[str], int], Draws]  # names, the most popular first, and a seed


def uniform(names: Sequence[str], seed: int) -> Draws:
    """Each as likely as the other."""
    random = np.random.default_rng(seed)
    while True:
        yield names[int(random.integers(len(names)))]


def zipf(names: Sequence[str], seed: int, exponent: float = 1.0) -> Draws:
    """The i-th, counted from 1, with a likelihood in proportion to i ** -exponent."""
    random = np.random.default_rng(seed)
    cumulative = np.cumsum(np.arange(1, len(names) + 1, dtype=np.float64) ** -exponent)
    while True:
        yield names[int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))]


def power(names: Sequence[str], seed: int, alpha: float = 0.3) -> Draws:
    """As S-LoRA's trace generator draws: `int(numpy.random.power(alpha) * n)`; its alpha of 1 is `uniform`."""
    random = np.random.default_rng(seed)
    while True:
        yield names[min(int(random.power(alpha) * len(names)), len(names) - 1)]


POPULARITIES: dict[str, Popularity] = {"uniform": uniform, "zipf 1.0": zipf, "power 0.3": power}


def own_shares(names: Sequence[str], num_streams: int, seed: int) -> list[Draws]:
    """One row of draws per stream, each from a share of its own and never the same name twice in a row.

    So the streams always use as many adapters as they are, and every change of a request changes the adapter. Name i
    belongs to stream i modulo `num_streams`: what comes round in that rhythm, such as ranks, stays equally often in
    use. Each share must hold two names or more.
    """
    assert len(names) >= 2 * num_streams, "a share needs two names to change between"
    return [_changing(names[stream::num_streams], seed + stream) for stream in range(num_streams)]


def _changing(share: Sequence[str], seed: int) -> Draws:
    random = np.random.default_rng(seed)
    last = int(random.integers(len(share)))
    while True:
        last = (last + 1 + int(random.integers(len(share) - 1))) % len(share)
        yield share[last]
