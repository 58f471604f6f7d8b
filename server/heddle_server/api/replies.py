"""The JSON of answers, as OpenAI's own client validates it: whole replies and stream chunks.

A reply object belongs to one generation and keeps what a whole reply collects from its deltas.
"""

from __future__ import annotations

from typing import Any

from heddle_server.api.adapter_choice import AdapterChoice, ChosenAdapter
from heddle_server.api.generation import Delta, Generation
from heddle_server.messages import TokenLogprobs

Json = dict[str, Any]


class Reply:
    """What chat and plain completions share. Subclasses shape the choices."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, generation: Generation, model: str, *, include_usage: bool, continuous_usage: bool) -> None:
        self._generation = generation
        self._model = model  # as the client named it
        self._include_usage = include_usage or continuous_usage
        self._continuous_usage = continuous_usage

    def whole(self, deltas: list[Delta]) -> Json:
        """The reply to a request that does not stream."""
        text = "".join(delta.text for delta in deltas)
        logprobs = self._logprobs(deltas)
        choice = {"index": 0, **self._whole_text(text), "logprobs": logprobs}
        choice["finish_reason"] = deltas[-1].finish_reason
        return {**self._head(self.whole_object), "choices": [choice], "usage": self._usage(), **self._source()}

    def opening(self) -> list[Json]:
        """Chunks sent before the first token."""
        return []

    def chunk(self, delta: Delta) -> Json:
        """What one delta adds."""
        chunk = self._chunk({**self._chunk_text(delta.text), "logprobs": self._logprobs([delta])}, delta.finish_reason)
        return {**chunk, **self._source()} if delta.finish_reason else chunk

    def closing(self) -> list[Json]:
        """Chunks sent after the last token."""
        if not self._include_usage:
            return []
        return [{**self._head(self.chunk_object), "choices": [], "usage": self._usage()}]

    def _chunk(self, choice: Json, finish_reason: str | None) -> Json:
        chunk = {
            **self._head(self.chunk_object),
            "choices": [{"index": 0, "logprobs": None, **choice, "finish_reason": finish_reason}],
        }
        if self._include_usage:
            chunk["usage"] = self._usage() if self._continuous_usage else None
        return chunk

    def _head(self, object_name: str) -> Json:
        return {
            "id": f"{self.id_prefix}-{self._generation.public_id}",
            "object": object_name,
            "created": self._generation.created,
            "model": self._model,
        }

    def _usage(self) -> Json:
        prompt, generated = self._generation.num_prompt_tokens, self._generation.num_generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": self._generation.num_cached_tokens},
        }

    def _source(self) -> Json:
        """heddle's own part: exactly which weights gave the answer, and how long they were waited for."""
        return {"heddle": {**_weights(self._generation.adapters), **self._start()}}

    def _start(self) -> Json:
        admission = self._generation.admission
        return {
            "cache": admission.tier if admission else None,
            "load_ms": _milliseconds(admission.load_seconds if admission else None),
            "queue_ms": _milliseconds(admission.queue_seconds if admission else None),
            "ttft_ms": _milliseconds(self._generation.ttft_seconds),
        }

    def _token_text(self, token_id: int) -> str:
        return self._generation.tokenizer.token_text(token_id)

    def _whole_text(self, text: str) -> Json:
        raise NotImplementedError

    def _chunk_text(self, text: str) -> Json:
        raise NotImplementedError

    def _logprobs(self, deltas: list[Delta]) -> Json | None:
        raise NotImplementedError


class ChatReply(Reply):
    """chat.completion and chat.completion.chunk"""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def opening(self) -> list[Json]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}}, None)]

    def _whole_text(self, text: str) -> Json:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _chunk_text(self, text: str) -> Json:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, deltas: list[Delta]) -> Json | None:
        entries = [
            {
                **self._entry(token_id, logprobs.logprob),
                "top_logprobs": [self._entry(top_id, logprob) for top_id, logprob in logprobs.top],
            }
            for token_id, logprobs in _tokens(deltas)
        ]
        return {"content": entries, "refusal": None} if entries else None

    def _entry(self, token_id: int, logprob: float) -> Json:
        token_bytes = self._generation.tokenizer.token_bytes(token_id)
        return {"token": token_bytes.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(token_bytes)}


class CompletionReply(Reply):
    """text_completion, whole or as a chunk"""

    id_prefix = "cmpl"
    whole_object = "text_completion"
    chunk_object = "text_completion"
    _offset = 0  # characters of token text told so far

    def _whole_text(self, text: str) -> Json:
        return {"text": text}

    def _chunk_text(self, text: str) -> Json:
        return {"text": text}

    def _logprobs(self, deltas: list[Delta]) -> Json | None:
        pairs = _tokens(deltas)
        if not pairs:
            return None
        tokens = [self._token_text(token_id) for token_id, _ in pairs]
        return {
            "tokens": tokens,
            "token_logprobs": [logprobs.logprob for _, logprobs in pairs],
            "top_logprobs": [
                {self._token_text(top_id): logprob for top_id, logprob in logprobs.top} for _, logprobs in pairs
            ],
            "text_offset": [self._advance(token) for token in tokens],
        }

    def _advance(self, token: str) -> int:
        offset, self._offset = self._offset, self._offset + len(token)
        return offset


def _weights(adapters: AdapterChoice) -> Json:
    """An adapter as it was trained by its reference; one that is scaled, or a mix, by its parts."""
    if single := adapters.single:
        version = single.version
        return {"adapter": single.reference, "version": version.version, "digest": version.digest}
    weights: Json = {"adapter": None, "version": None, "digest": adapters.key or None}
    if adapters.adapters:
        weights["adapters"] = [_part(each) for each in adapters]
    return weights


def _part(adapter: ChosenAdapter) -> Json:
    version = adapter.version
    return {
        "name": adapter.reference,
        "version": version.version,
        "digest": version.digest,
        "scale": adapter.scale,
    }


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds * 1000, 2)


def _tokens(deltas: list[Delta]) -> list[tuple[int, TokenLogprobs]]:
    return [pair for delta in deltas for pair in zip(delta.token_ids, delta.logprobs, strict=False)]
