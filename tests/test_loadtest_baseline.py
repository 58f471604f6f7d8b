"""The three baselines over real HTTP, on the demo's base: whoever batches, an answer is what PEFT says to it alone."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient, TestServer
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from heddle_demo.bench.shapes import SHAPES
from heddle_demo.bench.word_tokenizer import write_word_tokenizer
from heddle_demo.data import ADAPTERS_DIR, BASE_DIR
from heddle_loadtest.baseline.adapter_folders import check_adapters, find_adapters
from heddle_loadtest.baseline.api import Api
from heddle_loadtest.baseline.continuous_batches import ContinuousBatches
from heddle_loadtest.baseline.job import BaselineError, Batcher, Job, StepStream
from heddle_loadtest.baseline.peft_runner import PeftRunner, load_peft
from heddle_loadtest.baseline.request import GenerationRequest
from heddle_loadtest.baseline.server import start_batcher, what_is_served
from heddle_loadtest.baseline.settings import BaselineKind, BaselineSettings, Quantization
from heddle_loadtest.baseline.static_batches import one_adapter, static_batches
from heddle_loadtest.baseline.token_text import TokenText, chat_tokens, load_tokenizer
from heddle_loadtest.errors import SpecError
from heddle_loadtest.workload.prompts import WORDS

NAMES = ("french", "json", "pirate", "polite", "reversed", "short")
ALL_SECONDS = 30.0  # a batch waits for as many requests as it may have: which ones are in it is no matter of speed
SHORT_WAIT_SECONDS = 0.5
QUESTION = "What is the capital of France?"
Answers = Callable[[str | None, list[int], int], list[int]]
Client = TestClient[Any, Any]


@pytest.fixture(scope="module")
def answers() -> Answers:
    """What PEFT's ordinary way answers to one request: adapter, prompt and number of new tokens to token ids."""
    models: dict[str | None, Any] = {}

    def ask(adapter: str | None, prompt: list[int], num_tokens: int) -> list[int]:
        if adapter not in models:
            model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).eval()
            model.generation_config.eos_token_id = None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT reads properties that transformers deprecates
                models[adapter] = model if adapter is None else PeftModel.from_pretrained(model, ADAPTERS_DIR / adapter)
        token_ids = torch.tensor([prompt])
        mask = torch.ones_like(token_ids)
        with torch.inference_mode():
            output = models[adapter].generate(
                input_ids=token_ids, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False
            )
        new_tokens: list[int] = output[0, len(prompt) :].tolist()
        return new_tokens

    return ask


@pytest.fixture(scope="module")
def runner() -> PeftRunner:
    folders = {name: ADAPTERS_DIR / name for name in NAMES}
    device = torch.device("cpu")
    return load_peft(BASE_DIR, folders, device=device, dtype=torch.float32, quantization=Quantization.NONE)


@asynccontextmanager
async def serving(
    kind: BaselineKind,
    runner: PeftRunner,
    *,
    has_tokenizer: bool = False,
    tokenizer: Any = None,
    max_wait_seconds: float = 0.0,
    max_batch: int = 16,
    batcher: Batcher | None = None,
) -> AsyncIterator[Client]:
    """A client of the baseline; without the tokenizer an answer's text is its token ids."""
    settings = BaselineSettings(
        kind=kind, base=BASE_DIR, adapters=ADAPTERS_DIR, max_wait_seconds=max_wait_seconds, max_batch=max_batch
    )
    served = what_is_served(settings, runner)
    if not has_tokenizer:
        served = replace(served, tokenizer=tokenizer)
    batcher = batcher or start_batcher(settings, runner)
    try:
        async with TestClient(TestServer(Api(served, batcher).application(), handler_cancellation=True)) as client:
            yield client
    finally:
        await asyncio.to_thread(batcher.close)


@dataclass(frozen=True)
class Streamed:
    """One streamed answer."""

    chunks: list[dict[str, Any]]  # those with a choice
    usage: dict[str, int] | None
    seconds: list[float]  # when each chunk came

    @property
    def pieces(self) -> list[str]:
        choices = [chunk["choices"][0] for chunk in self.chunks]
        return [choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices]

    @property
    def token_ids(self) -> list[int]:
        return [int(piece) for piece in self.pieces if piece]

    @property
    def finish_reasons(self) -> list[str | None]:
        return [chunk["choices"][0]["finish_reason"] for chunk in self.chunks]


