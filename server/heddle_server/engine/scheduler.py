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
from typing import NamedTuple

from heddle_adapters.residency import Residency, TenantShareFull
from heddle_adapters.run_allocator import OutOfSpace
from heddle_kernels.segments import BASE_SLOT
from heddle_server.engine.fairness import VirtualTokenCounters
from heddle_server.engine.kv_cache import KvCache
from heddle_server.engine.sequence import Sequence

MAX_OVERTAKEN = 32  # requests that may start while an older one waits for room
NOTHING = range(0)
MAX_SCORED_TOKENS = 256  # a step; 150 MB of logits for a vocabulary of 150,000
MAX_SHORT_OF_ROOM = 32  # requests a step that are tried in vain; looking for pages costs more than a table look-up


class Chunk(NamedTuple):
    """The part of a sequence that one step computes."""

    sequence: Sequence
    num_tokens: int
    completes: bool  # whether all known tokens are computed after it, so that a new token can be sampled

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(slot, number of tokens), run by run; until it has been launched."""
        begin = self.sequence.num_computed
        return self.sequence.runs(begin, begin + self.num_tokens)

    @property
    def scored(self) -> range:
        """Which of its tokens' logits score the prompt token after them; until it has been launched."""
        sequence = self.sequence
        if not sequence.num_unscored:
            return NOTHING
        last = sequence.num_prompt_tokens - 1 - sequence.num_computed  # which has no prompt token after it
        return range(max(0, last - sequence.num_unscored), max(0, min(self.num_tokens, last)))


@dataclass
class StepPlan:
    """One step: chunks to compute, and requests that cannot be served."""

    chunks: list[Chunk] = field(default_factory=list)
    failed: list[tuple[Sequence, Exception]] = field(default_factory=list)

    @property
    def room_to_score(self) -> int:
        """How many more tokens may score prompts: their logits are held all at once."""
        return MAX_SCORED_TOKENS - sum(chunk.num_tokens for chunk in self.chunks if chunk.sequence.num_unscored)


