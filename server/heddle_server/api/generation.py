"""One admitted request while it is answered: engine outputs to what is told, counted and timed.

A request may want several answers: each is a `Generation`, a request of its own to the engine.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from heddle_server.api.adapter_choice import AdapterChoice
from heddle_server.api.answer_reader import AnswerReader, Parts
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import engine_error
from heddle_server.api.metrics import Metrics
from heddle_server.api.overload import Place
from heddle_server.api.text_stream import TextStream
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.messages import AdmissionReport, FinishReason, TokenLogprobs, TokenOutput
from heddle_server.request import Request


@dataclass(frozen=True)
class Delta:
    """What one engine output added to the answer."""

    parts: Parts
    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs]  # one per token, or none
    finish_reason: FinishReason | None  # "stop" or "length", with the last


class Generation:
    """Iterate `deltas` once, inside `with`: leaving it ends the request everywhere."""

    def __init__(
        self,
        request: Request,
        *,
        adapters: AdapterChoice,
        prompt_text: str | None,
        text: TextStream,
        reader: AnswerReader | None,
        engine: EngineClient,
        end_token_ids: frozenset[int],
        place: Place,
        on_damaged: Callable[[str, str], None],
        metrics: Metrics,
    ) -> None:
        """`prompt_text`: the prompt where the reply repeats it; `reader` takes the text apart where there is more to it
        than words; `on_damaged` is told each digest that the engine found damaged, and why."""
        self.adapters = adapters
        self.prompt_text = prompt_text
        self.prompt_token_ids = request.prompt_token_ids
        self.prompt_logprobs: Sequence[TokenLogprobs] | None = None  # come with the first token, if asked for
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_generated_tokens = 0
        self.num_reasoning_tokens = 0  # of those
        self.num_cached_tokens = 0
        self.admission: AdmissionReport | None = None  # comes with the first token
        self.ttft_seconds: float | None = None  # from admission to the first token
        self._request = request
        self._engine = engine
        self._end_token_ids = end_token_ids
        self._text = text
        self._reader = reader
        self._place = place
        self._on_damaged = on_damaged
        self._metrics = metrics
        self._outcome = "disconnect"  # until something else ends it
        self._started = time.monotonic()
        self._last_token = self._started

    def __enter__(self) -> Self:
        self._metrics.waiting_adapters.add(self.adapters.references)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.ttft_seconds is None:
            self._metrics.waiting_adapters.remove(self.adapters.references)
        if self._outcome in ("stop", "length"):
            self._place.count_answer(self.num_generated_tokens)
        seconds = time.monotonic() - self._started
        self._metrics.count_request(
            self._outcome, self.adapters.names, self.num_prompt_tokens, self.num_generated_tokens, seconds
        )

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; a request the engine cannot finish raises its typed error."""
        # Leaving the engine's iterator early, at a stop string or a disconnect, aborts the request there.
        async with aclosing(self._engine.generate(self._request)) as outputs:
            async for output in outputs:
                if output.finish_reason in ("error", "abort"):
                    self._outcome = "error"
                    self._report_damage(output)
                    raise engine_error(output.error_code, output.error_message)
                delta = self._delta(output)
                if delta.finish_reason:
                    self._outcome = delta.finish_reason
                yield delta
                if delta.finish_reason:
                    return

    def _delta(self, output: TokenOutput) -> Delta:
        self._time(output)
        self.num_generated_tokens += len(output.token_ids)
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs = output.prompt_logprobs
        text = self._text.push(self._shown(output))
        finish_reason = "stop" if self._text.is_stopped else output.finish_reason
        if finish_reason:
            text += self._text.finish()
        parts = Parts(text) if self._reader is None else self._reader.feed(text)
        if self._reader is not None:
            if self._reader.is_over:
                finish_reason = "stop"
            if finish_reason:
                parts += self._reader.finish()
        if parts.reasoning:
            self.num_reasoning_tokens += len(output.token_ids)
        return Delta(parts, output.token_ids, output.logprobs or (), finish_reason)

    def _shown(self, output: TokenOutput) -> Sequence[int]:
        """The tokens that are text: the one that ended the answer is not."""
        ended = output.finish_reason == "stop" and output.token_ids and output.token_ids[-1] in self._end_token_ids
        return output.token_ids[:-1] if ended else output.token_ids

    def _time(self, output: TokenOutput) -> None:
        if not output.token_ids:
            return
        now = time.monotonic()
        if self.num_generated_tokens == 0:
            self._start(now - self._started, output.admission)
        else:
            self._metrics.inter_token_latency.observe((now - self._last_token) / len(output.token_ids))
        self._last_token = now

    def _start(self, ttft_seconds: float, admission: AdmissionReport | None) -> None:
        self._place.start()
        self._metrics.waiting_adapters.remove(self.adapters.references)
        self.ttft_seconds, self.admission = ttft_seconds, admission
        self._metrics.observe_start(ttft_seconds, admission)

    def _report_damage(self, output: TokenOutput) -> None:
        if output.error_code != "adapter_damaged":
            return
        message = output.error_message or ""
        digests = {each.version.digest for each in self.adapters}
        # The message names the digest; where there is only one adapter, it is that one anyway.
        for digest in digests if len(digests) == 1 else [each for each in digests if each in message]:
            self._on_damaged(digest, message)


class Answer:
    """All that answers one HTTP request. Inside `with`, iterate `deltas` once."""

    def __init__(self, generations: Sequence[Generation], tokenizer: Tokenizer, held: ExitStack) -> None:
        """`held` is closed at the end: places in the server, and the adapters' content."""
        self.public_id = uuid.uuid4().hex
        self.created = int(time.time())  # Unix seconds
        self.generations = generations
        self.tokenizer = tokenizer
        self._held = held

    @property
    def adapters(self) -> AdapterChoice:
        """The same for all."""
        return self.generations[0].adapters

    @property
    def adapter_name(self) -> str | None:
        """As the client wrote it; None for the base and for mixes."""
        return self.adapters.single.reference if self.adapters.single else None

    def __enter__(self) -> Self:
        with ExitStack() as entered:
            entered.enter_context(self._held)
            for generation in self.generations:
                entered.enter_context(generation)
            self._held = entered.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.__exit__(kind, error, trace)

    async def deltas(self) -> AsyncGenerator[tuple[int, Delta], None]:
        """What comes, with the number of the generation it belongs to; one that fails ends all."""
        if len(self.generations) == 1:
            async with aclosing(self.generations[0].deltas()) as deltas:
                async for delta in deltas:
                    yield 0, delta
            return
        coming = asyncio.Queue[tuple[int, Delta | Exception | None]]()
        tasks = [asyncio.create_task(_forward(*each, coming)) for each in enumerate(self.generations)]
        num_open = len(tasks)
        try:
            while num_open:
                number, what = await coming.get()
                if isinstance(what, Exception):
                    raise what
                if what is None:
                    num_open -= 1
                else:
                    yield number, what
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(
    number: int, generation: Generation, coming: asyncio.Queue[tuple[int, Delta | Exception | None]]
) -> None:
    """One generation's deltas, then None or what ended it."""
    try:
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                coming.put_nowait((number, delta))
    except Exception as error:
        coming.put_nowait((number, error))
    else:
        coming.put_nowait((number, None))
