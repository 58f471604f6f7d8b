"""The search for the highest sustainable rate, against targets whose rate is known."""

from __future__ import annotations

import pytest

from heddle_loadtest.measure.capacity import Probe, next_rate, sustained_rate


def probe(rate: float, *, num_kept: int = 100, is_valid: bool = True) -> Probe:
    return Probe(rate=rate, num_kept=num_kept, num_requests=100, is_valid=is_valid)


def search(capacity: float, low: float, high: float) -> list[Probe]:
    """All probes of a target that keeps its level up to `capacity` and breaks it beyond."""
    probes: list[Probe] = []
    while (rate := next_rate(probes, low, high)) is not None:
        assert len(probes) < 40, "the search does not end"
        probes.append(probe(rate, num_kept=100 if rate <= capacity else 50))
    return probes


@pytest.mark.parametrize("capacity", [0.11, 1.0, 3.0, 7.77, 64.0, 900.0])
def test_finds_the_capacity_within_a_tenth(capacity: float) -> None:
    found = sustained_rate(search(capacity, low=0.1, high=1000.0))
    assert found is not None
    assert found <= capacity < found * 1.1 * (1 + 1e-9)


def test_doubles_upwards_then_halves_the_gap_in_log_space() -> None:
    rates = [each.rate for each in search(capacity=5.0, low=1.0, high=100.0)]
    assert rates[:5] == pytest.approx([1.0, 2.0, 4.0, 8.0, 32**0.5])


def test_target_that_does_not_sustain_the_lowest_rate() -> None:
    probes = search(capacity=0.5, low=1.0, high=100.0)
    assert [each.rate for each in probes] == [1.0]
    assert sustained_rate(probes) is None


def test_target_that_sustains_the_highest_rate() -> None:
    probes = search(capacity=1e9, low=1.0, high=10.0)
    assert [each.rate for each in probes] == [1.0, 2.0, 4.0, 8.0, 10.0]
    assert sustained_rate(probes) == 10.0


def test_enough_is_a_share_of_the_requests() -> None:
    assert probe(1.0, num_kept=95).is_sustained()
    assert not probe(1.0, num_kept=94).is_sustained()
    assert probe(1.0, num_kept=90).is_sustained(target_share=0.9)
    assert probe(1.0, is_valid=False).is_sustained()  # kept in spite of a late client
    assert not Probe(rate=1.0, num_kept=0, num_requests=0, is_valid=True).is_sustained()


def test_share_comes_with_its_interval() -> None:
    low, high = probe(1.0, num_kept=95).share_interval
    assert low < probe(1.0, num_kept=95).share < high


def test_a_rate_above_a_failed_one_does_not_count() -> None:
    probes = [probe(1.0), probe(2.0, num_kept=10), probe(3.0)]
    assert sustained_rate(probes) == 1.0
    assert next_rate(probes, 1.0, 10.0) == pytest.approx(2**0.5)


def test_failed_rate_above_the_lowest_leads_back_to_it() -> None:
    assert next_rate([probe(8.0, num_kept=0)], 1.0, 10.0) == 1.0


def test_rates_that_are_no_range() -> None:
    for low, high in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="must be positive"):
            next_rate([], low, high)