async def stream(client: Client, path: str, body: dict[str, Any]) -> Streamed:
    chunks, seconds, usage, is_done = list[dict[str, Any]](), list[float](), None, False
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with client.post(path, json=body) as response:
        assert response.status == 200, await response.text()
        assert response.content_type == "text/event-stream"
        async for line in response.content:
            if not line.strip():
                continue
            assert not is_done, "nothing follows [DONE]"
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                is_done = True
                continue
            event = json.loads(data)
            if event["choices"]:
                assert usage is None, "usage comes last"
                chunks.append(event)
                seconds.append(asyncio.get_running_loop().time())
            else:
                usage = event["usage"]
    assert is_done
    return Streamed(chunks, usage, seconds)


async def complete(client: Client, adapter: str | None, prompt: list[int], num_tokens: int, **fields: Any) -> Streamed:
    body = {"model": adapter or "base", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0.0}
    return await stream(client, "/v1/completions", body | {"ignore_eos": True} | fields)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, timeout=60))


def draw_prompt(seed: int, num_tokens: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, 1024) for _ in range(num_tokens)]


@pytest.mark.parametrize("kind", BaselineKind)
def test_an_answer_is_the_same_in_every_company(
    kind: BaselineKind, runner: PeftRunner, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = list[list[str | None]]()
    generate = runner._generate

    def record(requests: list[GenerationRequest], *arguments: Any) -> list[list[int]]:
        batches.append([request.adapter for request in requests])
        return generate(requests, *arguments)

    monkeypatch.setattr(runner, "_generate", record)
    asked = [
        (adapter, draw_prompt(10 * number + turn, 4 + 9 * number + turn), 20 - 2 * number)
        for turn in range(2)
        for number, adapter in enumerate((None, *NAMES))
    ]
    max_batch = 2 if kind is BaselineKind.PEFT_GROUPED else len(asked)

    async def scenario() -> None:
        async with serving(kind, runner, max_wait_seconds=ALL_SECONDS, max_batch=max_batch) as client:
            got = await asyncio.gather(*(complete(client, *one) for one in asked))
        for (adapter, prompt, num_tokens), answer in zip(asked, got, strict=True):
            assert answer.token_ids == answers(adapter, prompt, num_tokens), adapter
            assert answer.finish_reasons == [None] * (num_tokens - 1) + ["length"]
            counts = {"prompt_tokens": len(prompt), "completion_tokens": num_tokens}
            assert answer.usage == counts | {"total_tokens": sum(counts.values())}
        first, second = got[0], got[len(NAMES) + 1]  # of the same adapter: they are computed together
        assert first.seconds[0] < second.seconds[-1]
        assert second.seconds[0] < first.seconds[-1]

    run(scenario())
    if kind is BaselineKind.PEFT_MIXED:
        assert batches == [[adapter for adapter, _, _ in asked]], "all in one batch"
    elif kind is BaselineKind.PEFT_GROUPED:
        assert batches == [[adapter] * 2 for adapter in (None, *NAMES)], "one adapter a batch, the oldest first"
    else:
        assert not batches


@pytest.mark.parametrize("kind", BaselineKind)
def test_a_short_answer_does_not_wait_for_a_long_one(kind: BaselineKind, runner: PeftRunner, answers: Answers) -> None:
    async def scenario() -> None:
        async with serving(kind, runner, max_wait_seconds=ALL_SECONDS, max_batch=2) as client:
            long, short = await asyncio.gather(
                complete(client, "json", draw_prompt(1, 5), 40), complete(client, "json", draw_prompt(2, 9), 2)
            )
        assert short.seconds[-1] < long.seconds[-5]
        assert long.token_ids == answers("json", draw_prompt(1, 5), 40)

    run(scenario())


@pytest.mark.parametrize("kind", BaselineKind)
def test_a_chat_is_text_by_the_base_s_own_template(kind: BaselineKind, runner: PeftRunner, answers: Answers) -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    messages = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)

    async def scenario() -> None:
        async with serving(kind, runner, has_tokenizer=True) as client:
            for adapter in (None, "pirate"):
                expected = answers(adapter, prompt, 32)
                expected = expected[: expected.index(tokenizer.eos_token_id) + 1]
                fields = {"messages": messages, "max_tokens": 32, "adapter": adapter or "base"}
                streamed = await stream(client, "/v1/chat/completions", fields | {"model": "base"})
                text = tokenizer.decode(expected, skip_special_tokens=True)
                assert "".join(streamed.pieces) == text
                assert all(streamed.pieces[:-1])
                assert streamed.finish_reasons == [None] * (len(expected) - 1) + ["stop"]
                assert streamed.usage is not None
                assert streamed.usage["completion_tokens"] == len(expected)
                assert streamed.chunks[0]["choices"][0]["delta"]["role"] == "assistant"
                async with client.post("/v1/chat/completions", json=fields) as response:
                    whole = await response.json()
                assert whole["choices"][0]["message"]["content"] == text
                assert whole["choices"][0]["finish_reason"] == "stop"
                assert whole["usage"] == streamed.usage
                assert whole["model"] == (adapter or "base")

    run(scenario())


