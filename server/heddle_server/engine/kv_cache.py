"""Keys and values by page: what each sequence holds, and prefixes kept for whoever asks next. No torch.

A full page of prompt or answer is entered under a key that chains its tokens to everything before them, to the tenant's
salt, and to which of them the adapter changes and what its content is: so equal keys mean equal keys and values, and
what an adapter has not changed yet is shared with the base.

An adapter may bring keys and values of its own for the first tokens. Its full pages are the sequences' first ones; the
last, if it is not full, is copied to a page of the sequence's own (`step_inputs.page_copies`).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from functools import partial
from hashlib import sha256
from itertools import chain

from heddle_adapters.mix import BASE_KEY
from heddle_adapters.page_pool import PagePool
from heddle_server.engine.sequence import Sequence, empty_pages

# What computing a page again costs, beside copying as many bytes from host memory. Of an 8B model on an H200, 16 tokens
# are 2 * 16 * 8e9 operations, 0.5 ms at 5e14 a second, and their 2 MiB of keys and values are 0.05 ms over PCIe: ten
# times. A smaller model is nearer to 8 and a CPU far above, but a missing adapter also makes its request wait, so the
# lower end is taken. An estimate: nothing of it was measured.
RECOMPUTE_COST = 8


class KvCache:
    """Allocates, shares and frees KV pages. Called from the engine's thread only."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._page_of_key: dict[bytes, int] = {}  # the cache holds one reference to each of these pages
        self._key_of_page: dict[int, bytes] = {}
        self.num_queries = 0  # prompt tokens looked up
        self.num_hits = 0  # of those, found
        self.num_evictions = 0  # cached pages given up
        self.num_idle_pages = 0  # cached pages that no sequence uses

    def __contains__(self, key: bytes) -> bool:
        """Whether a page is cached under this key."""
        return key in self._page_of_key

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def check_room(self, sequence: Sequence, max_tokens: int) -> None:
        """Raises OutOfSpace when a sequence without pages could not have those of its next `max_tokens` tokens.

        A look that changes nothing: requests are tried in every step until there is room, which is no use of a prefix.
        """
        num_lent = self._num_lent(sequence)
        cached = self._cached_pages(sequence)
        num_idle = sum(self._pool.references(page) == 1 for page in cached)
        num_held = num_lent + len(cached)
        num_tokens = min(sequence.num_tokens, self._num_computed(sequence, num_held) + max_tokens)
        self._pool.check_room(self.pages_for(num_tokens) - num_held + num_idle)

    def attach_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without pages its adapter's full ones and the longest cached beginning after them, leaving at
        least one token to compute."""
        assert not sequence.pages, "the sequence already holds pages"
        for page in sequence.prefix_pages[: self._num_lent(sequence)]:
            self._pool.share(page)
            sequence.pages.append(page)
        for page in self._cached_pages(sequence):
            if self._pool.references(page) == 1:
                self._pool.eviction.withdraw(self._key_of_page[page])
                self.num_idle_pages -= 1
            self._pool.share(page)
            sequence.pages.append(page)
        sequence.num_entered = len(sequence.pages)
        sequence.num_computed = self._num_computed(sequence, len(sequence.pages))

    def count_lookup(self, sequence: Sequence) -> None:
        """Note what the prefix cache has saved a sequence that is admitted for the first time."""
        num_virtual = sequence.request.num_virtual_tokens
        sequence.num_cached = max(0, sequence.num_computed - num_virtual)
        self.num_queries += sequence.num_prompt_tokens - num_virtual
        self.num_hits += sequence.num_cached

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for the first `num_tokens` tokens. Raises OutOfSpace, taking none."""
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages.extend(self._pool.allocate(missing))

    def remember(self, sequence: Sequence) -> None:
        """Enter the pages that the last step has filled into the cache."""
        num_full = sequence.num_computed // self._page_tokens
        if num_full == sequence.num_entered:
            return
        self._extend_keys(sequence, num_full * self._page_tokens)
        filled = range(sequence.num_entered, num_full)
        sequence.num_entered = num_full
        for page, key in ((sequence.pages[number], sequence.page_keys[number]) for number in filled):
            if key not in self._page_of_key and page not in self._key_of_page:
                self._pool.share(page)
                self._page_of_key[key] = page
                self._key_of_page[page] = key

    def release(self, sequence: Sequence) -> None:
        """Let go of every page; cached ones stay, the end of a chain being the first to be given up.

        Pages count as used when they are let go of, the beginning of the chain last, so that none ever outlives one
        before it.
        """
        for number, page in reversed(list(enumerate(sequence.pages))):
            self._pool.free(page)
            is_entered = self._num_lent(sequence) <= number < sequence.num_entered
            if is_entered and (key := sequence.page_keys[number]) in self._page_of_key:
                self._pool.eviction.touch(key)  # even if another sequence's page was entered under it
            if page in self._key_of_page and self._pool.references(page) == 1:
                self._offer(page, self._key_of_page[page])
        sequence.pages = empty_pages()
        sequence.num_computed = sequence.num_entered = 0

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Every page's references are the sequences that hold it and, if it is cached or an adapter's, that one too."""
        holders = [page for sequence in sequences for page in sequence.pages]
        lent = {page for sequence in sequences for page in sequence.pages[: self._num_lent(sequence)]}
        assert lent.isdisjoint(self._key_of_page), "an adapter's own page is cached"
        for page in {*holders, *self._key_of_page}:
            expected = holders.count(page) + (page in self._key_of_page or page in lent)
            assert self._pool.references(page) == expected, f"page {page} has not its {expected} references"
        in_use = set(holders)
        idle = {page for page in self._key_of_page if page not in in_use}
        assert len(idle) == self.num_idle_pages, f"{len(idle)} pages are idle, {self.num_idle_pages} are counted"
        for page, key in self._key_of_page.items():
            assert (key in self._pool.eviction) == (page in idle), f"page {page} is in use and could be given up"
        assert {page: key for key, page in self._page_of_key.items()} == self._key_of_page, "cache index torn"

    def _num_lent(self, sequence: Sequence) -> int:
        """How many of its first pages are its adapter's."""
        return sequence.num_prefix_tokens // self._page_tokens

    def _num_computed(self, sequence: Sequence, num_pages: int) -> int:
        """How many of its tokens need not be computed where it is given this many pages at its start."""
        return max(num_pages * self._page_tokens, sequence.num_prefix_tokens)

    def _cached_pages(self, sequence: Sequence) -> list[int]:
        """Pages of the longest cached beginning, those of its adapter left out, that leaves at least one token to
        compute; none where all are wanted."""
        if sequence.num_unscored:
            return []
        self._extend_keys(sequence, len(sequence.token_ids))
        usable = (sequence.num_tokens - 1) // self._page_tokens
        pages: list[int] = []
        for key in sequence.page_keys[self._num_lent(sequence) : usable]:
            if (page := self._page_of_key.get(key)) is None:
                break
            pages.append(page)
        return pages

    def _offer(self, page: int, key: bytes) -> None:
        page_bytes = self._pool.page_bytes
        self._pool.eviction.offer(key, page_bytes, RECOMPUTE_COST * page_bytes, partial(self._give_back, page, key))
        self.num_idle_pages += 1

    def _give_back(self, page: int, key: bytes) -> None:
        del self._page_of_key[key], self._key_of_page[page]
        self._pool.free(page)
        self._pool.eviction.forget(key)
        self.num_idle_pages -= 1
        self.num_evictions += 1

    def _extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the keys of the leading full pages among the first `num_tokens` tokens."""
        keys = sequence.page_keys
        begins = range(len(keys) * self._page_tokens, num_tokens - self._page_tokens + 1, self._page_tokens)
        adapter = sequence.request.adapter_key if begins else BASE_KEY
        for begin in begins:
            end = begin + self._page_tokens
            parent = keys[-1] if keys else root_key(sequence.request.cache_salt)
            changed = [(first - begin, last - begin) for first, last in sequence.changed_between(begin, end)]
            keys.append(page_key(parent, sequence.token_ids[begin:end], adapter if changed else BASE_KEY, changed))


def root_key(salt: bytes) -> bytes:
    """The key that every prefix of this tenant starts from."""
    return sha256(_fields(b"heddle-kv-root-2", salt)).digest()


def page_key(
    parent: bytes, token_ids: list[int], adapter: str = BASE_KEY, changed: Iterable[tuple[int, int]] = ()
) -> bytes:
    """sha256 over typed, length-prefixed fields, so that no two different inputs run together.

    `adapter` is who changes any of these tokens, `changed` which of them, (begin, end) counted in the page.
    """
    spans = array("q", chain.from_iterable(changed)).tobytes()
    fields = (b"heddle-kv-page-2", parent, array("q", token_ids).tobytes(), adapter.encode(), spans)
    return sha256(_fields(*fields)).digest()


def _fields(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)
