"""Which adapters are on the device, on their way there, or kept in host memory. Policy only, without torch.

Reads are started in the order in which requests arrived, copies when the scheduler wants to start a request and there
are pages; the loader does both beside the engine's thread, and a table line is written only between two steps. An
adapter in use is never taken away; an idle one gives way when the pool is short. Two requests for one adapter are one
load, and a failed load fails those who wait for it.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from heddle_adapters.errors import AdapterError, AdapterExceedsPool
from heddle_adapters.host_tier import HostTier
from heddle_adapters.mix import AdapterPart, adapter_key, in_order
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.page_pool import PagePool
from heddle_adapters.run_allocator import OutOfSpace
from heddle_adapters.tier import AdapterMove, CachedAdapter, Tier, farthest
from heddle_adapters.tracked_adapter import ON_THE_WAY, State, TrackedAdapter

if TYPE_CHECKING:  # device_rows needs torch; this file does not
    from heddle_adapters.device_rows import DeviceRows, PageMap, PlacedAdapter, PlacedMix

log = logging.getLogger(__name__)

MAX_UNTOLD_MOVES = 10_000  # of an engine in-process that nobody asks
MAX_READS = 2  # at once; the others stay in queue order and can still be called off


class AdapterCapacity(AdapterError):
    """What is pinned leaves the adapter too little room."""


class TenantShareFull(OutOfSpace):
    """The tenant's adapters in use hold its whole share of the pool."""


class Loader(Protocol):
    """What moves bytes beside the engine's thread."""

    def read(self, digest: str) -> Future[PackedAdapter]: ...

    def copy(self, packed: PackedAdapter, page_map: PageMap) -> Future[None]: ...

    def prepare(self, digest: str) -> None: ...

    def forget(self, digest: str) -> None: ...

    def close(self) -> None: ...


@dataclass
class MixInUse:
    """The table line of several adapters together; it goes with the last request that uses it."""

    placed: PlacedMix
    num_references: int = 0


