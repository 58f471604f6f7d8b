"""Values against numpy on the pooled requests; intervals by how often they hold the truth where it is known."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from heddle_loadtest.client.result import RequestError
from heddle_loadtest.measure import bootstrap
from heddle_loadtest.measure.bootstrap import (
    interval_of,
    intervals_of,
    replicates_of,
    stretched_replicates_of,
    values_of,
    weighted_percentile,
)
from heddle_loadtest.measure.sample import METRICS, RATES, SHARES, Ranked, Sample, sample_of
from heddle_loadtest.measure.stretch import stretched, student_quantile
from heddle_loadtest.measure.summary import summarize
from heddle_loadtest.run.outcome import Outcome
from heddle_loadtest.workload.spec import Slo
from loadtest_samples import OPEN_LOOP, make_outcome, make_result

ERROR = RequestError("queue_full", "later")


def exponential_outcome(random: np.random.Generator, count: int = 200, scale: float = 1.0, seed: int = 0) -> Outcome:
    """Requests at Poisson times whose one token takes an exponential time."""
    due = np.cumsum(random.exponential(0.1, size=count))
    took = random.exponential(scale, size=count)
    return make_outcome([make_result(float(at), float(at + t)) for at, t in zip(due, took, strict=True)], seed=seed)


def held(
    truth: float, metric: str, make: Callable[[np.random.Generator], list[Outcome]], num_trials: int = 40
) -> float:
    """The share of trials whose interval holds the truth."""
    hits = 0
    for trial in range(num_trials):
        interval = intervals_of(OPEN_LOOP, make(np.random.default_rng(trial)))[metric]
        hits += interval.low <= truth <= interval.high
    return hits / num_trials


def test_values_are_those_of_the_pooled_requests() -> None:
    random = np.random.default_rng(1)
    outcomes = [exponential_outcome(random, count) for count in (50, 80, 3)]
    results = [result for outcome in outcomes for result in outcome.results]
    ttft = [result.end_to_end_seconds for result in results]  # one token: the same as TTFT
    seconds = sum(outcome.ended_seconds for outcome in outcomes)
    values = values_of(sample_of(Slo(ttft_seconds=1.0), outcomes))
    for percent in (50, 90, 99):
        assert values[f"ttft_p{percent}"] == pytest.approx(np.percentile(ttft, percent))
        assert values[f"e2e_p{percent}"] == pytest.approx(np.percentile(ttft, percent))
    assert values["requests_per_second"] == pytest.approx(133 / seconds)
    assert values["output_tokens_per_second"] == pytest.approx(133 / seconds)
    assert values["goodput"] == pytest.approx(np.mean(np.array(ttft) <= 1.0))
    assert values["error_rate"] == 0.0
    assert "tpot_p50" not in values  # answers of one token have none


def test_failed_requests_have_no_latency_and_abandoned_ones_no_part_at_all() -> None:
    results = [
        make_result(0.0, 1.0, 1.5),
        make_result(0.0, 9.0, error=ERROR),
        make_result(0.0, 9.0, error=RequestError("abandoned", "stopped")),
    ]
    values = values_of(sample_of(None, [make_outcome(results, ended=10.0)]))
    assert values["ttft_p99"] == pytest.approx(1.0)
    assert values["tpot_p50"] == pytest.approx(0.5)
    assert values["error_rate"] == pytest.approx(0.5)
    assert values["output_tokens_per_second"] == pytest.approx(0.2)
    assert "goodput" not in values


def test_weighted_percentile_is_numpys_of_the_repeated_values() -> None:
    random = np.random.default_rng(2)
    values = np.sort(random.exponential(size=30))
    counts = random.integers(0, 4, size=(50, 30))
    counts[7] = 0
    for percent in (0, 50, 90, 99, 100):
        expected = [np.percentile(np.repeat(values, row), percent) if row.any() else np.nan for row in counts]
        found = weighted_percentile(values, np.cumsum(counts, axis=1, dtype=np.float64), percent)
        assert found == pytest.approx(expected, nan_ok=True)


def test_replicates_spread_as_a_plain_bootstrap_does() -> None:
    """One repeat: nothing but its requests is resampled, so brute force must see the same spread."""
    random = np.random.default_rng(3)
    outcome = exponential_outcome(random)
    ttft = np.array([result.ttft_seconds for result in outcome.results])
    brute = [np.percentile(random.choice(ttft, ttft.size), 90) for _ in range(2000)]
    replicates = replicates_of(sample_of(None, [outcome]))["ttft_p90"]
    assert np.mean(replicates) == pytest.approx(np.mean(brute), rel=0.05)
    assert np.std(replicates) == pytest.approx(np.std(brute), rel=0.15)


def test_interval_holds_the_median_of_an_exponential() -> None:
    share = held(np.log(2), "ttft_p50", lambda random: [exponential_outcome(random)])
    assert 0.81 <= share <= 1.0  # 95 % within four standard errors of 40 trials


def test_interval_holds_the_rate_of_a_poisson_process() -> None:
    def make(random: np.random.Generator) -> list[Outcome]:
        due = np.cumsum(random.exponential(0.1, size=500))
        results = [make_result(float(at), float(at)) for at in due[due < 30.0]]
        return [make_outcome(results, ended=30.0)]

    assert 0.81 <= held(10.0, "requests_per_second", make) <= 1.0


def differing_repeats(random: np.random.Generator, num_repeats: int = 3, count: int = 30) -> list[Outcome]:
    """One stream whose answers take 1 s but for chance; each repeat is faster or slower as a whole by a tenth or so."""
    outcomes = []
    for seed in range(num_repeats):
        took = random.lognormal(random.normal(0.0, 0.1), 0.1, size=count)
        ends = np.cumsum(took)
        results = [make_result(float(end - t), float(end)) for end, t in zip(ends, took, strict=True)]
        outcomes.append(make_outcome(results, seed=seed))
    return outcomes


@pytest.mark.parametrize(
    ("metric", "truth"),
    [("ttft_p50", 1.0), ("ttft_p90", np.exp(1.2816 * np.hypot(0.1, 0.1))), ("requests_per_second", np.exp(-0.01))],
)
def test_interval_of_three_repeats_that_differ_holds_the_truth(
    metric: str, truth: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truths of the lognormal law: the mean of exp(N(0, 0.02)) is exp(0.01) seconds."""
    monkeypatch.setattr(bootstrap, "_NUM_REPLICATES", (400, 400))
    assert held(truth, metric, differing_repeats, num_trials=300) >= 0.9


