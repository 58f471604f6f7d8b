"""From a valid wire request to an `Answer` that the engine can run: adapter, prompt tokens, grammar, limits, seed.

All that can be refused is refused here, before the first byte of an answer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from heddle_adapters.errors import AdapterNotFound
from heddle_adapters.names import RESERVED_NAME
from heddle_server.api.adapter_choice import AdapterChoice
from heddle_server.api.adapter_holds import AdapterHolds
from heddle_server.api.answer_format import AnswerFormat
from heddle_server.api.answer_reader import AnswerReader
from heddle_server.api.chat_template import TEMPLATE_VARIABLES, ChatTemplate
from heddle_server.api.engine_client import EngineClient
from heddle_server.api.errors import (
    AdapterConflict,
    ContextLengthExceeded,
    EngineUnavailable,
    InvalidRequest,
    ModelNotFound,
    did_you_mean,
)
from heddle_server.api.generation import Answer, Generation
from heddle_server.api.grammar_checker import GrammarChecker
from heddle_server.api.metrics import Metrics
from heddle_server.api.overload import LoadGate, Place
from heddle_server.api.protocol import ChatCompletionRequest, CompletionRequest, GenerationRequest, Message
from heddle_server.api.text_stream import TextStream
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.api.tools import NamedTool, ToolCall
from heddle_server.api.wire_fields import AdapterField, ScaledAdapter
from heddle_server.messages import ModelCard
from heddle_server.request import LOCAL_TENANT, Request, SamplingParams

BASE_NAME = RESERVED_NAME
MAX_ANSWERS = 128
MAX_PROMPT_LOGPROBS = 200_000

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
        answer_format: AnswerFormat | None,
        grammars: GrammarChecker,
        holds: AdapterHolds,
        gate: LoadGate,
        on_damaged: Callable[[str, str], None],
        metrics: Metrics,
    ) -> None:
        """`answer_format`: None for a base whose answers are text and nothing else; `on_damaged` is told the digest of
        content that the engine found damaged, and why."""
        self.model_name = model_name
        self._engine = engine
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        self._answer_format = answer_format
        self._grammars = grammars
        self._holds = holds
        self._gate = gate
        self._on_damaged = on_damaged
        self._metrics = metrics
        self._request_ids = itertools.count(1)

    async def admit_chat(self, body: ChatCompletionRequest, tenant: str) -> Answer:
        """A chat: the template makes the prompt, the answer may fill the context."""
        return await self._admit(body, tenant, lambda: asyncio.to_thread(self._chat_prompts, body))

    async def admit_completion(self, body: CompletionRequest, tenant: str) -> Answer:
        """A plain completion: each answer goes on from its prompt's text."""
        return await self._admit(body, tenant, lambda: asyncio.to_thread(self._completion_prompts, body))

    def require_engine(self) -> ModelCard:
        """The model that answers; raises `EngineUnavailable` while there is none."""
        if self._engine.model is None or not self._engine.is_ready:
            raise EngineUnavailable("The model is not ready: it is loading or restarting. Try again shortly.")
        return self._engine.model

    def chat_token_ids(self, body: ChatCompletionRequest) -> list[int]:
        """The prompt of a chat, as `admit_chat` makes it; takes its time, so off the event loop."""
        (prompt,) = self._chat_prompts(body)
        return prompt.token_ids

    def is_base_name(self, name: str) -> bool:
        return name in ("", BASE_NAME, self.model_name)

    def asked_adapters(self, body: GenerationRequest) -> tuple[ScaledAdapter, ...]:
        """Which adapters `model` and `adapter` together ask for; none is the base."""
        by_model = None if body.model is None or self.is_base_name(body.model) else body.model
        named = self._named_adapter(body)
        if named is None:
            return () if by_model is None else (ScaledAdapter(name=by_model),)
        asked = self._by_adapter(named)
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

    async def _admit(self, body: AnyBody, tenant: str, make_prompts: Callable[[], Awaitable[list[_Prompt]]]) -> Answer:
        model = self.require_engine()
        self._check_token_ids(body, model.vocabulary_size)
        with ExitStack() as held:
            place = self._gate.enter(tenant)
            held.callback(place.leave)
            adapters = self._bind(body, tenant)
            held.callback(self._holds.release, adapters)
            prompts = await make_prompts()
            for prompt in prompts:  # of text too: a tokenizer may know tokens that the base was never trained on
                check_vocabulary(prompt.token_ids, model.vocabulary_size, _prompt_param(body))
            answered = [prompt for prompt in prompts for _ in range(body.num_choices)]
            _check_together(body, answered)
            grammar = await self._grammar(body, tenant, prompts, model)
            seed = random.getrandbits(63) if body.seed is None else body.seed
            requests = [
                self._request(
                    prompt,
                    _sampling(
                        body,
                        _max_tokens(body, len(prompt.token_ids), adapters.num_virtual_tokens, model.max_model_len),
                        (seed + index) % 2**63,
                        grammar,
                    ),
                    adapters,
                    tenant,
                )
                for index, prompt in enumerate(answered)
            ]
            is_cold = any(self._engine.tier_of(part.digest) != "device" for part in adapters.parts)
            places = [place, *place.take_more(len(answered) - 1)]
            for each in places[1:]:
                held.callback(each.leave)
            place.queue(places, [len(prompt.token_ids) for prompt in answered], is_cold=is_cold)
            generations = [
                self._generation(body, request, prompt, adapters, place)
                for request, prompt, place in zip(requests, answered, places, strict=True)
            ]
            self.require_engine()
            return Answer(generations, self._tokenizer, held.pop_all())

    def _generation(
        self, body: AnyBody, request: Request, prompt: _Prompt, adapters: AdapterChoice, place: Place
    ) -> Generation:
        reader = self._reader(body, prompt)
        marks_are_special = (
            reader is not None and self._answer_format is not None and self._answer_format.has_special_marks
        )
        is_chat = isinstance(body, ChatCompletionRequest)
        return Generation(
            request,
            adapters=adapters,
            prompt_text=prompt.text if isinstance(body, CompletionRequest) and body.echo else None,
            text=TextStream(
                self._tokenizer,
                body.stop,
                () if is_chat and not prompt.is_continued else prompt.token_ids,
                num_free_tokens=body.min_tokens or 0,
                keep_stop=bool(body.include_stop_str_in_output),
                skip_special_tokens=body.skip_special_tokens is not False and not marks_are_special,
            ),
            reader=reader,
            engine=self._engine,
            end_token_ids=frozenset(self.require_engine().eos_token_ids) | frozenset(request.sampling.stop_token_ids),
            place=place,
            on_damaged=self._on_damaged,
            metrics=self._metrics,
        )

    def _reader(self, body: AnyBody, prompt: _Prompt) -> AnswerReader | None:
        """What takes the answer apart; None where an answer is words and nothing else."""
        if self._answer_format is None or isinstance(body, CompletionRequest):
            return None
        template = self._answer_format.template(has_tools=bool(body.offered_tools))
        if template["fields"].keys() <= {"content"}:
            return None
        tools = [tool.model_dump(exclude_none=True) for tool in body.offered_tools]
        return AnswerReader(template, prompt.begun, tools, is_parallel=body.parallel_tool_calls is not False)

    async def _grammar(self, body: AnyBody, tenant: str, prompts: Sequence[_Prompt], model: ModelCard) -> str | None:
        """What the answer must follow, tried out; raises `InvalidRequest`."""
        is_forced = isinstance(body, ChatCompletionRequest) and bool(body.forced_tools)
        if not is_forced and body.response_format is None:
            return None
        param = "tools" if is_forced else "response_format"
        try:
            grammar = await asyncio.to_thread(self._answer_grammar, body, prompts[0])
        except ValueError as error:  # numbers beyond 64 bits, for one
            raise InvalidRequest(f"{param!r} cannot be followed: {error}", param=param) from None
        if grammar is None:
            return None
        await self._grammars.check(grammar, model.vocabulary_size, model.eos_token_ids, tenant=tenant, param=param)
        return grammar

    def _answer_grammar(self, body: AnyBody, prompt: _Prompt) -> str | None:
        if isinstance(body, ChatCompletionRequest) and body.forced_tools:
            assert self._answer_format is not None, "a prompt with tools was made"
            is_parallel = body.parallel_tool_calls is not False and not isinstance(body.tool_choice, NamedTool)
            grammar: str | None = self._answer_format.call_grammar(body.forced_tools, is_parallel=is_parallel)
        else:
            grammar = body.response_format.grammar if body.response_format is not None else None
        reader = None if grammar is None else self._reader(body, prompt)
        if grammar is None or reader is None or self._answer_format is None or reader.reasoning_is_over:
            return grammar
        return self._answer_format.after_reasoning(grammar, is_open=reader.reasoning_is_open)

    def _named_adapter(self, body: GenerationRequest) -> AdapterField | None:
        return body.adapter_id if body.adapter is None else body.adapter

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
        if single.rank is not None:
            raise InvalidRequest("The base has no rank; only adapters have.", param="adapter.rank")
        return ()

    def _bind(self, body: GenerationRequest, tenant: str) -> AdapterChoice:
        """The versions that serve this request from its first to its last token, whatever is uploaded meanwhile."""
        try:
            return self._holds.bind(self.asked_adapters(body), tenant)
        except AdapterNotFound as error:
            if self._named_adapter(body) is not None or body.model is None:
                raise
            raise self.model_not_found(body.model, error.nearest) from None

    def _chat_prompts(self, body: ChatCompletionRequest) -> list[_Prompt]:
        if body.tools and not (self._chat_template.knows("tools") and self._answer_format is not None):
            raise InvalidRequest(
                "This model was not trained to call tools: its chat template knows none.", param="tools"
            )
        messages = [_template_message(message) for message in body.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        variables = self._template_variables(body)
        render = partial(self._chat_template.render, messages, tools, variables=variables)
        if body.continue_final_message:
            text = begun = self._chat_template.render_open(messages, tools, variables=variables)
        else:
            text = render(add_generation_prompt=body.add_generation_prompt is not False)
            before = render(add_generation_prompt=False) if self._answer_format is not None else ""
            begun = text.removeprefix(before) if text.startswith(before) else ""
        # The template wrote the special tokens itself.
        token_ids = self._tokenizer.encode(text, add_special_tokens=False)
        return [_Prompt(token_ids, begun=begun, is_continued=bool(body.continue_final_message))]

    def _template_variables(self, body: ChatCompletionRequest) -> dict[str, Any]:
        variables: dict[str, Any] = dict(body.chat_template_kwargs or {})
        if reserved := sorted(TEMPLATE_VARIABLES & variables.keys()):
            message = f"{reserved[0]!r} is a field of its own, not a variable of the chat template."
            raise InvalidRequest(message, param=f"chat_template_kwargs.{reserved[0]}")
        if body.reasoning_effort is not None:
            if not self._chat_template.knows("reasoning_effort"):
                message = "This model's chat template knows no reasoning effort. Leave it out."
                raise InvalidRequest(message, param="reasoning_effort")
            variables["reasoning_effort"] = body.reasoning_effort
        return variables

    def _completion_prompts(self, body: CompletionRequest) -> list[_Prompt]:
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                prompts.append(_Prompt(self._tokenizer.encode(prompt, add_special_tokens=True), text=prompt))
            else:
                text = self._tokenizer.decode(prompt, skip_special_tokens=False) if body.echo else None
                prompts.append(_Prompt(prompt, text=text))
        return prompts

    def _check_token_ids(self, body: AnyBody, vocabulary_size: int) -> None:
        """Raises `InvalidRequest` for tokens that are named and do not exist; also in prompts, before they are text."""
        prompts = body.prompt if isinstance(body, CompletionRequest) else []
        for prompt in prompts:
            if not isinstance(prompt, str):
                check_vocabulary(prompt, vocabulary_size, "prompt")
        check_vocabulary(list(body.logit_bias), vocabulary_size, "logit_bias")
        check_vocabulary(body.stop_token_ids or [], vocabulary_size, "stop_token_ids")

    def _request(self, prompt: _Prompt, sampling: SamplingParams, adapters: AdapterChoice, tenant: str) -> Request:
        return Request(
            request_id=next(self._request_ids),
            prompt_token_ids=prompt.token_ids,
            sampling=sampling,
            adapters=adapters.parts,
            num_virtual_tokens=adapters.num_virtual_tokens,
            tenant=tenant,
            cache_salt=b"" if tenant == LOCAL_TENANT else tenant.encode(),
        )


@dataclass(frozen=True)
class _Prompt:
    """What an answer goes on from."""

    token_ids: list[int]
    text: str | None = None  # as the client wrote it, or would have
    begun: str = ""  # what the chat template has written of the answer
    is_continued: bool = False  # whether the answer goes on in the middle of a text


def _prompt_param(body: AnyBody) -> str:
    return "messages" if isinstance(body, ChatCompletionRequest) else "prompt"


def _check_together(body: AnyBody, answered: Sequence[_Prompt]) -> None:
    """Bounds what one request may ask for; raises `InvalidRequest`."""
    if len(answered) > MAX_ANSWERS:
        message = f"{len(answered)} answers in one request are more than {MAX_ANSWERS}. Send fewer prompts at once."
        raise InvalidRequest(message, param="n")
    if isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None:
        num_logprobs = sum(len(prompt.token_ids) for prompt in answered) * (1 + body.logprobs)
        if num_logprobs > MAX_PROMPT_LOGPROBS:
            raise InvalidRequest(
                f"'echo' with 'logprobs' would be {num_logprobs} logprobs of the prompts' tokens, more than the "
                f"{MAX_PROMPT_LOGPROBS} of one reply. Send less at once.",
                param="echo",
            )


def _sampling(body: AnyBody, max_tokens: int, seed: int, grammar: str | None) -> SamplingParams:
    if (body.min_tokens or 0) > max_tokens:
        message = f"min_tokens is {body.min_tokens}, and there is room for {max_tokens} tokens at most."
        raise InvalidRequest(message, param="min_tokens")
    is_echo = isinstance(body, CompletionRequest) and bool(body.echo)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(body.temperature, 1.0),
        top_p=_given(body.top_p, 1.0),
        top_k=max(_given(body.top_k, 0), 0),
        min_p=_given(body.min_p, 0.0),
        seed=seed,
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=_given(body.min_tokens, 0),
        presence_penalty=_given(body.presence_penalty, 0.0),
        frequency_penalty=_given(body.frequency_penalty, 0.0),
        repetition_penalty=_given(body.repetition_penalty, 1.0),
        logit_bias=tuple(sorted(body.logit_bias.items())),
        grammar=grammar,
        num_logprobs=body.num_logprobs,
        num_prompt_logprobs=body.num_logprobs if is_echo else None,
    )


