"""For which adapter each request is, as a number from 0: the most popular first. Knows no names and no requests.

Usable by itself: `draw_adapters` wants a popularity, how many adapters there are, and a generator. Three families:

    independent draws    uniform, zipf, slora-power, by-rank, dealt, weighted     `expected_shares` are likelihoods
    exact counts         in-turn, distinct, identical, square-root, skewed        `expected_shares` are what is drawn
    moving with time     drift, storm                                            no shares; `times` are needed
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from heddle_loadtest.workload.spec import (
    ByRank,
    Dealt,
    Distinct,
    Drift,
    Identical,
    InTurn,
    Popularity,
    Skewed,
    SLoraPower,
    SquareRoot,
    Storm,
    Uniform,
    Weighted,
    Zipf,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


def draw_adapters(
    popularity: Popularity,
    num_adapters: int,
    random: Generator,
    *,
    num_requests: int,
    times: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
) -> list[int]:
    """The adapter of each request, each from 0 to `num_adapters` - 1.

    `times` are the requests' due seconds, which drift and storm need; `ranks` are the adapters', for by-rank.
    """
    match popularity:
        case Drift():
            drawn = _drift(popularity, num_adapters, random, _needed(times))
        case Storm():
            drawn = _storm(popularity, num_adapters, random, _needed(times))
        case InTurn() | Distinct():
            drawn = np.arange(num_requests) % num_adapters
        case SquareRoot() | Skewed() | Identical():
            counts = exact_counts(popularity, num_adapters, num_requests)
            drawn = random.permutation(np.repeat(np.arange(num_adapters), counts))
        case _:
            upper_ends = np.cumsum(_likelihoods(popularity, num_adapters, ranks))
            drawn = np.searchsorted(upper_ends / upper_ends[-1], random.random(num_requests), side="right")
    adapters: list[int] = drawn.tolist()
    return adapters


def expected_shares(
    popularity: Popularity, num_adapters: int, *, num_requests: int, ranks: Sequence[int] | None = None
) -> list[float] | None:
    """Each adapter's share of the requests; None where it moves with time. They sum to 1."""
    match popularity:
        case Drift() | Storm():
            return None
        case InTurn() | Distinct() | SquareRoot() | Skewed() | Identical():
            weights = np.array(exact_counts(popularity, num_adapters, num_requests), dtype=float)
        case _:
            weights = _likelihoods(popularity, num_adapters, ranks)
    shares: list[float] = (weights / weights.sum()).tolist()
    return shares


def exact_counts(
    popularity: InTurn | Distinct | SquareRoot | Skewed | Identical, num_adapters: int, num_requests: int
) -> list[int]:
    """How many of the requests each adapter gets, where no chance is in it."""
    match popularity:
        case InTurn() | Distinct():
            counts = _equal_counts(num_adapters, num_requests)
        case Identical():
            counts = [num_requests]
        case SquareRoot():
            num_asked = math.isqrt(max(num_requests - 1, 0)) + 1  # the square root, rounded up
            counts = _equal_counts(min(num_asked, num_adapters), num_requests)
        case Skewed(ratio=ratio):
            counts = _skewed_counts(num_adapters, num_requests, ratio)
    return counts + [0] * (num_adapters - len(counts))


def _equal_counts(num_asked: int, num_requests: int) -> list[int]:
    each, left = divmod(num_requests, num_asked)
    return [each + (adapter < left) for adapter in range(num_asked)]


def _skewed_counts(num_adapters: int, num_requests: int, ratio: float) -> list[int]:
    """A geometric series' share of what is left, at least one, until nothing is left or there is no adapter more.

    The series is the paper's (Punica, arXiv 2310.18547, section 7: each 1.5 times the next). The generator released
    with it builds the series from the other end, rounds down, and gives what is left to one more: of 32 requests this
    asks for 9 adapters and that for 8, of 1024 for 17 and 16.
    """
    counts = list[int]()
    while (left := num_requests - sum(counts)) > 0 and len(counts) < num_adapters:
        left_share = 1 - ratio ** -(num_adapters - len(counts))  # of an endless series, what the rest of it makes up
        counts.append(min(left, max(1, round(left * (1 - 1 / ratio) / left_share))))
    return counts


def _likelihoods(popularity: Popularity, num_adapters: int, ranks: Sequence[int] | None) -> Floats:
    """In proportion; they need not sum to 1."""
    match popularity:
        case Uniform():
            return np.ones(num_adapters)
        case Zipf(alpha=alpha):
            return _zipf(num_adapters, alpha)
        case SLoraPower(alpha=alpha):
            # numpy.random.power(alpha) is below x with a likelihood of x ** alpha
            return np.diff((np.arange(num_adapters + 1) / num_adapters) ** alpha)
        case Dealt(stride=stride, functions=functions, alpha=alpha):
            owners = np.arange(functions) // stride % num_adapters
            return np.bincount(owners, _zipf(functions, alpha), num_adapters).astype(np.float64)
        case Weighted(weights=weights):
            return np.array([weights[min(adapter, len(weights) - 1)] for adapter in range(num_adapters)])
        case ByRank(alpha=alpha):
            assert ranks is not None, "by-rank needs the adapters' ranks"
            return _by_rank(np.array(ranks[:num_adapters]), alpha)
        case _:
            raise AssertionError(f"{popularity} has no likelihoods")


def _zipf(count: int, alpha: float) -> Floats:
    return np.arange(1, count + 1, dtype=float) ** -alpha


def _by_rank(ranks: Integers, alpha: float) -> Floats:
    likelihoods = np.empty(len(ranks))
    for rank in np.unique(ranks):
        same_rank = ranks == rank
        zipf = _zipf(int(same_rank.sum()), alpha)
        likelihoods[same_rank] = zipf / zipf.sum()
    return likelihoods


def _drift(drift: Drift, num_adapters: int, random: Generator, times: Floats) -> Integers:
    """In the k-th period, from 0, the hot ones are k to k + hot - 1, around and around."""
    place = random.random(len(times))
    is_hot = (random.random(len(times)) < drift.hot_share) | (drift.hot == num_adapters)
    in_hot = np.floor(place * drift.hot)
    in_cold = drift.hot + np.floor(place * (num_adapters - drift.hot))
    periods = np.floor(times / drift.period_seconds)
    return ((periods + np.where(is_hot, in_hot, in_cold)) % num_adapters).astype(np.int64)


def _storm(storm: Storm, num_adapters: int, random: Generator, times: Floats) -> Integers:
    drawn = random.integers(storm.warm, size=len(times))
    in_storm = np.flatnonzero(times >= storm.at_seconds)[: num_adapters - storm.warm]
    drawn[in_storm] = storm.warm + np.arange(len(in_storm))
    return drawn


def _needed(times: Sequence[float] | None) -> Floats:
    assert times is not None, "drift and storm need the requests' times"
    return np.array(times, dtype=float)
