"""Tiers, pins, mixes, shares, what is told, and that the books balance whatever happens. No torch, no threads."""

from __future__ import annotations

import random

import pytest

from heddle_adapters.errors import AdapterError
from heddle_adapters.mix import AdapterPart, adapter_key
from heddle_adapters.tier import AdapterMove, Tier
from small_world import PAGE_BYTES, SmallWorld


def moves_of(world: SmallWorld) -> list[tuple[str, Tier, Tier]]:
    return [(move.adapter_digest, move.source, move.target) for move in world.residency.take_moves()]


def test_an_adapter_comes_from_disk_then_from_host_then_is_there() -> None:
    world = SmallWorld(num_pages=4)
    world.loader.sizes = {"a": 2, "b": 2}
    tiers = [world.serve(name).tier for name in ("a", "a", "b", "a", "b")]
    assert tiers == ["disk", "device", "disk", "host", "host"]
    assert world.loader.reads == ["a", "b"], "host memory kept both"
    assert world.residency.num_requests == {"disk": 2, "device": 1, "host": 2}
    assert world.residency.num_loads == 4


def test_what_has_moved_is_told_once() -> None:
    world = SmallWorld(num_pages=4, host_pages=3)
    world.loader.sizes = {"a": 2, "b": 2}
    world.serve("a")
    assert moves_of(world) == [("a", "disk", "host"), ("a", "host", "device")]
    world.serve("b")
    assert moves_of(world) == [("b", "disk", "host"), ("b", "host", "device"), ("a", "device", "disk")]
    assert moves_of(world) == []


def test_moves_tell_bytes_and_seconds() -> None:
    world = SmallWorld()
    world.loader.sizes["a"] = 3
    world.serve("a")
    for move in world.residency.take_moves():
        assert isinstance(move, AdapterMove)
        assert move.size_bytes == 3 * PAGE_BYTES
        assert move.seconds > 0


def test_reads_are_started_in_queue_order_and_no_further_ahead_than_host_memory_allows() -> None:
    world = SmallWorld(num_pages=6, host_pages=10)
    world.loader.sizes = dict.fromkeys("bcdef", 5)
    running = world.add([1] * 3, "a")
    world.step_until_running(running)
    for name in "bcdef":
        world.add([1] * 3, name)
    for _ in range(5):
        world.step()
    assert world.loader.reads == ["a", "b", "c"], "two are staged and fill host memory"
    world.scheduler.finish(running)
    for _ in range(3):
        world.step()
    assert world.loader.reads[:4] == ["a", "b", "c", "d"]


def test_a_host_tier_of_nothing_still_serves() -> None:
    world = SmallWorld(num_pages=4, host_pages=0)
    world.loader.sizes = {"a": 2, "b": 2, "c": 2}
    for name in "abcabc":
        world.serve(name)
    assert world.host.num_adapters == 0
    assert world.residency.num_loads == 6


# Pins


def test_a_pinned_adapter_comes_unasked_and_stays() -> None:
    world = SmallWorld(num_pages=4)
    world.residency.pin({"kept": "local"})
    for _ in range(4):
        world.step()
    assert world.residency.tier_of("kept") == "device"
    for number in range(6):
        world.serve(f"other-{number}")
    assert world.residency.tier_of("kept") == "device"
    assert world.serve("kept").tier == "device"
    world.residency.pin({})
    for number in range(6):
        world.serve(f"other-{number}")
    assert world.residency.tier_of("kept") != "device"


def test_when_pins_leave_too_little_room_a_request_is_told_so() -> None:
    world = SmallWorld(num_pages=6)
    world.loader.sizes = {"kept": 4, "wide": 3}
    world.residency.pin({"kept": "local"})
    for _ in range(4):
        world.step()
    world.add([1] * 3, "wide")
    failures = [failure for _ in range(5) for failure in world.step().failed]
    assert [str(error) for _, error in failures] == [
        "The adapter needs 3 pages; the pool has 6, 4 of them pinned. "
        "Unpin some adapters, or start the server with a larger --pool-bytes."
    ]
    world.serve(())


def test_a_pinned_adapter_that_cannot_be_loaded_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    world = SmallWorld()
    world.loader.broken["kept"] = AdapterError("the file is damaged")
    world.residency.pin({"kept": "local"})
    for _ in range(4):
        world.step()
    assert "the file is damaged" in caplog.text
    world.serve("other")
    del world.loader.broken["kept"]
    world.serve("kept")
    assert world.residency.tier_of("kept") == "device"


