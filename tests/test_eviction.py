"""The order of eviction: what each policy prefers, the books, and that the default is the best of them."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from heddle_adapters import eviction
from heddle_adapters.eviction import PATIENCE, POLICIES, EvictionOrder
from heddle_demo.bench.eviction_bench import SCENARIOS, Outcome, Simulation, Visit, compare, mean_relative, simulate
from heddle_server.config import EngineConfig, EvictionName


def nothing() -> None:
    pass


def use(order: EvictionOrder, *keys: str, size: int = 10, reload: int = 10) -> None:
    """Requests that use these one after another, each letting go at once."""
    for key in keys:
        order.touch(key)
        order.withdraw(key)
        order.offer(key, size, reload, nothing)


def departures(order: EvictionOrder) -> list[str]:
    return [str(order.pop().key) for _ in range(len(order))]


def test_every_policy_can_be_chosen() -> None:
    assert set(get_args(EvictionName)) == set(POLICIES)


def test_lru_gives_up_what_was_used_longest_ago() -> None:
    order = EvictionOrder("lru")
    use(order, "often", "often", "often", "once", "late")
    order.touch("once")
    assert departures(order) == ["often", "late", "once"]


@pytest.mark.parametrize("policy", ["gdsf", "cost"])
def test_frequent_use_counts_for_more_than_recent_use(policy: str) -> None:
    order = EvictionOrder(policy)
    use(order, "often", "often", "often", "often", "once", "late")
    assert departures(order) == ["once", "late", "often"]


@pytest.mark.parametrize("policy", ["gdsf", "cost"])
def test_what_costs_more_per_byte_stays_longer(policy: str) -> None:
    order = EvictionOrder(policy)
    use(order, "dear", size=10, reload=80)
    use(order, "large", size=100, reload=100)
    use(order, "small", size=10, reload=10)
    assert departures(order) == ["large", "small", "dear"]


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_what_was_popular_once_goes_in_the_end(policy: str) -> None:
    order = EvictionOrder(policy)
    use(order, *["yesterday"] * 100)
    for number in range(5000):
        use(order, f"today {number}")
        if len(order) > 20 and order.pop().key == "yesterday":
            return
    raise AssertionError("a hundred uses count for ever")


def test_twice_the_cost_is_worth_its_patience_in_turnovers() -> None:
    order = EvictionOrder("cost")
    use(order, *(f"other {number}" for number in range(997)))
    use(order, "plain")
    use(order, "dear", reload=20)
    use(order, *["other 0"] * 1000, "late")
    assert order.priority("dear") - order.priority("plain") == pytest.approx(PATIENCE, abs=0.01)
    assert order.priority("late") - order.priority("plain") == pytest.approx(1.0, abs=0.01)


def test_uses_of_long_ago_count_for_less_than_those_of_now() -> None:
    order = EvictionOrder("cost")
    use(order, *["formerly"] * 5)
    use(order, *(f"other {number}" for number in range(10)))
    use(order, *["other 0"] * 1000)
    use(order, "formerly", *["lately"] * 3)
    assert order.priority("formerly") < order.priority("lately")


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_among_equals_the_first_offered_goes_first(policy: str) -> None:
    order = EvictionOrder(policy)
    for key in "cab":
        order.offer(key, 10, 10, nothing)
    assert departures(order) == ["c", "a", "b"]


def test_what_was_given_up_comes_back_as_popular_as_it_was() -> None:
    order = EvictionOrder("cost")
    use(order, *["popular"] * 8)
    assert order.pop().key == "popular"
    use(order, "popular", "newcomer")
    assert departures(order) == ["newcomer", "popular"]


def test_what_is_forgotten_comes_back_as_a_newcomer() -> None:
    order = EvictionOrder("cost")
    use(order, *["popular"] * 8)
    order.forget("popular")
    assert len(order) == order.num_bytes == 0
    use(order, "popular", "newcomer")
    assert departures(order) == ["popular", "newcomer"]


def test_one_thing_can_be_given_up_out_of_turn() -> None:
    order = EvictionOrder("gdsf")
    use(order, *["popular"] * 8, "once")
    assert order.pop("popular").key == "popular"
    use(order, "late")
    assert order.priority("late") == order.priority("once"), "what was first in line has not gone"
    assert departures(order) == ["once", "late"]


def test_what_is_in_use_is_not_given_up() -> None:
    order = EvictionOrder("lru")
    use(order, "first", "second")
    order.withdraw("first")
    order.withdraw("first")
    assert departures(order) == ["second"]
    assert order.worst() is None


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_against_a_plain_list(policy: str) -> None:
    """Any churn: what goes is always the smallest priority, and of those what was ranked first."""
    rng = random.Random(3)
    order, idle, rank = EvictionOrder(policy), dict[str, int](), dict[str, int]()
    for step in range(5000):
        key = f"adapter {min(int(rng.paretovariate(0.7)), 60)}"
        order.touch(key)
        if key in idle:
            rank[key] = step
            if rng.random() < 0.5:
                order.withdraw(key)
                del idle[key]
        else:
            idle[key] = rng.choice((10, 20, 40))
            rank[key] = step
            order.offer(key, idle[key], rng.choice((1, 8)) * idle[key], nothing)
        assert (len(order), order.num_bytes) == (len(idle), sum(idle.values()))
        if len(idle) > 25:
            expected = min(idle, key=lambda key: (order.priority(key), rank[key]))
            worst = order.worst()
            assert worst is not None
            assert order.pop() is worst
            assert worst.key == expected
            del idle[expected]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "NUM_REMEMBERED", 100)
    order = EvictionOrder("cost")
    use(order, *["popular"] * 50)
    for _ in range(1000):
        order.touch("popular")
    assert len(order._heap) < 200, "out-of-date entries pile up"
    order.pop()
    for number in range(1000):
        order.touch(f"asked for and never loaded {number}")
        order.offer(f"come and gone {number}", 10, 10, nothing)
        order.pop()
    assert len(order._remembered) == 100
    assert not order._usage


def test_the_simulator_gives_the_same_numbers_again() -> None:
    first, again, other = (simulate(SCENARIOS[0], 0.1, "cost", 100, 500, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_the_simulator_counts_only_what_was_there_before() -> None:
    simulation = Simulation([4] * 20, num_pages=40, policy="lru")
    for adapter in [*range(20), 0]:
        simulation.serve(Visit(adapter))
    assert simulation.num_hits == 0
    assert simulation.num_reloaded_bytes == 4 * simulation.pool.page_bytes
    simulation.serve(Visit(0))
    assert simulation.num_hits == 1
    simulation.pool.check_integrity()


def test_the_default_is_the_best_policy_on_average_and_never_far_from_it() -> None:
    """The small form of `heddle bench eviction`."""
    default = EngineConfig(model_path="", model_name="", store_path="").eviction
    outcomes: list[Outcome] = []
    for scenario in SCENARIOS:
        outcomes += compare(scenario, 0.5 if scenario.name == "chats" else 0.1, num_adapters=300, num_requests=4000)
    means = mean_relative(outcomes)
    assert min(means, key=lambda policy: means[policy]) == default, means
    assert not [outcome for outcome in outcomes if outcome.policy == default and outcome.relative > 1.1]
