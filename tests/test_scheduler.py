"""What runs when: budgets, adapters on their way, a full pool, overtaking, fairness, preemption. Milliseconds."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from heddle_adapters.errors import AdapterError, AdapterExceedsPool
from heddle_adapters.mix import AdapterPart
from heddle_server.engine.scheduler import MAX_OVERTAKEN, PoolTooSmall, StepPlan
from heddle_server.engine.sequence import Sequence
from heddle_server.request import Request, SamplingParams
from small_world import SmallWorld


def tokens_of(plan: StepPlan) -> dict[int, int]:
    return {chunk.sequence.request.request_id: chunk.num_tokens for chunk in plan.chunks}


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    world = SmallWorld(max_batch_tokens=16)
    world.add([1] * 5)
    world.step()
    world.add([2] * 40)
    taken = [tokens_of(world.step()) for _ in range(4)]
    assert taken == [{1: 1, 2: 15}, {1: 1, 2: 15}, {1: 1, 2: 10}, {1: 1, 2: 1}]


# Adapters on their way


@pytest.mark.parametrize("stage", ["reads", "copies"])
def test_a_request_waits_for_its_adapter_and_others_do_not(stage: str) -> None:
    world = SmallWorld()
    setattr(world.loader, f"holds_{stage}", True)
    cold, warm = world.add([1] * 4, "cold"), world.add([2] * 4)
    for _ in range(5):
        assert list(tokens_of(world.step())) == [warm.request.request_id]
    if stage == "reads":
        world.loader.finish_read("cold")
    else:
        world.loader.finish_copy("cold")
    world.step_until_running(cold)
    assert cold.load_seconds > 0
    assert cold.tier == "disk"


def test_nobody_waits_for_somebody_elses_cold_adapter() -> None:
    world = SmallWorld(max_batch_requests=64, num_pages=200, max_batch_tokens=400)
    world.serve("warm")
    world.loader.holds_reads = True
    for number in range(40):
        world.add([1] * 4, f"cold-{number}")
    late = world.add([2] * 4, "warm")
    assert list(tokens_of(world.step())) == [late.request.request_id]


def test_two_requests_for_one_adapter_are_one_load() -> None:
    world = SmallWorld()
    requests = [world.add([1] * 4, "shared"), world.add([2] * 4, "shared")]
    world.step_until_running(requests[0])
    assert world.scheduler.running == requests
    assert world.loader.reads == ["shared"]
    assert world.residency.num_loads == 1


def test_a_failed_load_fails_those_who_wait_for_it_once_and_nobody_else() -> None:
    world = SmallWorld()
    world.loader.broken["broken"] = AdapterError("the file is damaged")
    for number in range(2):
        world.add([number] * 4, "broken")
    other = world.add([3] * 4)
    plans = [world.step() for _ in range(3)]
    assert [str(error) for plan in plans for _, error in plan.failed] == ["the file is damaged"] * 2
    assert all(list(tokens_of(plan)) == [other.request.request_id] for plan in plans)
    assert world.loader.reads == ["broken"]
    del world.loader.broken["broken"]
    world.step_until_running(world.add([4] * 4, "broken"))
    assert world.loader.reads == ["broken"] * 2, "the next request tries again"


def test_a_load_that_nobody_waits_for_is_called_off() -> None:
    world = SmallWorld()
    world.loader.holds_reads = True
    world.loader.broken["two"] = AdapterError("the file is damaged")
    doomed = [world.add([1] * 4, name) for name in ("one", "two", "three")]
    world.step()
    for sequence in doomed:
        world.scheduler.finish(sequence)
    assert world.loader.reads == ["one", "two"], "the third was still to be read"
    world.loader.holds_reads = False
    for name in ("one", "two"):
        world.loader.finish_read(name)
    fine = world.add([1] * 4, "fine")
    world.step_until_running(fine)
    assert world.scheduler.running == [fine]
    assert world.residency.num_loads == 1
    assert world.residency.num_resident == 1


def test_a_request_called_off_and_repeated_while_its_adapter_is_read_is_served() -> None:
    world = SmallWorld()
    world.loader.holds_reads = True
    world.scheduler.finish(first := world.add([1] * 4, "a"))
    first = world.add([1] * 4, "a")
    world.step()
    world.scheduler.finish(first)
    again = world.add([1] * 4, "a")
    world.step()
    world.loader.holds_reads = False
    if "a" in world.loader.reading:
        world.loader.finish_read("a")
    world.step_until_running(again)


# Room


def test_an_adapter_in_use_stays_and_an_idle_one_gives_way() -> None:
    world = SmallWorld(num_pages=5)
    world.loader.sizes = {"first": 2, "second": 2}
    first = world.add([1] * 3, "first")
    world.step_until_running(first)
    second = world.add([2] * 9, "second")
    for _ in range(4):
        world.step()
    assert world.scheduler.running == [first], "no room for the second's tokens while the first is in use"
    world.scheduler.finish(first)
    world.step_until_running(second)
    assert world.residency.num_evictions == 1


def test_a_full_pool_puts_the_newest_back_and_computes_it_again() -> None:
    world = SmallWorld(num_pages=4)
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


def test_a_preempted_request_gets_its_adapter_back() -> None:
    world = SmallWorld(num_pages=9)
    old = world.add([1] * 6, "old")
    world.step_until_running(old)
    new = world.add([2] * 6, "new")
    world.step_until_running(new)
    while new in world.scheduler.running:
        world.step()
    assert world.scheduler.num_preemptions == 1
    assert world.scheduler.running == [old]
    world.scheduler.finish(old)
    world.step_until_running(new)
    assert new.slot is not None


def test_a_request_that_can_never_fit_fails_instead_of_waiting_for_ever() -> None:
    world = SmallWorld(num_pages=3)
    hopeless = world.add([1] * 13)
    plan = world.step()
    assert [(sequence, type(error)) for sequence, error in plan.failed] == [(hopeless, PoolTooSmall)]
    assert world.pool.num_free == 3
    growing = world.add([1] * 11)
    failed = [failure for _ in range(4) for failure in world.step().failed]
    assert [(sequence, type(error)) for sequence, error in failed] == [(growing, PoolTooSmall)]


def test_a_request_that_fails_for_want_of_room_does_not_hold_up_those_behind_it() -> None:
    world = SmallWorld(num_pages=3)
    world.add([1] * 13)
    fine = world.add([2] * 4)
    plan = world.step()
    assert len(plan.failed) == 1
    assert list(tokens_of(plan)) == [fine.request.request_id]


def test_one_that_waits_for_room_is_overtaken_only_so_often() -> None:
    world = SmallWorld(num_pages=8, max_batch_requests=3)
    world.loader.sizes = {"wide": 6}
    base = [world.add([1] * 3) for _ in range(3)]
    world.step()
    wide = world.add([2] * 3, "wide")
    started = 0
    for _ in range(3 * MAX_OVERTAKEN):
        world.scheduler.finish(base.pop(0))
        base.append(world.add([1] * 3))
        world.step()
        if wide in world.scheduler.running:
            break
        started += base[-1] in world.scheduler.running
    assert started <= MAX_OVERTAKEN + 1, "one more started while the adapter was still read"
    assert wide.num_overtaken == MAX_OVERTAKEN
    assert world.scheduler.running[0] is wide, "the others made room for it and none started before it"


def test_what_cannot_be_had_costs_nothing_idle() -> None:
    world = SmallWorld(num_pages=8)
    world.loader.sizes = {"idle": 2, "wide": 5}
    world.serve("idle")
    world.add([2] * 15)
    world.step()
    world.add([3] * 3, "wide")
    for _ in range(4):
        world.step()
    assert world.residency.num_evictions == 0


def test_an_adapter_larger_than_the_pool_fails_its_request() -> None:
    world = SmallWorld(num_pages=3)
    world.loader.sizes["huge"] = 4
    world.add([1] * 4, "huge")
    failures = [failure for _ in range(4) for failure in world.step().failed]
    assert [type(error) for _, error in failures] == [AdapterExceedsPool]
    assert "needs 4 pages; the pool has 3" in str(failures[0][1])


def test_a_mix_that_does_not_fit_together_fails_although_each_part_would() -> None:
    world = SmallWorld(num_pages=5)
    world.loader.sizes = {"a": 3, "b": 3}
    hopeless = world.add([1] * 3, (AdapterPart("a"), AdapterPart("b")))
    failures = [failure for _ in range(8) for failure in world.step().failed]
    assert [sequence for sequence, _ in failures] == [hopeless]
    assert isinstance(failures[0][1], AdapterExceedsPool)
    world.serve("a")


@pytest.mark.parametrize("host_pages", [0, 2, 64])
@pytest.mark.parametrize("policy", ["cost", "gdsf", "lru"])
def test_in_a_crowd_that_fits_nowhere_everybody_has_a_turn(policy: str, host_pages: int) -> None:
    source = random.Random(host_pages)
    world = SmallWorld(num_pages=8, host_pages=host_pages, policy=policy)
    names = list("abcdef")
    world.loader.sizes = dict(zip(names, (1, 1, 2, 2, 3, 3), strict=True))
    world.loader.holds_reads = world.loader.holds_copies = True
    born: dict[Sequence, int] = {}
    for step in range(600):
        if world.scheduler.num_waiting < 10:
            parts = tuple(AdapterPart(name) for name in source.sample(names, source.choice((0, 0, 1, 1, 2))))
            born[world.add([step] * source.randrange(1, 7), parts)] = step
        for name in [name for name in world.loader.reading if source.random() < 0.5]:
            world.loader.finish_read(name)
        for name in [name for name in world.loader.copying if source.random() < 0.5]:
            world.loader.finish_copy(name)
        for sequence, _ in world.step().failed:
            born.pop(sequence, None)
        for sequence in list(world.scheduler.running):
            born.pop(sequence, None)
            if sequence.num_generated > 3:
                world.scheduler.finish(sequence)
        assert all(step - arrived < 200 for arrived in born.values())


# Fairness


def test_tenants_share_by_tokens_and_not_by_requests() -> None:
    world = SmallWorld(num_pages=400, max_batch_tokens=64, max_batch_requests=4)
    for number in range(60):
        world.add([1] * 4, tenant="many small", salt=b"never shared %d" % number)
    for number in range(10):
        world.add([2] * 24, tenant="few large", salt=b"never shared %d" % number)
    served = {"many small": 0, "few large": 0}
    for _ in range(400):
        plan = world.step()
        for chunk in plan.chunks:
            served[chunk.sequence.request.tenant] += chunk.num_tokens
        for sequence in [each for each in world.scheduler.running if each.num_generated >= 4]:
            world.scheduler.finish(sequence)
        if not any(sequence.request.tenant == "few large" for sequence in world.scheduler.sequences()):
            break
    assert served["few large"] == 10 * (24 + 3)
    assert 0.6 < served["many small"] / served["few large"] < 1.2


def test_a_tenant_whose_share_of_the_pool_is_taken_waits_and_others_do_not() -> None:
    world = SmallWorld(num_pages=12, tenant_page_limit=4)
    world.loader.sizes = dict.fromkeys(("a1", "a2", "a3", "b1"), 2)
    running = [world.add([1] * 3, name, tenant="a") for name in ("a1", "a2")]
    world.step_until_running(running[1])
    third = world.add([1] * 3, "a3", tenant="a")
    other = world.add([1] * 3, "b1", tenant="b")
    world.step_until_running(other)
    for _ in range(4):
        world.step()
    assert third not in world.scheduler.running
    world.scheduler.finish(running[0])
    world.step_until_running(third)
    assert world.residency.num_evictions == 1, "the tenant's own idle adapter gave way"
    world.add([1] * 3, "a-wide", tenant="a")
    world.loader.sizes["a-wide"] = 5
    failures = [failure for _ in range(4) for failure in world.step().failed]
    assert "--tenant-pool-share" in str(failures[0][1])


# Prefixes


def test_a_prefix_is_shared_only_with_the_same_adapters_and_tenant() -> None:
    world = SmallWorld(max_batch_tokens=32)
    prompt = list(range(1, 11))
    mix, other_mix = (AdapterPart("a"), AdapterPart("b", 0.5)), (AdapterPart("a"), AdapterPart("b", 0.25))
    asked: list[tuple[str | tuple[AdapterPart, ...], bytes, int]] = [
        ((), b"", 0),
        ((), b"", 8),
        ("a", b"", 0),
        ((AdapterPart("a", 0.5),), b"", 0),
        (mix, b"", 0),
        (other_mix, b"", 0),
        (mix[::-1], b"", 8),
        ((), b"other", 0),
        ("a", b"", 8),
    ]
    for adapters, salt, num_cached in asked:
        sequence = world.add(prompt, adapters, salt=salt)
        world.step_until_running(sequence)
        assert sequence.num_cached == num_cached, f"{adapters} {salt!r}"
        world.scheduler.finish(sequence)


def test_at_least_one_token_is_computed_even_when_all_are_cached() -> None:
    world = SmallWorld()
    first = world.add([1] * 8)
    world.step()
    world.scheduler.finish(first)
    again = world.add([1] * 8)
    assert tokens_of(world.step()) == {again.request.request_id: 4}


def test_idle_prefixes_give_way_oldest_first_and_ends_before_beginnings() -> None:
    world = SmallWorld(num_pages=6)
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


# Ending


def test_aborting_at_any_moment_frees_everything() -> None:
    world = SmallWorld()
    world.loader.holds_reads = True
    sequences = [world.add([1] * 20), world.add([2] * 4, "cold"), world.add([3] * 4)]
    world.step()
    for sequence in sequences:
        world.scheduler.finish(sequence)
        world.check()
    world.loader.finish_read("cold")
    world.step()
    assert world.pool.num_free + world.kv_cache.num_idle_pages == world.pool.num_pages
    assert world.scheduler.num_waiting == 0


@pytest.mark.parametrize("forgotten_first", [True, False])
def test_a_forgotten_adapter_goes_when_its_last_request_has_ended(forgotten_first: bool) -> None:
    world = SmallWorld()
    sequence = world.add([1] * 4, "old")
    world.step_until_running(sequence)
    steps: list[Callable[[], None]] = [
        lambda: world.residency.forget("old"),
        lambda: world.scheduler.finish(sequence),
    ]
    for number, act in enumerate(steps if forgotten_first else reversed(steps)):
        assert world.residency.num_resident == 1, f"gone before step {number}"
        act()
    assert world.residency.num_resident == 0
    assert world.host.num_adapters == 0
    assert world.loader.forgotten == ["old"]
    world.check()
