"""Who asks for which adapter: endless draws of names, the same for the same seed. Knows no time and no server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from heddle_loadtest.workload.popularity import expected_shares
from heddle_loadtest.workload.spec import Popularity, SLoraPower, Uniform, Zipf

Draws = Iterator[str]

POPULARITIES: dict[str, Popularity] = {
    "uniform": Uniform(),
    "zipf 1.0": Zipf(alpha=1.0),
    "power 0.3": SLoraPower(alpha=0.3),
}


def popular(names: Sequence[str], popularity: Popularity, seed: int) -> Draws:
    """By their likelihoods; of `names`, the most popular first."""
    shares = expected_shares(popularity, len(names), num_requests=len(names))
    assert shares is not None, "a popularity that moves with time has no shares"
    random, cumulative = np.random.default_rng(seed), np.cumsum(shares)
    while True:
        yield names[min(int(np.searchsorted(cumulative, random.random(), side="right")), len(names) - 1)]


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
