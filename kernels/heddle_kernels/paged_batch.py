"""Where a flattened batch's tokens read and write their keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PagedBatch:
    """Sequences of a step, their new tokens side by side in one flat batch. Filled by the model runner."""

    query_start: tuple[int, ...]  # [num_sequences + 1], bounds of each sequence's new tokens
    length: tuple[int, ...]  # [num_sequences], tokens of each sequence after this step
    pages: tuple[Tensor, ...]  # [num_sequences] of int64 [pages of the sequence], in order
    write_page: Tensor  # [num_tokens] int64, the page each new token is stored in
    write_offset: Tensor  # [num_tokens] int64, its place in that page

    def sequences(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(begin, end, length, pages) of every sequence."""
        yield from zip(self.query_start, self.query_start[1:], self.length, self.pages, strict=False)