def test_one_repeat_is_not_stretched_and_more_are() -> None:
    outcomes = differing_repeats(np.random.default_rng(7))
    one, three = sample_of(None, outcomes[:1]), sample_of(None, outcomes)
    name = "requests_per_second"
    assert stretched_replicates_of(one, 0)[name] == pytest.approx(replicates_of(one)[name])
    logs = [
        np.log(replicates / values_of(three)[name])
        for replicates in (replicates_of(three)[name], stretched_replicates_of(three, 2)[name])
    ]
    assert logs[1] == pytest.approx(logs[0] * np.sqrt(3 / 2) * stats.t.ppf(0.975, 2) / 1.96, rel=1e-3)


def test_student_quantiles() -> None:
    for degrees_of_freedom in range(1, 31):
        expected = stats.t.ppf(0.975, degrees_of_freedom)
        assert student_quantile(degrees_of_freedom) == pytest.approx(expected, abs=5.1e-4)
    assert student_quantile(31) == pytest.approx(stats.norm.ppf(0.975), abs=1e-3)
    with pytest.raises(ValueError, match="0 degrees of freedom"):
        student_quantile(0)


def test_stretching_leaves_the_possible_range_for_nothing() -> None:
    draws = np.array([0.0, 0.5, 1.0, 2.0, np.nan])
    assert stretched(draws, 1.0, 3.0, is_share=False) == pytest.approx([0.0, 0.125, 1.0, 8.0, np.nan], nan_ok=True)
    assert stretched(draws[:3], 0.9, 3.0, is_share=True) == pytest.approx([0.0, 0.0, 1.0])
    assert stretched(draws[:3], 0.7, 1.5, is_share=True) == pytest.approx([0.0, 0.4, 1.0])
    assert stretched(draws[:2], 0.0, 3.0, is_share=False) == pytest.approx([0.0, 1.5])


def test_two_repeats_far_apart_have_no_interval_below_zero() -> None:
    outcomes = [exponential_outcome(np.random.default_rng(seed), 50, scale) for seed, scale in enumerate((0.1, 2.0))]
    found = intervals_of(OPEN_LOOP, outcomes)
    assert all(0.0 <= interval.low < interval.high for interval in found.values())
    assert {"ttft_p50", "requests_per_second"} <= set(found)


@pytest.mark.parametrize(
    ("num_results", "without"),
    [
        (1, set(METRICS)),
        (2, {"ttft_p90", "ttft_p99", "tpot_p99", "e2e_p90", "e2e_p99"}),
        (9, {"ttft_p90", "ttft_p99", "tpot_p99", "e2e_p90", "e2e_p99"}),
        (10, {"ttft_p99", "tpot_p99", "e2e_p99"}),
        (99, {"ttft_p99", "tpot_p99", "e2e_p99"}),
        (100, set()),
    ],
)
def test_no_interval_for_what_so_few_values_cannot_reach(num_results: int, without: set[str]) -> None:
    outcome = make_outcome([make_result(float(at), at + 0.1, at + 0.2) for at in range(num_results)])
    assert set(METRICS) - set(SHARES) - set(intervals_of(OPEN_LOOP, [outcome])) == without - set(SHARES)


