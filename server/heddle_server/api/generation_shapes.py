"""The shapes of answers over HTTP, whole and as chunks of a stream, for the description of the API."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from heddle_adapters.tier import Tier

FinishReason = Literal["stop", "length"]
Milliseconds = Annotated[float | None, Field(ge=0)]


class MixedAdapter(TypedDict):
    """One adapter of a mix."""

    name: Annotated[str, Field(description="As the request named it.")]
    version: int
    digest: str
    scale: float
    rank: NotRequired[Annotated[int, Field(ge=1, description="Where the request gave one.")]]


class Source(TypedDict):
    """Which weights gave the answer, and what it waited for. heddle's own."""

    adapter: Annotated[str | None, Field(description="As the request named it; null for the base and for a mix.")]
    version: int | None
    digest: Annotated[str | None, Field(description="Of the weights that answered; null for the base.")]
    adapters: NotRequired[Annotated[list[MixedAdapter], Field(description="Of a mix, or of one with a scale or rank.")]]
    cache: Annotated[Tier | None, Field(description="Where the adapter was when it was asked for; null for the base.")]
    load_ms: Annotated[Milliseconds, Field(description="Waited for the adapter.")]
    queue_ms: Annotated[Milliseconds, Field(description="Waited for the first step, the adapter included.")]
    ttft_ms: Annotated[Milliseconds, Field(description="To the first token.")]


class PromptTokensDetails(TypedDict):
    """Where the prompt's tokens came from."""

    cached_tokens: Annotated[int, Field(ge=0, description="Found in the prefix cache.")]


class CompletionTokensDetails(TypedDict):
    """What the answers' tokens were for."""

    reasoning_tokens: Annotated[int, Field(ge=1)]


class Usage(TypedDict):
    """Tokens of all prompts and answers; each prompt counts once, however many answers it gets."""

    prompt_tokens: Annotated[int, Field(ge=0)]
    completion_tokens: Annotated[int, Field(ge=0)]
    total_tokens: Annotated[int, Field(ge=0)]
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[Annotated[CompletionTokensDetails, Field(description="Where some are.")]]


class TopLogprob(TypedDict):
    """A token that was likely, too."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """How likely the answer's tokens were."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunctionShape(TypedDict):
    """What is called."""

    name: str
    arguments: Annotated[str, Field(description="JSON text.")]


class ToolCallShape(TypedDict):
    """One call of a tool."""

    id: str
    type: Literal["function"]
    function: CalledFunctionShape


class ChatMessage(TypedDict):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCallShape]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[Annotated[str, Field(description="Another name for reasoning_content.")]]


class ChatChoice(TypedDict):
    """One of the answers."""

    index: Annotated[int, Field(ge=0)]
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"]


class ReplyHead(TypedDict):
    """What every reply begins with."""

    id: str
    created: Annotated[int, Field(description="Unix time in seconds.")]
    model: Annotated[str, Field(description="As the request named it.")]
    system_fingerprint: Annotated[
        str, Field(description="Another one, and the same request may be answered otherwise; adapters aside.")
    ]


class ChatCompletion(ReplyHead):
    """A whole answer to a chat."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    heddle: Source


class CalledFunctionDelta(TypedDict):
    """A piece of a call."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A piece of a call: the first has its id and name, the next its arguments."""

    index: Annotated[int, Field(ge=0)]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class ChatDelta(TypedDict):
    """What a chunk adds to the assistant's turn."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]
    reasoning_content: NotRequired[str]
    reasoning: NotRequired[str]


class ChatChunkChoice(TypedDict):
    """What a chunk adds to one of the answers."""

    index: Annotated[int, Field(ge=0)]
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | Literal["tool_calls"] | None


class ChunkTail(ReplyHead):
    """What only some chunks have."""

    usage: NotRequired[
        Annotated[Usage | None, Field(description="With stream_options.include_usage: null until the last chunk.")]
    ]
    heddle: NotRequired[Annotated[Source, Field(description="With an answer's last chunk.")]]


class ChatCompletionChunk(ChunkTail):
    """A piece of a streamed answer to a chat."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]


class TextLogprobs(TypedDict):
    """How likely the tokens were, as lists of the same length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(TypedDict):
    """One of the answers."""

    index: Annotated[int, Field(ge=0)]
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(ReplyHead):
    """A whole answer that goes on from a prompt."""

    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    heddle: Source


class TextChunkChoice(TypedDict):
    """What a chunk adds to one of the answers."""

    index: Annotated[int, Field(ge=0)]
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextCompletionChunk(ChunkTail):
    """A piece of a streamed answer that goes on from a prompt."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]


class Tokenized(TypedDict):
    """A text's tokens."""

    count: Annotated[int, Field(ge=0)]
    max_model_len: Annotated[int, Field(description="Tokens that fit into one request, prompt and answer.")]
    tokens: list[int]
    token_strs: NotRequired[Annotated[list[str], Field(description="With return_token_strs.")]]


class Detokenized(TypedDict):
    """The text of tokens."""

    prompt: str
