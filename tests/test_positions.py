"""Adapters that change some tokens only: which run by the base, and which keys and values are the base's."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from heddle_adapters.mix import AdapterPart
from heddle_adapters.positions import END, Positions
from heddle_kernels.segments import BASE_SLOT
from heddle_server.engine.sequence import Sequence
from small_world import PAGE_TOKENS, SmallWorld

INVOCATION = (90, 91)
ACTIVATED, EDGES = Positions(invocation=INVOCATION), Positions(num_first=2, num_last=3)
TEXT = list(range(1, 11))


def world_with(**positions: Positions) -> SmallWorld:
    world = SmallWorld(num_pages=64, max_batch_tokens=64)
    world.loader.positions = positions
    return world


def started(world: SmallWorld, prompt: list[int], adapter: str = "adapter") -> Sequence:
    sequence = world.add(prompt, adapter)
    world.step_until_running(sequence)
    return sequence


def served(world: SmallWorld, prompt: list[int], adapter: str | tuple[AdapterPart, ...]) -> Sequence:
    """One request from its beginning to the first token of its answer."""
    sequence = world.add(prompt, adapter)
    while sequence.num_generated == 0:
        world.step()
    world.scheduler.finish(sequence)
    return sequence


def slots(sequence: Sequence, num_tokens: int) -> str:
    """One letter a token: the adapter's or the base's."""
    names = {sequence.slot: "A", BASE_SLOT: "-"}
    return "".join(names[slot] * length for slot, length in sequence.runs(0, num_tokens))


def test_an_invoked_adapter_acts_from_the_last_invocation_on() -> None:
    world = world_with(adapter=ACTIVATED)
    sequence = started(world, [1, *INVOCATION, 2, 3, *INVOCATION, 4])
    assert slots(sequence, 10) == "-----AAAAA"
    assert sequence.runs(0, 3) == [(BASE_SLOT, 3)]
    assert sequence.runs(6, 7) == [(sequence.slot, 1)]


def test_an_adapter_that_is_not_invoked_leaves_all_to_the_base() -> None:
    world = world_with(adapter=ACTIVATED)
    assert slots(started(world, TEXT), 12) == "-" * 12
    assert served(world, TEXT, "adapter").page_keys == served(world, TEXT, ()).page_keys


def test_first_and_last_tokens_of_the_prompt_and_none_of_the_answer() -> None:
    world = world_with(adapter=EDGES)
    assert slots(started(world, TEXT), 12) == "AA-----AAA--"
    assert slots(started(world, [1, 2, 3]), 4) == "A-A-", "half and half where there is no room for both"


def test_adapters_without_positions_and_mixes_change_every_token() -> None:
    world = world_with()
    assert slots(started(world, TEXT), 12) == "A" * 12
    mix = world.add(TEXT, (AdapterPart("one"), AdapterPart("other")))
    world.step_until_running(mix)
    assert slots(mix, 12) == "A" * 12
    base = world.add(TEXT)
    world.step_until_running(base)
    assert base.runs(0, 12) == [(BASE_SLOT, 12)]


def test_chunks_are_cut_where_the_adapter_begins_to_act() -> None:
    world = SmallWorld(max_batch_tokens=6)
    world.loader.positions = {"adapter": ACTIVATED}
    sequence = world.add([*TEXT, *INVOCATION], "adapter")
    runs = list[list[tuple[int, int]]]()
    while sequence.num_generated < 2:
        plan = world.scheduler.plan()
        for chunk in plan.chunks:
            runs.append(chunk.runs)
            sequence.num_computed += chunk.num_tokens
            if chunk.completes:
                sequence.token_ids.append(7)
    slot = sequence.slot
    assert runs == [[(BASE_SLOT, 6)], [(BASE_SLOT, 4), (slot, 2)], [(slot, 1)]]


# Which keys and values are whose


@pytest.mark.parametrize("base_first", [True, False])
def test_what_comes_before_the_invocation_is_shared_with_the_base(base_first: bool) -> None:
    world = world_with(adapter=ACTIVATED, other=ACTIVATED)
    prompt = [*TEXT, *INVOCATION, *TEXT]  # two whole pages before the one with the first changed token
    order: list[str | tuple[AdapterPart, ...]] = [(), "adapter"] if base_first else ["adapter", ()]
    assert served(world, prompt, order[0]).num_cached == 0
    assert served(world, prompt, order[1]).num_cached == 8
    assert served(world, prompt, "other").num_cached == 8, "another adapter's invocation is another's"
    assert served(world, prompt, "adapter").num_cached == 20
    assert served(world, prompt, ()).num_cached == 20


def test_tenants_share_nothing_before_the_invocation_either() -> None:
    world = world_with(adapter=ACTIVATED)
    prompt = [*TEXT, *INVOCATION, *TEXT]
    served(world, prompt, "adapter")
    other = world.add(prompt, "adapter", salt=b"other")
    world.step_until_running(other)
    assert other.num_cached == 0


def test_the_same_tokens_changed_elsewhere_are_another_prefix() -> None:
    """The last tokens of a short prompt are changed; as the beginning of a long one they are not."""
    world = world_with(adapter=EDGES)
    short, long = TEXT[:8], [*TEXT, *TEXT]
    assert served(world, short, "adapter").num_cached == 0
    assert served(world, long, "adapter").num_cached == 4, "the first page has the same two changed tokens"
    assert served(world, [*long, 1, 2], "adapter").num_cached == 16
    invoked = world_with(adapter=ACTIVATED)
    again = [*INVOCATION, *TEXT]
    assert served(invoked, again, "adapter").num_cached == 0
    assert served(invoked, [*again, *INVOCATION, 1], "adapter").num_cached == 0, "now the second one counts"


Spans = list[tuple[int, bool]]


@given(
    prompts=st.lists(st.lists(st.sampled_from([1, *INVOCATION]), min_size=1, max_size=14), min_size=2, max_size=2),
    positions=st.one_of(
        st.just(ACTIVATED), st.builds(Positions, num_first=st.integers(0, 5), num_last=st.integers(0, 5))
    ),
)
def test_keys_are_equal_where_tokens_and_changes_are(prompts: list[list[int]], positions: Positions) -> None:
    world = world_with(adapter=positions)
    sequences = [served(world, prompt, "adapter") for prompt in prompts]
    histories = list[Spans]()
    for sequence in sequences:
        changed = [number for begin, end in sequence.changed or () for number in range(begin, min(end, 20))]
        histories.append([(token, number in changed) for number, token in enumerate(sequence.token_ids)])
    one, other = sequences
    for page, keys in enumerate(zip(one.page_keys, other.page_keys, strict=False)):
        end = (page + 1) * PAGE_TOKENS
        assert (keys[0] == keys[1]) == (histories[0][:end] == histories[1][:end])


@given(
    positions=st.one_of(
        st.just(Positions()),
        st.just(ACTIVATED),
        st.builds(Positions, num_first=st.integers(0, 5), num_last=st.integers(0, 5)),
    ),
    prompt=st.lists(st.sampled_from([1, *INVOCATION]), min_size=1, max_size=14),
    begin=st.integers(0, 15),
    length=st.integers(0, 10),
)
def test_runs_name_every_token_once(positions: Positions, prompt: list[int], begin: int, length: int) -> None:
    sequence = started(world_with(adapter=positions), prompt)
    changed = {number for first, end in positions.ranges(prompt) for number in range(first, min(end, 40))}
    runs = sequence.runs(begin, begin + length)
    named = [slot for slot, num_tokens in runs for _ in range(num_tokens)]
    assert named == [sequence.slot if number in changed else BASE_SLOT for number in range(begin, begin + length)]
    assert all(num_tokens > 0 for _, num_tokens in runs)
    assert all(one[0] != other[0] for one, other in pairwise(runs))


def test_an_endless_range_ends_nowhere() -> None:
    assert started(world_with(), TEXT).changed == ((0, END),)