def test_time_of_a_repeat_in_which_nothing_ended_counts() -> None:
    """As it does in the summary's total."""
    good = make_outcome([make_result(float(at), at + 1.0) for at in range(10)])
    stuck = make_outcome([make_result(0.0, error=RequestError("abandoned", "stopped"))], ended=10.0)
    values = values_of(sample_of(None, [good, stuck]))
    total = summarize(OPEN_LOOP, [good, stuck]).total
    assert values["requests_per_second"] == pytest.approx(total.requests_per_second) == pytest.approx(0.5)
    assert values["output_tokens_per_second"] == pytest.approx(total.output_tokens_per_second)
    replicates = replicates_of(sample_of(None, [good, stuck]))
    assert np.isnan(replicates["error_rate"]).mean() == pytest.approx(0.25, abs=0.06)  # those of the stuck one alone
    assert set(replicates["requests_per_second"].round(9)) == {0.0, 0.5, 1.0}


def test_repeats_that_differ_widen_the_interval() -> None:
    """Three repeats around 1 s, each sure of itself but unlike the others: the interval must span them."""
    random = np.random.default_rng(4)
    outcomes = [exponential_outcome(random, 500, scale) for scale in (0.5, 1.0, 1.5)]
    alike = [exponential_outcome(random, 500, 1.0) for _ in range(3)]
    apart, close = (intervals_of(OPEN_LOOP, runs)["ttft_p50"] for runs in (outcomes, alike))
    assert apart.low < 0.45 < 0.95 < apart.high
    assert apart.high - apart.low > 3 * (close.high - close.low)


def test_same_results_give_the_same_intervals() -> None:
    outcomes = [exponential_outcome(np.random.default_rng(5))]
    assert intervals_of(OPEN_LOOP, outcomes) == intervals_of(OPEN_LOOP, outcomes)


def test_metrics_with_an_interval() -> None:
    results = [make_result(float(at), at + 0.1, at + 0.2) for at in range(100)]
    found = intervals_of(OPEN_LOOP, [make_outcome(results)])
    assert set(found) == set(METRICS) - {"goodput", "error_rate"}
    assert set(RATES) < set(found)


def test_ten_thousand_requests_take_no_time_to_speak_of() -> None:
    random = np.random.default_rng(6)
    sample = sample_of(Slo(ttft_seconds=1.0), [exponential_outcome(random, 3334) for _ in range(3)])
    started = time.process_time()
    replicates = replicates_of(sample)
    assert time.process_time() - started < 2.0  # 0.5 s, on a machine that others use too
    assert replicates["ttft_p99"].size == 999  # 10,000,000 draws at most


def test_number_of_replicates_is_bounded_by_the_work() -> None:
    none = Ranked(np.array([], dtype=np.int64), np.array([]))
    sample = Sample(
        latencies={"ttft": none, "tpot": none, "e2e": none},
        shares={},
        repeat_ends=(100_000,),
        slices=np.ones((1, 20, 2)),
        slice_seconds=np.ones(1),
    )
    assert replicates_of(sample)["requests_per_second"].size == 200


def test_nothing_measured() -> None:
    for outcomes in ([], [make_outcome([])], [make_outcome([make_result(0.0, error=RequestError("abandoned", ""))])]):
        sample = sample_of(None, outcomes)
        assert (values_of(sample), replicates_of(sample), intervals_of(OPEN_LOOP, outcomes)) == ({}, {}, {})


def test_replicates_without_a_value() -> None:
    ones = np.ones(100)
    assert interval_of(np.array([])) is None
    assert interval_of(np.where(np.arange(100) < 20, np.nan, ones)) is None
    few = interval_of(np.where(np.arange(100) < 4, np.nan, ones))
    assert few is not None
    assert (few.low, few.high) == (1.0, 1.0)


def test_request_counts_evenly_over_the_time_it_was_under_way() -> None:
    """Ten tokens from 0 to 0.5 s, four from 0.475 to 1 s; a slice is 50 ms."""
    results = [make_result(0.0, 0.5, num_output_tokens=10), make_result(0.4, 1.0, num_output_tokens=4, lag=0.075)]
    slices = sample_of(None, [make_outcome(results)]).slices[0]
    assert slices[:9] == pytest.approx(np.tile([1.0, 0.1], (9, 1)))
    assert slices[10:] == pytest.approx(np.tile([4 * 0.05 / 0.525, 0.05 / 0.525], (10, 1)))
    assert slices.sum(axis=0) == pytest.approx([14.0, 2.0])


def test_streams_in_lockstep_have_a_sure_rate() -> None:
    """Four streams whose answers all take 0.3 s: they end in waves, which are not noise."""
    results = [make_result(wave * 0.3, wave * 0.3 + 0.3) for wave in range(10) for _ in range(4)]
    interval = intervals_of(OPEN_LOOP, [make_outcome(results)])["requests_per_second"]
    assert (interval.low, interval.high) == pytest.approx((40 / 3, 40 / 3), rel=0.01)