@pytest.mark.parametrize("how", ["unpinned", "forgotten"])
def test_a_pinned_adapter_that_never_found_room_leaves_host_memory_with_its_pin(how: str) -> None:
    world = SmallWorld(num_pages=4, host_pages=2)
    world.loader.sizes["kept"] = 2
    long = world.add([1] * 11)
    world.residency.pin({"kept": "local"})
    for _ in range(4):
        world.step()
    assert world.host.num_held_bytes == 2 * PAGE_BYTES, "it waits in host memory for room"
    if how == "unpinned":
        world.residency.pin({})
    else:
        world.residency.forget("kept")
    assert world.host.num_held_bytes == 0
    world.scheduler.finish(long)
    world.serve("other")
    world.serve("kept")
    assert world.loader.reads.count("kept") == 2, "nothing was left of it"


def test_a_pinned_adapter_that_finds_no_room_does_not_keep_others_from_being_read() -> None:
    world = SmallWorld(num_pages=20, host_pages=2, tenant_page_limit=5)
    world.loader.sizes = dict.fromkeys(("kept", "too much", "far too much"), 3)
    world.residency.pin(dict.fromkeys(("kept", "too much", "far too much"), "local"))
    for _ in range(6):
        world.step()
    assert len(world.loader.reads) == 2, "the third would only lie in host memory too"
    world.serve("asked for")


def test_what_is_forgotten_in_host_memory_is_told() -> None:
    world = SmallWorld(num_pages=4)
    world.loader.sizes = {"a": 2, "b": 2}
    world.serve("a")
    world.serve("b")
    world.residency.take_moves()
    world.residency.forget("a")
    assert moves_of(world) == [("a", "host", "disk")]


# Mixes


def test_a_mix_is_one_line_for_all_its_requests_and_goes_with_the_last() -> None:
    world = SmallWorld()
    world.rows.mix_pages = 1
    parts = (AdapterPart("a"), AdapterPart("b", 0.5))
    first, second = world.add([1] * 3, parts), world.add([1] * 3, parts[::-1])
    world.step_until_running(second)
    assert first.slot == second.slot
    alone = world.add([1] * 3, "a")
    world.step_until_running(alone)
    assert alone.slot not in (None, first.slot)
    assert world.residency.num_pages == 3
    for sequence in (first, second, alone):
        world.scheduler.finish(sequence)
        world.check()
    assert world.residency.num_pages == 2, "the parts stay, the mix's own page does not"


def test_no_part_of_a_mix_in_use_gives_way() -> None:
    world = SmallWorld(num_pages=10)
    parts = (AdapterPart("a"), AdapterPart("b"))
    mixed = world.add([1] * 3, parts)
    world.step_until_running(mixed)
    for number in range(5):
        world.serve(f"other-{number}")
    assert world.residency.tier_of("a") == world.residency.tier_of("b") == "device"
    world.scheduler.finish(mixed)
    for number in range(5, 15):
        world.serve(f"other-{number}")
    assert "device" not in (world.residency.tier_of("a"), world.residency.tier_of("b"))


def test_a_mix_waits_for_its_slowest_part_and_is_counted_where_that_was() -> None:
    world = SmallWorld()
    world.serve("a")
    mixed = world.add([1] * 3, (AdapterPart("a"), AdapterPart("b")))
    assert mixed.tier == "disk"
    world.step_until_running(mixed)


def test_mixes_that_do_not_fit_side_by_side_are_served_one_after_the_other() -> None:
    world = SmallWorld(num_pages=8)
    world.loader.sizes = dict.fromkeys("abcd", 3)
    world.loader.holds_reads = True
    mixes = [world.add([1] * 3, (AdapterPart(one), AdapterPart(other))) for one, other in ("ab", "cd")]
    for first_halves in ("a", "c", "b", "d"):
        world.step()
        world.step()
        world.loader.finish_read(first_halves)
    world.loader.holds_reads = False
    for mixed in mixes:
        world.step_until_running(mixed)
        world.scheduler.finish(mixed)
    assert world.residency.num_loads <= 6


def test_keys_of_mixes() -> None:
    a, b = AdapterPart("a"), AdapterPart("b", 0.5)
    assert adapter_key(()) == ""
    assert adapter_key((a,)) == "a"
    assert adapter_key((a, b)) == adapter_key((b, a))
    others = [(AdapterPart("b"),), (a, AdapterPart("b", 0.25)), (AdapterPart("a", 0.5), b), (b, b)]
    assert len({adapter_key(parts) for parts in [(a, b), (a,), (b,), *others]}) == 7


