"""The compiled attention of a CPU against dense attention: windows, soft caps, sinks, grouped heads, chunks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from dense_attention import dense
from heddle_kernels.cpu_kernels import ops as cpu_ops
from heddle_kernels.cpu_kernels.ops import CpuOps
from heddle_kernels.paged_batch import PagedBatch
from tolerances import OPERATION

PAGE_TOKENS, NUM_PAGES, NUM_LAYERS, LAYER = 4, 60, 3, 1
SCALING = 0.3
LENGTHS = [3, 13, 9, 22, 50]
CHUNKS = [[1, 7, 3, 20, 40], [2, 12, 8, 21, 41], [3, 13, 9, 22, 50]]  # tokens of each sequence after each step


class Sequences:
    """Random states of several sequences, and a pool of pages full of NaN with some of every sequence's own."""

    def __init__(
        self, lengths: list[int], num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        torch.manual_seed(0)
        self.lengths = lengths
        self.query = [torch.randn(length, num_heads, head_dim).to(dtype) for length in lengths]
        self.key, self.value = (
            [torch.randn(length, num_kv_heads, head_dim).to(dtype) for length in lengths] for _ in range(2)
        )
        shape = (NUM_PAGES, NUM_LAYERS, 2, PAGE_TOKENS, num_kv_heads, head_dim)
        self.pool = torch.full(shape, torch.nan, dtype=dtype)
        num_pages = [-(-length // PAGE_TOKENS) for length in lengths]
        self.pages = torch.randperm(NUM_PAGES)[: sum(num_pages)].split_with_sizes(num_pages)

    @property
    def kv(self) -> Tensor:
        """One layer [num_pages, 2, page_tokens, num_kv_heads, head_dim]; the others' pages lie between its own."""
        return self.pool[:, LAYER]

    def batch(self, chunks: list[tuple[int, int]]) -> PagedBatch:
        """Of each sequence the tokens from .. to; a sequence of no tokens sits nowhere."""
        bounds = (0, *accumulate(end - begin for begin, end in chunks))
        lengths = tuple(end if end > begin else 0 for begin, end in chunks)
        table = torch.zeros(len(chunks), max(len(held) for held in self.pages), dtype=torch.int32)
        slots = list[int]()
        for number, ((begin, end), held) in enumerate(zip(chunks, self.pages, strict=True)):
            table[number, : -(-end // PAGE_TOKENS)] = held[: -(-end // PAGE_TOKENS)]
            slots += [int(held[p // PAGE_TOKENS]) * PAGE_TOKENS + p % PAGE_TOKENS for p in range(begin, end)]
        return PagedBatch(
            query_start=torch.tensor(bounds, dtype=torch.int32),
            length=torch.tensor(lengths, dtype=torch.int32),
            page_table=table,
            write_slot=torch.tensor(slots, dtype=torch.int64),
            query_bounds=bounds,
            lengths=lengths,
        )

    def step(
        self, chunks: list[tuple[int, int]], attend: Callable[[Tensor, Tensor, PagedBatch], Tensor]
    ) -> list[Tensor]:
        """Write the chunks' keys and values, attend: each sequence's [new tokens, heads, dim]."""
        batch = self.batch(chunks)
        query, key, value = (
            torch.cat([states[begin:end] for states, (begin, end) in zip(all_states, chunks, strict=True)])
            for all_states in (self.query, self.key, self.value)
        )
        CpuOps().write_kv(key, value, self.kv, batch)
        return list(attend(query, self.kv, batch).split_with_sizes([end - begin for begin, end in chunks]))


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf).item()


@pytest.mark.parametrize("dtype", OPERATION, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 4, 8), (4, 2, 20), (7, 1, 64), (6, 2, 6)])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 5])
def test_matches_dense_attention(
    window: int | None,
    softcap: float | None,
    with_sinks: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """Chunks of one token, of a few (compiled as well) and of more than that (torch's)."""
    sequences = Sequences(LENGTHS, num_heads, num_kv_heads, head_dim, dtype)
    sinks = torch.randn(num_heads) if with_sinks else None
    outputs: list[list[Tensor]] = [[] for _ in LENGTHS]
    begins = [0] * len(LENGTHS)
    for ends in CHUNKS:
        attended = sequences.step(
            list(zip(begins, ends, strict=True)),
            lambda query, kv, batch: CpuOps().paged_attention(query, kv, batch, SCALING, window, softcap, sinks),
        )
        begins = ends
        for parts, part in zip(outputs, attended, strict=True):
            parts.append(part)
    for number, parts in enumerate(outputs):
        states = (sequences.query[number], sequences.key[number], sequences.value[number])
        expected = dense(*states, SCALING, window, softcap, sinks)
        assert error(torch.cat(parts), expected) <= OPERATION[dtype], f"sequence of {LENGTHS[number]}"


@pytest.mark.parametrize("threshold", [0, 1000])
@pytest.mark.parametrize("window", [None, 7])
def test_prompts_either_way(window: int | None, threshold: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a prompt at once, and a chunk after what is there: compiled, and by torch."""
    monkeypatch.setattr(cpu_ops, "MOST_NEW_TOKENS", threshold)
    sequences = Sequences([30, 45], 4, 2, 16, torch.float32)
    for chunks in ([(0, 30), (0, 21)], [(29, 30), (21, 45)]):
        attended = sequences.step(chunks, lambda q, kv, batch: CpuOps().paged_attention(q, kv, batch, SCALING, window))
        for number, (begin, end) in enumerate(chunks):
            query, key, value = (s[number][:end] for s in (sequences.query, sequences.key, sequences.value))
            expected = dense(query, key, value, SCALING, window, None, None)[begin:end]
            assert error(attended[number], expected) <= OPERATION[torch.float32]


def test_neighbours_change_no_bit() -> None:
    sequences = Sequences(LENGTHS, 4, 2, 16, torch.bfloat16)
    sequences.step([(0, length) for length in LENGTHS], lambda query, kv, batch: query)
    last = [(length - 1, length) for length in LENGTHS]

    def attend(query: Tensor, kv: Tensor, batch: PagedBatch) -> Tensor:
        return CpuOps().paged_attention(query, kv, batch, SCALING)

    together = sequences.step(last, attend)
    for number in range(len(LENGTHS)):
        nobody = [(begin, end) if i == number else (end, end) for i, (begin, end) in enumerate(last)]
        assert torch.equal(sequences.step(nobody, attend)[number], together[number])


def test_states_of_any_strides() -> None:
    """As modelling code hands them over: heads before tokens, values a part of a longer row."""
    sequences = Sequences([20], 4, 2, 16, torch.float32)
    batch, ops = sequences.batch([(0, 20)]), CpuOps()
    query, key, value = sequences.query[0], sequences.key[0], sequences.value[0]
    beside = torch.cat([torch.randn(20, 96), value.flatten(1)], dim=1)[:, 96:].view(20, 2, 16)
    ops.write_kv(key.transpose(0, 1).contiguous().transpose(0, 1), beside, sequences.kv, batch)
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    attended = ops.paged_attention(turned, sequences.kv, batch, SCALING)
    assert error(attended, dense(query, key, value, SCALING, None, None, None)) <= OPERATION[torch.float32]


def test_writing_touches_nothing_else() -> None:
    sequences = Sequences([9], 2, 1, 4, torch.float32)
    sequences.step([(0, 9)], lambda query, kv, batch: query)
    written = ~sequences.pool.isnan()
    assert written.sum() == 2 * 9 * 4
    assert written[:, LAYER].sum() == written.sum()
