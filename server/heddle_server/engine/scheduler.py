"""What runs in the next step: decodes first, then prefill chunks, then new requests. Policy only, no torch.

A request waits while its adapter is on its way; the others do not. Among waiting requests the tenant that has had
least comes first, and within a tenant the oldest. One that finds no room may be overtaken by smaller ones, but only so
often: then nothing new starts before it. When pages run out, the newest running request is put back and will be
computed again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain

from heddle_adapters.residency import Residency, TenantShareFull
from heddle_adapters.run_allocator import OutOfSpace
from heddle_kernels.segments import BASE_SLOT
from heddle_server.engine.fairness import VirtualTokenCounters
from heddle_server.engine.kv_cache import KvCache
from heddle_server.engine.sequence import Sequence

MAX_OVERTAKEN = 32  # requests that may start while an older one waits for room
MAX_SHORT_OF_ROOM = 32  # requests a step that are tried in vain; looking for pages costs more than a table look-up


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
        self._counters = VirtualTokenCounters()
        self._waiting: dict[str, deque[Sequence]] = {}  # by tenant, oldest first
        self._overdue: list[Sequence] = []  # waiting, and overtaken as often as may be
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0

    @property
    def waiting(self) -> Iterator[Sequence]:
        """Tenant by tenant, oldest first."""
        return chain.from_iterable(self._waiting.values())

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    def add(self, sequence: Sequence) -> None:
        request = sequence.request
        sequence.arrived_at = time.monotonic()
        sequence.tier = self._residency.arrive(request.adapters, request.tenant)
        self._counters.activate(request.tenant)
        self._waiting.setdefault(request.tenant, deque()).append(sequence)

    def plan(self) -> StepPlan:
        """Choose the next step's chunks and give each its pages."""
        plan = StepPlan()
        self._residency.advance()
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
        elif sequence in self._waiting.get(sequence.request.tenant, ()):
            self._leave_queue(sequence)

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
                self._take(sequence, num_tokens, plan)
                return num_tokens

    def _admit(self, budget: int, plan: StepPlan) -> None:
        """Start waiting requests, passing over those whose adapter is on its way."""
        if not budget or len(self.running) >= self._max_batch_requests:
            return
        short_of_room: list[Sequence] = []
        blocked_tenants: set[str] = set()  # whose share of the pool is taken and who have waited long enough for it
        for sequence in self._candidates():
            if not budget or len(self.running) >= self._max_batch_requests:
                return
            if sequence.request.tenant in blocked_tenants:
                continue
            try:
                taken = self._start(sequence, budget, plan)
            except OutOfSpace as error:
                is_own_share = isinstance(error, TenantShareFull)
                tenant = sequence.request.tenant if is_own_share else None
                if not self._may_come_free(tenant):
                    self._fail(sequence, PoolTooSmall(sequence), plan)
                elif not is_own_share and sequence.num_overtaken >= MAX_OVERTAKEN:
                    return  # what comes free is for this one
                elif sequence.num_overtaken >= MAX_OVERTAKEN:
                    blocked_tenants.add(sequence.request.tenant)
                else:
                    short_of_room.append(sequence)
                    if len(short_of_room) == MAX_SHORT_OF_ROOM:
                        return
            except Exception as error:  # whatever the load raised is these requests' failure, nobody else's
                self._fail(sequence, error, plan)
            else:
                budget -= taken
                if taken:
                    self._count_overtaken(short_of_room)

    def _may_come_free(self, tenant: str | None) -> bool:
        """Whether anything runs, of this tenant or of all, that will give pages back."""
        is_running = any(tenant is None or sequence.request.tenant == tenant for sequence in self.running)
        return is_running or self._residency.is_copying

    def _candidates(self) -> Iterator[Sequence]:
        """Waiting sequences, each once: overdue ones, then the oldest untried of the tenant that has had least."""
        yield from list(self._overdue)
        untried = {tenant: iter(list(queue)) for tenant, queue in self._waiting.items()}
        while untried:
            tenant = self._counters.first(untried) if len(untried) > 1 else next(iter(untried))
            sequence = next(untried[tenant], None)
            if sequence is None:
                del untried[tenant]
            elif sequence not in self._overdue:
                yield sequence

    def _count_overtaken(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            sequence.num_overtaken += 1
            if sequence.num_overtaken == MAX_OVERTAKEN:
                self._overdue.append(sequence)

    def _start(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Move a waiting sequence to the running ones and plan its first chunk.

        The tokens taken, 0 while its adapter is on its way. Raises OutOfSpace, changing nothing.
        """
        slot = self._slot(sequence)
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
        if sequence.started_at is None:
            self._first_start(sequence)
        self._leave_queue(sequence)
        self.running.append(sequence)
        self._take(sequence, num_tokens, plan)
        return num_tokens

    def _first_start(self, sequence: Sequence) -> None:
        self._kv_cache.count_lookup(sequence)
        sequence.started_at = time.monotonic()
        ready_at = self._residency.ready_at(sequence.request.adapters)
        sequence.load_seconds = max(0.0, ready_at - sequence.arrived_at)

    def _take(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> None:
        """Put a chunk into the plan and on its tenant's account."""
        num_generated = 1 if sequence.is_decoding else 0
        self._counters.charge(sequence.request.tenant, num_tokens - num_generated, num_generated)
        plan.chunks.append(Chunk.of(sequence, num_tokens))

    def _fail(self, sequence: Sequence, error: Exception, plan: StepPlan) -> None:
        self._leave_queue(sequence)
        plan.failed.append((sequence, error))

    def _slot(self, sequence: Sequence) -> int | None:
        request = sequence.request
        return self._residency.acquire(request.adapters, request.tenant) if request.adapters else BASE_SLOT

    def _preempt(self, victim: Sequence, plan: StepPlan) -> None:
        plan.chunks = [chunk for chunk in plan.chunks if chunk.sequence is not victim]
        self.running.remove(victim)
        self._release(victim)
        self._residency.expect(victim.request.adapters, victim.request.tenant)
        self._counters.activate(victim.request.tenant)
        self._waiting.setdefault(victim.request.tenant, deque()).appendleft(victim)
        self.num_preemptions += 1

    def _leave_queue(self, sequence: Sequence) -> None:
        """It waits no more, for whatever reason."""
        tenant = sequence.request.tenant
        self._waiting[tenant].remove(sequence)
        if not self._waiting[tenant]:
            del self._waiting[tenant]
        if sequence in self._overdue:
            self._overdue.remove(sequence)
        self._counters.deactivate(tenant)
        self._residency.depart(sequence.request.adapters)

    def _release(self, sequence: Sequence) -> None:
        self._kv_cache.release(sequence)
        self._residency.release(sequence.request.adapters)
        sequence.slot = None
