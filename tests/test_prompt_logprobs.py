"""Logprobs of a prompt's own tokens: equal to transformers', in any batch, chunked, preempted, with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from engine_driver import make_request
from heddle_server.engine import scheduler
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenLogprobs
from heddle_server.request import Request
from peft_samples import make_adapter
from test_engine import register
from test_families import make_engine, prompt_of
from tiny_models import save_tiny_model

LENGTHS = (1, 2, 17, 40, 75)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("llama")
    return folder, save_tiny_model(folder, "llama")


def scored(prompt: list[int], adapter: str | None = None, **sampling: object) -> Request:
    options: dict[str, object] = {"num_logprobs": 0, "num_prompt_logprobs": 3, "max_tokens": 4, **sampling}
    return make_request(prompt, adapter, **options)  # type: ignore[arg-type]


def prompt_logprobs(engine: Engine, requests: list[Request]) -> list[tuple[TokenLogprobs, ...] | None]:
    """What the first output of each tells, checking that no later one tells it again."""
    told: dict[int, list[tuple[TokenLogprobs, ...] | None]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_requests:
        for output in engine.step():
            assert output.error_message is None
            told[output.request_id].append(output.prompt_logprobs)
        engine.check_integrity()
    for outputs in told.values():
        assert outputs[1:] == [None] * len(outputs[1:])
    return [outputs[0] for outputs in told.values()]


def expected(model: Any, prompt: list[int]) -> Tensor:
    """[len(prompt) - 1, vocabulary]"""
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([prompt])).logits[0, :-1].float(), dim=-1)


def assert_equal(told: tuple[TokenLogprobs, ...] | None, logprobs: Tensor, prompt: list[int]) -> None:
    assert told is not None
    assert len(told) == len(prompt) - 1
    for described, row, token_id in zip(told, logprobs, prompt[1:], strict=True):
        assert described.logprob == pytest.approx(row[token_id].item(), abs=1e-4)
        best = row.topk(3)
        assert [value for _, value in described.top] == pytest.approx(best.values.tolist(), abs=1e-4)


@pytest.mark.parametrize("overlap", ["off", "on"])
@pytest.mark.parametrize("max_scored", [5, 256])
def test_equal_to_transformers_beside_each_other_and_others(
    overlap: str, max_scored: int, llama: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduler, "MAX_SCORED_TOKENS", max_scored)
    folder, model = llama
    engine = make_engine(folder, overlap=overlap, max_batch_tokens=64)
    prompts = [prompt_of(length, number) for number, length in enumerate(LENGTHS)]
    others = [make_request(prompt_of(50, 9), max_tokens=12) for _ in range(3)]
    told = prompt_logprobs(engine, [*others, *map(scored, prompts)])
    assert told[:3] == [None] * 3
    for prompt, logprobs in zip(prompts, told[3:], strict=True):
        assert_equal(logprobs, expected(model, prompt), prompt)


def test_a_cached_prefix_is_computed_again(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    engine = make_engine(folder)
    prompt = prompt_of(60, 3)
    first, again = (prompt_logprobs(engine, [scored(prompt)])[0] for _ in range(2))
    assert_equal(first, expected(model, prompt), prompt)
    assert_equal(again, expected(model, prompt), prompt)


def test_who_is_put_back_is_scored_once(llama: tuple[Path, PreTrainedModel]) -> None:
    folder, model = llama
    page_bytes = make_engine(folder).model.page_bytes
    engine = make_engine(folder, pool_bytes=10 * page_bytes, max_model_len=96)
    prompts = [prompt_of(30 + number, number) for number in range(6)]
    told = prompt_logprobs(engine, [scored(prompt, max_tokens=40) for prompt in prompts])
    assert engine.stats().num_preemptions > 0
    for prompt, logprobs in zip(prompts, told, strict=True):
        assert_equal(logprobs, expected(model, prompt), prompt)


def test_with_adapters_beside_the_base(llama: tuple[Path, PreTrainedModel], tmp_path: Path) -> None:
    folder, model = llama
    engine = make_engine(folder, store_path=str(tmp_path))
    (digest,) = register(tmp_path, engine, model, ("lora",))
    prompts = [prompt_of(20, 1), prompt_of(33, 2)]
    base, adapted = prompt_logprobs(engine, [scored(prompts[0]), scored(prompts[1], digest)])
    assert_equal(base, expected(model, prompts[0]), prompts[0])
    peft = make_adapter(model, "lora", tmp_path / "again", rank=2, seed=0)  # what `register` has made
    assert_equal(adapted, expected(peft, prompts[1]), prompts[1])
    assert (expected(peft, prompts[1]) - expected(model, prompts[1])).abs().max() > 0.01
