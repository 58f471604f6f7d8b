"""Pages: allocation, sharing, runs, what idle things give back, and that the books always balance."""

from __future__ import annotations

import random
from functools import partial

import pytest

from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace, RunAllocator

PAGE_BYTES = 16


def make_pool(num_pages: int) -> PagePool:
    return PagePool(num_pages, PAGE_BYTES, EvictionOrder("lru"))


class IdleThings:
    """Keeps pages that nobody uses until the pool asks for them."""

    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.pages: dict[str, list[int]] = {}

    def keep(self, key: str, pages: list[int]) -> None:
        self.pages[key] = pages
        size_bytes = len(pages) * PAGE_BYTES
        self.pool.eviction.touch(key)
        self.pool.eviction.offer(key, size_bytes, size_bytes, partial(self.give_back, key))

    def give_back(self, key: str) -> None:
        for page in self.pages.pop(key):
            self.pool.free(page)


def test_allocate_share_free() -> None:
    pool = make_pool(4)
    first, second = pool.allocate(2)
    pool.share(first)
    assert not pool.free(first)
    assert pool.free(first)
    assert pool.free(second)
    pool.check_integrity()
    assert pool.num_free == 4


def test_a_failed_allocation_takes_nothing() -> None:
    pool = make_pool(4)
    pool.allocate(3)
    with pytest.raises(OutOfSpace):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_runs_are_adjacent_even_when_the_pool_is_scattered() -> None:
    pool = make_pool(9)
    pages = pool.allocate(9)
    for page in pages[::2]:
        pool.free(page)
    with pytest.raises(OutOfSpace):
        pool.allocate_run(2)
    pool.free(pages[1])
    first = pool.allocate_run(3)
    assert first == 0
    pool.check_integrity()


def test_idle_things_give_way_in_order_and_only_as_many_as_needed() -> None:
    pool = make_pool(8)
    idle = IdleThings(pool)
    for key, num_pages in (("oldest", 3), ("middle", 1), ("newest", 2)):
        idle.keep(key, pool.allocate(num_pages))
    assert (pool.num_free, pool.num_idle) == (2, 6)
    pool.allocate(2)
    assert len(idle.pages) == 3, "free pages come first"
    pool.allocate(4)
    assert list(idle.pages) == ["newest"]
    assert (pool.num_free, pool.num_idle) == (0, 2)
    pool.check_integrity()


@pytest.mark.parametrize("adjacent", [False, True])
def test_what_cannot_be_had_costs_nothing_idle(adjacent: bool) -> None:
    pool = make_pool(8)
    idle = IdleThings(pool)
    pool.allocate(3)
    for page in pool.allocate(4):
        idle.keep(str(page), [page])
    with pytest.raises(OutOfSpace, match="6 pages are wanted; 5 of 8 are free or idle"):
        pool.allocate_run(6) if adjacent else pool.allocate(6)
    assert len(idle.pages) == 4
    pool.check_integrity()


def test_a_long_run_takes_as_many_idle_things_as_lie_in_its_way() -> None:
    pool = make_pool(8)
    idle = IdleThings(pool)
    pages = pool.allocate(8)
    for page in (6, 0, 2, 1, 4):
        idle.keep(str(page), [pages[page]])
    assert pool.allocate_run(3) == 0
    assert list(idle.pages) == ["4"], "the oldest went until three lay side by side"
    pool.check_integrity()


def test_a_run_that_no_gap_can_hold_fails_with_the_books_balanced() -> None:
    pool = make_pool(6)
    idle = IdleThings(pool)
    pages = pool.allocate(6)
    for page in pages[::2]:
        idle.keep(str(page), [page])
    with pytest.raises(OutOfSpace, match="nothing idle is left"):
        pool.allocate_run(2)
    assert (pool.num_free, pool.num_idle) == (3, 0)
    pool.check_integrity()


def test_run_allocator_against_a_plain_set() -> None:
    rng = random.Random(5)
    allocator, taken = RunAllocator(64), dict[int, int]()
    for _ in range(3000):
        if taken and rng.random() < 0.5:
            first = rng.choice(sorted(taken))
            allocator.free(first, taken.pop(first))
        else:
            length = rng.randint(1, 9)
            used = {unit for first, size in taken.items() for unit in range(first, first + size)}
            try:
                first = allocator.allocate(length)
            except OutOfSpace:
                free_runs = "".join(" " if unit in used else "x" for unit in range(64)).split()
                assert max(map(len, free_runs), default=0) < length
            else:
                assert not used & set(range(first, first + length))
                taken[first] = length
        assert allocator.num_free == 64 - sum(taken.values())
