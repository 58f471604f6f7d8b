"""One admitted request while it is answered: engine outputs to text, counted and timed."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import engine_error
from heddle_server.api.metrics import Metrics
from heddle_server.api.text_stream import TextStream
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.messages import FinishReason, TokenLogprobs, TokenOutput
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
        adapter: AdapterVersion | None,
        stop: Sequence[str],
        is_continuation: bool,
        created: int,
        engine: EngineClient,
        tokenizer: Tokenizer,
        end_token_ids: frozenset[int],
        holds: AdapterHolds,
        metrics: Metrics,
    ) -> None:
        self.public_id = uuid.uuid4().hex
        self.created = created  # Unix seconds
        self.adapter = adapter
        self.tokenizer = tokenizer
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.num_generated_tokens = 0
        self.num_cached_tokens = 0
        self._request = request
        self._engine = engine
        self._end_token_ids = end_token_ids
        self._text = TextStream(tokenizer, stop, request.prompt_token_ids if is_continuation else ())
        self._holds = holds
        self._metrics = metrics
        self._outcome = "disconnect"  # until something else ends it
        self._started = time.monotonic()
        self._last_token = self._started

    @property
    def adapter_name(self) -> str | None:
        return self.adapter.name if self.adapter else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._holds.release(self.adapter)
        seconds = time.monotonic() - self._started
        self._metrics.count_request(self._outcome, self.num_prompt_tokens, self.num_generated_tokens, seconds)

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """The answer as it comes; a request the engine cannot finish raises its typed error."""
        # Leaving the engine's iterator early, at a stop string or a disconnect, aborts the request there.
        async with aclosing(self._engine.generate(self._request)) as outputs:
            async for output in outputs:
                if output.finish_reason in ("error", "abort"):
                    self._outcome = "error"
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
            self._metrics.time_to_first_token.observe(now - self._started)
        else:
            self._metrics.inter_token_latency.observe((now - self._last_token) / len(output.token_ids))
        self._last_token = now