@dataclass
class Admission:
    """One step's attempts to start waiting requests."""

    plan: StepPlan
    budget: int  # tokens left to compute
    started: list[Sequence] = field(default_factory=list)
    short_of_room: list[Sequence] = field(default_factory=list)  # tried in vain
    blocked_tenants: set[str] = field(default_factory=set)  # who wait for room in their own share, long enough
    is_over: bool = False  # nothing more is to be tried


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
            was_pushed_out = sequence.slot is None  # by an earlier one
            share = _share(sequence, budget, plan)
            if share > 0 and not was_pushed_out and not sequence.is_full:
                budget -= self._continue(sequence, share, plan)
        self._admit(budget, plan)
        self._residency.let_go()
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

    def _continue(self, sequence: Sequence, num_tokens: int, plan: StepPlan) -> int:
        """Plan a running sequence's next chunk, pushing out newer ones if need be; the tokens taken."""
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
        """Start waiting requests, and have adapters copied for those that cannot start before."""
        admission = Admission(plan, budget)
        for sequence in self._candidates(admission):
            if sequence.request.tenant not in admission.blocked_tenants:
                self._try(sequence, admission)
            if admission.is_over:
                break
        for sequence in admission.short_of_room:
            self._count_overtaken(sequence, admission.started)

    def _candidates(self, admission: Admission) -> Iterator[Sequence]:
        """Waiting sequences: overdue ones, then those that can start at once, then those that need a copy first.

        So an adapter that has just been brought is used before another may push it out again.
        """
        yield from list(self._overdue)
        for sequence in self._in_turn(are_here=True):
            if self._is_full(admission):
                break
            yield sequence
        yield from self._in_turn(are_here=False)

    def _in_turn(self, are_here: bool) -> Iterator[Sequence]:
        """Those whose adapters are on the device, or not: always the oldest of the tenant that has had least."""
        untried = {tenant: iter(list(queue)) for tenant, queue in self._waiting.items()}
        while untried:
            tenant = self._counters.first(untried) if len(untried) > 1 else next(iter(untried))
            sequence = next(untried[tenant], None)
            if sequence is None:
                del untried[tenant]
            elif sequence not in self._overdue and self._residency.are_here(sequence.request.adapters) == are_here:
                yield sequence

    def _is_full(self, admission: Admission) -> bool:
        return not admission.budget or len(self.running) >= self._max_batch_requests

    def _try(self, sequence: Sequence, admission: Admission) -> None:
        """Start it, or have its adapter brought nearer; what fails in that is this request's failure, nobody else's."""
        if sequence.num_unread:  # put back a moment ago: its last token is not known yet
            return
        if self._is_full(admission) and self._residency.are_here(sequence.request.adapters):
            return
        if sequence.num_unscored and admission.plan.room_to_score <= 0:
            return
        try:
            num_tokens = self._start(sequence, admission.budget, admission.plan)
        except OutOfSpace as error:
            self._has_no_room(sequence, isinstance(error, TenantShareFull), admission)
        except Exception as error:
            self._fail(sequence, error, admission.plan)
        else:
            admission.budget -= num_tokens
            if num_tokens:
                admission.started.append(sequence)
            else:
                self._residency.keep(sequence.request.adapters)

    def _has_no_room(self, sequence: Sequence, is_own_share: bool, admission: Admission) -> None:
        """It waits for pages, of the pool or of its tenant's share, unless none will ever come free."""
        tenant, is_overdue = sequence.request.tenant, sequence.num_overtaken >= MAX_OVERTAKEN
        if not self._may_come_free(tenant if is_own_share else None):
            self._fail(sequence, PoolTooSmall(sequence), admission.plan)
            return
        if is_overdue and not is_own_share:
            admission.is_over = True  # what comes free is for this one
            return
        self._residency.keep(sequence.request.adapters)
        if is_overdue:
            admission.blocked_tenants.add(tenant)
        else:
            admission.short_of_room.append(sequence)
            admission.is_over = len(admission.short_of_room) == MAX_SHORT_OF_ROOM

    def _may_come_free(self, tenant: str | None) -> bool:
        """Whether anything runs, of this tenant or of all, that will give pages back."""
        is_running = any(tenant is None or sequence.request.tenant == tenant for sequence in self.running)
        return is_running or self._residency.may_come_free

    def _count_overtaken(self, sequence: Sequence, started: list[Sequence]) -> None:
        sequence.num_overtaken += sum(other.arrived_at > sequence.arrived_at for other in started)
        if sequence.num_overtaken >= MAX_OVERTAKEN:
            self._overdue.append(sequence)

    def _start(self, sequence: Sequence, budget: int, plan: StepPlan) -> int:
        """Move a waiting sequence to the running ones and plan its first chunk.

        The tokens taken, 0 while its adapter is on its way. Raises OutOfSpace, changing nothing.
        """
        slot = self._slot(sequence)
        if slot is None:
            return 0
        try:
            sequence.bind(self._residency.placed(sequence.request.adapters))
            self._kv_cache.check_room(sequence, budget)
        except Exception:
            self._residency.release(sequence.request.adapters, sequence.request.tenant)
            raise
        sequence.slot = slot if sequence.changed else BASE_SLOT
        self._kv_cache.attach_prefix(sequence)
        num_tokens = _share(sequence, budget, plan)
        self._kv_cache.reserve(sequence, sequence.num_computed + num_tokens)
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
        plan.chunks.append(Chunk(sequence, num_tokens, completes=num_tokens == sequence.num_pending))

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
        self._residency.release(sequence.request.adapters, sequence.request.tenant)
        sequence.slot = None


def _share(sequence: Sequence, budget: int, plan: StepPlan) -> int:
    """How many of its tokens the step may compute."""
    num_tokens = min(sequence.num_pending, budget)
    return min(num_tokens, plan.room_to_score) if sequence.num_unscored else num_tokens
