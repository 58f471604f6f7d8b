"""An answer as OpenAI's JSON, chunk by chunk and whole. Knows no HTTP and no model."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from typing import Any

from heddle_loadtest.baseline.request import FinishReason, GenerationRequest, Step
from heddle_loadtest.baseline.token_text import TokenText


class ChatForm:
    """Where /v1/chat/completions has its text."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def chunk(self, text: str, is_first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if is_first else {}
        return {"delta": role | ({"content": text} if text else {})}

    def whole(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text}}


class CompletionForm:
    """Where /v1/completions has it."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def chunk(self, text: str, is_first: bool) -> dict[str, Any]:
        return {"text": text}

    def whole(self, text: str) -> dict[str, Any]:
        return {"text": text}


class Reply:
    """One answer as JSON, step by step and whole."""

    def __init__(
        self, form: ChatForm | CompletionForm, generation: GenerationRequest, text: TokenText, model: str
    ) -> None:
        self._form = form
        self._num_prompt_tokens = len(generation.prompt)
        self._text = text
        self._head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._pieces: list[str] = []
        self._finish_reason: FinishReason | None = None

    def take(self, step: Step) -> dict[str, Any]:
        """The chunk of this step. The end-of-sequence token has no text and counts in the usage, as with heddle."""
        self._finish_reason = step.finish_reason
        self._pieces.append("" if step.finish_reason == "stop" else self._text.piece(step.token))
        choice = self._form.chunk(self._pieces[-1], len(self._pieces) == 1)
        return self._around(self._form.chunk_object, [self._choice(choice)])

    def whole(self) -> dict[str, Any]:
        choice = self._choice(self._form.whole("".join(self._pieces)))
        return self._around(self._form.whole_object, [choice]) | self.usage()

    def usage_chunk(self) -> dict[str, Any]:
        return self._around(self._form.chunk_object, []) | self.usage()

    def usage(self) -> dict[str, Any]:
        counts = {"prompt_tokens": self._num_prompt_tokens, "completion_tokens": len(self._pieces)}
        return {"usage": counts | {"total_tokens": sum(counts.values())}}

    def _choice(self, content: Mapping[str, Any]) -> dict[str, Any]:
        return {"index": 0, **content, "finish_reason": self._finish_reason}

    def _around(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "choices": choices}