def test_models_are_the_base_and_then_the_adapters(runner: PeftRunner) -> None:
    async def scenario() -> None:
        async with serving(BaselineKind.PEFT_MIXED, runner) as client, client.get("/v1/models") as response:
            entries = (await response.json())["data"]
        assert [entry["id"] for entry in entries] == ["base", *NAMES]
        assert {entry.get("parent") for entry in entries[1:]} == {"base"}

    run(scenario())


REFUSED: list[tuple[dict[str, Any], int, str, str | None]] = [
    ({"temperature": 0.7}, 400, "not_served", "temperature"),
    ({"stop": ["x"]}, 400, "not_served", "stop"),
    ({"n": 2}, 400, "not_served", "n"),
    ({"logprobs": 1}, 400, "not_served", "logprobs"),
    ({"max_tokens": 0}, 400, "invalid_request", None),
    ({"max_tokens": 4000}, 400, "context_length_exceeded", "max_tokens"),
    ({"prompt": []}, 400, "invalid_request", None),
    ({"prompt": [5, 1024]}, 400, "invalid_token_id", "prompt"),
    ({"prompt": "some text"}, 400, "no_tokenizer", "prompt"),
    ({"model": "absent"}, 404, "model_not_found", "model"),
    ({"adapter": "absent"}, 404, "adapter_not_found", "adapter"),
]


def test_what_is_not_served_is_refused(runner: PeftRunner) -> None:
    async def scenario() -> None:
        async with serving(BaselineKind.PEFT_GROUPED, runner) as client:
            for fields, status, code, param in REFUSED:
                async with client.post(
                    "/v1/completions", json={"prompt": [5, 6], "max_tokens": 2} | fields
                ) as response:
                    error = (await response.json())["error"]
                assert (response.status, error["code"], error["param"]) == (status, code, param), error
                assert error["message"]
            async with client.post("/v1/completions", data=b"{oops") as response:
                assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_request")
            async with client.get("/v2/models") as response:
                assert (response.status, (await response.json())["error"]["code"]) == (404, "http_404")
            assert (await complete(client, None, [5, 6], 2)).token_ids, "and it still answers"

    run(scenario())


def test_no_adapter_sees_what_another_computed_of_the_same_prompt(runner: PeftRunner, answers: Answers) -> None:
    prompt = draw_prompt(7, 600)  # longer than two of the cache's pages, which are what is shared
    turns = ("json", "french", "json", None, "french")
    expected = [answers(adapter, prompt, 8) for adapter in turns]
    assert len(set(map(tuple, expected))) == 3, "the adapters answer differently"

    async def ask(shares_prefixes: bool) -> list[list[int]]:
        batcher = ContinuousBatches(runner, 4, 1.0, shares_prefixes=shares_prefixes)
        async with serving(BaselineKind.TRANSFORMERS_CB_GROUPED, runner, batcher=batcher) as client:
            return [(await complete(client, adapter, prompt, 8)).token_ids for adapter in turns]

    async def scenario() -> None:
        assert await ask(shares_prefixes=False) == expected
        assert await ask(shares_prefixes=True) != expected, "transformers tells adapters apart now: share prefixes"

    run(scenario())


