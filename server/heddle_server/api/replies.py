"""The JSON of answers, as OpenAI's own client validates it: whole replies and stream chunks.

A reply object belongs to one answer and keeps what a whole reply collects from its deltas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from heddle_server.api.answer_reader import CalledTool, Parts
from heddle_server.api.answer_source import Json, final_headers, source_of
from heddle_server.api.errors import envelope
from heddle_server.api.generation import Answer, Delta, Generation
from heddle_server.api.tokenizer import Tokenizer
from heddle_server.messages import TokenLogprobs

TokenPairs = Sequence[tuple[int, TokenLogprobs]]


@dataclass
class Choice:
    """One of a reply's answers, as far as it has come."""

    index: int
    generation: Generation
    deltas: list[Delta] = field(default_factory=list)  # of a whole reply
    num_calls: int = 0  # of tools
    finish_reason: str | None = None
    has_begun: bool = False  # whether anything of it was told

    def count(self, delta: Delta) -> None:
        """One more delta has come."""
        self.num_calls += len(delta.parts.tool_calls)
        if delta.finish_reason is not None:
            is_call = delta.finish_reason == "stop" and self.num_calls
            self.finish_reason = "tool_calls" if is_call else delta.finish_reason

    @property
    def parts(self) -> Parts:
        """All that a whole reply's deltas came to."""
        return Parts(
            "".join(delta.parts.content for delta in self.deltas),
            "".join(delta.parts.reasoning for delta in self.deltas),
            tuple(call for delta in self.deltas for call in delta.parts.tool_calls),
        )

    @property
    def tokens(self) -> TokenPairs:
        return [pair for delta in self.deltas for pair in tokens_of(delta)]


