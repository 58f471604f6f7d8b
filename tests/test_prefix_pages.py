"""Keys and values that an adapter brings: in its own pages, shared by its requests, copied where they go on."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle_server.engine.sequence import Sequence
from heddle_server.engine.step_inputs import page_copies
from small_world import PAGE_TOKENS, SmallWorld

PROMPT = list(range(1, 12))


def world_with(num_prefix_tokens: int, **options: int) -> SmallWorld:
    world = SmallWorld(**options)  # type: ignore[arg-type]
    world.loader.prefixes = {"prefix": num_prefix_tokens}
    return world


def ask(world: SmallWorld, prompt: list[int] = PROMPT, **sampling: int) -> Sequence:
    num_virtual_tokens = world.loader.prefixes["prefix"]
    return world.add(prompt, "prefix", tenant="t", salt=b"", num_virtual_tokens=num_virtual_tokens, **sampling)


def copies_until_running(world: SmallWorld, sequence: Sequence) -> list[tuple[int, int]]:
    """What the steps copy until the first one that computes the sequence, that one included."""
    for _ in range(10):
        plan = world.scheduler.plan()
        copies = page_copies(plan.chunks, PAGE_TOKENS)
        world.run(plan)
        if copies or sequence in world.scheduler.running:
            return copies
    raise AssertionError("the request was not started")


@pytest.mark.parametrize("num_prefix_tokens", [1, 4, 6, 8, 11])
def test_full_pages_are_the_adapters_and_the_last_is_copied(num_prefix_tokens: int) -> None:
    world = world_with(num_prefix_tokens)
    first, second = ask(world), ask(world, [50] * 9)
    copies = copies_until_running(world, first)
    num_full, rest = divmod(num_prefix_tokens, PAGE_TOKENS)
    own_pages = first.prefix_pages
    assert len(own_pages) == num_full + bool(rest)
    for sequence in (first, second):
        assert list(sequence.pages[:num_full]) == own_pages[:num_full]
        assert set(sequence.pages[num_full:]).isdisjoint(own_pages)
        assert sequence.num_computed > num_prefix_tokens
    assert copies == ([(own_pages[-1], each.pages[num_full]) for each in (first, second)] if rest else [])
    assert page_copies(world.scheduler.plan().chunks, PAGE_TOKENS) == [], "only before the first token"
    for sequence in (first, second):
        world.scheduler.finish(sequence)
        world.check()


def test_what_the_adapter_brings_is_never_computed_and_never_cached_as_tokens() -> None:
    world = world_with(10)
    sequence = ask(world)
    computed = 0
    while sequence.num_generated == 0:
        computed += sum(chunk.num_tokens for chunk in world.step().chunks)
    assert computed == len(PROMPT)
    assert sequence.num_cached == 0
    assert [key in world.kv_cache for key in sequence.page_keys] == [False, False, True, True, True]


def test_pages_after_it_are_found_again_and_then_nothing_is_copied() -> None:
    world = world_with(6)
    first = ask(world)
    copies_until_running(world, first)
    world.scheduler.finish(first)
    again = ask(world)
    assert copies_until_running(world, again) == [], "the page that the copy went on in was found whole"
    assert again.num_cached == 10, "of 17 tokens 16 lie in whole pages, and 6 are the adapter's"
    other = ask(world, PROMPT[:1])
    assert len(copies_until_running(world, other)) == 1, "too short to fill the page"


def test_prompt_logprobs_have_every_token_of_the_prompt_computed() -> None:
    world = world_with(6)
    for _ in range(2):
        sequence = ask(world, num_prompt_logprobs=0)
        plan = world.step()
        while not plan.chunks:
            plan = world.step()
        (chunk,) = plan.chunks
        assert chunk.num_tokens == len(PROMPT)
        assert sequence.num_unscored == 0
        world.scheduler.finish(sequence)
        world.check()


def test_a_request_put_back_at_once_gives_the_pages_back() -> None:
    world = world_with(8)
    sequence = ask(world, num_prompt_logprobs=0)
    while sequence not in world.scheduler.running:
        world.scheduler.plan()
    world.scheduler.finish(sequence)  # before anything was computed
    world.check()


def test_a_preempted_request_takes_them_again_wherever_they_lie_then() -> None:
    world = world_with(6, num_pages=8)
    old = world.add([1] * 6)
    world.step()
    new = ask(world, [2] * 5)
    world.step_until_running(new)
    before = new.prefix_pages
    while new in world.scheduler.running:
        world.step()
    assert not new.pages
    assert world.scheduler.num_preemptions == 1
    hold = world.pool.allocate(world.pool.num_free + world.pool.num_idle)  # so that the adapter gives way
    assert world.residency.num_evictions == 1
    world.scheduler.finish(old)
    for page in set(hold).difference(before):
        world.pool.free(page)
    copies = copies_until_running(world, new)
    assert new.prefix_pages != before
    assert list(new.pages[:1]) == new.prefix_pages[:1]
    assert copies == [(new.prefix_pages[1], new.pages[1])]
    for page in before:
        world.pool.free(page)


def test_an_adapter_in_use_keeps_its_pages_and_gives_way_afterwards() -> None:
    world = world_with(8, num_pages=6, max_batch_tokens=32)
    sequence = ask(world, [1, 2, 3])
    world.step_until_running(sequence)
    wide = world.add([9] * 20)
    world.step()
    assert world.residency.num_evictions == 0
    world.scheduler.finish(sequence)
    world.step_until_running(wide)
    assert world.residency.num_evictions == 1
    world.scheduler.finish(wide)
    again = ask(world, [1, 2, 3])
    world.step_until_running(again)
    assert list(again.pages[:2]) == again.prefix_pages


def test_what_is_admitted_with_another_number_of_tokens_fails_alone() -> None:
    world = world_with(8)
    wrong = world.add(PROMPT, "prefix", num_virtual_tokens=5)
    right = ask(world)
    failed = list[Sequence]()
    for _ in range(5):
        failed += [sequence for sequence, _ in world.step().failed]
    assert failed == [wrong]
    assert right in world.scheduler.running


@given(
    num_prefix_tokens=st.integers(1, 13),
    num_pages=st.integers(10, 24),
    seed=st.integers(0, 1000),
)
def test_every_page_is_accounted_for_whatever_happens(num_prefix_tokens: int, num_pages: int, seed: int) -> None:
    source = random.Random(seed)
    world = world_with(num_prefix_tokens, num_pages=num_pages)
    alive = list[Sequence]()
    for _ in range(40):
        if len(alive) < 4:
            prompt = [source.randrange(2)] * source.randrange(1, 10)
            adapter = source.choice(["prefix", "prefix", "a", None])
            alive.append(ask(world, prompt) if adapter == "prefix" else world.add(prompt, adapter or ()))
        plan = world.scheduler.plan()
        for source_page, target in page_copies(plan.chunks, PAGE_TOKENS):
            assert world.pool.references(target) == 1, "the page that is written to is nobody else's"
            assert source_page != target
        world.run(plan)
        for sequence, _ in plan.failed:
            alive.remove(sequence)
        if alive and source.random() < 0.3:
            sequence = alive.pop(source.randrange(len(alive)))
            world.scheduler.finish(sequence)
            world.check()
    for sequence in alive:
        world.scheduler.finish(sequence)
    world.step()  # takes in what was still being loaded
    assert world.pool.num_free + world.pool.num_idle == num_pages