def test_an_adapter_s_turn_comes_while_another_is_in_demand(runner: PeftRunner) -> None:
    async def scenario() -> None:
        batcher = ContinuousBatches(runner, 4, switch_seconds=0.0)
        left = list(range(200))
        async with serving(BaselineKind.TRANSFORMERS_CB_GROUPED, runner, batcher=batcher) as client:

            async def keep_asking() -> None:
                while left:
                    left.pop()
                    await complete(client, "json", [5, 6, 7], 8)

            crowd = [asyncio.create_task(keep_asking()) for _ in range(2)]
            await complete(client, "json", [5, 6, 7], 8)
            await complete(client, "pirate", [5, 6, 7], 8)
            assert left, "it did not wait for the crowd to go"
            left.clear()
            await asyncio.gather(*crowd)

    run(scenario())


@pytest.mark.parametrize("kind", BaselineKind)
def test_stopping_ends_a_long_answer_and_the_threads(kind: BaselineKind, runner: PeftRunner) -> None:
    settings = BaselineSettings(kind=kind, base=BASE_DIR, adapters=ADAPTERS_DIR, max_wait_seconds=0.0)

    async def scenario() -> None:
        threads = threading.active_count()
        batcher = start_batcher(settings, runner)
        request = GenerationRequest(prompt=[5, 6], adapter="json", max_tokens=1000, ignore_eos=True)
        running, waiting = (Job(request, StepStream()) for _ in range(2))
        try:
            batcher.submit(running)
            steps = aiter(running.stream)
            await anext(steps)
            batcher.submit(waiting)
        finally:
            await asyncio.to_thread(batcher.close)
        with pytest.raises(BaselineError, match="stopping"):
            async for _ in steps:
                pass
        with pytest.raises(BaselineError, match="stopping"):
            async for _ in waiting.stream:
                pass
        late = Job(request, StepStream())
        batcher.submit(late)
        with pytest.raises(BaselineError, match="stopping"):
            await anext(aiter(late.stream))
        assert threading.active_count() <= threads + 1, "to_thread's own may be left"

    run(scenario())


def test_after_a_failure_nothing_is_answered_wrongly(runner: PeftRunner) -> None:
    async def scenario() -> None:
        batcher = static_batches(runner, is_mixed=False, max_batch=4, max_wait_seconds=0.0)
        try:
            for token in (5000, 5):  # the first is beyond the vocabulary
                job = Job(GenerationRequest(prompt=[token], adapter=None, max_tokens=2), StepStream())
                batcher.submit(job)
                with pytest.raises(BaselineError, match="PEFT failed: IndexError"):
                    await anext(aiter(job.stream))
        finally:
            await asyncio.to_thread(batcher.close)

    run(scenario())


def test_who_hangs_up_while_waiting_is_not_answered(runner: PeftRunner) -> None:
    async def scenario() -> None:
        async with serving(BaselineKind.PEFT_GROUPED, runner, max_wait_seconds=SHORT_WAIT_SECONDS) as client:
            gone = asyncio.create_task(complete(client, "json", [5, 6], 1500))
            await asyncio.sleep(SHORT_WAIT_SECONDS / 5)  # it waits for others to join its batch
            gone.cancel()
            answer = await complete(client, "json", [5, 6], 3)
            assert len(answer.token_ids) == 3

    run(scenario())


def test_who_hangs_up_frees_the_adapter_s_turn(runner: PeftRunner, answers: Answers) -> None:
    async def scenario() -> None:
        batcher = ContinuousBatches(runner, 4, switch_seconds=60.0)
        gone, other = (
            Job(GenerationRequest(prompt=[5, 6], adapter=name, max_tokens=8 if name else 1500, ignore_eos=True), stream)
            for name, stream in ((None, StepStream()), ("pirate", StepStream()))
        )
        try:
            batcher.submit(gone)
            await anext(aiter(gone.stream))
            batcher.submit(other)
            gone.stream.is_abandoned = True
            assert [step.token async for step in other.stream] == answers("pirate", [5, 6], 8)
            assert gone.stream._events.qsize() < 1499, "it was not computed to its end"
        finally:
            await asyncio.to_thread(batcher.close)

    run(scenario())


