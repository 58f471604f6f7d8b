"""Popularities against shares that the test computes itself, by chi-square; exact counts to the request."""

from __future__ import annotations

from collections import Counter
from itertools import cycle, islice, pairwise

import numpy as np
import pytest
from scipy import stats

from heddle_loadtest.workload.popularity import draw_adapters, exact_counts, expected_shares
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

NUM_ADAPTERS = 50
NUM_REQUESTS = 20_000
RANKS = [8, 16, 64] * 17

# Each kind with chance in it, and a wrong one that the test has to notice
KINDS: list[tuple[Popularity, Popularity]] = [
    (Uniform(), Zipf(alpha=0.2)),
    (Zipf(alpha=1.0), Zipf(alpha=1.1)),
    (Zipf(alpha=0.0), Zipf(alpha=0.2)),
    (SLoraPower(alpha=1.0), SLoraPower(alpha=0.9)),
    (SLoraPower(alpha=0.3), SLoraPower(alpha=0.35)),
    (ByRank(alpha=1.0), ByRank(alpha=1.2)),
    (Dealt(stride=4), Dealt(stride=8)),
    (Dealt(stride=1, functions=60, alpha=0.5), Dealt(stride=1, functions=400, alpha=0.5)),
    (Weighted(weights=(5, 0, 3, 1)), Weighted(weights=(7, 0, 3, 1))),
]


def shares_of(popularity: Popularity) -> list[float]:
    """Worked out another way than in the generator: one adapter, or one function, after the other."""
    weights = [0.0] * NUM_ADAPTERS
    match popularity:
        case Uniform():
            weights = [1.0] * NUM_ADAPTERS
        case Zipf(alpha=alpha):
            weights = [1 / (1 + adapter) ** alpha for adapter in range(NUM_ADAPTERS)]
        case SLoraPower(alpha=alpha):
            power = stats.powerlaw(alpha)
            weights = [power.cdf((i + 1) / NUM_ADAPTERS) - power.cdf(i / NUM_ADAPTERS) for i in range(NUM_ADAPTERS)]
        case ByRank(alpha=alpha):
            for rank in (8, 16, 64):
                same = [adapter for adapter in range(NUM_ADAPTERS) if RANKS[adapter] == rank]
                total = sum(1 / place**alpha for place in range(1, len(same) + 1))
                for place, adapter in enumerate(same, start=1):
                    weights[adapter] = 1 / place**alpha / total
        case Dealt(stride=stride, functions=functions, alpha=alpha):
            turns = cycle(adapter for adapter in range(NUM_ADAPTERS) for _ in range(stride))
            for function, adapter in enumerate(islice(turns, functions), start=1):
                weights[adapter] += 1 / function**alpha
        case Weighted(weights=given):
            weights = [*given, *[given[-1]] * (NUM_ADAPTERS - len(given))]
    return [weight / sum(weights) for weight in weights]


def draw(popularity: Popularity, **options: object) -> list[int]:
    settings: dict[str, object] = {"num_requests": NUM_REQUESTS, "ranks": RANKS} | options
    return draw_adapters(popularity, NUM_ADAPTERS, np.random.default_rng(3), **settings)  # type: ignore[arg-type]


def p_value(adapters: list[int], shares: list[float]) -> float:
    """Chi-square; adapters too rare for it (fewer than 5 expected) count as one."""
    expected = np.array(shares) * len(adapters)
    counts = np.bincount(adapters, minlength=len(shares))
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    if wanted[-1] < 5:
        assert observed[-1] == 0 or wanted[-1] > 0
        observed, wanted = observed[:-1], wanted[:-1] * observed[:-1].sum() / wanted[:-1].sum()
    return float(stats.chisquare(observed, wanted).pvalue)


@pytest.mark.parametrize(("popularity", "wrong"), KINDS, ids=repr)
def test_draws_follow_their_shares(popularity: Popularity, wrong: Popularity) -> None:
    adapters = draw(popularity)
    assert p_value(adapters, shares_of(popularity)) > 1e-3
    assert p_value(adapters, shares_of(wrong)) < 1e-6, "the test could not fail"


@pytest.mark.parametrize("popularity", [kind for kind, _ in KINDS], ids=repr)
def test_expected_shares_are_what_the_test_works_out(popularity: Popularity) -> None:
    shares = expected_shares(popularity, NUM_ADAPTERS, num_requests=100, ranks=RANKS)
    assert shares == pytest.approx(shares_of(popularity))


def test_s_loras_power_law_is_its_generators() -> None:
    """Its trace.py draws int(numpy.random.power(alpha) * n): the same counts, drawn its way."""
    theirs = (np.random.RandomState(9).power(0.3, NUM_REQUESTS) * NUM_ADAPTERS).astype(int)
    assert p_value(theirs.tolist(), draw_shares(draw(SLoraPower(alpha=0.3), num_requests=2_000_000))) > 1e-3


def draw_shares(adapters: list[int]) -> list[float]:
    return [count / len(adapters) for count in np.bincount(adapters, minlength=NUM_ADAPTERS).tolist()]