class Reply:
    """What chat and plain completions share. Subclasses shape the choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str
    has_named_events = False

    def __init__(
        self, answer: Answer, model: str, fingerprint: str, *, include_usage: bool, continuous_usage: bool
    ) -> None:
        """`fingerprint` changes when the same request may be answered otherwise, adapters aside."""
        self._answer = answer
        self._model = model  # as the client named it
        self._fingerprint = fingerprint
        self._include_usage = include_usage or continuous_usage
        self._continuous_usage = continuous_usage
        self._choices = [Choice(index, generation) for index, generation in enumerate(answer.generations)]

    def take(self, number: int, delta: Delta) -> None:
        """One more delta of a whole reply."""
        self._choices[number].count(delta)
        self._choices[number].deltas.append(delta)

    def whole(self) -> Json:
        """The reply to a request that does not stream, when all is taken."""
        choices = [{"index": choice.index, **self._whole_choice(choice)} for choice in self._choices]
        return {**self._head(self.whole_object), "choices": choices, "usage": self._usage(), **self._source()}

    def final_headers(self) -> dict[str, str]:
        """What is known of a whole reply besides its body."""
        return final_headers(self._answer)

    def opening(self) -> Iterator[Json]:
        """Chunks sent before the first token."""
        yield from ()

    def chunks(self, number: int, delta: Delta) -> Iterator[Json]:
        """What one delta adds. Tokens that are a piece of a character or of a possible stop string say nothing yet."""
        choice = self._choices[number]
        choice.count(delta)
        contents = list(self._chunk_contents(choice, delta))
        if choice.finish_reason is not None and not contents:
            contents = [self._empty_content()]
        for content in contents:
            is_last = content is contents[-1] and choice.finish_reason is not None
            chunk = self._chunk(choice, content, choice.finish_reason if is_last else None)
            yield {**chunk, **self._source()} if is_last else chunk

    def closing(self) -> Iterator[Json]:
        """Chunks sent after the last token."""
        if self._include_usage:
            yield {**self._head(self.chunk_object), "choices": [], "usage": self._usage()}

    def failing(self, error: Exception) -> Iterator[Json]:
        """Chunks sent when the answer ends in an error."""
        yield envelope(error)

    def _chunk(self, choice: Choice, content: Json, finish_reason: str | None) -> Json:
        chunk = {
            **self._head(self.chunk_object),
            "choices": [{"index": choice.index, "logprobs": None, **content, "finish_reason": finish_reason}],
        }
        if self._include_usage:
            chunk["usage"] = self._usage() if self._continuous_usage else None
        return chunk

    def _head(self, object_name: str) -> Json:
        return {
            "id": f"{self.id_prefix}-{self._answer.public_id}",
            "object": object_name,
            "created": self._answer.created,
            "model": self._model,
            "system_fingerprint": self._fingerprint,
        }

    def _usage(self) -> Json:
        """Each prompt counts once, however many answers it gets."""
        first = dict[int, Generation]()  # the answers after it found what it had computed
        for each in self._answer.generations:
            first.setdefault(id(each.prompt_token_ids), each)
        prompts = first.values()
        prompt = sum(each.num_prompt_tokens for each in prompts)
        generated = sum(each.num_generated_tokens for each in self._answer.generations)
        usage: Json = {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens for each in prompts)},
        }
        if reasoning := sum(each.num_reasoning_tokens for each in self._answer.generations):
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage

    def _source(self) -> Json:
        return {"heddle": source_of(self._answer)}

    def _whole_choice(self, choice: Choice) -> Json:
        raise NotImplementedError

    def _chunk_contents(self, choice: Choice, delta: Delta) -> Iterable[Json]:
        raise NotImplementedError

    def _empty_content(self) -> Json:
        raise NotImplementedError


class ChatReply(Reply):
    """chat.completion and chat.completion.chunk"""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> Iterator[Json]:
        for choice in self._choices:
            yield self._chunk(choice, {"delta": {"role": "assistant", "content": ""}}, None)

    def _whole_choice(self, choice: Choice) -> Json:
        parts = choice.parts
        message: Json = {"role": "assistant", "content": parts.content, "refusal": None}
        if parts.tool_calls:
            message["content"] = parts.content or None
            message["tool_calls"] = [_called(call) for call in parts.tool_calls]
        if parts.reasoning:
            message.update(_reasoning(parts.reasoning))
        return {
            "message": message,
            "logprobs": _chat_logprobs(self._answer.tokenizer, choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_contents(self, choice: Choice, delta: Delta) -> Iterable[Json]:
        logprobs = _chat_logprobs(self._answer.tokenizer, tokens_of(delta))
        contents = list(_chat_deltas(choice, delta.parts))
        if not contents and logprobs is None:
            return
        for number, content in enumerate(contents or [{}]):
            yield {"delta": content, "logprobs": logprobs if number == 0 else None}

    def _empty_content(self) -> Json:
        return {"delta": {}}


class CompletionReply(Reply):
    """text_completion, whole or as a chunk"""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._offsets = [0 for _ in self._choices]  # characters of token text told so far

    def _whole_choice(self, choice: Choice) -> Json:
        return {
            "text": self._prompt_text(choice) + choice.parts.content,
            "logprobs": self._logprobs(choice, choice.tokens),
            "finish_reason": choice.finish_reason,
        }

    def _chunk_contents(self, choice: Choice, delta: Delta) -> Iterable[Json]:
        text = self._prompt_text(choice) + delta.parts.content
        logprobs = self._logprobs(choice, tokens_of(delta))
        if text or logprobs:
            choice.has_begun = True
            yield {"text": text, "logprobs": logprobs}

    def _empty_content(self) -> Json:
        return {"text": ""}

    def _prompt_text(self, choice: Choice) -> str:
        return "" if choice.has_begun else choice.generation.prompt_text or ""

    def _logprobs(self, choice: Choice, pairs: TokenPairs) -> Json | None:
        generation, tokenizer = choice.generation, self._answer.tokenizer
        rows: list[tuple[int, TokenLogprobs | None]] = [*pairs]
        if generation.prompt_logprobs is not None and not choice.has_begun:
            # Nothing comes before the first token that it could be judged by.
            prompt = zip(generation.prompt_token_ids, (None, *generation.prompt_logprobs), strict=True)
            rows = [*prompt, *rows]
        if not rows:
            return None
        tokens = [tokenizer.token_text(token_id) for token_id, _ in rows]
        offsets = []
        for token in tokens:
            offsets.append(self._offsets[choice.index])
            self._offsets[choice.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [described.logprob if described else None for _, described in rows],
            "top_logprobs": [
                # The best last: two tokens may look the same, as pieces of characters do.
                {tokenizer.token_text(top_id): logprob for top_id, logprob in reversed(described.top)}
                if described
                else None
                for _, described in rows
            ],
            "text_offset": offsets,
        }


def _chat_deltas(choice: Choice, parts: Parts) -> Iterator[Json]:
    if parts.reasoning:
        yield _reasoning(parts.reasoning)
    if parts.content:
        yield {"content": parts.content}
    for index, call in enumerate(parts.tool_calls, start=choice.num_calls - len(parts.tool_calls)):
        named = {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}}
        yield {"tool_calls": [{"index": index, **named}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": call.arguments}}]}


def _called(call: CalledTool) -> Json:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _reasoning(text: str) -> Json:
    """Under both names that clients look for."""
    return {"reasoning_content": text, "reasoning": text}


def _chat_logprobs(tokenizer: Tokenizer, pairs: TokenPairs) -> Json | None:
    entries = logprob_entries(tokenizer, pairs)
    return {"content": entries, "refusal": None} if entries else None


def logprob_entries(tokenizer: Tokenizer, pairs: TokenPairs) -> list[Json]:
    """Tokens with their logprobs and those of the likeliest, as chats and responses tell them."""

    def entry(token_id: int, logprob: float) -> Json:
        token_bytes = tokenizer.token_bytes(token_id)
        return {"token": token_bytes.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token_bytes)}

    return [
        {**entry(token_id, described.logprob), "top_logprobs": [entry(*top) for top in described.top]}
        for token_id, described in pairs
    ]


def tokens_of(delta: Delta) -> TokenPairs:
    """A delta's tokens with what is known of each; none where nobody asked."""
    return list(zip(delta.token_ids, delta.logprobs, strict=False))
