"""From a valid wire request to a `Generation` the engine can run: adapter, prompt tokens, limits, seed.

All that can be refused is refused here, before the first byte of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Sequence
from typing import TypeVar

from heddle_adapters.errors import AdapterNotFound
from heddle_adapters.names import RESERVED_NAME
from heddle_adapters.store import AdapterStore
from heddle_adapters.store_index import AdapterVersion
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.chat_template import ChatTemplate
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import (
    AdapterConflict,
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    did_you_mean,
)
from heddle_server.api.generation import Generation
from heddle_server.api.metrics import Metrics
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, Message
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.messages import ModelCard
from heddle_server.request import Request, SamplingParams

BASE_NAME = RESERVED_NAME

Number = TypeVar("Number", int, float)


class Admission:
    """Admits requests of one server."""

    def __init__(
        self,
        *,
        model_name: str,
        engine: EngineClient,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate,
        store: AdapterStore,
        holds: AdapterHolds,
        metrics: Metrics,
    ) -> None:
        self.model_name = model_name
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._store = store
        self._holds = holds
        self._metrics = metrics
        self._request_ids = itertools.count(1)

    async def admit_chat(self, body: ChatCompletionRequest) -> Generation:
        """A chat: the template makes the prompt, the answer may fill the context."""
        self._require_engine()
        adapter = self._bind(body)
        try:
            prompt = await asyncio.to_thread(self._chat_prompt, body.messages)
            return self._generation(body, adapter, prompt, is_continuation=False)
        except BaseException:
            self._holds.release(adapter)
            raise

    async def admit_completion(self, body: CompletionRequest) -> Generation:
        """A plain completion: the answer goes on from the prompt's text."""
        self._require_engine()
        adapter = self._bind(body)
        try:
            if isinstance(body.prompt, str):
                prompt = await asyncio.to_thread(self._tokenizer.encode, body.prompt, add_special_tokens=True)
            else:
                prompt = body.prompt
            return self._generation(body, adapter, prompt, is_continuation=True)
        except BaseException:
            self._holds.release(adapter)
            raise

    def is_base_name(self, name: str) -> bool:
        return name in ("", BASE_NAME, self.model_name)

    def adapter_name(self, model: str | None, adapter: str | None) -> str | None:
        """Which adapter `model` and `adapter` together ask for; None is the base."""
        by_model = None if model is None or self.is_base_name(model) else model
        if adapter is None:
            return by_model
        by_adapter = None if self.is_base_name(adapter) else adapter
        if by_model not in (None, by_adapter):
            raise AdapterConflict(
                f"'model' asks for adapter {by_model!r} and 'adapter' for {by_adapter or BASE_NAME!r}. "
                f"Name one adapter, or set 'model' to {self.model_name!r}.",
                param="adapter",
            )
        return by_adapter

    def _bind(self, body: ChatCompletionRequest | CompletionRequest) -> AdapterVersion | None:
        """The version that serves this request from its first to its last token, whatever is uploaded meanwhile."""
        name = self.adapter_name(body.model, body.adapter)
        if name is None:
            return None
        try:
            return self._holds.bind(name)
        except AdapterNotFound:
            if body.adapter is not None:
                raise
            raise self.model_not_found(name) from None

    def model_not_found(self, name: str) -> ModelNotFound:
        known = [BASE_NAME, self.model_name, *(each.name for each in self._store.list())]
        return ModelNotFound(f"Model {name[:96]!r} does not exist.{did_you_mean(name, known)}", param="model")

    def _require_engine(self) -> ModelCard:
        if self._engine.model is None or not self._engine.is_ready:
            raise EngineUnavailable("The model is not ready: it is loading or restarting. Try again shortly.")
        return self._engine.model

    def _chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._chat_template.render([_template_message(message) for message in messages])
        # The template wrote the special tokens itself.
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _generation(
        self,
        body: ChatCompletionRequest | CompletionRequest,
        adapter: AdapterVersion | None,
        prompt: list[int],
        *,
        is_continuation: bool,
    ) -> Generation:
        model = self._require_engine()
        param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
        _check_vocabulary(prompt, model.vocabulary_size, param)
        sampling = SamplingParams(
            max_tokens=_max_tokens(body, len(prompt), model.max_model_len),
            temperature=_given(body.temperature, 1.0),
            top_p=_given(body.top_p, 1.0),
            top_k=max(_given(body.top_k, 0), 0),
            seed=random.getrandbits(63) if body.seed is None else body.seed % 2**63,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=bool(body.ignore_eos),
            num_logprobs=body.num_logprobs,
        )
        request = Request(
            request_id=next(self._request_ids),
            prompt_token_ids=prompt,
            sampling=sampling,
            adapter_digest=adapter.digest if adapter else None,
        )
        return Generation(
            request,
            adapter=adapter,
            stop=body.stop,
            is_continuation=is_continuation,
            created=int(time.time()),
            engine=self._engine,
            tokenizer=self._tokenizer,
            end_token_ids=frozenset(model.eos_token_ids) | frozenset(sampling.stop_token_ids),
            holds=self._holds,
            metrics=self._metrics,
        )


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _template_message(message: Message) -> dict[str, str]:
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": message.content, **named}


def _check_vocabulary(token_ids: list[int], size: int, param: str) -> None:
    """Also for text: a tokenizer may know tokens that were added after the base was trained."""
    if (beyond := max(token_ids, default=0)) >= size:
        raise InvalidRequest(f"Token id {beyond} is not in the vocabulary of {size} tokens.", param=param)


def _max_tokens(body: ChatCompletionRequest | CompletionRequest, num_prompt: int, max_model_len: int) -> int:
    """How many tokens the answer may have: a default is clamped to the context, a wish must fit."""
    param = "messages" if isinstance(body, ChatCompletionRequest) else "prompt"
    room = max_model_len - num_prompt
    if num_prompt == 0:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    if room < 1:
        raise ContextLengthExceeded(
            f"The prompt has {num_prompt} tokens and leaves no room for an answer: "
            f"this model's context is {max_model_len} tokens.",
            param=param,
        )
    limit = body.token_limit
    if limit is None or (limit > room and body.max_tokens is None and isinstance(body, CompletionRequest)):
        return room
    if limit > room:
        raise ContextLengthExceeded(
            f"The prompt's {num_prompt} tokens and the answer's {limit} exceed "
            f"this model's context of {max_model_len} tokens. Ask for at most {room}.",
            param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        )
    return limit
