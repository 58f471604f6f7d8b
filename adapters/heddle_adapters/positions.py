"""Which tokens of a sequence an adapter changes."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec

END = 2**31 - 1  # of a range that goes on for as long as the answer does


class Positions(msgspec.Struct, frozen=True):
    """All tokens, unless one of the fields says otherwise; at most one of the two ways is used.

    An activated LoRA acts from its invocation on: the beginning of the last place where `invocation` occurs in the
    prompt, and nowhere if it does not occur (PEFT 0.21, `tuners/lora/variants.py:calculate_alora_offsets`). A ReFT
    acts on the first and the last tokens of the prompt, at most half of it from either end (pyreft,
    `dataset.py:get_intervention_locations`), and on no token of the answer.
    """

    invocation: tuple[int, ...] = ()  # token ids
    num_first: int = 0
    num_last: int = 0

    @property
    def are_all(self) -> bool:
        return not self.invocation and not self.num_first and not self.num_last

    def ranges(self, prompt_token_ids: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(begin, end) of the changed tokens, ascending and apart; `END` for all that follow."""
        if self.are_all:
            return ((0, END),)
        length = len(prompt_token_ids)
        if self.invocation:
            begin = _last_place(self.invocation, prompt_token_ids)
            return () if begin is None else ((begin, END),)
        num_first, num_last = min(length // 2, self.num_first), min(length // 2, self.num_last)
        first, last = (0, num_first), (length - num_last, length)
        if first[1] == last[0]:
            return ((0, length),) if length else ()
        return tuple(span for span in (first, last) if span[0] < span[1])


def _last_place(wanted: Sequence[int], token_ids: Sequence[int]) -> int | None:
    """Where `wanted` occurs last. Searched backwards as bytes, whose search never takes the product of both lengths."""
    backwards, pattern = (array("q", tokens[::-1]).tobytes() for tokens in (token_ids, wanted))
    width = array("q").itemsize
    found = backwards.find(pattern)
    while found >= 0 and found % width:  # between two tokens
        found = backwards.find(pattern, found + 1)
    return None if found < 0 else len(token_ids) - found // width - len(wanted)
