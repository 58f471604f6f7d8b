"""What one arm of the serving benchmark does, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from heddle_demo.bench.mixes import Mix

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Generation:
    """One batch, answered."""

    token_ids: list[list[int]]  # of each request, its new tokens
    seconds: float
    prefill_seconds: float | None = None  # until every request had its first token; None where nobody can say

    @property
    def tokens_per_second(self) -> float:
        """New tokens, prompts computed on the way."""
        return sum(map(len, self.token_ids)) / self.seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """New tokens after each request's first, over the time after the prefill."""
        if self.prefill_seconds is None:
            return None
        return sum(len(tokens) - 1 for tokens in self.token_ids) / (self.seconds - self.prefill_seconds)


class Arm(Protocol):
    """One way to serve a batch."""

    name: str

    def generate(self, prompts: Prompts, mix: Mix, num_new_tokens: int) -> Generation:
        """Exactly so many tokens for every prompt, greedily."""
