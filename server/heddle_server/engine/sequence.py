"""A request in flight: its tokens, its pages and how far it has been computed. No torch."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from heddle_adapters.tier import Tier
from heddle_server.engine.grammar import GrammarState
from heddle_server.messages import TokenLogprobs
from heddle_server.request import Request


def empty_pages() -> array[int]:
    """Page numbers as 32-bit integers, which the model runner reads without converting them."""
    return array("i")


@dataclass(eq=False)  # two requests are never the same one
class Sequence:
    """Prompt and answer of one request. Changed by the scheduler and the engine only."""

    request: Request
    token_ids: list[int]  # prompt, then generated tokens, as far as the host knows them
    max_num_tokens: int = sys.maxsize  # prompt and answer together, when the answer ends at the latest
    num_unread: int = 0  # tokens after those that have been sampled and not been read from the device: 0 or 1
    slot: int | None = None  # the adapter's line in the row table while running; BASE_SLOT for the base
    pages: array[int] = field(default_factory=empty_pages)  # KV pages, in order; the first may be shared
    page_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full pages
    num_entered: int = 0  # leading pages that were offered to the prefix cache
    num_computed: int = 0  # tokens whose keys and values lie in the pages
    num_cached: int = 0  # prompt tokens found in the prefix cache at first admission
    tier: Tier | None = None  # where its adapter was when it arrived; None for the base
    arrived_at: float = 0.0  # on the monotonic clock
    started_at: float | None = None  # when it was first admitted
    load_seconds: float = 0.0  # of the time between, until its adapter was on the device
    num_overtaken: int = 0  # requests that were started while this one waited for room
    grammar: GrammarState | None = None  # what its answer must follow
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # if asked for, as far as the host knows them
    num_prompt_tokens: int = field(init=False)
    num_unscored: int = field(init=False)  # last prompt tokens whose logprobs are asked for and not computed
    changes_logits: bool = field(init=False)  # these three are looked at for every sequence in every step
    reads_tokens: bool = field(init=False)
    answer_counts: Counter[int] = field(default_factory=Counter)  # how often the answer has each token, if reads_tokens

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.num_prompt_tokens = len(self.request.prompt_token_ids)
        # Nothing comes before the first token that it could be judged by.
        self.num_unscored = 0 if sampling.num_prompt_logprobs is None else self.num_prompt_tokens - 1
        self.changes_logits = sampling.changes_logits
        self.reads_tokens = sampling.reads_tokens

    @classmethod
    def of(cls, request: Request, max_model_len: int = sys.maxsize) -> Sequence:
        num_prompt_tokens = len(request.prompt_token_ids)
        max_num_tokens = min(num_prompt_tokens + request.sampling.max_tokens, max_model_len)
        return cls(request, list(request.prompt_token_ids), max_num_tokens)

    @cached_property
    def prompt_tokens(self) -> frozenset[int]:
        return frozenset(self.request.prompt_token_ids)

    def append(self, token_id: int) -> None:
        """One more token of the answer has come to be known."""
        self.token_ids.append(token_id)
        if self.reads_tokens:
            self.answer_counts[token_id] += 1
        if self.grammar is not None:
            self.grammar.advance(token_id)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_unread

    @property
    def num_generated(self) -> int:
        """Tokens of the answer that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def is_full(self) -> bool:
        """Whether the answer ends, for its length alone, with the last token that was sampled."""
        return self.num_tokens >= self.max_num_tokens

    @property
    def num_pending(self) -> int:
        """Tokens known but not computed: one while decoding, more while prefilling."""
        return len(self.token_ids) + self.num_unread - self.num_computed

    @property
    def is_decoding(self) -> bool:
        num_tokens = self.num_tokens
        return num_tokens - self.num_computed == 1 and num_tokens > self.num_prompt_tokens
