"""Cached prefixes: what their keys tell apart, who shares them, and which give way first."""

from __future__ import annotations

import random

import pytest

from heddle_adapters.eviction import POLICIES, EvictionOrder
from heddle_adapters.mix import AdapterPart
from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace
from heddle_server.engine.kv_cache import KvCache, page_key
from heddle_server.engine.sequence import Sequence
from heddle_server.request import Request, SamplingParams

PAGE_TOKENS = 4


def request(prompt: list[int], adapters: tuple[AdapterPart, ...] = (), salt: bytes = b"") -> Request:
    return Request(
        request_id=1,
        prompt_token_ids=prompt,
        sampling=SamplingParams(max_tokens=1),
        adapters=adapters,
        cache_salt=salt,
    )


def first_key(adapters: tuple[AdapterPart, ...], salt: bytes = b"") -> bytes:
    """Of a request's first page."""
    sequence = Sequence.of(request(list(range(PAGE_TOKENS)), adapters, salt))
    sequence.bind(None)
    Cache(1).kv_cache.check_room(sequence, 1)
    return sequence.page_keys[0]


class Cache:
    """A KV cache over a pool of its own, and requests that are computed in one go."""

    def __init__(self, num_pages: int, policy: str = "lru") -> None:
        self.pool = PagePool(num_pages, 16, EvictionOrder(policy))
        self.kv_cache = KvCache(self.pool, PAGE_TOKENS)
        self.running: list[Sequence] = []

    def start(self, prompt: list[int], salt: bytes = b"") -> Sequence:
        sequence = Sequence.of(request(prompt, salt=salt))
        self.kv_cache.attach_prefix(sequence)
        try:
            self.kv_cache.reserve(sequence, sequence.num_tokens)
        except OutOfSpace:
            self.kv_cache.release(sequence)
            raise
        self.kv_cache.count_lookup(sequence)
        sequence.num_computed = sequence.num_tokens
        self.kv_cache.remember(sequence)
        self.running.append(sequence)
        self.check()
        return sequence

    def finish(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.kv_cache.release(sequence)
        self.check()

    def serve(self, prompt: list[int], salt: bytes = b"") -> int:
        """A request from beginning to end; how many of its tokens were found."""
        sequence = self.start(prompt, salt)
        self.finish(sequence)
        return sequence.num_cached

    def check(self) -> None:
        self.pool.check_integrity()
        self.kv_cache.check_integrity(self.running)


def test_looking_for_room_in_vain_is_no_use_of_a_prefix() -> None:
    cache = Cache(9, "gdsf")
    cache.serve(list(range(17)))
    hog = cache.start([99] * 13)
    wanting = Sequence.of(request(list(range(25))))

    def priorities() -> list[float]:
        cache.kv_cache.check_room(wanting, 4)
        return [cache.pool.eviction.priority(key) for key in wanting.page_keys[:4]]

    before = priorities()
    for _ in range(10):
        with pytest.raises(OutOfSpace):
            cache.kv_cache.check_room(wanting, 5)
    assert priorities() == before
    cache.check()
    cache.finish(hog)
    cache.kv_cache.check_room(wanting, 100)
    with pytest.raises(OutOfSpace):
        cache.kv_cache.check_room(Sequence.of(request([7] * 37)), 100)


def test_keys_separate_their_fields() -> None:
    def part(digest: str, scale: float = 1.0) -> tuple[AdapterPart, ...]:
        return (AdapterPart(digest, scale),)

    fields = [((), b""), (part("ab"), b"c"), (part("a"), b"bc"), (part("abc"), b""), (part("abc", 0.5), b"")]
    fields += [((AdapterPart("abc", 1.0, rank),), b"") for rank in (1, 2)]
    assert len({first_key(adapters, salt) for adapters, salt in fields}) == len(fields)
    assert page_key(b"p", [1, 2]) != page_key(b"p", [2, 1])
    assert page_key(b"p", [1]) != page_key(b"p1", [])
    changes = [("", []), ("a", [(0, 2)]), ("b", [(0, 2)]), ("a", [(1, 2)]), ("a", [(0, 1)]), ("a", [(0, 1), (1, 2)])]
    assert len({page_key(b"p", [1, 2], *change) for change in changes}) == len(changes)


def test_a_mix_shares_prefixes_whatever_the_order_of_its_parts() -> None:
    one, two = AdapterPart("one", 0.5), AdapterPart("two", 0.25)
    assert first_key((one, two)) == first_key((two, one))
    assert first_key((one, two)) != first_key((one,))


def test_whole_pages_are_found_again_by_the_same_tenant() -> None:
    cache = Cache(16)
    prompt = list(range(10))
    assert [cache.serve(prompt), cache.serve(prompt), cache.serve(prompt, b"other")] == [0, 8, 0]
    assert cache.serve(prompt[:8]) == 4, "one token at least is computed"
    assert (cache.kv_cache.num_queries, cache.kv_cache.num_hits) == (38, 12)


def test_a_chain_is_given_up_from_its_end() -> None:
    cache = Cache(6)
    cache.serve(list(range(16)))
    assert cache.kv_cache.num_idle_pages == 4
    cache.serve([99] * 15)
    assert cache.kv_cache.num_evictions == 2
    assert cache.serve(list(range(16))) == 8
    assert not cache.pool.eviction._remembered, "millions of pages pass through: none is remembered"


def test_what_a_running_request_uses_stays() -> None:
    cache = Cache(5)
    cache.serve(list(range(9)))
    running = cache.start(list(range(9)))
    assert running.num_cached == 8
    with pytest.raises(OutOfSpace):
        cache.start([99] * 9)
    assert cache.kv_cache.num_evictions == 0
    cache.finish(running)
    assert cache.serve([99] * 17) == 0
    assert cache.kv_cache.num_evictions == 2


def test_a_prefix_that_many_share_outlives_younger_ones() -> None:
    cache = Cache(8, "cost")
    system = list(range(8))
    for question in range(6):
        cache.serve([*system, 100 + question])
    for number in range(3):
        cache.serve([200 + number] * 9)
    assert cache.serve([*system, 300]) == 8


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_page_outlives_one_before_it(policy: str) -> None:
    """Whatever is shared, continued and given up, what is cached are whole beginnings."""
    rng = random.Random(4)
    cache = Cache(30, policy)
    chains: list[list[bytes]] = []
    prompts = [[0] * 8]
    for _ in range(500):
        if len(cache.running) == 3:
            cache.finish(rng.choice(cache.running))
        begin = rng.choice(prompts)[: PAGE_TOKENS * rng.randint(0, 6)]
        prompt = begin + [rng.randrange(3) for _ in range(rng.randint(1, 12))]
        prompts = [*prompts[-5:], prompt]
        chains.append(cache.start(prompt).page_keys)
        for chain in chains:
            is_cached = [key in cache.kv_cache for key in chain]
            assert is_cached == sorted(is_cached, reverse=True)
    assert cache.kv_cache.num_evictions > 100
    assert cache.kv_cache.num_hits > 1000
