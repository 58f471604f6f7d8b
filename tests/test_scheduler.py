"""What runs when: budgets, adapters on their way, a full pool, preemption, prefixes. No torch, milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from heddle_adapters.errors import AdapterError
from heddle_adapters.page_pool import PagePool
from heddle_adapters.residency import AdapterTooLarge, Residency
from heddle_server.engine.kv_cache import KvCache, page_key, root_key
from heddle_server.engine.scheduler import PoolTooSmall, Scheduler, StepPlan
from heddle_server.engine.sequence import Sequence
from heddle_server.request import Request, SamplingParams

PAGE_TOKENS = 4


@dataclass
class Packed:
    num_pages: int


@dataclass
class Placed:
    slot: int
    run_pages: tuple[tuple[int, int], ...]

    @property
    def num_pages(self) -> int:
        return len(self.run_pages)


@dataclass
class FakeRows:
    """Stands in for the device: takes pages, gives slots."""

    pool: PagePool
    slots: list[int] = field(default_factory=lambda: list(range(100)))

    def place(self, packed: Packed) -> Placed:
        pages = self.pool.allocate(packed.num_pages)
        return Placed(self.slots.pop(0), tuple((page, 1) for page in pages))

    def remove(self, placed: Placed) -> None:
        for page, _ in placed.run_pages:
            self.pool.free(page)
        self.slots.insert(0, placed.slot)


class World:
    """A scheduler over a small pool, and a loader that can be held up."""

    def __init__(self, num_pages: int = 32, max_batch_tokens: int = 16, adapter_pages: int = 1) -> None:
        self.pool = PagePool(num_pages, page_bytes=16)
        self.kv_cache = KvCache(self.pool, PAGE_TOKENS)
        self.gate = threading.Event()
        self.gate.set()
        self.loads: list[str] = []
        self.loaded = threading.Semaphore(0)
        self.adapter_pages = adapter_pages
        rows = FakeRows(self.pool)
        self.residency = Residency(self.load, rows, self.pool, self.loaded.release)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.kv_cache, self.residency, max_batch_tokens, max_batch_requests=8)
        self.next_id = 0

    def load(self, digest: str) -> Packed:
        self.loads.append(digest)
        assert self.gate.wait(5)
        if digest == "broken":
            raise AdapterError("the file is damaged")
        return Packed(self.adapter_pages)

    def add(self, prompt: list[int], adapter: str | None = None, salt: bytes = b"") -> Sequence:
        self.next_id += 1
        request = Request(
            request_id=self.next_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=50),
            adapter_digest=adapter,
            cache_salt=salt,
        )
        sequence = Sequence.of(request)
        self.scheduler.add(sequence)
        return sequence

    def wait_for_load(self) -> None:
        assert self.loaded.acquire(timeout=5)

    def step(self) -> StepPlan:
        """Plan, then pretend that the model ran and every complete sequence got token 7."""
        plan = self.scheduler.plan()
        for chunk in plan.chunks:
            chunk.sequence.num_computed += chunk.num_tokens
            self.kv_cache.remember(chunk.sequence)
            if chunk.completes:
                chunk.sequence.token_ids.append(7)
        self.check()
        return plan

    def check(self) -> None:
        self.pool.check_integrity()
        self.kv_cache.check_integrity(list(self.scheduler.sequences()))
        self.residency.check_integrity()


def tokens_of(plan: StepPlan) -> dict[int, int]:
    return {chunk.sequence.request.request_id: chunk.num_tokens for chunk in plan.chunks}


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    world = World(max_batch_tokens=16)
    world.add([1] * 5)
    world.step()
    world.add([2] * 40)
    taken = [tokens_of(world.step()) for _ in range(4)]
    assert taken == [{1: 1, 2: 15}, {1: 1, 2: 15}, {1: 1, 2: 10}, {1: 1, 2: 1}]


def test_a_request_waits_for_its_adapter_and_others_do_not() -> None:
    world = World()
    world.gate.clear()
    cold, warm = world.add([1] * 4, "cold"), world.add([2] * 4)
    for _ in range(3):
        assert list(tokens_of(world.step())) == [warm.request.request_id]
    world.gate.set()
    world.wait_for_load()
    assert cold.request.request_id in tokens_of(world.step())


def test_two_requests_for_one_adapter_are_one_load() -> None:
    world = World()
    world.add([1] * 4, "shared")
    world.add([2] * 4, "shared")
    world.wait_for_load()
    assert len(world.step().chunks) == 2
    assert world.loads == ["shared"]


def test_a_failed_load_fails_those_who_wait_for_it_once_and_nobody_else() -> None:
    world = World()
    world.add([1] * 4, "broken")
    world.add([2] * 4, "broken")
    other = world.add([3] * 4)
    world.wait_for_load()
    plan = world.step()
    assert [str(error) for _, error in plan.failed] == ["the file is damaged"] * 2
    assert list(tokens_of(plan)) == [other.request.request_id]
    assert world.loads == ["broken"]
    world.add([4] * 4, "broken")
    world.wait_for_load()
    assert len(world.step().failed) == 1, "the next request tries again"


def test_an_adapter_in_use_stays_and_an_idle_one_gives_way() -> None:
    world = World(num_pages=5, adapter_pages=2)
    first = world.add([1] * 3, "first")
    world.wait_for_load()
    world.step()
    second = world.add([2] * 9, "second")
    world.wait_for_load()
    world.step()
    assert not world.scheduler.running[1:], "no room for the second's tokens while the first is in use"
    world.scheduler.finish(first)
    assert list(tokens_of(world.step())) == [second.request.request_id]
    assert world.residency.num_evictions == 1


def test_a_full_pool_puts_the_newest_back_and_computes_it_again() -> None:
    world = World(num_pages=4)
    old, new = world.add([1] * 6), world.add([2] * 6)
    world.step()
    for _ in range(3):
        world.step()
    assert world.scheduler.num_preemptions == 1
    assert list(world.scheduler.waiting) == [new]
    world.scheduler.finish(old)
    plan = world.step()
    assert tokens_of(plan) == {2: new.num_computed - 4}, "its first page was still cached"
    assert new.num_generated >= 2


def test_a_request_that_can_never_fit_fails_instead_of_waiting_for_ever() -> None:
    world = World(num_pages=3)
    hopeless = world.add([1] * 13)
    plan = world.step()
    assert [(sequence, type(error)) for sequence, error in plan.failed] == [(hopeless, PoolTooSmall)]
    assert world.pool.num_free == 3
    growing = world.add([1] * 11)
    failed = [failure for _ in range(4) for failure in world.step().failed]
    assert [(sequence, type(error)) for sequence, error in failed] == [(growing, PoolTooSmall)]


def test_a_request_that_fails_for_want_of_room_does_not_hold_up_those_behind_it() -> None:
    world = World(num_pages=3)
    world.add([1] * 13)
    fine = world.add([2] * 4)
    plan = world.step()
    assert len(plan.failed) == 1
    assert list(tokens_of(plan)) == [fine.request.request_id]


def test_an_adapter_that_waits_for_room_is_not_overtaken_for_ever() -> None:
    world = World(num_pages=6, adapter_pages=3)
    first = world.add([1] * 3, "first")
    world.wait_for_load()
    world.step()
    second = world.add([2] * 3, "second")
    world.wait_for_load()
    late = [world.add([3] * 3, "first") for _ in range(3)]
    world.step()
    assert not any(sequence in world.scheduler.running for sequence in late)
    world.scheduler.finish(first)
    world.step()
    assert world.scheduler.running == [second]


def test_what_cannot_be_had_costs_nothing_idle() -> None:
    world = World(num_pages=8, adapter_pages=2)
    idle = world.add([1] * 3, "idle")
    world.wait_for_load()
    world.step()
    world.scheduler.finish(idle)
    world.add([2] * 15)
    world.step()
    world.adapter_pages = 5
    world.add([3] * 3, "wide")
    world.wait_for_load()
    for _ in range(3):
        world.step()
    assert world.residency.num_evictions == 0


def test_a_load_that_nobody_waits_for_is_dropped() -> None:
    world = World()
    world.gate.clear()
    busy = [world.add([1] * 4, name) for name in ("one", "two", "broken")]
    for sequence in busy:
        world.scheduler.finish(sequence)
    world.gate.set()
    fine = world.add([1] * 4, "broken-no-more")
    while world.scheduler.waiting:
        world.wait_for_load()
        assert not world.step().failed, "a failure that nobody waited for is nobody's"
    assert world.scheduler.running == [fine]
    assert world.residency.num_loads == 1


def test_an_adapter_larger_than_the_pool_fails_its_request() -> None:
    world = World(num_pages=3, adapter_pages=4)
    world.add([1] * 4, "huge")
    world.wait_for_load()
    ((_, error),) = world.step().failed
    assert isinstance(error, AdapterTooLarge)


def test_a_prefix_is_shared_only_with_the_same_adapter_and_tenant() -> None:
    world = World()
    prompt = list(range(1, 11))
    first = world.add(prompt)
    world.step()
    world.scheduler.finish(first)
    cached = {}
    for name, adapter, salt in (("same", None, b""), ("adapter", "other", b""), ("tenant", None, b"other")):
        sequence = world.add(prompt, adapter, salt)
        if adapter:
            world.wait_for_load()
        world.step()
        cached[name] = sequence.num_cached
    assert cached == {"same": 8, "adapter": 0, "tenant": 0}
    assert world.kv_cache.num_hits == 8


def test_at_least_one_token_is_computed_even_when_all_are_cached() -> None:
    world = World()
    first = world.add([1] * 8)
    world.step()
    world.scheduler.finish(first)
    again = world.add([1] * 8)
    assert tokens_of(world.step()) == {again.request.request_id: 4}


def test_idle_prefixes_give_way_oldest_first_and_ends_before_beginnings() -> None:
    world = World(num_pages=6)
    first = world.add(list(range(8)))
    world.step()
    world.scheduler.finish(first)
    assert world.kv_cache.num_idle_pages == 2
    world.add([9] * 15)
    world.step()
    again = Sequence.of(Request(request_id=99, prompt_token_ids=list(range(8)), sampling=SamplingParams(max_tokens=1)))
    world.kv_cache.attach_prefix(again)
    assert again.num_computed == 4, "the second page of the chain went, the first stayed"
    world.kv_cache.release(again)


def test_aborting_at_any_moment_frees_everything() -> None:
    world = World()
    world.gate.clear()
    sequences = [world.add([1] * 20), world.add([2] * 4, "cold"), world.add([3] * 4)]
    world.step()
    for sequence in sequences:
        world.scheduler.finish(sequence)
        world.check()
    world.gate.set()
    world.wait_for_load()
    world.step()
    assert world.pool.num_free + world.kv_cache.num_idle_pages == world.pool.num_pages


@pytest.mark.parametrize("forgotten_first", [True, False])
def test_a_forgotten_adapter_goes_when_its_last_request_has_ended(forgotten_first: bool) -> None:
    world = World()
    sequence = world.add([1] * 4, "old")
    world.wait_for_load()
    world.step()
    steps: list[Callable[[], None]] = [
        lambda: world.residency.forget("old"),
        lambda: world.scheduler.finish(sequence),
    ]
    for number, act in enumerate(steps if forgotten_first else reversed(steps)):
        assert world.residency.num_resident == 1, f"gone before step {number}"
        act()
    assert world.residency.num_resident == 0
    world.check()


def test_prefix_keys_separate_their_fields() -> None:
    def request(adapter: str | None, salt: bytes) -> Request:
        return Request(
            request_id=1,
            prompt_token_ids=[1],
            sampling=SamplingParams(max_tokens=1),
            adapter_digest=adapter,
            cache_salt=salt,
        )

    fields = [(None, b""), ("ab", b"c"), ("a", b"bc"), ("abc", b"")]
    keys = {root_key(request(adapter, salt)) for adapter, salt in fields}
    assert len(keys) == 4
    assert page_key(b"p", [1, 2]) != page_key(b"p", [2, 1])
    assert page_key(b"p", [1]) != page_key(b"p1", [])
