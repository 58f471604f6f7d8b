"""One step on the device: chunks to flat tensors, a forward through woven modelling code, logits, sampled tokens."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heddle_adapters.device_rows import DeviceRows, LineSummary
from heddle_kernels.ops import Ops
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.triton_kernels.row_plan import PlanCapacity
from heddle_server.engine.adapter_batch import NOWHERE, AdapterBatch, AdapterLines, ForwardContext, TokenAnswers
from heddle_server.engine.attention import PagedAttention
from heddle_server.engine.decode_graphs import DecodeGraphs, DecodeStep
from heddle_server.engine.logit_rules import change_logits
from heddle_server.engine.model_loader import LoadedModel
from heddle_server.engine.sampler import Draw, Sampled, Scores, draw
from heddle_server.engine.scheduler import Chunk
from heddle_server.engine.sequence import Sequence
from heddle_server.engine.step_inputs import StepInputs, page_copies


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device has been given; its tokens can be read when it is done."""

    chunks: list[Chunk]  # in batch order
    completing: list[Chunk]  # of those, the ones a token was sampled for
    tokens: Draw  # one for each of `completing`
    scores: list[tuple[Sequence, Scores]]  # of prompt tokens, for those who asked


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
        max_model_len: int,
        ops: Ops,
    ) -> None:
        """`memory` is the pool's storage and one page more, which belongs to nobody: uint8 [pages * page_bytes]."""
        shape = loaded.kv_layout
        self._model = loaded.model
        self._eos_token_ids = loaded.eos_token_ids
        self._vocabulary_size = int(loaded.model.get_input_embeddings().weight.shape[0])
        self._device = loaded.device
        self._context = context
        self._rows = rows
        self._ops = ops
        self._page_tokens = page_tokens
        self.num_segments = 0  # over all steps
        self.forward_seconds = 0.0  # over all steps; on CUDA, until the forward was given to the device
        self.sample_seconds = 0.0  # over all steps, waiting for the device included
        self._kv = memory.view(loaded.dtype).view(
            num_pages + 1, shape.num_layers, 2, page_tokens, shape.num_kv_heads, shape.head_dim
        )
        self._graphs: DecodeGraphs | None = None
        if hasattr(ops, "plan_rows_into"):
            self._graphs = DecodeGraphs(
                self._forward,
                StaticPlans(ops, rows),
                max_pages=-(-max_model_len // page_tokens),
                spare_slot=num_pages * page_tokens,
                capture=loaded.device.type == "cuda",
            )

    @property
    def device_seconds(self) -> float:
        """Time in forwards and sampling; on CUDA, giving them to the device and waiting for it."""
        return self.forward_seconds + self.sample_seconds

    def launch(self, chunks: list[Chunk], previous: LaunchedStep | None = None) -> LaunchedStep:
        """Give the device a step. `previous` is the one before it, when not all of its tokens have been read."""
        ordered = sorted(chunks, key=_last_slot)
        completing = [chunk for chunk in ordered if chunk.completes]
        inputs = StepInputs.of(
            ordered, self._page_tokens, self._vocabulary_size, self._device, previous.completing if previous else ()
        )
        if previous is not None and len(inputs.unread_rows):
            inputs.token_ids[inputs.unread_rows] = previous.tokens.token_ids[inputs.unread_sources]
        batch = self._batch(ordered)
        self._copy_pages(page_copies(ordered, self._page_tokens))
        started = time.monotonic()
        logits = self._logits(inputs, ordered, completing, batch)
        forwarded = time.monotonic()
        scores, logits = _scores(logits, ordered)
        sequences = [chunk.sequence for chunk in completing]
        tokens = draw(
            logits[: len(completing)],
            [sequence.request.sampling for sequence in sequences],
            [sequence.num_tokens for sequence in sequences],
            lambda sound: change_logits(sound, sequences, self._eos_token_ids),
        )
        self.forward_seconds += forwarded - started
        self.sample_seconds += time.monotonic() - forwarded
        return LaunchedStep(ordered, completing, tokens, scores)

    def read(self, step: LaunchedStep) -> list[Sampled | None]:
        """A token for each of `step.completing`, None where the logits are not finite. Waits for the device."""
        started = time.monotonic()
        sampled = step.tokens.read()
        self.sample_seconds += time.monotonic() - started
        return sampled

    def _logits(self, inputs: StepInputs, chunks: list[Chunk], completing: list[Chunk], batch: BatchLines) -> Tensor:
        """[at least num logits wanted, vocabulary], by a captured graph where one fits."""
        if self._graphs is not None and inputs.paged.is_decode and len(completing) == len(chunks):
            scaled = batch.scaled_input_sites if batch.has_adapters else None
            if batch.is_plain:  # else the host has a part in it
                places = self._rows.graph_places if batch.touched_places else NOWHERE
                logits = self._graphs.run(DecodeStep(inputs, batch.segments, scaled, places))
                if logits is not None:
                    return logits
        return self._forward(inputs, self._adapter_batch(chunks, inputs, batch))

    @torch.inference_mode()
    def _forward(self, inputs: StepInputs, adapters: AdapterBatch | None) -> Tensor:
        """Logits [num_logits, vocabulary]."""
        with self._context.using(adapters):
            logits: Tensor = self._model(
                input_ids=inputs.token_ids[None],
                position_ids=inputs.positions[None],
                use_cache=False,
                logits_to_keep=inputs.logit_rows,
                heddle_attention=PagedAttention(inputs.paged, self._kv, self._ops),
            ).logits[0]
        return logits

    def _copy_pages(self, copies: list[tuple[int, int]]) -> None:
        """Whole pages of all layers' keys and values, on the stream of the steps: (source, target) each."""
        for source, target in copies:
            self._kv[target].copy_(self._kv[source])

    def _batch(self, chunks: list[Chunk]) -> BatchLines:
        segments = Segments.from_runs(run for chunk in chunks for run in chunk.runs)
        self.num_segments += len(segments.slot)
        return BatchLines(segments, {slot: self._rows.line_of(slot) for slot in set(segments.slot) - {BASE_SLOT}})

    def _adapter_batch(self, chunks: list[Chunk], inputs: StepInputs, batch: BatchLines) -> AdapterBatch | None:
        """None for a base-only batch: no adapter code runs at all."""
        if not batch.has_adapters:
            return None
        wanted = [run for chunk in chunks for run in _wanted_runs(chunk)]
        head_segments = Segments.from_runs(wanted or _first_token(chunks[0]))
        rows, plan_rows = self._rows, self._ops.plan_rows
        plan = plan_rows(rows.rows, rows.vectors, rows.table, batch.segments)
        is_decode = head_segments == batch.segments  # every token's logits are wanted
        return AdapterBatch(
            plan=plan,
            head_plan=plan if is_decode else plan_rows(rows.rows, rows.vectors, rows.table, head_segments),
            touched_sites=_union(line.touched_sites for line in batch.lines.values()),
            scaled_input_sites=batch.scaled_input_sites,
            touched_places=batch.touched_places,
            lines=None if batch.is_plain else AdapterLines(rows, batch.segments, batch.lines),
            head_lines=None if batch.is_plain else AdapterLines(rows, head_segments, batch.lines),
            tokens=self._token_answers(inputs, batch),
        )

    def _token_answers(self, inputs: StepInputs, batch: BatchLines) -> TokenAnswers | None:
        """Which of the step's tokens an adapter answers for. The host knows all tokens but those it has not read."""
        tokens, offsets = list[NDArray[np.int64]](), list[NDArray[np.int64]]()
        for begin, end, slot in batch.segments.with_adapters():
            if (own := batch.lines[slot].tokens) is not None:
                found, found_offsets = own.find(inputs.known_tokens[begin:end])
                tokens.append(begin + found)
                offsets.append(found_offsets)
        if not sum(map(len, tokens)):
            return None
        answered = np.concatenate(tokens)
        is_virtual = inputs.known_tokens[answered] >= self._vocabulary_size
        return TokenAnswers(
            tokens=torch.from_numpy(answered).to(self._device),
            offsets=torch.from_numpy(np.concatenate(offsets)).to(self._device),
            is_virtual=torch.from_numpy(is_virtual).to(self._device),
        )


@dataclass(frozen=True)
class BatchLines:
    """Which adapters a step's tokens use, and where these change anything."""

    segments: Segments
    lines: dict[int, LineSummary]  # of every adapter in the batch, by slot

    @property
    def has_adapters(self) -> bool:
        return bool(self.lines)

    @cached_property
    def scaled_input_sites(self) -> frozenset[int]:
        return _union(line.scaled_input_sites for line in self.lines.values())

    @cached_property
    def touched_places(self) -> frozenset[int]:
        return _union(line.touched_places for line in self.lines.values())

    @cached_property
    def is_plain(self) -> bool:
        return all(line.is_plain for line in self.lines.values())


class StaticPlans:
    """Plans for captured graphs, out of this engine's row table."""

    def __init__(self, ops: Any, rows: DeviceRows) -> None:
        self._ops = ops
        self._rows = rows

    @property
    def generation(self) -> int:
        generation: int = self._ops.table_generation
        return generation

    def into(self, words: Tensor, segments: Segments, capacity: PlanCapacity) -> Any:
        rows = self._rows
        return self._ops.plan_rows_into(words, rows.rows, rows.vectors, rows.table, segments, capacity)


def _scores(logits: Tensor, chunks: list[Chunk]) -> tuple[list[tuple[Sequence, Scores]], Tensor]:
    """Scores of prompt tokens, and the logits [num completing, vocabulary] that tokens are drawn from."""
    if not any(chunk.sequence.num_unscored for chunk in chunks):
        return [], logits
    scores, last_rows, row = list[tuple[Sequence, Scores]](), list[int](), 0
    for chunk in chunks:
        if num_scored := len(chunk.scored):
            sequence, first = chunk.sequence, chunk.sequence.num_computed + chunk.scored.start + 1
            given = torch.tensor(sequence.token_ids[first : first + num_scored], device=logits.device)
            num_logprobs = sequence.request.sampling.num_prompt_logprobs or 0
            scores.append((sequence, Scores(logits[row : row + num_scored], given, num_logprobs)))
        row += num_scored
        if chunk.completes:
            last_rows.append(row)
            row += 1
    return scores, logits[last_rows]


def _last_slot(chunk: Chunk) -> int:
    """Of its last token, so that most neighbours share one."""
    return chunk.runs[-1][0]


def _wanted_runs(chunk: Chunk) -> list[tuple[int, int]]:
    """(slot, number of tokens) of those whose logits are wanted, in the order of `StepInputs.logit_rows`."""
    sequence, begin, scored = chunk.sequence, chunk.sequence.num_computed, chunk.scored
    runs = sequence.runs(begin + scored.start, begin + scored.stop) if scored else []
    end = begin + chunk.num_tokens
    return runs + sequence.runs(end - 1, end) if chunk.completes else runs


def _first_token(chunk: Chunk) -> list[tuple[int, int]]:
    """What stands for those whose logits are wanted where there are none."""
    begin = chunk.sequence.num_computed
    return chunk.sequence.runs(begin, begin + 1)


def _union(sets: Iterable[frozenset[int]]) -> frozenset[int]:
    return frozenset[int]().union(*sets)
