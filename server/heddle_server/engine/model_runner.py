"""One step on the device: chunks to flat tensors, a forward through woven modelling code, logits, sampled tokens."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor

from heddle_adapters.device_rows import DeviceRows
from heddle_kernels.dispatch import Kernels
from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_server.engine.attention import PagedAttention
from heddle_server.engine.model_loader import LoadedModel
from heddle_server.engine.sampler import Sampled, sample
from heddle_server.engine.scheduler import Chunk
from heddle_server.engine.weave import AdapterBatch, ForwardContext


class ModelRunner:
    """Owns the typed view of the pool that holds keys and values."""

    def __init__(
        self,
        loaded: LoadedModel,
        context: ForwardContext,
        rows: DeviceRows,
        memory: Tensor,
        num_pages: int,
        page_tokens: int,
        kernels: Kernels,
    ) -> None:
        """`memory` is the pool's storage, uint8 [num_pages * page_bytes]."""
        shape = loaded.kv_shape
        self._model = loaded.model
        self._device = loaded.device
        self._context = context
        self._rows = rows
        self._ops = kernels.ops
        self._page_tokens = page_tokens
        self.num_segments = 0  # over all steps
        self._kv = memory.view(loaded.dtype).view(
            num_pages, shape.num_layers, 2, page_tokens, shape.num_kv_heads, shape.head_dim
        )

    def run(self, chunks: list[Chunk]) -> dict[int, Sampled | None]:
        """Compute the chunks; by request id, the new token of each chunk that completes its sequence.

        None where the logits are not finite.
        """
        ordered = sorted(chunks, key=_slot)
        ends = list(accumulate(chunk.num_tokens for chunk in ordered))
        completing = [(chunk, end - 1) for chunk, end in zip(ordered, ends, strict=True) if chunk.completes]
        logits = self._forward(ordered, ends, completing)
        sequences = [chunk.sequence for chunk, _ in completing]
        sampled = sample(
            logits[: len(completing)],
            [sequence.request.sampling for sequence in sequences],
            [sequence.num_tokens for sequence in sequences],
        )
        return {sequence.request.request_id: token for sequence, token in zip(sequences, sampled, strict=True)}

    @torch.inference_mode()
    def _forward(self, chunks: list[Chunk], ends: list[int], completing: list[tuple[Chunk, int]]) -> Tensor:
        """Logits [max(1, num completing), vocabulary] of the last tokens of completing chunks."""
        positions = [self._positions(chunk) for chunk in chunks]
        token_ids = [
            token for c, p in zip(chunks, positions, strict=True) for token in c.sequence.token_ids[p.start : p.stop]
        ]
        last_rows = [row for _, row in completing] or [0]  # the head is never asked for nothing
        head_slots = [(_slot(chunk), 1) for chunk, _ in completing] or [(_slot(chunks[0]), 1)]
        adapters = self._adapter_batch(
            Segments.from_runs((_slot(chunk), chunk.num_tokens) for chunk in chunks), Segments.from_runs(head_slots)
        )
        with self._context.using(adapters):
            logits: Tensor = self._model(
                input_ids=self._tensor(token_ids)[None],
                position_ids=self._tensor([position for p in positions for position in p])[None],
                use_cache=False,
                logits_to_keep=self._tensor(last_rows),
                heddle_attention=PagedAttention(self._paged_batch(chunks, ends, positions), self._kv, self._ops),
            ).logits[0]
        return logits

    def _adapter_batch(self, segments: Segments, head_segments: Segments) -> AdapterBatch | None:
        """None for a base-only batch: no adapter code runs at all."""
        self.num_segments += len(segments.slot)
        slots = {slot for slot in segments.slot if slot != BASE_SLOT}
        if not slots:
            return None
        touched = frozenset[int]().union(*(self._rows.sites_of(slot) for slot in slots))
        return AdapterBatch(segments, head_segments, touched, self._rows, self._ops)

    def _paged_batch(self, chunks: list[Chunk], ends: list[int], positions: list[range]) -> PagedBatch:
        pages = [chunk.sequence.pages for chunk in chunks]
        size = self._page_tokens
        return PagedBatch(
            query_start=(0, *ends),
            length=tuple(p.stop for p in positions),
            pages=tuple(self._tensor(held[: -(-p.stop // size)]) for held, p in zip(pages, positions, strict=True)),
            write_page=self._tensor(
                [held[position // size] for held, p in zip(pages, positions, strict=True) for position in p]
            ),
            write_offset=self._tensor([position % size for p in positions for position in p]),
        )

    def _tensor(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    @staticmethod
    def _positions(chunk: Chunk) -> range:
        return range(chunk.sequence.num_computed, chunk.sequence.num_computed + chunk.num_tokens)


def _slot(chunk: Chunk) -> int:
    slot = chunk.sequence.slot
    assert slot is not None, "a planned sequence has a slot"
    return slot
