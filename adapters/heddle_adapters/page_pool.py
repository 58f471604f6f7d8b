"""One pool of pages for keys, values and adapter rows alike: who holds which page, without torch.

A page is held by counted references. What is held by nobody but could still be useful (a cached prefix, an idle
adapter) is offered to the pool's eviction order, which gives up the least valuable when the pool is short.
"""

from __future__ import annotations

from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.run_allocator import OutOfSpace, RunAllocator


class PagePool:
    """Counts the references to every page. All methods are called from the engine's thread only."""

    def __init__(self, num_pages: int, page_bytes: int, eviction: EvictionOrder) -> None:
        """`eviction` orders what is idle in this pool, and nothing else: each thing by the bytes of its pages."""
        self.page_bytes = page_bytes
        self.eviction = eviction
        self._allocator = RunAllocator(num_pages)
        self._references = [0] * num_pages

    @property
    def num_pages(self) -> int:
        return self._allocator.capacity

    @property
    def num_free(self) -> int:
        return self._allocator.num_free

    @property
    def num_idle(self) -> int:
        """Pages that would come free if everything idle were given up."""
        return self.eviction.num_bytes // self.page_bytes

    def allocate(self, num_pages: int) -> list[int]:
        """`num_pages` pages with one reference each, anywhere in the pool.

        Raises OutOfSpace, and takes and gives up nothing, when everything idle would not be enough.
        """
        self.check_room(num_pages)
        while self.num_free < num_pages:
            self._give_up_one()
        pages = [self._allocator.allocate() for _ in range(num_pages)]
        for page in pages:
            self._references[page] = 1
        return pages

    def allocate_run(self, length: int) -> int:
        """First of `length` adjacent pages with one reference each.

        Raises OutOfSpace; having given up everything idle, if there would have been room but not in one piece.
        """
        self.check_room(length)
        while True:
            try:
                first = self._allocator.allocate(length)
            except OutOfSpace:
                self._give_up_one()
            else:
                self._references[first : first + length] = [1] * length
                return first

    def check_room(self, num_pages: int) -> None:
        """Raises OutOfSpace when so many pages cannot be had, so that nothing idle is given up in vain."""
        num_available = self.num_free + self.num_idle
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
        """Every page is either free or referenced, the count of free pages is right, and nothing idle is free."""
        free = [self._allocator.is_free(page) for page in range(self.num_pages)]
        for page, (is_free, references) in enumerate(zip(free, self._references, strict=True)):
            assert is_free == (references == 0), f"page {page}: free={is_free} with {references} references"
        assert sum(free) == self.num_free, f"{sum(free)} pages are free, the pool counts {self.num_free}"
        assert self.num_free + self.num_idle <= self.num_pages, f"{self.num_idle} pages cannot be idle"

    def _give_up_one(self) -> None:
        """Free the pages of the least valuable idle thing, or raise OutOfSpace."""
        if not self.eviction:
            raise OutOfSpace(f"{self.num_free} of {self.num_pages} pages are free and nothing idle is left to give up")
        self.eviction.pop().give_back()
