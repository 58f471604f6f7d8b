"""Tokens that an adapter puts before every prompt: they take room and are computed, and nobody is told of them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator

import httpx
import pytest
import torch

import scripted_engine
from heddle_adapters.errors import AdapterIncompatible
from heddle_server.api.pool_room import PoolRoom
from heddle_server.engine.logit_rules import change_logits
from heddle_server.engine.sequence import Sequence
from heddle_server.request import Request, SamplingParams
from live_server import live_server, server_config
from small_world import VOCABULARY, SmallWorld
from test_adapter_api import upload
from test_http_api import CHAT, HELLO, refusal

NUM_VIRTUAL = 6


def request_of(prompt: list[int], num_virtual_tokens: int = NUM_VIRTUAL, **sampling: float) -> Request:
    return Request(
        request_id=1,
        prompt_token_ids=prompt,
        sampling=SamplingParams(**{"max_tokens": 5, **sampling}),  # type: ignore[arg-type]
        num_virtual_tokens=num_virtual_tokens,
    )


def test_they_come_first_and_count_in_the_context() -> None:
    sequence = Sequence.of(request_of([3, 4, 5]), max_model_len=100, vocabulary_size=VOCABULARY)
    assert sequence.token_ids == [*range(VOCABULARY, VOCABULARY + NUM_VIRTUAL), 3, 4, 5]
    assert sequence.max_num_tokens == NUM_VIRTUAL + 3 + 5
    assert Sequence.of(request_of([3] * 90), max_model_len=100, vocabulary_size=VOCABULARY).max_num_tokens == 100
    sequence.append(9)
    assert sequence.num_generated == 1


def test_they_are_computed_and_their_pages_are_shared_by_requests_for_the_same_adapter() -> None:
    world = SmallWorld()
    prompt = list(range(1, 12))
    cached = []
    for adapter in ("soft", "soft", "other"):
        sequence = world.add(prompt, adapter, num_virtual_tokens=NUM_VIRTUAL)
        world.step_until_running(sequence)
        while sequence.num_generated == 0:
            world.step()
        cached.append((sequence.num_cached, sequence.num_computed))
        world.scheduler.finish(sequence)
    # 17 tokens are 4 whole pages of 4, of which 16 - 6 tokens are the prompt's own.
    assert [found for found, _ in cached] == [0, 10, 0]
    assert world.kv_cache.num_queries == 3 * len(prompt)
    assert world.kv_cache.num_hits == 10


def test_a_prefix_that_is_virtual_throughout_is_none_of_the_clients_tokens() -> None:
    world = SmallWorld()
    for _ in range(2):
        sequence = world.add([1, 2], "soft", num_virtual_tokens=NUM_VIRTUAL)
        world.step_until_running(sequence)
        world.scheduler.finish(sequence)
    assert sequence.num_cached == 0
    assert world.kv_cache.num_hits == 0


def test_prompt_logprobs_are_of_the_prompts_own_tokens() -> None:
    world = SmallWorld(max_batch_tokens=4)
    prompt = list(range(1, 12))
    sequence = world.add(prompt, "soft", num_virtual_tokens=NUM_VIRTUAL, num_prompt_logprobs=0)
    scored = list[int]()
    for _ in range(20):
        computed, plan = sequence.num_computed, world.scheduler.plan()
        for chunk in plan.chunks:
            scored += [sequence.token_ids[computed + number + 1] for number in chunk.scored]
            sequence.num_unscored -= len(chunk.scored)
            sequence.num_computed += chunk.num_tokens
            if chunk.completes:
                sequence.token_ids.append(7)
    assert scored == prompt[1:]
    assert sequence.num_unscored == 0


def changed_logits(sequence: Sequence) -> list[float]:
    logits = torch.ones(1, 8)
    change_logits(logits, [sequence], (0,))
    changed: list[float] = logits[0].tolist()
    return changed


def test_penalties_know_the_prompts_own_tokens_only() -> None:
    sequence = Sequence.of(request_of([3, 4], repetition_penalty=2.0), vocabulary_size=8)
    assert changed_logits(sequence) == [1, 1, 1, 0.5, 0.5, 1, 1, 1]


def test_they_are_no_part_of_the_least_number_of_answered_tokens() -> None:
    sequence = Sequence.of(request_of([3, 4], min_tokens=1), vocabulary_size=8)
    assert changed_logits(sequence)[0] < -1e4
    sequence.append(5)
    assert changed_logits(sequence)[0] == 1


# Over HTTP

COMPLETIONS = "/v1/completions"
MAX_MODEL_LEN = 40


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A server that knows an adapter "plain", and the same content as "soft" with virtual tokens before it."""
    folder = tmp_path_factory.mktemp("server")
    config = server_config(folder, max_model_len=MAX_MODEL_LEN)
    with live_server(config) as first:
        for name in ("plain", "soft"):
            assert upload(first, name).status_code == 201
    with sqlite3.connect(folder / "store" / "index.sqlite3") as index:
        index.execute("UPDATE versions SET num_virtual_tokens = ? WHERE name = 'soft'", (NUM_VIRTUAL,))
    with live_server(config) as second:
        yield second


def test_an_adapter_whose_tokens_leave_no_room_is_not_taken() -> None:
    room = PoolRoom(scripted_engine.model_card(MAX_MODEL_LEN))
    room.check_context(MAX_MODEL_LEN - 2)
    with pytest.raises(AdapterIncompatible, match=r"puts 39 tokens before every prompt, .* context has 40"):
        room.check_context(MAX_MODEL_LEN - 1)


def complete(client: httpx.Client, adapter: str, num_prompt: int, **fields: object) -> httpx.Response:
    return client.post(COMPLETIONS, json={"prompt": [65] * num_prompt, "adapter": adapter, **fields})


def test_the_card_tells_how_many_there_are(client: httpx.Client) -> None:
    assert client.get("/v1/adapters/soft").json()["num_virtual_tokens"] == NUM_VIRTUAL
    assert client.get("/v1/adapters/plain").json()["num_virtual_tokens"] == 0


def test_they_count_in_the_context_and_not_in_the_usage(client: httpx.Client) -> None:
    room = MAX_MODEL_LEN - 20
    usage = complete(client, "soft", 20, max_tokens=room - NUM_VIRTUAL).json()["usage"]
    assert usage["prompt_tokens"] == 20
    assert complete(client, "plain", 20, max_tokens=room).status_code == 200
    refused = complete(client, "soft", 20, max_tokens=room)
    assert refusal(refused) == (400, "context_length_exceeded", "max_tokens")
    assert refused.json()["error"]["message"] == (
        "This model's maximum context length is 40 tokens, of which the adapter takes 6 for virtual tokens of its own; "
        "the prompt's 20 and the answer's 20 exceed it. Ask for at most 14."
    )


def test_a_prompt_that_they_leave_no_room_for_is_refused(client: httpx.Client) -> None:
    assert complete(client, "plain", MAX_MODEL_LEN - NUM_VIRTUAL, max_tokens=1).status_code == 200
    refused = complete(client, "soft", MAX_MODEL_LEN - NUM_VIRTUAL, max_tokens=1)
    assert refusal(refused) == (400, "context_length_exceeded", "prompt")
    assert "takes 6" in refused.json()["error"]["message"]


def test_an_echo_shows_the_prompt_and_nothing_before_it(client: httpx.Client) -> None:
    reply = complete(client, "soft", 3, max_tokens=2, echo=True).json()
    assert reply["choices"][0]["text"].startswith("AAA")
    assert client.post(CHAT, json={"messages": HELLO, "adapter": "soft"}).status_code == 200
