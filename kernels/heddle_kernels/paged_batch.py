"""Where a flattened batch's tokens read and write their keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Sequences of a step, their new tokens side by side in one flat batch. Filled by the model runner."""

    query_start: Tensor  # [num_sequences + 1] int32, bounds of each sequence's new tokens
    length: Tensor  # [num_sequences] int32, tokens of each sequence after this step; 0 = nobody sits here
    page_table: Tensor  # [num_sequences, max_pages] int32, pages of each sequence in order, then zeros
    write_slot: Tensor  # [num_tokens] int64, page * page_tokens + place in it, of each new token
    query_bounds: tuple[int, ...]  # query_start on the host
    lengths: tuple[int, ...]  # length on the host

    @property
    def is_decode(self) -> bool:
        """Whether every sequence has exactly one new token."""
        return self.query_bounds[-1] == len(self.lengths)

    @property
    def max_query_tokens(self) -> int:
        return max((end - begin for begin, end in pairwise(self.query_bounds)), default=0)

    @property
    def max_length(self) -> int:
        return max(self.lengths, default=0)
