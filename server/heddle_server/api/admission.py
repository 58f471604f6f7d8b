"""From a valid wire request to a `Generation` the engine can run: adapter, prompt tokens, limits, seed.

All that can be refused is refused here, before the first byte of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

from heddle_adapters.errors import AdapterNotFound
from heddle_adapters.names import RESERVED_NAME
from heddle_server.api.adapter_choice import AdapterChoice
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
from heddle_server.api.overload import LoadGate
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, Message
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.api.wire_fields import ScaledAdapter
from heddle_server.messages import ModelCard
from heddle_server.request import LOCAL_TENANT, Request, SamplingParams

BASE_NAME = RESERVED_NAME

AnyBody = ChatCompletionRequest | CompletionRequest
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
        holds: AdapterHolds,
        gate: LoadGate,
        on_damaged: Callable[[str, str], None],
        metrics: Metrics,
    ) -> None:
        """`on_damaged` is told the digest of content that the engine found damaged, and why."""
        self.model_name = model_name
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._holds = holds
        self._gate = gate
        self._on_damaged = on_damaged
        self._metrics = metrics
        self._request_ids = itertools.count(1)

    async def admit_chat(self, body: ChatCompletionRequest) -> Generation:
        """A chat: the template makes the prompt, the answer may fill the context."""
        return await self._admit(body, lambda: asyncio.to_thread(self._chat_prompt, body.messages))

    async def admit_completion(self, body: CompletionRequest) -> Generation:
        """A plain completion: the answer goes on from the prompt's text."""
        return await self._admit(body, lambda: self._completion_prompt(body.prompt))

    def is_base_name(self, name: str) -> bool:
        return name in ("", BASE_NAME, self.model_name)

    def asked_adapters(self, body: GenerationRequest) -> tuple[ScaledAdapter, ...]:
        """Which adapters `model` and `adapter` together ask for; none is the base."""
        by_model = None if body.model is None or self.is_base_name(body.model) else body.model
        if body.adapter is None:
            return () if by_model is None else (ScaledAdapter(name=by_model),)
        asked = self._by_adapter(body.adapter)
        if by_model is not None and [each.name for each in asked] != [by_model]:
            raise AdapterConflict(
                f"'model' asks for adapter {by_model!r} and 'adapter' for "
                f"{' and '.join(repr(each.name) for each in asked) or repr(BASE_NAME)}. "
                f"Name one adapter, or set 'model' to {self.model_name!r}.",
                param="adapter",
            )
        return asked

    def model_not_found(self, name: str, nearest: Sequence[str]) -> ModelNotFound:
        """The error for a `model` that is neither the base nor an adapter; `nearest` are adapters of a similar name."""
        hint = did_you_mean(name, [BASE_NAME, self.model_name, *nearest])
        hint = hint or " GET /v1/models lists those that do."
        return ModelNotFound(f"Model {name[:96]!r} does not exist.{hint}", param="model")

    async def _admit(self, body: AnyBody, encode_prompt: Callable[[], Awaitable[list[int]]]) -> Generation:
        self._require_engine()
        with ExitStack() as held:
            place = self._gate.enter(LOCAL_TENANT)
            held.callback(place.leave)
            adapters = self._bind(body)
            held.callback(self._holds.release, adapters)
            request = self._request(body, adapters, await encode_prompt())
            is_cold = any(self._engine.tier_of(part.digest) != "device" for part in request.adapters)
            place.queue(len(request.prompt_token_ids), is_cold=is_cold)
            model = self._require_engine()
            return Generation(
                request,
                adapters=adapters,
                stop=body.stop,
                is_continuation=isinstance(body, CompletionRequest),
                created=int(time.time()),
                engine=self._engine,
                tokenizer=self._tokenizer,
                end_token_ids=frozenset(model.eos_token_ids) | frozenset(request.sampling.stop_token_ids),
                place=place,
                held=held.pop_all(),
                on_damaged=self._on_damaged,
                metrics=self._metrics,
            )

    def _by_adapter(self, adapter: str | ScaledAdapter | list[str | ScaledAdapter]) -> tuple[ScaledAdapter, ...]:
        if isinstance(adapter, list):
            mix = tuple(_scaled(each) for each in adapter)
            for number, each in enumerate(mix):
                if self.is_base_name(each.name):
                    message = "The base is part of every mix as it is, so it cannot be named in one; leave it out."
                    raise InvalidRequest(message, param=f"adapter.{number}")
            return mix
        single = _scaled(adapter)
        if not single.name:  # an unset variable of the client's, more likely than a wish for the base
            raise InvalidRequest(f"The adapter's name is empty; leave it out, or say {BASE_NAME!r}.", param="adapter")
        if not self.is_base_name(single.name):
            return (single,)
        if single.scale != 1.0:
            raise InvalidRequest("The base has no scale; only adapters have.", param="adapter.scale")
        return ()

    def _bind(self, body: GenerationRequest) -> AdapterChoice:
        """The versions that serve this request from its first to its last token, whatever is uploaded meanwhile."""
        try:
            return self._holds.bind(self.asked_adapters(body))
        except AdapterNotFound as error:
            if body.adapter is not None or body.model is None:
                raise
            raise self.model_not_found(body.model, error.nearest) from None

    def _require_engine(self) -> ModelCard:
        if self._engine.model is None or not self._engine.is_ready:
            raise EngineUnavailable("The model is not ready: it is loading or restarting. Try again shortly.")
        return self._engine.model

    def _chat_prompt(self, messages: Sequence[Message]) -> list[int]:
        text = self._chat_template.render([_template_message(message) for message in messages])
        # The template wrote the special tokens itself.
        return self._tokenizer.encode(text, add_special_tokens=False)

    async def _completion_prompt(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        return await asyncio.to_thread(self._tokenizer.encode, prompt, add_special_tokens=True)

    def _request(self, body: AnyBody, adapters: AdapterChoice, prompt: list[int]) -> Request:
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
        return Request(
            request_id=next(self._request_ids),
            prompt_token_ids=prompt,
            sampling=sampling,
            adapters=adapters.parts,
            tenant=LOCAL_TENANT,
        )


def _scaled(adapter: str | ScaledAdapter) -> ScaledAdapter:
    return ScaledAdapter(name=adapter) if isinstance(adapter, str) else adapter


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _template_message(message: Message) -> dict[str, str]:
    named = {} if message.name is None else {"name": message.name}
    return {"role": message.role, "content": message.content, **named}


def _check_vocabulary(token_ids: list[int], size: int, param: str) -> None:
    """Also for text: a tokenizer may know tokens that were added after the base was trained."""
    if (beyond := max(token_ids, default=0)) >= size:
        raise InvalidRequest(f"Token id {beyond} is not in the vocabulary of {size} tokens.", param=param)


def _max_tokens(body: AnyBody, num_prompt: int, max_model_len: int) -> int:
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
