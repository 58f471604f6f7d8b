"""Steps that overlap: planned while the one before runs, its tokens known to the device alone. The same answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from engine_driver import Answer, make_request, run
from heddle_server.engine.engine import Engine
from heddle_server.request import Request
from test_engine import greedy, register
from test_families import make_engine, prompt_of
from tiny_models import save_tiny_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_tiny_model(folder, "llama")


def make_both(folder: Path, **config: object) -> tuple[Engine, Engine]:
    """One engine whose steps follow each other, one whose steps overlap."""
    return make_engine(folder, overlap="off", **config), make_engine(folder, overlap="on", **config)


def fields(answer: Answer) -> tuple[object, ...]:
    return answer.token_ids, answer.finish_reason, answer.error_code, answer.num_cached_tokens


def workload(digests: list[str], seed: int) -> list[Request]:
    source = random.Random(seed)
    return [
        make_request(
            prompt_of(source.choice((1, 5, 17, 33, 60)), source.randrange(4)),
            source.choice([None, *digests]),
            max_tokens=source.choice((1, 2, 7, 20)),
            stop_token_ids=tuple(source.sample(range(96), source.choice((0, 0, 20)))),
            temperature=source.choice((0.0, 0.0, 1.0)),
            presence_penalty=source.choice((0.0, 0.0, 1.5)),
            repetition_penalty=source.choice((1.0, 1.0, 1.3)),
            num_prompt_logprobs=source.choice((None, None, 2)),
            seed=source.randrange(1000),
        )
        for _ in range(40)
    ]


@pytest.mark.parametrize("num_pages", [18, 400])
def test_overlapping_steps_answer_what_single_steps_do(
    num_pages: int, llama: tuple[Path, PreTrainedModel], tmp_path: Path
) -> None:
    folder, model = llama
    config = {"store_path": str(tmp_path), "max_batch_tokens": 64, "max_model_len": 96}
    roomy = make_engine(folder, **config)
    page_bytes = roomy.model.page_bytes
    digests = register(tmp_path, roomy, model, ("lora", "ia3"))
    single, overlapping = make_both(folder, pool_bytes=num_pages * page_bytes, **config)
    for seed in range(3):
        expected, actual = (run(engine, workload(digests, seed)) for engine in (single, overlapping))
        for one, other in zip(expected, actual, strict=True):
            assert fields(other)[:3] == fields(one)[:3]
    assert (overlapping.stats().num_preemptions > 0) == (num_pages < 100)


def test_stops_early_and_drops_the_token_under_way(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    expected = greedy(model, prompt_of(9, 1), 12)
    stop = expected[5]
    (answer,) = run(
        make_engine(folder, overlap="on"), [make_request(prompt_of(9, 1), max_tokens=12, stop_token_ids=(stop,))]
    )
    assert answer.token_ids == expected[: expected.index(stop) + 1]


def test_an_aborted_request_leaves_nothing(llama: tuple[Path, PreTrainedModel]) -> None:
    engine = make_engine(llama[0], overlap="on")
    gone, stays = (make_request(prompt_of(20, number), max_tokens=10) for number in (1, 2))
    engine.add(gone)
    engine.add(stays)
    for _ in range(3):
        engine.step()
    engine.abort(gone.request_id)
    engine.check_integrity()
    answer = Answer(stays)
    while engine.has_requests:
        for output in engine.step():
            assert output.request_id == stays.request_id
            answer.take(output)
        engine.check_integrity()
    assert answer.finish_reason == "length"
    assert engine.step() == []
    stats = engine.stats()
    assert stats.num_kv_pages == stats.num_running == 0


def test_prefixes_of_answers_are_found_again(llama: tuple[Path, PreTrainedModel]) -> None:
    """Pages are entered under tokens that came to be known after their step was launched."""
    for engine in make_both(llama[0]):
        (first,) = run(engine, [make_request(prompt_of(20, 1), max_tokens=30)])
        (again,) = run(engine, [make_request(prompt_of(20, 1) + first.token_ids, max_tokens=3)])
        assert again.num_cached_tokens == 48
