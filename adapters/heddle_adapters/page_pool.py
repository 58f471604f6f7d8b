"""One pool of pages for keys, values and adapter rows alike: who holds which page, without torch.

A page is held by counted references. What is held by nobody but could still be useful (a cached prefix, an idle
adapter) belongs to a reclaimer, which gives pages back when the pool is short.
"""

from __future__ import annotations

from typing import Protocol

from heddle_adapters.run_allocator import OutOfSpace, RunAllocator


class Reclaimable(Protocol):
    """Something that keeps idle pages and can give them back."""

    @property
    def num_idle_pages(self) -> int:
        """Pages it would give back if asked for everything."""

    def oldest_idle(self) -> float | None:
        """When its least recently used idle thing was last used; None if it has nothing idle."""

    def reclaim_oldest(self) -> None:
        """Free the pages of that thing."""


class PagePool:
    """Counts the references to every page. All methods are called from the engine's thread only."""

    def __init__(self, num_pages: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._allocator = RunAllocator(num_pages)
        self._references = [0] * num_pages
        self._reclaimers: list[Reclaimable] = []

    @property
    def num_pages(self) -> int:
        return self._allocator.capacity

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    def add_reclaimer(self, reclaimer: Reclaimable) -> None:
        self._reclaimers.append(reclaimer)

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` pages with one reference each, anywhere in the pool.

        Raises OutOfSpace, and takes and reclaims nothing, when everything idle would not be enough.
        """
        self.check_room(num_pages)
        while self.num_free < num_pages:
            self._reclaim()
        pages = [self._allocator.allocate() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        return pages

    def allocate_run(self, length: int) -> int:
        """First of `length` adjacent pages with one reference each. Raises OutOfSpace."""
        self.check_room(length)
        while True:
            try:
                first = self._allocator.allocate(length)
            except OutOfSpace:
                self._reclaim()
            else:
                self._references[first : first + length] = [1] * length
                return first

    def check_room(self, num_pages: int) -> None:
        """Raises OutOfSpace when so many pages cannot be had, so that nothing idle is given up in vain."""
        num_available = self.num_free + sum(reclaimer.num_idle_pages for reclaimer in self._reclaimers)
        if num_available < num_pages:
            raise OutOfSpace(f"{num_pages} pages are wanted; {num_available} of {self.num_pages} are free or idle")

    def share(self, page: int) -> None:
        """One more reference to a held page."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] += 1

    def free(self, page: int) -> bool:
        """One reference less; True when it was the last and the page is free again."""
        assert self._references[page] > 0, f"page {page} is free"
        self._references[page] -= 1
        if self._references[page] == 0:
            self._allocator.free(page)
            return True
        return False

    def references(self, page: int) -> int:
        return self._references[page]

    def check_integrity(self) -> None:
        """Every page is either free or referenced, and the count of free pages is right."""
        free = [self._allocator.is_free(page) for page in range(self.num_pages)]
        for page, (is_free, references) in enumerate(zip(free, self._references, strict=True)):
            assert is_free == (references == 0), f"page {page}: free={is_free} with {references} references"
        assert sum(free) == self.num_free, f"{sum(free)} pages are free, the pool counts {self.num_free}"

    def _reclaim(self) -> None:
        """Free the least recently used idle thing of any kind, or raise OutOfSpace."""
        idle = [(used, number) for number, r in enumerate(self._reclaimers) if (used := r.oldest_idle()) is not None]
        if not idle:
            raise OutOfSpace(f"{self.num_free} of {self.num_pages} pages are free and nothing idle is left to reclaim")
        self._reclaimers[min(idle)[1]].reclaim_oldest()
