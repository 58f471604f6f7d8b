"""Keys and values by page: what each sequence holds, and prefixes kept for whoever asks next. No torch.

A full page of prompt or answer is entered under a key that chains its tokens to everything before them, to the
adapter's content and to the tenant's salt, so that equal keys mean equal keys and values.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict
from hashlib import sha256

from heddle_adapters.page_pool import PagePool
from heddle_server.engine.sequence import Sequence
from heddle_server.request import Request


class KvCache:
    """Allocates, shares and frees KV pages. Called from the engine's thread only."""

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self._page_tokens = page_tokens
        self._page_of_key: dict[bytes, int] = {}  # the cache holds one reference to each of these pages
        self._key_of_page: dict[int, bytes] = {}
        self._idle: OrderedDict[int, float] = OrderedDict()  # cached pages no sequence uses, oldest first
        self.num_queries = 0  # prompt tokens looked up
        self.num_hits = 0  # of those, found
        pool.add_reclaimer(self)

    @property
    def num_idle_pages(self) -> int:
        return len(self._idle)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self._page_tokens)

    def attach_prefix(self, sequence: Sequence) -> None:
        """Give a sequence without pages the longest cached prefix, leaving at least one token to compute."""
        assert not sequence.pages, "the sequence already holds pages"
        self._extend_keys(sequence, sequence.num_tokens)
        usable = (sequence.num_tokens - 1) // self._page_tokens
        for key in sequence.page_keys[:usable]:
            if (page := self._page_of_key.get(key)) is None:
                break
            self._pool.share(page)
            self._idle.pop(page, None)
            sequence.pages.append(page)
        sequence.num_entered = len(sequence.pages)
        sequence.num_computed = len(sequence.pages) * self._page_tokens

    def count_lookup(self, sequence: Sequence) -> None:
        """Note what the prefix cache has saved a sequence that is admitted for the first time."""
        sequence.num_cached = sequence.num_computed
        self.num_queries += sequence.num_prompt_tokens
        self.num_hits += sequence.num_cached

    def reserve(self, sequence: Sequence, num_tokens: int) -> None:
        """Pages for the first `num_tokens` tokens. Raises OutOfSpace, taking none."""
        missing = self.pages_for(num_tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._pool.allocate(missing)

    def remember(self, sequence: Sequence) -> None:
        """Enter the pages that the last step has filled into the cache."""
        num_full = sequence.num_computed // self._page_tokens
        self._extend_keys(sequence, num_full * self._page_tokens)
        filled = range(sequence.num_entered, num_full)
        sequence.num_entered = num_full
        for page, key in ((sequence.pages[number], sequence.page_keys[number]) for number in filled):
            if key not in self._page_of_key and page not in self._key_of_page:
                self._pool.share(page)
                self._page_of_key[key] = page
                self._key_of_page[page] = key

    def release(self, sequence: Sequence) -> None:
        """Let go of every page; cached ones stay, the end of a chain being the first to be reclaimed."""
        now = time.monotonic()
        for page in reversed(sequence.pages):
            self._pool.free(page)
            if page in self._key_of_page and self._pool.references(page) == 1:
                self._idle[page] = now
        sequence.pages = []
        sequence.num_computed = sequence.num_entered = 0

    def oldest_idle(self) -> float | None:
        return next(iter(self._idle.values()), None)

    def reclaim_oldest(self) -> None:
        page, _ = self._idle.popitem(last=False)
        del self._page_of_key[self._key_of_page.pop(page)]
        self._pool.free(page)

    def check_integrity(self, sequences: list[Sequence]) -> None:
        """Every page's references are the sequences that hold it and, if it is cached, the cache."""
        holders = [page for sequence in sequences for page in sequence.pages]
        for page in {*holders, *self._key_of_page}:
            expected = holders.count(page) + (page in self._key_of_page)
            assert self._pool.references(page) == expected, f"page {page} has not its {expected} references"
        in_use = set(holders)
        assert set(self._idle) == {page for page in self._key_of_page if page not in in_use}, "idle pages miscounted"
        assert {page: key for key, page in self._page_of_key.items()} == self._key_of_page, "cache index torn"

    def _extend_keys(self, sequence: Sequence, num_tokens: int) -> None:
        """Compute the keys of the leading full pages among the first `num_tokens` tokens."""
        keys = sequence.page_keys
        for begin in range(len(keys) * self._page_tokens, num_tokens - self._page_tokens + 1, self._page_tokens):
            parent = keys[-1] if keys else root_key(sequence.request)
            keys.append(page_key(parent, sequence.token_ids[begin : begin + self._page_tokens]))


def root_key(request: Request) -> bytes:
    """The key that every prefix of this adapter and tenant starts from."""
    adapter = (request.adapter_digest or "").encode()
    return sha256(_fields(b"heddle-kv-root-1", adapter, request.cache_salt)).digest()


def page_key(parent: bytes, token_ids: list[int]) -> bytes:
    """sha256 over typed, length-prefixed fields, so that no two different inputs run together."""
    return sha256(_fields(b"heddle-kv-page-1", parent, array("q", token_ids).tobytes())).digest()


def _fields(*fields: bytes) -> bytes:
    return b"".join(len(field).to_bytes(8, "little") + field for field in fields)
