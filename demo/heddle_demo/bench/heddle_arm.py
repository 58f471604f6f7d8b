"""heddle's engine in this process as an arm of the serving benchmark."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from heddle_adapters.mix import AdapterPart
from heddle_adapters.store import AdapterStore
from heddle_demo.bench.failure import BenchFailed
from heddle_demo.bench.generation import Generation, Prompts
from heddle_demo.bench.mixes import Mix
from heddle_demo.bench.random_adapters import RandomAdapters, fill_store
from heddle_server.config import PAGE_TOKENS, DeviceName, EngineConfig, KernelsName, LoadFormat
from heddle_server.engine.engine import Engine
from heddle_server.messages import TokenOutput
from heddle_server.request import LOCAL_TENANT, Request, SamplingParams

WAIT_SECONDS = 0.001  # while the engine waits for an adapter
ROWS_ROOM = 1.2  # of the rows: page ends, and the vectors
SPARE_BYTES = 8 << 20
FIRST_LOAD_SECONDS = 300.0  # for all adapters to be compiled and brought in


class HeddleArm:
    """Over an engine that has all adapters on its device."""

    name = "heddle"

    def __init__(self, engine: Engine, digests: list[str]) -> None:
        """`digests` of the adapters by number."""
        self.engine = engine
        self._digests = digests
        self._request_ids = count(1)

    @property
    def kernels(self) -> str:
        """Which implementation of the operations it computes with."""
        return str(self.engine._runner._ops.name)

    @property
    def sample_seconds(self) -> float:
        """Spent sampling since the start."""
        return float(self.engine._runner.sample_seconds)

    def bring_adapters(self) -> None:
        """One request to each, so that none is loaded while something is measured; from then on all stay."""
        deadline = time.monotonic() + FIRST_LOAD_SECONDS
        self.engine.pin_adapters(dict.fromkeys(self._digests, LOCAL_TENANT))
        for number in range(len(self._digests)):
            self.engine.add(self._request([number], number, num_new_tokens=1))
        while self.engine.has_requests:
            if time.monotonic() > deadline:
                raise BenchFailed(f"the adapters were not loaded within {FIRST_LOAD_SECONDS:.0f} s.")
            self.step()

    def generate(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> Generation:
        """Raises BenchFailed if a request fails, finds its prompt in the cache or waits for its adapter."""
        num_loads = self.engine.stats().num_adapter_loads
        started = time.perf_counter()
        answers = self.prefill(prompts, mix, num_new_tokens)
        prefill_seconds = time.perf_counter() - started
        while self.engine.has_requests:
            for output in self.step():
                answers[output.request_id] += output.token_ids
        seconds = time.perf_counter() - started
        if self.engine.stats().num_adapter_loads > num_loads:
            raise BenchFailed("an adapter was loaded while generating: the pool is too small for this benchmark.")
        return Generation(list(answers.values()), seconds, prefill_seconds)

    def prefill(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> dict[int, list[int]]:
        """Until every request has its first token; the tokens so far by request id."""
        requests = [self._request(prompt, who, num_new_tokens) for prompt, who in zip(prompts, mix, strict=True)]
        answers: dict[int, list[int]] = {request.request_id: [] for request in requests}
        for request in requests:
            self.engine.add(request)
        while not all(answers.values()):
            for output in self.step():
                answers[output.request_id] += output.token_ids
        return answers

    def abort(self, answers: dict[int, list[int]]) -> None:
        """Forget these requests, and the step that may still be under way."""
        for request_id in answers:
            self.engine.abort(request_id)
        self.engine.step()

    def answer(self, prompt: list[int], adapter: int | None, num_new_tokens: int) -> tuple[list[int], Tensor]:
        """Greedy tokens, and the log-probabilities [num_new_tokens, vocabulary] that they were chosen by."""
        vocabulary_size = self.engine.model.vocabulary_size
        self.engine.add(self._request(prompt, adapter, num_new_tokens, num_logprobs=vocabulary_size))
        token_ids, rows = list[int](), list[Tensor]()
        while self.engine.has_requests:
            for output in self.step():
                token_ids += output.token_ids
                rows.append(_row(output, vocabulary_size))
        return token_ids, torch.stack(rows)

    def close(self) -> None:
        self.engine.close()

    def step(self) -> list[TokenOutput]:
        """One step of the engine; raises BenchFailed if anything in it makes a figure worthless."""
        num_steps = self.engine.num_steps
        outputs = self.engine.step()
        for output in outputs:
            if output.error_code is not None:
                raise BenchFailed(f"a request failed: {output.error_message}")
            if output.num_cached_tokens:
                raise BenchFailed("a prompt was found in the prefix cache: it would have been measured for nothing.")
        if not outputs and self.engine.num_steps == num_steps:
            time.sleep(WAIT_SECONDS)
        return outputs

    def _request(
        self, prompt: list[int], adapter: int | None, num_new_tokens: int, num_logprobs: int | None = None
    ) -> Request:
        request_id = next(self._request_ids)
        return Request(
            request_id=request_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(
                max_tokens=num_new_tokens, temperature=0.0, ignore_eos=True, num_logprobs=num_logprobs
            ),
            adapters=() if adapter is None else (AdapterPart(self._digests[adapter]),),
            cache_salt=request_id.to_bytes(8, "big"),  # no prompt is found in the cache
        )


@dataclass(frozen=True, kw_only=True)
class HeddleSettings:
    """How the engine is set up."""

    base: Path
    store: Path
    device: DeviceName
    batch: int
    num_tokens: int  # of one request, prompt and answer
    num_adapters: int
    num_threads: int | None = None
    load_format: LoadFormat = "auto"
    kernels: KernelsName = "auto"


def start_heddle(settings: HeddleSettings, adapters: RandomAdapters, kv_bytes_per_token: int) -> HeddleArm:
    """An engine over a new store of the first adapters, all brought in."""
    fill_store(settings.store, adapters, settings.num_adapters)
    with AdapterStore(settings.store) as store:
        digests = {record.name: record.latest.digest for record in store.list()}
    engine = Engine(
        EngineConfig(
            model_path=str(settings.base),
            model_name=settings.base.name,
            store_path=str(settings.store),
            device=settings.device,
            load_format=settings.load_format,
            kernels=settings.kernels,
            pool_bytes=_pool_bytes(settings, adapters, kv_bytes_per_token),
            max_model_len=_whole_pages(settings.num_tokens + PAGE_TOKENS),
            max_batch_requests=max(settings.batch, settings.num_adapters),
            num_threads=settings.num_threads,
        )
    )
    arm = HeddleArm(engine, [digests[name] for name in adapters.names(settings.num_adapters)])
    arm.bring_adapters()
    return arm


def _pool_bytes(settings: HeddleSettings, adapters: RandomAdapters, kv_bytes_per_token: int) -> int:
    """Room for every adapter and twice the batch: what an earlier batch left in the cache takes nothing away."""
    row_bytes = settings.num_adapters * adapters.mean_row_bytes(settings.num_adapters)
    num_tokens = 2 * settings.batch * _whole_pages(settings.num_tokens + PAGE_TOKENS)
    return int(row_bytes * ROWS_ROOM + num_tokens * kv_bytes_per_token + SPARE_BYTES)


def _whole_pages(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS) * PAGE_TOKENS


def _row(output: TokenOutput, vocabulary_size: int) -> Tensor:
    """The logprobs of one place by token: [vocabulary]."""
    assert output.logprobs is not None
    row = torch.full((vocabulary_size,), -torch.inf)
    for token, logprob in output.logprobs[0].top:
        row[token] = logprob
    return row
