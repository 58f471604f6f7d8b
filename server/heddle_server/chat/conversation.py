"""A conversation with a server: what was said, with which adapter, and what the last answer took."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from heddle_server.server_client import ServerClient

BASE = "base"
CHAT_PATH = "/v1/chat/completions"


@dataclass(frozen=True)
class Figures:
    """What one answer took."""

    ttft_seconds: float  # until its first text was here
    tokens_per_second: float | None  # after the first token; None for an answer of one
    tier: str | None  # where its adapter was; None for the base, and for an answer that was stopped
    load_milliseconds: float | None  # until its adapter was on the device


@dataclass
class Conversation:
    """Its turns so far. One question is asked at a time."""

    client: ServerClient
    model: str = BASE
    adapter: str | None = None  # None: the model as it is
    system: str | None = None
    sampling: dict[str, Any] = field(default_factory=dict)  # fields of the request, such as temperature
    turns: list[dict[str, str]] = field(default_factory=list)

    def ask(self, question: str) -> Generator[str | Figures, None, None]:
        """The answer's text piece by piece, and last what it took; raises `ServerError`.

        What was said of an answer that is left early belongs to the conversation. A question without an answer does
        not.
        """
        turns = [*self.turns, {"role": "user", "content": question}]
        said = list[str]()
        try:
            yield from self._answer(turns, said)
        finally:
            if said:
                self.turns = [*turns, {"role": "assistant", "content": "".join(said)}]

    def start_anew(self) -> None:
        self.turns = []

    def _answer(self, turns: list[dict[str, str]], said: list[str]) -> Generator[str | Figures, None, None]:
        started = time.monotonic()
        first_at: float | None = None
        num_tokens, source = 0, dict[str, Any]()
        with closing(self.client.stream(CHAT_PATH, self._body(turns))) as events:
            for event in events:
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
                source = event.get("heddle") or source
                for choice in event.get("choices", ()):
                    if text := choice["delta"].get("content"):
                        first_at = first_at or time.monotonic()
                        said.append(text)
                        yield text
        ended = time.monotonic()
        first_at = first_at or ended
        yield Figures(
            ttft_seconds=first_at - started,
            tokens_per_second=(num_tokens - 1) / (ended - first_at) if num_tokens > 1 and ended > first_at else None,
            tier=source.get("cache"),
            load_milliseconds=source.get("load_ms"),
        )

    def _body(self, turns: list[dict[str, str]]) -> dict[str, Any]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {"model": self.model, "messages": [*system, *turns], "stream_options": {"include_usage": True}}
        return {**body, **self.sampling, **({} if self.adapter is None else {"adapter": self.adapter})}
