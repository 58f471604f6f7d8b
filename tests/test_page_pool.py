"""Pages: allocation, sharing, runs, reclaiming, and that the books always balance."""

from __future__ import annotations

import random

import pytest

from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace, RunAllocator


class IdlePages:
    """Keeps pages that nobody uses until the pool asks for them."""

    def __init__(self, pool: PagePool, times: list[float]) -> None:
        self.pool = pool
        self.kept = [(time, pool.allocate(1)[0]) for time in times]
        pool.add_reclaimer(self)

    @property
    def num_idle_pages(self) -> int:
        return len(self.kept)

    def oldest_idle(self) -> float | None:
        return min(self.kept)[0] if self.kept else None

    def reclaim_oldest(self) -> None:
        self.kept.sort()
        self.pool.free(self.kept.pop(0)[1])


def test_allocate_share_free() -> None:
    pool = PagePool(4, page_bytes=16)
    first, second = pool.allocate(2)
    pool.share(first)
    assert not pool.free(first)
    assert pool.free(first)
    assert pool.free(second)
    pool.check_integrity()
    assert pool.num_free == 4


def test_a_failed_allocation_takes_nothing() -> None:
    pool = PagePool(4, page_bytes=16)
    pool.allocate(3)
    with pytest.raises(OutOfSpace):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.check_integrity()


def test_runs_are_adjacent_even_when_the_pool_is_scattered() -> None:
    pool = PagePool(9, page_bytes=16)
    pages = pool.allocate(9)
    for page in pages[::2]:
        pool.free(page)
    with pytest.raises(OutOfSpace):
        pool.allocate_run(2)
    pool.free(pages[1])
    first = pool.allocate_run(3)
    assert first == 0
    pool.check_integrity()


def test_the_oldest_idle_thing_of_any_kind_gives_way_first() -> None:
    pool = PagePool(4, page_bytes=16)
    older, newer = IdlePages(pool, [1.0, 4.0]), IdlePages(pool, [2.0, 3.0])
    pool.allocate(2)
    assert [time for time, _ in older.kept] == [4.0]
    assert [time for time, _ in newer.kept] == [3.0]
    with pytest.raises(OutOfSpace):
        pool.allocate(3)
    assert len(older.kept) == len(newer.kept) == 1, "nothing is given up for what cannot be had anyway"
    pool.allocate(2)
    with pytest.raises(OutOfSpace):
        pool.allocate(1)
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
