"""One request as a model sees it, and its answer token by token. Knows no HTTP, no text and no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Greedy, always."""

    prompt: list[int]  # token ids
    adapter: str | None  # None: the base
    max_tokens: int
    ignore_eos: bool = False  # go on after an end-of-sequence token, up to max_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One token of an answer; the last one has a finish reason, and with `stop` it is the end-of-sequence token."""

    token: int
    finish_reason: FinishReason | None = None


@dataclass
class Answer:
    """What one request has got so far."""

    request: GenerationRequest
    end_token_ids: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    def take(self, token: int) -> Step | None:
        """The answer's next step; None if it was complete before."""
        if self.is_done:
            return None
        self.tokens.append(token)
        reason: FinishReason | None = None
        if token in self.end_token_ids and not self.request.ignore_eos:
            reason = "stop"
        elif len(self.tokens) == self.request.max_tokens:
            reason = "length"
        self.is_done = reason is not None
        return Step(token, reason)
