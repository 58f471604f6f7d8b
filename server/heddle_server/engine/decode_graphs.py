"""Decode steps as CUDA graphs: captured once for each size of batch, replayed for any mix of adapters.

A graph reads everything from memory that stays where it is: tokens, pages, and the plan of the step's adapters. Rows
of the batch that nobody uses compute the base's answer to a token of an empty sequence; what they store goes to a page
that belongs to nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from heddle_kernels.paged_batch import PagedBatch
from heddle_kernels.segments import BASE_SLOT, Segments
from heddle_kernels.triton_kernels.row_plan import PlanCapacity, PlanTooLarge
from heddle_server.engine.adapter_batch import AdapterBatch
from heddle_server.engine.step_inputs import StepInputs

logger = logging.getLogger(__name__)

MAX_SEQUENCES = 256  # of a captured batch; a larger one is bound by the device, not by launches
ROWS_PER_TOKEN = 768  # that a captured step has room for, on average: rank 256 for q, k and v
TILES_PER_TOKEN = ROWS_PER_TOKEN // 16
MAX_GRAPHS = 48  # then further kinds of steps run without one

Forward = Callable[[StepInputs, AdapterBatch | None], Tensor]
# Sequences it has room for; sites whose input is scaled, None for base only; all places beside linears, or none.
Key = tuple[int, frozenset[int] | None, frozenset[int]]


class Plans(Protocol):
    """Makes the plan of a step's adapters in memory that a graph reads."""

    @property
    def generation(self) -> int:
        """Another number when anything that plans refer to has moved in memory."""

    def into(self, words: Tensor, segments: Segments, capacity: PlanCapacity) -> Any:
        """Raises PlanTooLarge."""


@dataclass(frozen=True)
class DecodeStep:
    """A step in which every sequence has one new token."""

    inputs: StepInputs
    segments: Segments
    scaled_input_sites: frozenset[int] | None  # None for base only
    touched_places: frozenset[int] = frozenset()  # beside linears: where the captured step looks for work


class StaticStep:
    """The memory that one graph reads, for `capacity` sequences."""

    def __init__(self, capacity: int, max_pages: int, spare_slot: int, device: torch.device) -> None:
        self.plan_capacity = PlanCapacity(TILES_PER_TOKEN * capacity, capacity, ROWS_PER_TOKEN * capacity)
        self.plan_words = torch.zeros(self.plan_capacity.num_words, dtype=torch.int32, device=device)
        self._spare_slot = spare_slot
        index = torch.arange(capacity, device=device)
        self.inputs = StepInputs(
            token_ids=torch.zeros_like(index),
            known_tokens=np.zeros(capacity, np.int64),
            positions=torch.zeros_like(index),
            logit_rows=index,
            unread_rows=index[:0],
            unread_sources=index[:0],
            paged=PagedBatch(
                query_start=torch.arange(capacity + 1, dtype=torch.int32, device=device),
                length=torch.zeros(capacity, dtype=torch.int32, device=device),
                page_table=torch.zeros(capacity, max_pages, dtype=torch.int32, device=device),
                write_slot=torch.full_like(index, spare_slot),
                query_bounds=tuple(range(capacity + 1)),
                lengths=(0,) * capacity,
            ),
        )

    def fill(self, inputs: StepInputs) -> None:
        """Put a step's inputs where the graph reads them."""
        num_used, own, given = len(inputs.token_ids), self.inputs, inputs
        own.token_ids[:num_used] = given.token_ids
        own.positions[:num_used] = given.positions
        own.paged.write_slot[:num_used] = given.paged.write_slot
        own.paged.write_slot[num_used:] = self._spare_slot
        own.paged.length[:num_used] = given.paged.length
        own.paged.length[num_used:] = 0
        own.paged.page_table[:num_used, : given.paged.page_table.shape[1]] = given.paged.page_table


class DecodeGraphs:
    """Captures graphs as kinds of steps come by, and replays them."""

    def __init__(self, forward: Forward, plans: Plans, max_pages: int, spare_slot: int, capture: bool) -> None:
        """`max_pages` of the longest sequence; `spare_slot`, where keys and values of unused rows are stored.

        Without `capture`, a replay computes the forward over the same memory.
        """
        self._forward = forward
        self._plans = plans
        self._max_pages = max_pages
        self._spare_slot = spare_slot
        self._capture = capture
        self._steps: dict[Key, StaticStep] = {}
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._refused = set[Key]()  # kinds that cannot be captured
        self._generation = 0

    def run(self, step: DecodeStep) -> Tensor | None:
        """Logits [num_sequences, vocabulary], or None when no graph can take this step."""
        num_sequences = len(step.inputs.token_ids)
        if num_sequences > MAX_SEQUENCES:
            return None
        capacity = 1 << (num_sequences - 1).bit_length()
        key = (capacity, step.scaled_input_sites, step.touched_places)
        if key in self._refused:
            return None
        if key not in self._steps:
            if len(self._steps) == MAX_GRAPHS:
                return None
            device = step.inputs.token_ids.device
            self._steps[key] = StaticStep(capacity, self._max_pages, self._spare_slot, device)
        static = self._steps[key]
        try:
            adapters = self._plan(static, step, capacity)
        except PlanTooLarge:
            return None
        static.fill(step.inputs)
        logits = self._replay(key, static, adapters)
        return None if logits is None else logits[:num_sequences]

    def _plan(self, static: StaticStep, step: DecodeStep, capacity: int) -> AdapterBatch | None:
        """The adapters of a captured step: every linear looks for work, so that any mix can follow."""
        if step.scaled_input_sites is None:
            return None
        runs = zip(step.segments.slot, step.segments.lengths, strict=True)
        filled = Segments.from_runs([*runs, (BASE_SLOT, capacity - step.segments.num_tokens)])
        plan = self._plans.into(static.plan_words, filled, static.plan_capacity)
        return AdapterBatch(
            plan,
            plan,
            touched_sites=None,
            scaled_input_sites=step.scaled_input_sites,
            touched_places=step.touched_places,
        )

    def _replay(self, key: Key, static: StaticStep, adapters: AdapterBatch | None) -> Tensor | None:
        """Logits [capacity, vocabulary]"""
        if not self._capture:
            return self._forward(static.inputs, adapters)
        if self._generation != self._plans.generation:  # the graphs read a row table that has moved
            self._graphs.clear()
            self._generation = self._plans.generation
        kind = f"a decode step of {key[0]} sequences{'' if key[1] is None else ' with adapters'}"
        if key not in self._graphs:
            try:
                self._graphs[key] = self._captured(static, adapters)
            except RuntimeError as error:  # modelling code that talks to the host in between
                logger.warning("%s cannot be captured and runs launch by launch: %s", kind, error)
                self._refused.add(key)
                return None
            logger.info("captured %s", kind)
        graph, logits = self._graphs[key]
        graph.replay()
        return logits

    def _captured(self, static: StaticStep, adapters: AdapterBatch | None) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """A graph and the memory it leaves its logits in. A first run outside compiles what has not been compiled."""
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._forward(static.inputs, adapters)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self._forward(static.inputs, adapters)
        return graph, logits