class Residency:
    """Adapters by content digest. Called from the engine's thread only."""

    def __init__(
        self, loader: Loader, rows: DeviceRows, pool: PagePool, host: HostTier, tenant_page_limit: int | None = None
    ) -> None:
        """`tenant_page_limit`: pages that one tenant's adapters may take; None = all."""
        self._loader = loader
        self._rows = rows
        self._pool = pool
        self._host = host
        self._tenant_page_limit = tenant_page_limit or pool.num_pages
        self._adapters: dict[str, TrackedAdapter] = {}
        self._on_the_way: dict[str, TrackedAdapter] = {}  # reading or copying
        self._queue: deque[TrackedAdapter] = deque()  # to be read
        self._mixes: dict[str, MixInUse] = {}
        self._pinned: set[str] = set()
        self._kept: list[TrackedAdapter] = []  # each with a reference, until `let_go`
        self._tenant_pages: Counter[str] = Counter()
        self._num_uses: Counter[str] = Counter()
        self._moves: deque[AdapterMove] = deque(maxlen=MAX_UNTOLD_MOVES)
        self.num_requests: Counter[Tier] = Counter()  # by the tier in which they found their adapter
        self.num_resident = 0
        self.num_pages = 0  # of what is resident, mixes' own pages included
        self.num_pinned_pages = 0  # of what is pinned and has been read, when it was last advanced
        self.used_bytes = 0  # of those pages: rows and vectors without alignment and page ends
        self.num_loads = 0
        self.num_evictions = 0

    # A request's life: it arrives, is started or goes away, and lets go in the end.

    def arrive(self, parts: Sequence[AdapterPart], tenant: str) -> Tier | None:
        """Count a new request and what it uses; the farthest tier it found them in. It waits from now on."""
        for part in parts:
            self._pool.eviction.touch(part.digest)
            self._host.touch(part.digest)
            self._num_uses[part.digest] += 1
        tier = farthest([self.tier_of(part.digest) for part in parts])
        if tier is not None:
            self.num_requests[tier] += 1
        self.expect(parts, tenant)
        return tier

    def expect(self, parts: Sequence[AdapterPart], tenant: str) -> None:
        """A request waits for these adapters; what is not on its way is queued to be read."""
        for part in parts:
            adapter = self._known(part.digest, tenant)
            adapter.num_waiting += 1
            self._want(adapter)

    def depart(self, parts: Sequence[AdapterPart]) -> None:
        """A waiting request waits no more: it was started, has failed or is gone."""
        for part in parts:
            adapter = self._adapters[part.digest]
            assert adapter.num_waiting > 0, f"{part.digest} departed more often than expected"
            adapter.num_waiting -= 1
            if adapter.num_waiting == 0:
                self._call_off(adapter)

    def acquire(self, parts: Sequence[AdapterPart], tenant: str) -> int | None:
        """The slot of an adapter or mix, with one reference taken; None while it is on its way.

        What nobody else uses counts in this tenant's share from now on, whoever had it loaded. Raises OutOfSpace while
        there is no room for it, what `_check_capacity` raises where waiting would not help, and what the load raised
        to everyone who waited for it.
        """
        adapters = [self._known(part.digest, tenant) for part in parts]
        if all(adapter.state in ON_THE_WAY and adapter.failure is None for adapter in adapters):
            return None
        here = [adapter for adapter in adapters if adapter.state is State.RESIDENT]
        taken_over = [adapter for adapter in here if adapter.tenant != tenant and adapter.is_unused]
        for adapter in here:  # so that one part of a mix does not give way to another
            self._refer(adapter, tenant)
        slot = None
        try:
            self._check_capacity(adapters)
            for adapter in taken_over:
                self._make_room_in_share(tenant, adapter.num_pages)
                self._charge(adapter, tenant)
            for adapter in adapters:
                if adapter.failure is not None:
                    raise adapter.failure
                if adapter.state is State.STAGED:
                    if not adapter.is_pinned:
                        self._charge(adapter, tenant)
                    self._copy(adapter)
            if len(here) == len(adapters):
                slot = self._line_of(parts, adapters)
        finally:
            if slot is None:
                for adapter in here:
                    self._unrefer(adapter, tenant)
        return slot

    def placed(self, parts: Sequence[AdapterPart]) -> PlacedAdapter | None:
        """Where the adapter of a running request lies that uses one as it was trained; None of the base and of mixes.

        Only such an adapter puts tokens before the prompt, or leaves some tokens to the base.
        """
        if len(parts) == 1 and parts[0].is_whole:
            return _placed(self._adapters[parts[0].digest])
        return None

    def are_here(self, parts: Sequence[AdapterPart]) -> bool:
        """Whether all of them are on the device."""
        return all(self._adapters[part.digest].state is State.RESIDENT for part in parts)

    def keep(self, parts: Sequence[AdapterPart]) -> None:
        """Until `let_go`, what is on the device of these stays there: an older request waits for the rest, or for room.

        Without this, two mixes that do not fit side by side would push out each other's parts for ever. What the first
        of them lacks is read whatever host memory holds, since that may wait for the very pages that are kept.
        """
        adapters = [self._adapters[part.digest] for part in parts]
        here = [adapter for adapter in adapters if adapter.state is State.RESIDENT]
        if here and not self._kept:
            for adapter in adapters:
                if adapter.state is State.QUEUED:
                    self._read(adapter)
        for adapter in here:
            self._refer(adapter)
            self._kept.append(adapter)

    def let_go(self) -> None:
        """Undo every `keep`."""
        while self._kept:
            self._unrefer(self._kept.pop())

    def release(self, parts: Sequence[AdapterPart], tenant: str) -> None:
        """One running request less of this tenant uses them."""
        if (mix := self._mixes.get(key := adapter_key(parts))) is not None:
            mix.num_references -= 1
            if mix.num_references == 0:
                del self._mixes[key]
                self.num_pages -= mix.placed.num_pages
                self._rows.remove_mix(mix.placed)
        for part in parts:
            self._unrefer(self._adapters[part.digest], tenant)

    def ready_at(self, parts: Sequence[AdapterPart]) -> float:
        """When the last of these resident adapters came to the device, on the monotonic clock."""
        return max((self._adapters[part.digest].published_at for part in parts), default=0.0)

    # What the operator and the store say.

    def prepare(self, digest: str) -> None:
        """Content was stored: make its rows when there is time."""
        self._loader.prepare(digest)

    def pin(self, tenants: Mapping[str, str]) -> None:
        """These, and no others, stay on the device from now on, by digest, each in its tenant's share.

        Missing ones are loaded.
        """
        wanted = set(tenants)
        for digest in self._pinned - wanted:
            adapter = self._adapters.get(digest)
            if adapter is not None and adapter.is_pinned:
                self._unpin(adapter)
        for digest in wanted - self._pinned:
            adapter = self._known(digest, tenants[digest])
            adapter.is_pinned = True
            self._pool.eviction.withdraw(adapter.digest)
            self._want(adapter)
        for digest, tenant in tenants.items():
            self._charge(self._adapters[digest], tenant)
        self._pinned = wanted

    def forget(self, digest: str) -> None:
        """Content is gone: remove it everywhere, from the device when the last request lets go."""
        self._loader.forget(digest)
        self._drop_from_host(digest)
        self._pinned.discard(digest)
        self._num_uses.pop(digest, None)
        if (adapter := self._adapters.get(digest)) is not None:
            adapter.is_forgotten = True
            self._unpin(adapter)

    # Between two steps.

    def advance(self) -> None:
        """Take in what the loader has done, start the next reads, bring missing pinned adapters."""
        for adapter in list(self._on_the_way.values()):
            if adapter.read is not None and adapter.read.done():
                self._has_been_read(adapter, adapter.read)
            elif adapter.copied is not None and adapter.copied.done():
                self._has_been_copied(adapter, adapter.copied)
        for digest in self._pinned:
            self._bring_pinned(self._adapters[digest])
        self.num_pinned_pages = sum(self._adapters[digest].num_pages for digest in self._pinned)
        self._start_reads()
        for digest in self._host.evicted():
            if digest not in self._adapters or self._adapters[digest].state is not State.RESIDENT:
                self._moves.append(AdapterMove(digest, "host", "disk", 0))

    @property
    def may_come_free(self) -> bool:
        """Whether pages are being filled, or kept for older requests, that may come free again."""
        return bool(self._kept) or any(adapter.state is State.COPYING for adapter in self._on_the_way.values())

    # What is told.

    def tier_of(self, digest: str) -> Tier:
        adapter = self._adapters.get(digest)
        if adapter is not None and adapter.state is State.RESIDENT:
            return "device"
        return "host" if self._host.get(digest) is not None else "disk"

    def take_moves(self) -> list[AdapterMove]:
        """Every change of tier since this was last asked."""
        moves = list(self._moves)
        self._moves.clear()
        return moves

    def describe(self) -> list[CachedAdapter]:
        """Everything nearer than the disk."""
        digests = {digest for digest, adapter in self._adapters.items() if adapter.state is State.RESIDENT}
        return [self._description(digest) for digest in sorted(digests.union(self._host.digests()))]

    @property
    def num_loading_pages(self) -> int:
        return sum(adapter.num_pages for adapter in self._on_the_way.values() if adapter.state is State.COPYING)

    def check_integrity(self) -> None:
        """References, states and pages agree with each other."""
        held = Counter[str]()
        for adapter in self._adapters.values():
            assert adapter.num_waiting >= 0, f"{adapter.digest} has {adapter.num_waiting} waiting"
            assert adapter.num_references >= adapter.users.total(), f"{adapter.digest} has more users than references"
            is_charged_right = not adapter.users or adapter.is_pinned or adapter.users[adapter.tenant]
            assert is_charged_right, f"{adapter.digest} counts in the share of a tenant that does not use it"
            assert (adapter.placed is not None) == (adapter.state is State.RESIDENT), f"{adapter.digest} misplaced"
            pages = adapter.placed.page_map if adapter.placed is not None else adapter.page_map
            if pages is None:
                assert not adapter.num_references, f"{adapter.digest} is used and not resident"
                continue
            held[adapter.tenant] += adapter.num_pages
            placed = adapter.placed
            num_lent = placed.num_prefix_pages if placed is not None and adapter.num_references else 0  # to sequences
            for page in pages.pages[num_lent:].tolist():
                assert self._pool.references(page) == 1, f"page {page} of {adapter.digest} is shared or free"
        assert held == +self._tenant_pages, "tenants' pages miscounted"
        resident = [adapter for adapter in self._adapters.values() if adapter.placed is not None]
        mix_pages = sum(mix.placed.num_pages for mix in self._mixes.values())
        assert self.num_resident == len(resident), "resident adapters miscounted"
        assert self.num_pages == sum(adapter.num_pages for adapter in resident) + mix_pages, "pages miscounted"

    def close(self) -> None:
        self._loader.close()

    # On the way to the device.

    def _known(self, digest: str, tenant: str) -> TrackedAdapter:
        if (adapter := self._adapters.get(digest)) is None:
            adapter = self._adapters[digest] = TrackedAdapter(digest, tenant)
        return adapter

    def _want(self, adapter: TrackedAdapter) -> None:
        """See that it is on its way, from wherever it is."""
        adapter.is_forgotten = False
        if adapter.state is not State.ABSENT or adapter.failure is not None:
            return
        self._host.hold(adapter.digest)  # until it is absent or resident again
        adapter.packed = self._host.get(adapter.digest)
        if adapter.packed is not None:
            adapter.enter(State.STAGED)
        else:
            self._queue.append(adapter)
            adapter.enter(State.QUEUED)

    def _start_reads(self) -> None:
        """In queue order, as many at once as there are readers, and no further ahead than host memory allows."""
        num_reads = sum(adapter.state is State.READING for adapter in self._on_the_way.values())
        while num_reads < MAX_READS and (adapter := self._next_to_read(num_reads)) is not None:
            self._read(adapter)
            num_reads += 1

    def _read(self, adapter: TrackedAdapter) -> None:
        self._queue.remove(adapter)
        adapter.state = State.READING  # its time counts from when it was queued
        adapter.read = self._loader.read(adapter.digest)
        self._on_the_way[adapter.digest] = adapter

    def _next_to_read(self, num_reads: int) -> TrackedAdapter | None:
        """The first in the queue, unless what has been read must go to the device before.

        A pinned adapter that no request waits for may find no room there for as long as it likes, so what it holds of
        host memory keeps only others like it from being read.
        """

        def has_room(num_held_bytes: int) -> bool:
            return num_held_bytes < self._host.budget_bytes or not (num_held_bytes or num_reads)

        if not self._queue:
            return None
        pinned = (self._adapters[digest] for digest in self._pinned)
        num_unasked_bytes = sum(
            adapter.packed.size_bytes for adapter in pinned if adapter.packed is not None and not adapter.num_waiting
        )
        num_held_bytes = self._host.num_held_bytes
        if not has_room(num_held_bytes - num_unasked_bytes):
            return None
        has_room_for_unasked = has_room(num_held_bytes)
        return next((adapter for adapter in self._queue if adapter.num_waiting or has_room_for_unasked), None)

    def _has_been_read(self, adapter: TrackedAdapter, read: Future[PackedAdapter]) -> None:
        adapter.read = None
        del self._on_the_way[adapter.digest]
        if read.cancelled():
            self._leave_host(adapter)
        elif (error := read.exception()) is not None:
            self._fail(adapter, error)
        else:
            packed = adapter.packed = self._host.put(read.result())
            seconds = adapter.enter(State.STAGED)
            self._moves.append(AdapterMove(adapter.digest, "disk", "host", packed.size_bytes, seconds))
        if adapter.num_waiting == 0:
            self._call_off(adapter)
        elif adapter.state is State.ABSENT:
            self._want(adapter)  # called off, and asked for again before that was seen

    def _copy(self, adapter: TrackedAdapter) -> None:
        """Take pages for a staged adapter and start filling them. Raises OutOfSpace."""
        packed = adapter.packed
        assert packed is not None, f"{adapter.digest} is not staged"
        self._make_room_in_share(adapter.tenant, packed.num_pages)
        adapter.page_map = self._rows.reserve(packed)
        self._tenant_pages[adapter.tenant] += packed.num_pages
        adapter.copied = self._loader.copy(packed, adapter.page_map)
        adapter.enter(State.COPYING)
        self._on_the_way[adapter.digest] = adapter

    def _has_been_copied(self, adapter: TrackedAdapter, copied: Future[None]) -> None:
        packed, page_map = adapter.packed, adapter.page_map
        assert packed is not None, f"{adapter.digest} was copied from nowhere"
        assert page_map is not None, f"{adapter.digest} was copied to nowhere"
        adapter.packed = adapter.page_map = adapter.copied = None
        del self._on_the_way[adapter.digest]
        if (error := copied.exception()) is not None:
            self._rows.cancel(page_map)
            self._tenant_pages[adapter.tenant] -= packed.num_pages
            self._fail(adapter, error)
        else:
            adapter.placed = self._rows.publish(packed, page_map)
            seconds = adapter.enter(State.RESIDENT)
            adapter.published_at = adapter.state_since
            self._count_resident(adapter.placed, 1)
            self.num_loads += 1
            self._moves.append(AdapterMove(adapter.digest, "host", "device", packed.size_bytes, seconds))
            self._host.release(adapter.digest)
        self._settle(adapter)

    def _bring_pinned(self, adapter: TrackedAdapter) -> None:
        """A pinned adapter comes as soon as there is room, asked for or not."""
        if adapter.state is State.STAGED:
            with suppress(OutOfSpace):
                self._copy(adapter)

    def _check_capacity(self, adapters: Sequence[TrackedAdapter]) -> None:
        """Whether they could lie on the device together if nothing ran.

        Raises `AdapterCapacity` while what is pinned leaves too little room, `AdapterExceedsPool` where even that
        would not help.
        """
        num_pages = sum(adapter.num_pages for adapter in adapters)
        num_pinned = self.num_pinned_pages - sum(adapter.num_pages for adapter in adapters if adapter.is_pinned)
        if num_pages > self._pool.num_pages:
            raise AdapterExceedsPool(
                f"{_needs(adapters, num_pages)}; the pool has {self._pool.num_pages}. "
                "Start the server with a larger --pool-bytes.",
                param="adapter",
            )
        if num_pages > self._tenant_page_limit:
            raise AdapterExceedsPool(
                f"{_needs(adapters, num_pages)}; a tenant's adapters may take {self._tenant_page_limit}. "
                "Start the server with a larger --tenant-pool-share or --pool-bytes.",
                param="adapter",
            )
        if num_pages > self._pool.num_pages - num_pinned:
            raise AdapterCapacity(
                f"{_needs(adapters, num_pages)}; the pool has {self._pool.num_pages}, {num_pinned} of them pinned. "
                "Unpin some adapters, or start the server with a larger --pool-bytes.",
                param="adapter",
            )

    def _charge(self, adapter: TrackedAdapter, tenant: str) -> None:
        """Count it in this tenant's share instead of another's."""
        if adapter.placed is not None or adapter.page_map is not None:
            self._tenant_pages[adapter.tenant] -= adapter.num_pages
            self._tenant_pages[tenant] += adapter.num_pages
        adapter.tenant = tenant

    def _charge_user(self, adapter: TrackedAdapter) -> None:
        """Where others than the one in whose share it counts use it, and that one does not, let it count in theirs."""
        if adapter.users and not adapter.users[adapter.tenant] and not adapter.is_pinned:
            self._charge(adapter, next(iter(adapter.users)))

    def _make_room_in_share(self, tenant: str, num_pages: int) -> None:
        """Let a tenant's own idle adapters give way before its share is exceeded. Raises `TenantShareFull`."""
        if self._tenant_page_limit >= self._pool.num_pages:
            return  # then the pool's own order does it, in turn, by which gdsf ages
        excess = self._tenant_pages[tenant] + num_pages - self._tenant_page_limit
        if excess <= 0:
            return
        idle = [
            each for each in self._adapters.values() if each.tenant == tenant and each.digest in self._pool.eviction
        ]
        if sum(each.num_pages for each in idle) < excess:
            raise TenantShareFull(f"tenant {tenant!r} holds its share of {self._tenant_page_limit} pages")
        for each in sorted(idle, key=lambda each: self._pool.eviction.priority(each.digest)):
            if excess > 0:
                excess -= each.num_pages
                self._pool.eviction.pop(each.digest).give_back()

    def _fail(self, adapter: TrackedAdapter, error: BaseException) -> None:
        adapter.failure = error if isinstance(error, Exception) else AdapterError(str(error))
        if adapter.is_pinned:
            log.warning("a pinned adapter cannot be loaded: %s", error)
        self._leave_host(adapter)

    def _leave_host(self, adapter: TrackedAdapter) -> None:
        """It is not on its way any more; the host tier may keep it or not."""
        adapter.packed = None
        adapter.enter(State.ABSENT)
        self._host.release(adapter.digest)

    def _unpin(self, adapter: TrackedAdapter) -> None:
        adapter.is_pinned = False
        self._charge_user(adapter)
        if adapter.num_waiting == 0:
            self._call_off(adapter)
        else:
            self._settle(adapter)

    def _call_off(self, adapter: TrackedAdapter) -> None:
        """Nobody waits for it any more: what has not been started need not be."""
        adapter.failure = None
        if adapter.is_pinned:
            return
        if adapter.state is State.QUEUED:
            self._queue.remove(adapter)
            self._leave_host(adapter)
        elif adapter.read is not None:
            adapter.read.cancel()  # if it has begun it goes on, into the host tier
        elif adapter.state is State.STAGED:
            self._leave_host(adapter)
        self._settle(adapter)

    # On the device.

    def _line_of(self, parts: Sequence[AdapterPart], adapters: list[TrackedAdapter]) -> int:
        if len(parts) == 1 and parts[0].is_whole:
            return _placed(adapters[0]).slot
        mix = self._mixes.get(key := adapter_key(parts))
        if mix is None:
            ordered = in_order(parts)
            scaled = [(_placed(self._adapters[part.digest]), part.scale) for part in ordered]
            mix = self._mixes[key] = MixInUse(self._rows.compose(scaled, [part.rank for part in ordered]))
            self.num_pages += mix.placed.num_pages
        mix.num_references += 1
        return mix.placed.slot

    def _refer(self, adapter: TrackedAdapter, tenant: str | None = None) -> None:
        """One more reference, of a tenant's running request or of what is kept for a waiting one."""
        adapter.num_references += 1
        if tenant is not None:
            adapter.users[tenant] += 1
        self._pool.eviction.withdraw(adapter.digest)

    def _unrefer(self, adapter: TrackedAdapter, tenant: str | None = None) -> None:
        assert adapter.num_references > 0, f"{adapter.digest} released more often than acquired"
        adapter.num_references -= 1
        if tenant is not None:
            adapter.users -= Counter([tenant])
            self._charge_user(adapter)
        adapter.last_used = time.monotonic()
        self._settle(adapter)

    def _settle(self, adapter: TrackedAdapter) -> None:
        """What becomes of an adapter that may just have lost its last user."""
        if adapter.num_references or adapter.state in (State.READING, State.COPYING):
            return
        if adapter.state is State.RESIDENT:
            if adapter.is_forgotten:
                self._pool.eviction.forget(adapter.digest)
                self._remove(adapter)
            elif not adapter.is_pinned and adapter.digest not in self._pool.eviction:
                size_bytes = adapter.num_pages * self._pool.page_bytes
                self._pool.eviction.offer(adapter.digest, size_bytes, size_bytes, lambda: self._evict(adapter))
        if adapter.state is State.ABSENT and not adapter.num_waiting and not adapter.is_pinned:
            if adapter.is_forgotten:
                self._drop_from_host(adapter.digest)
            self._adapters.pop(adapter.digest, None)

    def _evict(self, adapter: TrackedAdapter) -> None:
        """The pool is short and this idle adapter is worth least."""
        self.num_evictions += 1
        self._remove(adapter)

    def _remove(self, adapter: TrackedAdapter) -> None:
        placed = _placed(adapter)
        self._rows.remove(placed)
        self._count_resident(placed, -1)
        self._tenant_pages[adapter.tenant] -= placed.num_pages
        adapter.placed = None
        adapter.enter(State.ABSENT)
        size_bytes = placed.num_pages * self._pool.page_bytes
        self._moves.append(AdapterMove(adapter.digest, "device", self.tier_of(adapter.digest), size_bytes))
        if adapter.num_waiting:
            self._want(adapter)
        else:
            self._settle(adapter)

    def _drop_from_host(self, digest: str) -> None:
        if self.tier_of(digest) == "host":
            self._moves.append(AdapterMove(digest, "host", "disk", 0))
        self._host.drop(digest)

    def _count_resident(self, placed: PlacedAdapter, sign: int) -> None:
        self.num_resident += sign
        self.num_pages += sign * placed.num_pages
        self.used_bytes += sign * placed.used_bytes

    def _description(self, digest: str) -> CachedAdapter:
        adapter = self._adapters.get(digest)
        packed = self._host.get(digest)
        num_pages = (
            adapter.num_pages if adapter is not None and adapter.num_pages else packed.num_pages if packed else 0
        )
        is_idle = adapter is not None and not adapter.num_references and adapter.last_used > 0
        return CachedAdapter(
            adapter_digest=digest,
            tier=self.tier_of(digest),
            num_pages=num_pages,
            size_bytes=num_pages * self._pool.page_bytes,
            num_references=adapter.num_references if adapter else 0,
            num_waiting=adapter.num_waiting if adapter else 0,
            is_pinned=digest in self._pinned,
            num_uses=self._num_uses[digest],
            idle_seconds=time.monotonic() - adapter.last_used if adapter is not None and is_idle else 0.0,
        )


def _placed(adapter: TrackedAdapter) -> PlacedAdapter:
    assert adapter.placed is not None, f"{adapter.digest} is not on the device"
    return adapter.placed


def _needs(adapters: Sequence[TrackedAdapter], num_pages: int) -> str:
    return f"The {'adapter needs' if len(adapters) == 1 else 'adapters together need'} {num_pages} pages"
