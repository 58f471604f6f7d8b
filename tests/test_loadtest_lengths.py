"""Lengths against their distributions, by chi-square over whole tokens."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from heddle_loadtest.workload.lengths import draw_lengths
from heddle_loadtest.workload.spec import Between, FromTrace, Length, Lognormal

NUM_REQUESTS = 20_000

KINDS: list[tuple[Length, Length]] = [
    (Between(low=8, high=40), Between(low=8, high=41)),
    (Lognormal(median=18, sigma=0.8), Lognormal(median=18, sigma=0.85)),
    (Lognormal(median=18, sigma=0.8, low=9, high=30), Lognormal(median=19, sigma=0.8, low=9, high=30)),
]


def below(length: Length, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """How likely a length is `tokens` or fewer."""
    match length:
        case Between(low=low, high=high):
            return stats.randint(low, high + 1).cdf(tokens)  # type: ignore[no-any-return]
        case Lognormal(median=median, sigma=sigma, low=low, high=high):
            likely = stats.lognorm(s=sigma, scale=median).cdf(tokens + 0.5)
            return np.where(tokens < low, 0, np.where(tokens >= high, 1, likely))
    raise AssertionError(length)


def p_value(drawn: Length, believed: Length) -> float:
    lengths = draw_lengths(drawn, NUM_REQUESTS, np.random.default_rng(11))
    tokens = np.arange(0, 61, dtype=float)  # more than 60 is one bin
    expected = np.diff(np.append(below(believed, tokens), 1.0), prepend=0.0) * NUM_REQUESTS
    observed = np.bincount(np.minimum(lengths, 61), minlength=62)
    rare = expected < 5
    observed = np.append(observed[~rare], observed[rare].sum())
    expected = np.append(expected[~rare], max(expected[rare].sum(), 1e-9))
    return float(stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


@pytest.mark.parametrize(("length", "wrong"), KINDS, ids=repr)
def test_lengths_follow_their_distribution(length: Length, wrong: Length) -> None:
    assert p_value(length, length) > 1e-3
    assert p_value(length, wrong) < 1e-6, "the test could not fail"


def test_both_ends_are_drawn_and_none_beyond() -> None:
    lengths = draw_lengths(Between(low=3, high=5), 1000, np.random.default_rng(0))
    assert set(lengths) == {3, 4, 5}


def test_lognormal_keeps_its_limits() -> None:
    lengths = draw_lengths(Lognormal(median=10, sigma=3, low=4, high=50), 1000, np.random.default_rng(0))
    assert (min(lengths), max(lengths)) == (4, 50)


def test_fixed_and_traced() -> None:
    random = np.random.default_rng(0)
    assert draw_lengths(7, 3, random) == [7, 7, 7]
    assert draw_lengths(FromTrace(), 2, random, [5, 0, 9]) == [5, 1]  # a request of no tokens cannot be asked
