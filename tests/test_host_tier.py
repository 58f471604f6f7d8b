"""Adapters in host memory: the budget, what is held, what is told, and threads that put while another looks up."""

from __future__ import annotations

import random
import threading

import pytest

from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.host_tier import HostTier
from small_world import PAGE_BYTES, packed_adapter


def make_tier(num_pages: int) -> HostTier:
    return HostTier(num_pages * PAGE_BYTES, EvictionOrder("lru"))


def test_the_least_valuable_give_way_to_what_is_put() -> None:
    tier = make_tier(6)
    for digest, num_pages in (("a", 2), ("b", 2), ("c", 2)):
        tier.touch(digest)
        tier.put(packed_adapter(digest, num_pages))
    tier.touch("a")
    tier.put(packed_adapter("d", 3))
    assert tier.digests() == {"a", "d"}
    assert tier.num_bytes == 5 * PAGE_BYTES
    assert tier.num_evictions == 2
    assert tier.evicted() == ["b", "c"]
    assert tier.evicted() == [], "told once"
    tier.check_integrity()


def test_two_readers_of_one_adapter_leave_one_copy() -> None:
    tier = make_tier(6)
    first, second = packed_adapter("a", 2), packed_adapter("a", 2)
    assert tier.put(first) is first
    assert tier.put(second) is first
    assert tier.get("a") is first
    assert tier.num_bytes == 2 * PAGE_BYTES


def test_what_is_held_stays_until_as_often_released() -> None:
    tier = make_tier(4)
    tier.put(packed_adapter("a", 4))
    tier.hold("a")
    tier.hold("a")
    tier.release("a")
    tier.hold("b")
    tier.put(packed_adapter("b", 2))
    assert tier.digests() == {"a", "b"}, "both are held, over the budget"
    assert tier.num_held_bytes == 6 * PAGE_BYTES
    tier.release("a")
    assert tier.digests() == {"b"}, "no room for it beside what is held"
    tier.release("b")
    assert tier.digests() == {"b"}
    assert tier.num_held_bytes == 0
    assert tier.evicted() == ["a"]
    tier.check_integrity()


def test_a_hold_may_come_before_what_it_holds() -> None:
    tier = make_tier(2)
    tier.hold("a")
    tier.put(packed_adapter("a", 2))
    tier.put(packed_adapter("b", 2))
    assert "a" in tier.digests()
    tier.release("a")
    assert tier.digests() == {"a"}, "b gave way to what was used last"
    tier.check_integrity()


@pytest.mark.parametrize("budget_pages", [0, 3])
def test_what_is_larger_than_the_budget_is_here_while_held_and_costs_nobody_his_place(budget_pages: int) -> None:
    tier = make_tier(budget_pages)
    if budget_pages:
        tier.put(packed_adapter("small", 2))
    tier.hold("large")
    large = tier.put(packed_adapter("large", 5))
    assert tier.get("large") is large
    tier.release("large")
    assert tier.get("large") is None
    assert tier.evicted() == ["large"]
    assert tier.digests() == ({"small"} if budget_pages else set())
    tier.check_integrity()


def test_what_nobody_holds_and_does_not_fit_is_not_kept() -> None:
    tier = make_tier(2)
    tier.hold("held")
    tier.put(packed_adapter("held", 1))
    packed = packed_adapter("a", 2)
    assert tier.put(packed) is packed
    assert tier.digests() == {"held"}
    assert tier.num_evictions == 0, "it never came"
    tier.check_integrity()


def test_dropped_content_is_gone_and_whoever_holds_it_may_still_let_go() -> None:
    tier = make_tier(4)
    tier.put(packed_adapter("a", 2))
    tier.put(packed_adapter("b", 2))
    tier.hold("a")
    for digest in ("a", "b", "never here"):
        tier.drop(digest)
    assert tier.num_bytes == tier.num_adapters == 0
    assert tier.evicted() == [], "its going was wanted"
    tier.release("a")
    tier.check_integrity()
    with pytest.raises(AssertionError, match="more often than held"):
        tier.release("a")


def test_readers_put_while_the_engine_holds_and_lets_go() -> None:
    tier = make_tier(20)
    failures: list[BaseException] = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(500):
                tier.put(packed_adapter(f"adapter {rng.randrange(30)}", rng.randint(1, 4)))
        except BaseException as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for reader in readers:
        reader.start()
    rng = random.Random(9)
    while any(reader.is_alive() for reader in readers):
        digest = f"adapter {rng.randrange(30)}"
        tier.hold(digest)
        packed = tier.get(digest)
        if packed is not None:
            assert tier.get(digest) is packed, "given up while it was held"
        tier.release(digest)
        tier.check_integrity()
    assert not failures
    assert tier.num_bytes <= tier.budget_bytes
