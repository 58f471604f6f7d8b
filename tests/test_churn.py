"""Adapters and pages change places under running requests, and no answer changes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine_driver import Answer, make_request, run
from heddle_adapters.mix import AdapterPart
from heddle_adapters.store import AdapterStore
from heddle_server.engine.engine import Engine
from heddle_server.request import Request
from random_uploads import RandomUploads
from test_families import make_engine, prompt_of
from tiny_models import save_tiny_model
from tolerances import NEAR_TIE_MARGIN

NUM_ADAPTERS = 24
NUM_RESIDENT = 5  # that the tight pool has room for, beside the keys and values of a few requests
MAX_IN_FLIGHT = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder, "llama")
    return folder


@pytest.fixture
def uploads(tiny: Path, tmp_path: Path) -> Iterator[RandomUploads]:
    engine = make_engine(tiny)
    with AdapterStore(tmp_path / "store") as store:
        yield RandomUploads(store, engine.model.layout)
    engine.close()


def churning_requests(digests: list[str], num_requests: int) -> list[Request]:
    """Adapters at random, mixes of two among them, prompts that share beginnings."""
    source = random.Random(num_requests)
    requests = []
    for number in range(num_requests):
        parts = tuple(
            AdapterPart(digest, source.choice((1.0, 0.5)))
            for digest in source.sample(digests, source.choice((0, 1, 1, 1, 1, 2)))
        )
        prompt = prompt_of(20, number % 3) + prompt_of(source.randrange(1, 20), number)
        requests.append(make_request(prompt, parts, max_tokens=source.randrange(4, 24), num_logprobs=2))
    return requests


def run_in_turn(engine: Engine, requests: list[Request]) -> dict[int, Answer]:
    """Always `MAX_IN_FLIGHT` at once, the next one when one ends."""
    answers = {request.request_id: Answer(request) for request in requests}
    coming = iter(requests)
    for request in itertools.islice(coming, MAX_IN_FLIGHT):
        engine.add(request)
    while engine.has_requests:
        for output in engine.step():
            answers[output.request_id].take(output)
            if output.finish_reason and (following := next(coming, None)) is not None:
                engine.add(following)
        engine.check_integrity()
    return answers


def churn(tiny: Path, uploads: RandomUploads, store_path: Path, num_requests: int) -> int:
    """Answers from a pool for a few adapters against those of a roomy one; how often something changed places."""
    digests = [uploads.put(f"a{number}", rank=1 + number % 7, seed=number).digest for number in range(NUM_ADAPTERS)]
    roomy = make_engine(tiny, store_path=str(store_path), pool_bytes=1 << 24)
    requests = churning_requests(digests, num_requests)
    expected = run_in_turn(roomy, requests)
    pages = roomy.stats().num_adapter_pages * NUM_RESIDENT // NUM_ADAPTERS + 3 * MAX_IN_FLIGHT
    tight = make_engine(
        tiny, store_path=str(store_path), pool_bytes=pages * roomy.model.page_bytes, host_cache_bytes=1 << 18
    )
    found = run_in_turn(tight, requests)
    for request in requests:
        assert_same_up_to_a_near_tie(found[request.request_id], expected[request.request_id])
    stats = tight.stats()
    assert stats.num_preemptions > 0
    assert stats.num_kv_pages == stats.num_running == stats.num_waiting == stats.num_loading_pages == 0
    assert roomy.stats().num_adapter_evictions == 0
    for engine in (roomy, tight):
        engine.close()
    return stats.num_adapter_evictions + stats.num_preemptions


def assert_same_up_to_a_near_tie(found: Answer, expected: Answer) -> None:
    assert found.error_message is None
    assert found.finish_reason == "length"
    for one, other, logprobs in zip(found.token_ids, expected.token_ids, expected.logprobs, strict=True):
        if one != other:
            best, second = logprobs.topk(2).values.tolist()
            assert best - second < NEAR_TIE_MARGIN, f"request {found.request.request_id} was answered wrongly"
            return


def test_answers_stay_the_same_while_everything_changes_places(
    tiny: Path, uploads: RandomUploads, tmp_path: Path
) -> None:
    assert churn(tiny, uploads, tmp_path / "store", num_requests=150) > 50


@pytest.mark.slow
def test_a_thousand_changes_of_place_change_no_answer(tiny: Path, uploads: RandomUploads, tmp_path: Path) -> None:
    num_changes = churn(tiny, uploads, tmp_path / "store", num_requests=2500)
    assert num_changes > 1000, f"{num_changes} changes of place"


def replace_and_ask(tiny: Path, uploads: RandomUploads, store_path: Path, num_replacements: int) -> None:
    """A name's content changes over warm caches; every answer must be that of the newest content, computed cold."""
    engine = make_engine(tiny, store_path=str(store_path))
    prompt = prompt_of(60, 1)
    before: torch.Tensor | None = None
    for number in range(num_replacements):
        version = uploads.put("name", **VARIATIONS[number % len(VARIATIONS)](number))
        digest = AdapterPart(version.digest, 1.0 if number % 5 else 0.7)

        def ask(salt: bytes, digest: AdapterPart = digest) -> Any:
            return make_request(prompt, (digest,), max_tokens=2, num_logprobs=96, salt=salt)

        warm = run(engine, [ask(b"")])[0]
        again = run(engine, [ask(b"")])[0]
        cold = run(engine, [ask(number.to_bytes(4, "little"))])[0]
        assert warm.num_cached_tokens == cold.num_cached_tokens == 0
        assert again.num_cached_tokens == 48
        for answer in (warm, again):
            assert (answer.logprobs[0] - cold.logprobs[0]).abs().max() < 1e-4, f"replacement {number} is stale"
        assert before is None or (before - cold.logprobs[0]).abs().max() > 1e-2, "the replacement changes nothing"
        before = cold.logprobs[0]
    engine.close()


# New weights, then the same with another alpha, then with the other sign of it, then another rank's worth of weights.
VARIATIONS: list[Any] = [
    lambda number: {"rank": 4, "seed": number, "alpha": 8.0},
    lambda number: {"rank": 4, "seed": number - 1, "alpha": 4.0},
    lambda number: {"rank": 4, "seed": number - 2, "alpha": -4.0},
    lambda number: {"rank": 6, "seed": number, "alpha": 6.0},
]


def test_the_same_name_with_new_bytes_is_never_answered_from_the_old(
    tiny: Path, uploads: RandomUploads, tmp_path: Path
) -> None:
    replace_and_ask(tiny, uploads, tmp_path / "store", num_replacements=40)


@pytest.mark.slow
def test_five_hundred_replacements_leave_nothing_stale(tiny: Path, uploads: RandomUploads, tmp_path: Path) -> None:
    replace_and_ask(tiny, uploads, tmp_path / "store", num_replacements=500)