# Whatever happens


@pytest.mark.parametrize("policy", ["lru", "gdsf", "cost"])
@pytest.mark.parametrize("seed", range(3))
def test_the_books_balance_through_any_churn(policy: str, seed: int) -> None:
    source = random.Random(seed)
    world = SmallWorld(num_pages=14, host_pages=8, tenant_page_limit=10, policy=policy)
    names = [f"a{number}" for number in range(12)]
    world.loader.sizes = {name: source.choice((1, 1, 2, 3)) for name in names}
    world.rows.mix_pages = 1
    world.loader.holds_reads = world.loader.holds_copies = True
    num_ended = num_added = 0
    for _ in range(1500):
        match source.randrange(10):
            case 0 | 1 | 2 if world.scheduler.num_waiting < 12:
                parts = tuple(
                    AdapterPart(name, source.choice((1.0, 0.5)))
                    for name in source.sample(names, source.choice((0, 1, 1, 1, 2)))
                )
                tenant = source.choice(("one", "two"))
                world.add([source.randrange(50)] * source.randrange(1, 12), parts, tenant=tenant)
                num_added += 1
            case 3 if world.loader.reading:
                name = source.choice(sorted(world.loader.reading))
                world.loader.broken = {name: AdapterError("lost")} if source.random() < 0.1 else {}
                world.loader.finish_read(name)
            case 4 | 5 if world.loader.copying:
                world.loader.finish_copy(source.choice(sorted(world.loader.copying)))
            case 6 if sequences := list(world.scheduler.sequences()):
                world.scheduler.finish(source.choice(sequences))
                num_ended += 1
            case 7 if source.random() < 0.1:
                world.residency.pin({name: source.choice(("one", "two")) for name in source.sample(names, 2)})
            case 8 if source.random() < 0.2:
                world.residency.forget(source.choice(names))
            case _:
                num_ended += len(world.step().failed)
        world.check()
    world.loader.holds_reads = world.loader.holds_copies = False
    for name in list(world.loader.reading):
        world.loader.finish_read(name)
    for name in list(world.loader.copying):
        world.loader.finish_copy(name)
    world.residency.pin({})
    for _ in range(600):
        num_ended += len(world.step().failed)
        for sequence in [each for each in world.scheduler.running if each.num_generated > 2]:
            world.scheduler.finish(sequence)
            num_ended += 1
    assert num_ended == num_added, "every request ends"
    assert world.pool.num_free + world.pool.num_idle == world.pool.num_pages, "nothing is held"
    assert world.host.num_held_bytes == 0


# Shares


def test_a_pin_counts_in_its_owners_share() -> None:
    world = SmallWorld(num_pages=12, tenant_page_limit=4)
    world.loader.sizes = {"kept": 3, "wide": 2}
    world.residency.pin({"kept": "one"})
    for _ in range(4):
        world.step()
    world.add([1] * 3, "wide", tenant="one")
    failures = [failure for _ in range(5) for failure in world.step().failed]
    assert len(failures) == 1, "it would be over the share, and nothing that runs will change that"
    world.step_until_running(world.add([1] * 3, "wide", tenant="two"))
    world.residency.pin({"kept": "two"})
    world.check()
    world.step_until_running(world.add([1] * 3, "other", tenant="one"))


def test_what_others_use_counts_in_their_share_and_no_more_in_that_of_whoever_had_it_loaded() -> None:
    world = SmallWorld(num_pages=20, tenant_page_limit=4)
    world.loader.sizes = {"shared": 4, "own": 4}
    first, second = (world.add([1] * 3, "shared", tenant=tenant) for tenant in ("one", "two"))
    for sequence in (first, second):
        world.step_until_running(sequence)
    world.scheduler.finish(first)
    world.check()
    world.step_until_running(world.add([1] * 3, "own", tenant="one"))


def test_an_idle_adapter_counts_in_the_share_of_whoever_uses_it_next() -> None:
    world = SmallWorld(num_pages=20, tenant_page_limit=4)
    world.loader.sizes = {"shared": 4, "own": 4}
    world.serve("shared", tenant="one")
    user = world.add([1] * 3, "shared", tenant="two")
    world.step_until_running(user)
    world.check()
    world.step_until_running(world.add([1] * 3, "own", tenant="one"))
    waiting = world.add([1] * 3, "third", tenant="two")
    for _ in range(5):
        assert world.step().failed == []
    assert waiting not in world.scheduler.running, "its share is taken by what it uses"
    world.scheduler.finish(user)
    world.step_until_running(waiting)
