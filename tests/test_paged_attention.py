"""Attention over pages against dense attention: windows, soft caps, sinks, grouped heads, chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dense_attention import dense
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.reference import ReferenceOps
from tolerances import OPERATION

PAGE_TOKENS, HEAD_DIM, NUM_PAGES = 4, 8, 40
SCALING = 0.3


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_matches_dense_attention(
    window: int | None, softcap: float | None, with_sinks: bool, num_kv_heads: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    num_heads, lengths = 4, [3, 13, 9, 22]
    sinks = torch.randn(num_heads) if with_sinks else None
    kv = torch.full((NUM_PAGES, 2, PAGE_TOKENS, num_kv_heads, HEAD_DIM), torch.nan, dtype=dtype)
    order = torch.randperm(NUM_PAGES)
    pages, taken = [], 0
    for length in lengths:
        num_pages = -(-length // PAGE_TOKENS)
        pages.append(order[taken : taken + num_pages])
        taken += num_pages
    query = [torch.randn(length, num_heads, HEAD_DIM, dtype=dtype) for length in lengths]
    key = [torch.randn(length, num_kv_heads, HEAD_DIM, dtype=dtype) for length in lengths]
    value = [torch.randn(length, num_kv_heads, HEAD_DIM, dtype=dtype) for length in lengths]
    out = [torch.empty_like(states) for states in query]
    begins = [0, 0, 0, 0]
    for ends in [[1, 7, 3, 20], [2, 12, 8, 21], lengths]:  # several chunks, some of one token
        chunks = list(zip(begins, ends, strict=True))
        begins = ends
        batch = paged_batch(chunks, pages)
        flat = [torch.cat([s[b:e] for s, (b, e) in zip(states, chunks, strict=True)]) for states in (query, key, value)]
        ops = ReferenceOps()
        ops.write_kv(flat[1], flat[2], kv, batch)
        attended = ops.paged_attention(flat[0], kv, batch, SCALING, window, softcap, sinks)
        for number, (begin, end) in enumerate(chunks):
            first = batch.query_bounds[number]
            out[number][begin:end] = attended[first : first + end - begin]
    for number, length in enumerate(lengths):
        expected = dense(query[number], key[number], value[number], SCALING, window, softcap, sinks)
        error = (out[number].double() - expected).abs().max() / expected.abs().max()
        assert error <= OPERATION[dtype], f"sequence of {length}: relative error {error:.1e}"


def paged_batch(chunks: list[tuple[int, int]], pages: list[Tensor]) -> PagedBatch:
    bounds, write_slot = [0], list[int]()
    page_table = torch.zeros(len(pages), max(map(len, pages)), dtype=torch.int32)
    for row, ((begin, end), held) in enumerate(zip(chunks, pages, strict=True)):
        bounds.append(bounds[-1] + end - begin)
        write_slot += [
            int(held[position // PAGE_TOKENS]) * PAGE_TOKENS + position % PAGE_TOKENS for position in range(begin, end)
        ]
        page_table[row, : len(held)] = held
    lengths = tuple(end for _, end in chunks)
    return PagedBatch(
        query_start=torch.tensor(bounds, dtype=torch.int32),
        length=torch.tensor(lengths, dtype=torch.int32),
        page_table=page_table,
        write_slot=torch.tensor(write_slot, dtype=torch.int64),
        query_bounds=tuple(bounds),
        lengths=lengths,
    )
