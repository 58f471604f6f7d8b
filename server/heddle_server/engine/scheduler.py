"""What runs in the next step: decodes first, then prefill chunks, then new requests. Policy only, no torch.

A request waits while its adapter is on its way; the others do not. When pages run out, the newest running request is
put back and will be computed again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from heddle_adapters.residency import Residency
from heddle_adapters.run_allocator import OutOfSpace
from heddle_kernels.segments import BASE_SLOT
from heddle_server.engine.kv_cache import KvCache
from heddle_server.engine.sequence import Sequence


@dataclass(frozen=True)
class Chunk:
    """The part of a sequence that one step computes."""

    sequence: Sequence
    num_tokens: int
    completes: bool  # whether all known tokens are computed after it, so that a new token can be sampled

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        return cls(sequence, num_tokens, completes=num_tokens == sequence.num_pending)


@dataclass
class StepPlan:
    """One step: chunks to compute, and requests that cannot be served."""

    chunks: list[Chunk] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)


class PoolTooSmall(Exception):
    """A request needs more pages than the pool has, even with nothing else running."""

    def __init__(self, sequence: Sequence) -> None:
        super().__init__(
            f"The page pool cannot hold {sequence.num_tokens} tokens beside the request's adapter. "
            "Ask for fewer tokens, or start the server with a larger --pool-bytes."
        )


class Scheduler:
    """Owns the waiting and the running sequences."""

    def __init__(self, kv_cache: KvCache, residency: Residency, max_batch_tokens: int, max_batch_requests: int) -> None:
        self._kv_cache = kv_cache
        self._residency = residency
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_requests = max_batch_requests
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        if sequence.request.adapter_digest is not None:
            self._residency.prefetch(sequence.request.adapter_digest)

    def plan(self) -> StepPlan:
        """Choose the next step's chunks and give each its pages."""
        plan = StepPlan()
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda s: not s.is_decoding):
            if budget and sequence in self.running:  # an earlier one may have pushed it out
                budget -= self._continue(sequence, budget, plan)
        self._admit(budget, plan)
        return plan

    def finish(self, sequence: Sequence) -> None:
        """The sequence has ended, or its client has gone: give everything back."""
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            digest = sequence.request.adapter_digest
            if digest is not None and all(other.request.adapter_digest != digest for other in self.waiting):
                self._residency.abandon(digest)

    def sequences(self) -> Iterable[Sequence]:
        yield from self.running
        yield from self.waiting

    def _continue(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Plan a running sequence's next chunk, pushing out newer ones if need be; the tokens taken."""
        num_tokens = min(sequence.num_pending, budget)
        while True:
            try:
                self._kv_cache.reserve(sequence, sequence.num_computed + num_tokens)
            except OutOfSpace:
                if self.running == [sequence]:
                    self.finish(sequence)
                    plan.failed.append((sequence, PoolTooSmall(sequence)))
                    return 0
                victim = self.running[-1]
                self._preempt(victim, plan)
                if victim is sequence:
                    return 0
            else:
                plan.chunks.append(Chunk.of(sequence, num_tokens))
                return num_tokens

    def _admit(self, budget: int, plan: StepPlan) -> None:
        """Start waiting requests in order, passing over those whose adapter is not loaded yet."""
        failures: dict[str | None, Exception] = {}  # by adapter: all that wait for one load fail with it
        for sequence in list(self.waiting):
            if not budget or len(self.running) >= self._max_batch_requests:
                return
            digest = sequence.request.adapter_digest
            try:
                if digest in failures:
                    raise failures[digest]
                budget -= self._start(sequence, budget, plan)
            except OutOfSpace:
                if self.running:
                    return  # a full pool queues: nobody behind may overtake
                self._fail(sequence, PoolTooSmall(sequence), plan)
            except Exception as error:  # whatever the load raised is these requests' failure, nobody else's
                failures[digest] = error
                self._fail(sequence, error, plan)

    def _start(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Move a waiting sequence to the running ones and plan its first chunk.

        The tokens taken, 0 while its adapter is being loaded. Raises OutOfSpace, changing nothing.
        """
        slot = self._slot(sequence.request.adapter_digest)
        if slot is None:
            return 0
        sequence.slot = slot
        self._kv_cache.attach_prefix(sequence)
        num_tokens = min(sequence.num_pending, budget)
        try:
            self._kv_cache.reserve(sequence, sequence.num_computed + num_tokens)
        except OutOfSpace:
            self._release(sequence)
            raise
        if not sequence.has_started:
            self._kv_cache.count_lookup(sequence)
        sequence.has_started = True
        self.waiting.remove(sequence)
        self.running.append(sequence)
        plan.chunks.append(Chunk.of(sequence, num_tokens))
        return num_tokens

    def _fail(self, sequence: Sequence, error: Exception, plan: StepPlan) -> None:
        self.waiting.remove(sequence)
        plan.failed.append((sequence, error))

    def _slot(self, digest: str | None) -> int | None:
        return BASE_SLOT if digest is None else self._residency.acquire(digest)

    def _preempt(self, victim: Sequence, plan: StepPlan) -> None:
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not victim]
        self.running.remove(victim)
        self._release(victim)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        self._kv_cache.release(sequence)
        if sequence.request.adapter_digest is not None:
            self._residency.release(sequence.request.adapter_digest)
        sequence.slot = None
