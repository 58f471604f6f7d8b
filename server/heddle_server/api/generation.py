"""One admitted request while it is answered: engine outputs to text, counted and timed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from heddle_server.api.adapter_choice import AdapterChoice
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

    text: str
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
        stop: Sequence[str],
        is_continuation: bool,
        created: int,
        engine: EngineClient,
        tokenizer: Tokenizer,
        end_token_ids: frozenset[int],
        place: Place,
        held: ExitStack,
        on_damaged: Callable[[str, str], None],
        metrics: Metrics,
    ) -> None:
        """`held` is closed at the end; `on_damaged` is told each digest that the engine found damaged, and why."""
        self.public_id = uuid.uuid4().hex
        self.created = created  # Unix seconds
        self.adapters = adapters
        self.tokenizer = tokenizer
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_generated_tokens = 0
        self.num_cached_tokens = 0
        self.admission: AdmissionReport | None = None  # comes with the first token
        self.ttft_seconds: float | None = None  # from admission to the first token
        self._request = request
        self._engine = engine
        self._end_token_ids = end_token_ids
        self._text = TextStream(tokenizer, stop, request.prompt_token_ids if is_continuation else ())
        self._place = place
        self._held = held
        self._on_damaged = on_damaged
        self._metrics = metrics
        self._outcome = "disconnect"  # until something else ends it
        self._started = time.monotonic()
        self._last_token = self._started

    @property
    def adapter_name(self) -> str | None:
        """As the client wrote it; None for the base and for mixes."""
        return self.adapters.single.reference if self.adapters.single else None

    def __enter__(self) -> Self:
        self._metrics.waiting_adapters.add(self.adapters.references)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._held.close()
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
        text = self._text.push(self._shown(output))
        finish_reason = "stop" if self._text.is_stopped else output.finish_reason
        if finish_reason:
            text += self._text.finish()
        return Delta(text, output.token_ids, output.logprobs or (), finish_reason)

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