def test_a_batch_of_one_adapter_is_the_oldest_one_s() -> None:
    async def scenario() -> None:
        jobs = [
            Job(GenerationRequest(prompt=[1], adapter=adapter, max_tokens=1), StepStream())
            for adapter in ("a", None, "a", "b")
        ]
        assert one_adapter(jobs) == [jobs[0], jobs[2]]
        assert one_adapter(jobs[1:]) == [jobs[1]]

    run(scenario())


def write_config(folder: Path, **fields: Any) -> None:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))


def test_adapters_that_cannot_be_served_are_named(tmp_path: Path) -> None:
    write_config(tmp_path / "ia3" / "vectors", peft_type="IA3")
    write_config(tmp_path / "dora" / "split", peft_type="LORA", use_dora=True)
    write_config(tmp_path / "both" / "plain", peft_type="LORA")
    write_config(tmp_path / "both" / "vectors", peft_type="IA3")
    write_config(tmp_path / "prompts" / "soft", peft_type="PROMPT_TUNING")
    for name in ("ia3", "dora"):
        adapters = find_adapters(tmp_path / name)
        with pytest.raises(SpecError, match=r"PEFT cannot mix it.*use peft-grouped"):
            check_adapters(BaselineKind.PEFT_MIXED, adapters)
        for kind in (BaselineKind.PEFT_GROUPED, BaselineKind.TRANSFORMERS_CB_GROUPED):
            check_adapters(kind, adapters)
    for kind in BaselineKind:
        with pytest.raises(SpecError, match="'vectors': it is IA3 and 'plain' is LORA"):
            check_adapters(kind, find_adapters(tmp_path / "both"))
        with pytest.raises(SpecError, match="'soft': it is PROMPT_TUNING"):
            check_adapters(kind, find_adapters(tmp_path / "prompts"))


def test_peft_itself_cannot_mix_what_is_refused() -> None:
    """The day it can, this fails and the refusal can go."""
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32).eval()
    token_ids = torch.tensor([[5], [6]])
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # PEFT reads properties that transformers deprecates
        of_base = model(input_ids=token_ids).logits
        vectors = PeftModel.from_pretrained(model, ADAPTERS_DIR / "capitals", adapter_name="capitals").eval()
        named = vectors(input_ids=token_ids, adapter_names=["__base__", "__base__"]).logits
        with pytest.raises(ValueError, match="combine adapters with different peft types"):
            vectors.load_adapter(ADAPTERS_DIR / "json", adapter_name="json")
    assert not torch.allclose(named, of_base, atol=0.1), "it names the base and gets the adapter"


def test_a_tokenizer_file_is_taken_as_it_is(tmp_path: Path) -> None:
    """transformers' own class for a Qwen2 makes no token at all of words that are no byte pairs."""
    SHAPES["tiny"].write_config(tmp_path)
    write_word_tokenizer(tmp_path, SHAPES["tiny"].vocabulary_size)
    tokenizer = load_tokenizer(tmp_path)
    words = WORDS[:5]
    assert chat_tokens(tokenizer, [{"role": "user", "content": " ".join(words)}]) == [3, 4, 5, 6, 7]
    text = TokenText(tokenizer)
    assert [text.piece(token).strip() for token in (3, 4)] == list(words[:2])


def test_a_prompt_without_tokens_is_refused(runner: PeftRunner, tmp_path: Path) -> None:
    write_word_tokenizer(tmp_path, SHAPES["tiny"].vocabulary_size)

    async def scenario() -> None:
        async with serving(BaselineKind.PEFT_MIXED, runner, tokenizer=load_tokenizer(tmp_path)) as client:
            response = await client.post("/v1/completions", json={"prompt": "  ", "max_tokens": 2})
            assert (response.status, (await response.json())["error"]["code"]) == (400, "empty_prompt")

    run(scenario())
