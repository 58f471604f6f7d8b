"""Who is let in: bounded numbers, fair shares, and waits estimated from what the engine has done under load."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from engine_numbers import STATS
from heddle_server.api.errors import InvalidRequest, Overloaded, RateLimitExceeded, TenantOverloaded
from heddle_server.api.overload import LoadGate, Place

MAX_BATCH_TOKENS = 100
MAX_BATCH_REQUESTS = 4


class World:
    """A gate, a clock that is turned by hand, and an engine that only counts."""

    def __init__(
        self,
        max_requests: int = 1000,
        max_wait_seconds: float = 10.0,
        queued_token_limit: Callable[[str], int | None] = lambda tenant: None,
        is_shared: bool = False,
    ) -> None:
        self.now = 1000.0
        self.stats = STATS
        self.refused: list[str] = []
        self.gate = LoadGate(
            max_requests=max_requests,
            max_wait_seconds=max_wait_seconds,
            max_batch_tokens=MAX_BATCH_TOKENS,
            max_batch_requests=MAX_BATCH_REQUESTS,
            on_refused=self.refused.append,
            queued_token_limit=queued_token_limit,
            is_shared=lambda: is_shared,
            clock=lambda: self.now,
        )
        self.gate.observe(self.stats)

    def ask(self, tenant: str = "a", num_tokens: int = 0, *, is_cold: bool = False) -> Place:
        place = self.gate.enter(tenant)
        place.queue([place], [num_tokens], is_cold=is_cold)
        return place

    def compute(self, num_tokens: int, seconds: float) -> None:
        """One step of the engine."""
        self.now += seconds
        self.stats = msgspec.structs.replace(
            self.stats,
            num_computed_tokens=self.stats.num_computed_tokens + num_tokens,
            step_seconds=self.stats.step_seconds + seconds,
        )
        self.gate.observe(self.stats)


def test_as_many_as_the_server_takes() -> None:
    world = World(max_requests=2)
    first, _ = world.ask(), world.ask()
    with pytest.raises(Overloaded, match="2 requests in flight"):
        world.ask()
    assert world.refused == ["requests"]
    first.leave()
    world.ask()


def test_a_single_tenant_may_have_everything() -> None:
    world = World(max_requests=50)
    for _ in range(50):
        world.ask("only")
    with pytest.raises(Overloaded):
        world.ask("only")


def test_nobody_gets_the_last_places_of_a_shared_server_alone() -> None:
    world = World(max_requests=16, is_shared=True)
    places = [world.ask("greedy") for _ in range(14)]
    with pytest.raises(Overloaded):
        world.ask("greedy")
    world.ask("late")
    world.ask("late")
    for place in places:
        place.leave()
    for _ in range(6):
        world.ask("late")


def test_answers_of_one_request_are_let_in_together_or_not_at_all() -> None:
    world = World(max_requests=4, queued_token_limit=lambda tenant: 100)
    first = world.gate.enter("a")
    places = [first, *first.take_more(2)]
    first.queue(places, [60, 60, 60], is_cold=False)  # one request may always wait
    second = world.gate.enter("a")
    with pytest.raises(RateLimitExceeded, match="have 180 tokens, this request's have 10"):
        second.queue([second], [10])
    with pytest.raises(Overloaded, match="no places for 1 more"):
        second.take_more(1)
    for place in (*places, second):
        place.leave()
    with pytest.raises(InvalidRequest, match="5 answers at once are more than this server ever takes"):
        world.gate.enter("a").take_more(4)
    assert world.gate.num_requests == 1


def test_tenants_share_fairly_while_others_are_there() -> None:
    world = World(max_requests=8)
    world.ask("late")
    places = [world.ask("greedy") for _ in range(4)]
    with pytest.raises(TenantOverloaded, match="4 requests in flight"):
        world.ask("greedy")
    assert world.refused == ["tenant"]
    for _ in range(3):
        world.ask("late")
    places.pop().leave()
    world.ask("greedy")


def test_who_was_turned_away_by_a_full_server_gets_the_next_place() -> None:
    world = World(max_requests=4)
    places = [world.ask("greedy") for _ in range(4)]
    with pytest.raises(Overloaded):
        world.ask("late")
    places.pop().leave()
    with pytest.raises(TenantOverloaded):
        world.ask("greedy")  # its share is two of four now
    world.ask("late").leave()
    world.now += 31  # nobody has come back
    world.ask("greedy")


def test_an_unknown_rate_refuses_nobody() -> None:
    world = World()
    for _ in range(100):
        world.ask(num_tokens=1_000_000)


def test_a_wait_over_the_limit_is_refused_with_the_excess() -> None:
    world = World(max_wait_seconds=10.0)
    world.ask(num_tokens=1100)
    world.compute(200, 1.0)
    world.compute(200, 1.0)  # the 1100 are still queued: 5.5 s
    second = world.ask(num_tokens=1200)  # 11.5 s for the next
    with pytest.raises(Overloaded, match=r"about 12 s, .* longer than 10 s") as caught:
        world.ask()
    assert caught.value.retry_after_seconds == 2
    assert world.refused == ["wait"]
    second.start()  # computed, not queued any more
    world.ask()


def test_retry_after_is_bounded() -> None:
    world = World(max_wait_seconds=1.0)
    world.ask(num_tokens=1_000_000)
    world.compute(100, 1.0)
    with pytest.raises(Overloaded) as caught:
        world.ask()
    assert caught.value.retry_after_seconds == 30


def test_who_was_refused_takes_no_place() -> None:
    world = World(max_wait_seconds=1.0)
    world.ask(num_tokens=1000)
    place = world.gate.enter("a")  # both came in before either prompt was known
    world.compute(100, 1.0)
    with pytest.raises(Overloaded):
        place.queue([place], [1000])
    place.leave()
    assert world.gate.num_requests == 1


def test_an_idle_engine_says_nothing_of_what_it_could_do() -> None:
    world = World(max_wait_seconds=10.0)
    answering = world.ask(num_tokens=10)
    answering.start()
    for _ in range(100):
        world.compute(1, 0.1)  # one stream, ten tokens a second
    for _ in range(20):
        world.ask(num_tokens=500)


def test_requests_that_wait_for_their_adapters_do_not_make_the_engine_look_slow() -> None:
    world = World(max_wait_seconds=10.0)
    world.ask(num_tokens=10).start()
    cold = [world.ask(num_tokens=50, is_cold=True) for _ in range(100)]
    for _ in range(100):
        world.compute(1, 0.1)  # the one stream, while adapters are read from a slow disk
    world.ask()
    for place in cold:
        place.start()
    world.ask(num_tokens=2000)
    world.compute(100, 1.0)
    with pytest.raises(Overloaded):
        world.ask()


def test_an_old_rate_is_not_believed() -> None:
    world = World(max_wait_seconds=10.0)
    world.ask(num_tokens=10_000)
    world.compute(100, 1.0)
    with pytest.raises(Overloaded):
        world.ask()
    world.now += 31
    world.ask()


def test_the_rate_follows_the_engine() -> None:
    world = World(max_wait_seconds=10.0)
    world.ask(num_tokens=3000)
    for _ in range(20):
        world.compute(100, 1.0)
    with pytest.raises(Overloaded):
        world.ask()  # 30 s at 100 a second
    for _ in range(20):
        world.compute(1000, 1.0)
    world.ask()  # about 3 s


def test_a_new_engine_counts_from_nothing() -> None:
    world = World(max_wait_seconds=10.0)
    world.ask(num_tokens=2000)
    world.compute(1000, 1.0)
    world.stats = STATS
    world.gate.observe(world.stats)
    world.compute(1000, 1.0)
    world.ask()  # 2 s at 1000 a second, both before and after


def test_another_tenants_queue_comes_first_only_as_far_as_its_own() -> None:
    world = World(max_wait_seconds=10.0)
    for _ in range(3):
        world.ask("greedy", num_tokens=1000)
    world.compute(100, 1.0)
    with pytest.raises(Overloaded):
        world.ask("greedy")
    world.ask("other", num_tokens=600)  # nothing of its own before it
    with pytest.raises(Overloaded, match="about 12 s"):
        world.ask("other")  # its 600, and 600 of the other's


def test_where_the_batch_is_full_answers_have_to_end_first() -> None:
    world = World(max_wait_seconds=10.0)
    for _ in range(200):
        place = world.ask()
        place.count_answer(400)
        place.leave()
    for _ in range(MAX_BATCH_REQUESTS):
        world.ask(num_tokens=10).start()
    world.ask(num_tokens=10)
    world.ask(num_tokens=10)
    world.compute(50, 1.0)  # four answers at a time; the two wait for about 800 tokens
    with pytest.raises(Overloaded, match="about 16 s"):
        world.ask()
