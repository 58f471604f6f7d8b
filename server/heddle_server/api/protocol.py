"""The wire types of generation requests, as OpenAI defines them, with heddle's `adapter` added.

Every field of OpenAI's is here: acted upon, accepted because it cannot change the answer (`Ignored`), or accepted
at its neutral value only (`neutral`). A field that is not here is an error.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from heddle_server.api.response_format import ResponseFormat
from heddle_server.api.tools import MAX_TOOLS, CallId, FunctionTool, NamedTool, ToolCall, ToolChoice
from heddle_server.api.wire_fields import (
    MAX_REFERENCE_LENGTH,
    AdapterField,
    Ignored,
    LogitBias,
    MessageText,
    Prompts,
    StopStrings,
    TemplateVariables,
    WireModel,
    invalid,
    neutral,
)
from heddle_server.request import MAX_LOGPROBS

MAX_MESSAGES = 512
MAX_STOP_TOKENS = 64
MAX_CHOICES = 8
MAX_INTEGER = 2**31 - 1


class StreamOptions(WireModel):
    """What a stream carries beside the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Annotated[object, neutral(False)] = None


class Message(WireModel):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: MessageText | None = None
    name: Annotated[str | None, Field(max_length=64)] = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MAX_TOOLS)] = None
    tool_call_id: CallId | None = None
    reasoning_content: str | None = None
    reasoning: Annotated[str | None, Field(description="Another name for reasoning_content.")] = None
    # What clients send back when they repeat an assistant's turn as they got it.
    refusal: Annotated[object, neutral()] = None
    annotations: Annotated[object, neutral([])] = None
    audio: Annotated[object, neutral()] = None
    function_call: Annotated[object, neutral()] = None
    parsed: Ignored = None  # what OpenAI's own clients made of content

    @model_validator(mode="after")
    def _fits_its_role(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise invalid(f"a message of role {self.role!r} has no tool_calls; only the assistant's have", "tool_calls")
        if (self.tool_call_id is None) == (self.role == "tool"):
            raise invalid(
                "a message of role 'tool' needs the tool_call_id that it answers, and no other has one", "tool_call_id"
            )
        if self.content is None and not self.tool_calls:
            raise invalid(f"a message of role {self.role!r} needs content", "content")
        return self


class GenerationRequest(WireModel):
    """What chat and plain completions share."""

    model: Annotated[str | None, Field(max_length=MAX_REFERENCE_LENGTH)] = None
    adapter: AdapterField | None = None
    adapter_id: Annotated[
        str | None, Field(max_length=MAX_REFERENCE_LENGTH, description="LoRAX's and TGI's name for `adapter`.")
    ] = None

    stream: bool | None = None
    stream_options: StreamOptions | None = None

    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_INTEGER)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=-1, le=MAX_INTEGER, description="-1 and 0: all tokens")] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.01, le=100)] = None
    logit_bias: LogitBias = Field(default_factory=dict)
    n: Annotated[int | None, Field(ge=1, le=MAX_CHOICES, description="How many answers.")] = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: StopStrings = Field(default_factory=list)
    stop_token_ids: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_INTEGER)]] | None, Field(max_length=MAX_STOP_TOKENS)
    ] = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Field(ge=0, le=MAX_INTEGER)] = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None

    # Not served.
    length_penalty: Annotated[object, neutral(1)] = None
    best_of: Annotated[object, neutral(1)] = None
    use_beam_search: Annotated[object, neutral(False)] = None
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

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def token_limit(self) -> int | None:
        """Tokens of the answer that the client has set as its limit."""
        return self.max_tokens

    @model_validator(mode="after")
    def _what_is_shared_agrees(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options needs 'stream': true", "stream_options")
        if self.adapter is not None and self.adapter_id is not None:
            raise invalid("adapter and adapter_id name the same thing; send adapter only", "adapter_id")
        if self.min_tokens and self.token_limit is not None and self.min_tokens > self.token_limit:
            raise invalid(
                f"min_tokens is {self.min_tokens}, more than the {self.token_limit} that are allowed at most",
                "min_tokens",
            )
        return self


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_INTEGER)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    tools: Annotated[list[FunctionTool] | None, Field(max_length=MAX_TOOLS)] = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Annotated[str | None, Field(max_length=32, description="Given to the chat template.")] = None
    add_generation_prompt: bool | None = None
    continue_final_message: Annotated[bool | None, Field(description="The answer goes on from the last message.")] = (
        None
    )
    chat_template_kwargs: TemplateVariables | None = None

    functions: Annotated[object, neutral([])] = None  # what tools and tool_choice were called before
    function_call: Annotated[object, neutral("none")] = None
    modalities: Annotated[object, neutral(["text"])] = None
    audio: Annotated[object, neutral()] = None
    web_search_options: Annotated[object, neutral()] = None

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
            raise invalid("top_logprobs needs 'logprobs': true", "top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise invalid("max_tokens and max_completion_tokens differ; send max_completion_tokens only", "max_tokens")
        if self.continue_final_message and (self.add_generation_prompt or self.messages[-1].role != "assistant"):
            raise invalid(
                "continue_final_message goes on from a last message of role 'assistant', without add_generation_prompt",
                "continue_final_message",
            )
        self._check_tools()
        return self

    def _check_tools(self) -> None:
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise invalid("two tools have the same name", "tools")
        if self.tool_choice not in (None, "none", "auto") and not names:
            raise invalid("tool_choice asks for a call, and there are no tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise invalid(
                f"tool_choice names {self.tool_choice.function.name!r}, which is not among the tools", "tool_choice"
            )
        if self.forced_tools and self.response_format is not None and self.response_format.type != "text":
            raise invalid(
                "tool_choice asks for a call and response_format for something else; leave one of them out",
                "tool_choice",
            )

    @property
    def offered_tools(self) -> list[FunctionTool]:
        """Tools that the answer may call."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def forced_tools(self) -> list[FunctionTool]:
        """Tools of which the answer has to call one."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools or () if tool.function.name == self.tool_choice.function.name]
        return (self.tools or []) if self.tool_choice == "required" else []


class CompletionRequest(GenerationRequest):
    """POST /v1/completions"""

    prompt: Prompts
    logprobs: Annotated[int | None, Field(ge=0, le=MAX_LOGPROBS)] = None

    echo: Annotated[bool | None, Field(description="The reply begins with the prompt.")] = None
    suffix: Annotated[object, neutral("")] = None

    @property
    def token_limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens  # OpenAI's default

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs
