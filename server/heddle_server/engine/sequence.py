"""A request in flight: its tokens, its pages and how far it has been computed. No torch."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from heddle_adapters.positions import END
from heddle_adapters.tier import Tier
from heddle_kernels.segments import BASE_SLOT
from heddle_server.engine.grammar import GrammarState
from heddle_server.messages import TokenLogprobs
from heddle_server.request import Request

if TYPE_CHECKING:  # device_rows needs torch; this file does not
    from heddle_adapters.device_rows import PlacedAdapter

ALL_TOKENS = ((0, END),)


def empty_pages() -> array[int]:
    """Page numbers as 32-bit integers, which the model runner reads without converting them."""
    return array("i")


@dataclass(eq=False)  # two requests are never the same one
class Sequence:
    """Prompt and answer of one request. Changed by the scheduler and the engine only."""

    request: Request
    token_ids: list[int]  # virtual tokens, prompt, then generated tokens, as far as the host knows them
    max_num_tokens: int = sys.maxsize  # of all of them, when the answer ends at the latest
    num_unread: int = 0  # tokens after those that have been sampled and not been read from the device: 0 or 1
    slot: int | None = None  # the adapter's line in the row table while running; BASE_SLOT where it changes nothing
    num_prefix_tokens: int = 0  # leading tokens whose keys and values the adapter brings: they are never computed
    prefix_pages: list[int] = field(default_factory=list)  # pages of the adapter that hold those, while running
    pages: array[int] = field(default_factory=empty_pages)  # KV pages, in order; the first may be shared
    page_keys: list[bytes] = field(default_factory=list)  # prefix-cache keys of the leading full pages
    num_entered: int = 0  # leading pages that were offered to the prefix cache
    num_computed: int = 0  # tokens whose keys and values lie in the pages
    num_cached: int = 0  # the prompt's own tokens found in the prefix cache at first admission
    tier: Tier | None = None  # where its adapter was when it arrived; None for the base
    arrived_at: float = 0.0  # on the monotonic clock
    started_at: float | None = None  # when it was first admitted
    load_seconds: float = 0.0  # of the time between, until its adapter was on the device
    num_overtaken: int = 0  # requests that were started while this one waited for room
    grammar: GrammarState | None = None  # what its answer must follow
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)  # if asked for, as far as the host knows them
    changed: tuple[tuple[int, int], ...] | None = field(init=False)  # (begin, end) of the tokens that its adapters
    # change, ascending and apart; None until these have been on the device
    has_one_slot: bool = field(init=False)  # whether all of its tokens use `slot`
    num_prompt_tokens: int = field(init=False)  # virtual ones included, as in all numbers of tokens here
    num_unscored: int = field(init=False)  # last prompt tokens whose logprobs are asked for and not computed
    changes_logits: bool = field(init=False)  # these three are looked at for every sequence in every step
    reads_tokens: bool = field(init=False)
    answer_counts: Counter[int] = field(default_factory=Counter)  # how often the answer has each token, if reads_tokens

    def __post_init__(self) -> None:
        sampling = self.request.sampling
        self.changed = None if self.request.adapters else ()
        self.has_one_slot = not self.request.adapters
        num_told = len(self.request.prompt_token_ids)
        self.num_prompt_tokens = self.request.num_virtual_tokens + num_told
        # Nothing that is the client's comes before the first token that it could be judged by.
        self.num_unscored = 0 if sampling.num_prompt_logprobs is None else num_told - 1
        self.changes_logits = sampling.changes_logits
        self.reads_tokens = sampling.reads_tokens

    @classmethod
    def of(cls, request: Request, max_model_len: int = sys.maxsize, vocabulary_size: int = 0) -> Sequence:
        """`vocabulary_size`: the first id of virtual tokens."""
        virtual = range(vocabulary_size, vocabulary_size + request.num_virtual_tokens)
        token_ids = [*virtual, *request.prompt_token_ids]
        return cls(request, token_ids, min(len(token_ids) + request.sampling.max_tokens, max_model_len))

    def bind(self, placed: PlacedAdapter | None) -> None:
        """Its adapters are on the device: `placed` is the one that it uses, None of the base and of mixes.

        Called whenever the sequence is started, before its pages are looked for: an adapter's pages move, and what it
        changes is found out once.
        """
        if placed is not None:
            assert placed.num_prefix_tokens in (0, self.request.num_virtual_tokens), "admitted with another prefix"
            assert placed.positions.are_all or not self.request.num_virtual_tokens, "virtual tokens have no positions"
            self.num_prefix_tokens, self.prefix_pages = placed.num_prefix_tokens, placed.prefix_pages
            self.reads_tokens |= placed.answers_tokens  # the host says which tokens have rows of the adapter
        if self.changed is None:
            self.changed = ALL_TOKENS if placed is None else placed.positions.ranges(self.request.prompt_token_ids)
            self.has_one_slot = self.changed in ((), ALL_TOKENS)

    def changed_between(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(begin, end) of the tokens among begin .. end - 1 that its adapter changes."""
        assert self.changed is not None, "a sequence is bound before it is computed"
        clipped = [(max(first, begin), min(last, end)) for first, last in self.changed]
        return [span for span in clipped if span[0] < span[1]]

    def runs(self, begin: int, end: int) -> list[tuple[int, int]]:
        """(slot, number of tokens) of its tokens begin .. end - 1, run by run: its adapter's slot or the base's."""
        assert self.slot is not None, "a planned sequence has a slot"
        if self.has_one_slot:  # nearly always, and this is asked for every sequence in every step
            return [(self.slot, end - begin)] if begin < end else []
        runs = list[tuple[int, int]]()
        for first, last in self.changed_between(begin, end):
            if begin < first:
                runs.append((BASE_SLOT, first - begin))
            runs.append((self.slot, last - first))
            begin = last
        if begin < end:
            runs.append((BASE_SLOT, end - begin))
        return runs

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