def test_s_loras_alpha_of_one_is_uniform() -> None:
    assert expected_shares(SLoraPower(alpha=1), 200, num_requests=1) == pytest.approx([1 / 200] * 200)


def test_a_larger_stride_of_dlora_is_more_skewed() -> None:
    shares = [expected_shares(Dealt(stride=stride), 8, num_requests=1) for stride in (4, 8, 16, 32)]
    firsts = [share[0] for share in shares if share is not None]
    assert firsts == sorted(firsts)
    assert firsts[0] < 0.4 < 0.6 < firsts[-1]


@pytest.mark.parametrize(
    ("popularity", "num_requests", "counts"),
    [
        (InTurn(), 5, [2, 2, 1]),
        (Distinct(), 3, [1, 1, 1]),
        (Distinct(), 7, [3, 2, 2]),
        (Identical(), 7, [7]),
        (SquareRoot(), 9, [3, 3, 3]),
        (SquareRoot(), 10, [4, 3, 3]),  # four in the paper; here are three
        (Skewed(), 32, [15, 10, 7]),  # each half as many again as the next, however few there are
    ],
    ids=repr,
)
def test_exact_counts_with_three_adapters(popularity: Popularity, num_requests: int, counts: list[int]) -> None:
    adapters = draw_adapters(popularity, 3, np.random.default_rng(3), num_requests=num_requests)
    assert [Counter(adapters)[adapter] for adapter in range(len(counts))] == counts
    assert len(adapters) == num_requests
    shares = expected_shares(popularity, 3, num_requests=num_requests)
    assert shares is not None
    assert [round(share * num_requests) for share in shares][: len(counts)] == counts


def test_punicas_uniform_asks_for_the_square_root_rounded_up() -> None:
    """ceil(sqrt(n)): 6 adapters of 32 requests, 32 of 1024 (Punica, benchmarks/benchmark_utils.py)."""
    for num_requests, num_asked in ((1, 1), (2, 2), (32, 6), (36, 6), (37, 7), (1024, 32)):
        counts = exact_counts(SquareRoot(), num_requests, num_requests)
        assert sum(count > 0 for count in counts) == num_asked
        assert max(counts) - min(counts[:num_asked]) <= 1


def test_punicas_skewed_is_one_and_a_half_times_the_next() -> None:
    """As heddle's own benchmark counts. Punica's released generator comes to 8 and 16 adapters, of the same series."""
    assert exact_counts(Skewed(), 32, 32)[:9] == [11, 7, 5, 3, 2, 1, 1, 1, 1]
    counts = [count for count in exact_counts(Skewed(), 1024, 1024) if count]
    assert len(counts) == 17
    assert sum(counts) == 1024
    for count, following in pairwise(counts[:10]):
        assert count / following == pytest.approx(1.5, rel=0.05)


def test_exact_counts_come_in_random_order() -> None:
    """Shuffled, neighbours are equal as often as the shares say; sorted, nearly always."""
    for popularity in (SquareRoot(), Skewed()):
        adapters = draw(popularity)
        shares = draw_shares(adapters)
        num_equal = sum(a == b for a, b in pairwise(adapters))
        likely = sum(share**2 for share in shares)
        assert stats.binomtest(num_equal, len(adapters) - 1, likely).pvalue > 1e-3
    assert draw(InTurn())[:60] == [*range(50), *range(10)]


def test_drift_moves_its_hot_set_by_one_each_period() -> None:
    times = np.linspace(0, 100, NUM_REQUESTS, endpoint=False)
    adapters = np.array(draw(Drift(hot=5, hot_share=0.8, period_seconds=1), times=times))
    from_first_hot = (adapters - times.astype(int)) % NUM_ADAPTERS
    shares = [0.8 / 5] * 5 + [0.2 / 45] * 45
    assert p_value(from_first_hot.tolist(), shares) > 1e-3
    assert p_value(adapters.tolist(), shares) < 1e-6
    assert p_value(from_first_hot.tolist(), [0.75 / 5] * 5 + [0.25 / 45] * 45) < 1e-6


def test_a_hot_set_of_all_is_uniform() -> None:
    adapters = draw(Drift(hot=NUM_ADAPTERS, hot_share=0.1, period_seconds=1), times=np.arange(NUM_REQUESTS) / 100)
    assert p_value(adapters, [1 / NUM_ADAPTERS] * NUM_ADAPTERS) > 1e-3


def test_a_storm_asks_for_every_cold_adapter_once() -> None:
    times = np.arange(NUM_REQUESTS) / 100
    adapters = draw(Storm(warm=10, at_seconds=50), times=times)
    before, storm, after = adapters[:5000], adapters[5000:5040], adapters[5040:]
    assert sorted(storm) == list(range(10, NUM_ADAPTERS))
    for calm in (before, after):
        assert p_value(calm, [1 / 10] * 10) > 1e-3


def test_moving_popularities_have_no_shares() -> None:
    assert expected_shares(Drift(hot=1, period_seconds=1), 3, num_requests=9) is None
    assert expected_shares(Storm(warm=1, at_seconds=1), 3, num_requests=9) is None
