"""The wire types of generation requests, as OpenAI defines them, with heddle's `adapter` added.

Every field of OpenAI's is here: acted upon, accepted because it cannot change the answer (`Ignored`), or accepted
at its neutral value only (`neutral`). A field that is not here is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from heddle_server.api.wire_fields import (
    MAX_REFERENCE_LENGTH,
    AdapterField,
    Ignored,
    MessageText,
    Prompt,
    StopStrings,
    WireModel,
    invalid,
    neutral,
    unsupported,
)
from heddle_server.request import MAX_LOGPROBS

MAX_MESSAGES = 512
MAX_STOP_TOKENS = 64
MAX_INTEGER = 2**31 - 1


def _served_role(role: object) -> object:
    if role in ("tool", "function"):
        raise unsupported(f"The role {role!r}")
    return role


class StreamOptions(WireModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[object, neutral(False)] = None


class Message(WireModel):
    """One turn of a chat."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(_served_role)]
    content: MessageText
    name: Annotated[str | None, Field(max_length=64)] = None
    # What clients send back when they repeat an assistant's turn as they got it.
    refusal: Annotated[object, neutral()] = None
    annotations: Annotated[object, neutral([])] = None
    audio: Annotated[object, neutral()] = None
    tool_calls: Annotated[object, neutral([])] = None
    function_call: Annotated[object, neutral()] = None
    reasoning_content: Annotated[object, neutral("")] = None


class GenerationRequest(WireModel):
    """What chat and plain completions share."""

    model: Annotated[str | None, Field(max_length=MAX_REFERENCE_LENGTH)] = None
    adapter: AdapterField | None = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_INTEGER)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_INTEGER, description="-1 and 0: all tokens")] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]] | None, Field(max_length=MAX_STOP_TOKENS)
    ] = None
    ignore_eos: bool | None = None

    # Not served yet.
    n: Annotated[object, neutral(1)] = None
    frequency_penalty: Annotated[object, neutral(0)] = None
    presence_penalty: Annotated[object, neutral(0)] = None
    repetition_penalty: Annotated[object, neutral(1)] = None
    length_penalty: Annotated[object, neutral(1)] = None
    logit_bias: Annotated[object, neutral({})] = None
    min_p: Annotated[object, neutral(0)] = None
    min_tokens: Annotated[object, neutral(0)] = None
    best_of: Annotated[object, neutral(1)] = None
    use_beam_search: Annotated[object, neutral(False)] = None
    response_format: Annotated[object, neutral({"type": "text"})] = None
    skip_special_tokens: Annotated[object, neutral(True)] = None
    include_stop_str_in_output: Annotated[object, neutral(False)] = None
    return_token_ids: Annotated[object, neutral(False)] = None
    priority: Annotated[object, neutral(0)] = None

    # Cannot change the answer.
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None
    moderation: Ignored = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs 'stream': true")
        return self


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_INTEGER)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    tools: Annotated[object, neutral([])] = None
    tool_choice: Annotated[object, neutral("none")] = None
    parallel_tool_calls: Annotated[object, neutral(True, False)] = None
    functions: Annotated[object, neutral([])] = None
    function_call: Annotated[object, neutral("none")] = None
    reasoning_effort: Annotated[object, neutral("none")] = None
    modalities: Annotated[object, neutral(["text"])] = None
    audio: Annotated[object, neutral()] = None
    web_search_options: Annotated[object, neutral()] = None
    add_generation_prompt: Annotated[object, neutral(True)] = None
    continue_final_message: Annotated[object, neutral(False)] = None
    chat_template_kwargs: Annotated[object, neutral({})] = None

    prediction: Ignored = None
    verbosity: Ignored = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _fields_agree(self) -> ChatCompletionRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs 'logprobs': true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens differ; send max_completion_tokens only")
        return self


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Prompt
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    echo: Annotated[object, neutral(False)] = None
    suffix: Annotated[object, neutral("")] = None

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