def _scaled(adapter: str | ScaledAdapter) -> ScaledAdapter:
    return ScaledAdapter(name=adapter) if isinstance(adapter, str) else adapter


def _given(value: Number | None, default: Number) -> Number:
    return default if value is None else value


def _template_message(message: Message) -> dict[str, Any]:
    """As chat templates expect it: what is not there is left out, and arguments are an object."""
    said = {
        "role": message.role,
        "content": "" if message.content is None else message.content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
        "tool_calls": [_template_call(call) for call in message.tool_calls or ()] or None,
    }
    return {key: value for key, value in said.items() if value is not None}


def _template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
        json.dumps(arguments, ensure_ascii=False).encode()  # halves of characters can be written in JSON, and not sent
    except (ValueError, RecursionError):
        arguments = call.function.arguments  # the model wrote no JSON, and the template shows what it wrote
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def check_vocabulary(token_ids: list[int], size: int, param: str) -> None:
    """Raises `InvalidRequest` for tokens that do not exist.

    Also for text: a tokenizer may know tokens that were added after the base's training.
    """
    if (beyond := max(token_ids, default=0)) >= size:
        raise InvalidRequest(f"Token id {beyond} is not in the vocabulary of {size} tokens.", param=param)


def _max_tokens(body: AnyBody, num_prompt: int, num_virtual: int, max_model_len: int) -> int:
    """How many tokens the answer may have: a default is clamped to the context, a wish must fit.

    `num_virtual` tokens are put before the prompt by its adapter.
    """
    param = _prompt_param(body)
    room = max_model_len - num_virtual - num_prompt
    # Clients that fall back to a larger model know the overflow by these first words.
    context = f"This model's maximum context length is {max_model_len} tokens"
    if num_virtual:
        context += f", of which the adapter takes {num_virtual} for virtual tokens of its own"
    if num_prompt == 0:
        raise InvalidRequest("The prompt has no tokens.", param=param)
    if room < 1:
        raise ContextLengthExceeded(
            f"{context}; the prompt has {num_prompt} and leaves no room for an answer.", param=param
        )
    limit = body.token_limit
    if limit is None or (limit > room and body.max_tokens is None and isinstance(body, CompletionRequest)):
        return room
    if limit > room:
        raise ContextLengthExceeded(
            f"{context}; the prompt's {num_prompt} and the answer's {limit} exceed it. Ask for at most {room}.",
            param="max_tokens" if body.max_tokens is not None else "max_completion_tokens",
        )
    return limit
