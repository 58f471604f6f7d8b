"""From planned chunks to the tensors that a forward reads: filled on the host, brought to the device in one copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from heddle_server.engine.scheduler import Chunk
from heddle_server.engine.sequence import empty_pages

UNREAD = 0  # stands for a token until the device puts the right one there
ALIGNMENT_BYTES = 16  # of every array in the buffer that is copied


@dataclass(frozen=True)
class StepInputs:
    """One step's chunks side by side, in the order they were given."""

    token_ids: Tensor  # [num_tokens] int64, of the base's vocabulary
    known_tokens: NDArray[np.int64]  # [num_tokens], the same with virtual ones, as the host knows them
    positions: Tensor  # [num_tokens] int64
    logit_rows: Tensor  # [num_logits] int64, the tokens whose logits are wanted
    unread_rows: Tensor  # [num_unread] int64, tokens that only the device knows: the previous step has sampled them
    unread_sources: Tensor  # [num_unread] int64, which of the tokens that step sampled
    paged: PagedBatch

    @classmethod
    def of(
        cls,
        chunks: Sequence[Chunk],
        page_tokens: int,
        vocabulary_size: int,
        device: torch.device,
        previous: Sequence[Chunk] = (),
    ) -> StepInputs:
        """The logits wanted are, chunk by chunk, those that score a prompt token and those of the last token where a
        chunk completes its sequence.

        `previous` are the chunks that the step before this one has sampled tokens for, in that step's order.
        """
        bounds = (0, *accumulate(chunk.num_tokens for chunk in chunks))
        lengths = tuple(chunk.sequence.num_computed + chunk.num_tokens for chunk in chunks)
        num_columns = max(len(chunk.sequence.pages) for chunk in chunks)
        token_ids, pages = list[int](), empty_pages()
        for (sequence, num_new, _), length in zip(chunks, lengths, strict=True):
            token_ids += sequence.token_ids[length - num_new : length] or [UNREAD]
            pages += sequence.pages
            pages.extend(repeat(0, num_columns - len(sequence.pages)))
        page_table = np.frombuffer(pages, np.int32).reshape(len(chunks), num_columns)
        num_new_tokens = np.diff(bounds)
        # How far a token of the sequence lies behind its place in the batch is the same for a whole chunk.
        positions = np.arange(bounds[-1]) + np.repeat(np.subtract(lengths, bounds[1:]), num_new_tokens)
        page = page_table[np.repeat(np.arange(len(chunks)), num_new_tokens), positions // page_tokens]
        write_slot = page.astype(np.int64) * page_tokens + positions % page_tokens
        known_tokens = np.array(token_ids, np.int64)
        source_of = {id(chunk.sequence): source for source, chunk in enumerate(previous)}
        unread = [
            (row, source_of[id(chunk.sequence)])
            for row, chunk in zip(bounds, chunks, strict=False)
            if chunk.sequence.num_unread
        ]
        logit_rows = list[int]()
        for chunk, begin, end in zip(chunks, bounds, bounds[1:], strict=False):
            logit_rows += [begin + number for number in chunk.scored]
            logit_rows += [end - 1] if chunk.completes else []
        tensors = to_device(
            {
                # An adapter answers for a virtual token, whatever the base's embedding is asked for in its place.
                "token_ids": np.where(known_tokens < vocabulary_size, known_tokens, 0),
                "positions": positions,
                "logit_rows": np.array(logit_rows or [0], np.int64),  # the head is never asked for nothing
                "unread_rows": np.array([row for row, _ in unread], np.int64),
                "unread_sources": np.array([source for _, source in unread], np.int64),
                "write_slot": write_slot,
                "query_start": np.array(bounds, np.int32),
                "length": np.array(lengths, np.int32),
                "page_table": page_table,
            },
            device,
        )
        paged = PagedBatch(
            query_start=tensors["query_start"],
            length=tensors["length"],
            page_table=tensors["page_table"],
            write_slot=tensors["write_slot"],
            query_bounds=bounds,
            lengths=lengths,
        )
        return cls(
            tensors["token_ids"],
            known_tokens,
            tensors["positions"],
            tensors["logit_rows"],
            tensors["unread_rows"],
            tensors["unread_sources"],
            paged,
        )


def page_copies(chunks: Sequence[Chunk], page_tokens: int) -> list[tuple[int, int]]:
    """(source, target) of the pages to be copied before these chunks are computed.

    The page in which an adapter's own keys and values end goes on with those of each sequence: it is copied to a page
    of the sequence's own before the first token after them is computed.
    """
    copies = list[tuple[int, int]]()
    for sequence, _, _ in chunks:
        number, num_left_over = divmod(sequence.num_prefix_tokens, page_tokens)
        if num_left_over and sequence.num_computed == sequence.num_prefix_tokens:
            copies.append((sequence.prefix_pages[number], sequence.pages[number]))
    return copies


def to_device(arrays: Mapping[str, NDArray[Any]], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors on the device: one copy for all, which the host does not wait for."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    sizes = [-(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for array in arrays.values()]
    begins = [0, *accumulate(sizes)]
    staged = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=True)
    host = staged.numpy()
    for array, begin in zip(arrays.values(), begins, strict=False):
        host[begin : begin + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    copied = staged.to(device, non_blocking=True)
    tensors = dict[str, Tensor]()
    for (name, array), begin in zip(arrays.items(), begins, strict=False):
        dtype = torch.from_numpy(array[:0].reshape(-1)).dtype
        tensors[name] = copied[begin : begin + array.nbytes].view(dtype).view(array.shape)
    return tensors
