"""Virtual token counters: equal service to whoever waits, nothing saved up by whoever does not."""

from __future__ import annotations

import random

from heddle_server.engine import fairness
from heddle_server.engine.fairness import GENERATED_TOKEN_WEIGHT, PROMPT_TOKEN_WEIGHT, VirtualTokenCounters


def work(num_prompt_tokens: int, num_generated_tokens: int) -> int:
    return PROMPT_TOKEN_WEIGHT * num_prompt_tokens + GENERATED_TOKEN_WEIGHT * num_generated_tokens


def test_the_least_served_goes_first_and_of_equals_the_one_named_first() -> None:
    counters = VirtualTokenCounters()
    for tenant in ("a", "b", "c"):
        counters.activate(tenant)
    assert counters.first(["b", "a", "c"]) == "b"
    counters.charge("b", num_prompt_tokens=10)
    assert counters.first(["b", "a", "c"]) == "a"
    counters.charge("a", num_generated_tokens=5)
    counters.charge("c", num_generated_tokens=6)
    assert counters.first(["b", "c"]) == "b"
    assert counters.served("a") == counters.served("b") == work(10, 0)


def test_backlogged_tenants_are_served_alike_whatever_their_requests() -> None:
    """The paper's bound: with requests of at most so much work, two who always wait never lie further apart."""
    rng = random.Random(1)
    shapes = {"short": (20, 5), "long": (800, 300), "chatty": (10, 400)}
    largest = max(work(*shape) for shape in shapes.values())
    counters, served = VirtualTokenCounters(), dict.fromkeys(shapes, 0)
    for tenant in shapes:
        counters.activate(tenant)
    for _ in range(5000):
        tenant = counters.first(rng.sample(sorted(shapes), len(shapes)))
        counters.activate(tenant)  # its next request waits already
        counters.deactivate(tenant)
        counters.charge(tenant, *shapes[tenant])
        served[tenant] += work(*shapes[tenant])
        assert max(served.values()) - min(served.values()) <= largest
    assert min(served.values()) > 100 * largest


def test_whoever_comes_back_is_not_owed_what_was_not_asked_for() -> None:
    counters = VirtualTokenCounters()
    counters.activate("away")
    counters.deactivate("away")
    counters.activate("busy")
    counters.charge("busy", num_prompt_tokens=1000)
    counters.activate("away")
    assert counters.served("away") == counters.served("busy")
    counters.activate("new")
    assert counters.served("new") == 1000


def test_whoever_is_ahead_stays_ahead_over_a_pause() -> None:
    counters = VirtualTokenCounters()
    for tenant in ("greedy", "modest"):
        counters.activate(tenant)
    counters.charge("greedy", num_generated_tokens=1000)
    counters.deactivate("greedy")
    counters.activate("greedy")
    assert counters.first(["greedy", "modest"]) == "modest"


def test_after_everybody_left_a_newcomer_starts_where_the_last_one_stood() -> None:
    counters = VirtualTokenCounters()
    counters.activate("last")
    counters.charge("last", num_prompt_tokens=500)
    counters.deactivate("last")
    counters.activate("new")
    assert counters.served("new") == 500


def test_a_tenant_waits_until_its_last_request_does_not() -> None:
    counters = VirtualTokenCounters()
    counters.activate("two")
    counters.activate("two")
    counters.deactivate("two")
    counters.activate("other")
    counters.charge("other", num_prompt_tokens=100)
    counters.activate("two")
    assert counters.served("two") == 0, "it was waiting all the time and is not lifted"


def test_tenants_that_are_gone_and_not_ahead_are_forgotten() -> None:
    counters = VirtualTokenCounters()
    for tenant in ("waiting", "ahead"):
        counters.activate(tenant)
    counters.charge("ahead", num_prompt_tokens=10**9)
    counters.deactivate("ahead")
    for number in range(5 * fairness.MAX_GONE):
        counters.activate(f"passer-by {number}")
        counters.deactivate(f"passer-by {number}")
    assert len(counters._served) <= fairness.MAX_GONE + 2
    assert counters.served("ahead") == 10**9
