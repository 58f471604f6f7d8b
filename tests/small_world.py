"""A scheduler over a small pool, without a device and without threads: loads end when a test says so."""

from __future__ import annotations

from collections.abc import Sequence as Sequences
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from heddle_adapters.eviction import EvictionOrder
from heddle_adapters.host_tier import HostTier
from heddle_adapters.mix import AdapterPart
from heddle_adapters.packed_adapter import PackedAdapter
from heddle_adapters.page_pool import PagePool
from heddle_adapters.positions import Positions
from heddle_adapters.residency import Residency
from heddle_server.engine.kv_cache import KvCache
from heddle_server.engine.scheduler import Scheduler, StepPlan
from heddle_server.engine.sequence import Sequence
from heddle_server.request import LOCAL_TENANT, Request, SamplingParams

PAGE_TOKENS = 4
PAGE_BYTES = 16
MAX_STEPS = 50
VOCABULARY = 1000  # ids from here on are virtual tokens
EVERYWHERE = Positions()


def packed_adapter(
    digest: str, num_pages: int, num_prefix_tokens: int = 0, positions: Positions = EVERYWHERE
) -> PackedAdapter:
    """Pages and no rows: enough for whoever only moves it about."""
    nothing = np.zeros(0, np.int64)
    assert num_pages * PAGE_TOKENS >= num_prefix_tokens, "its keys and values have no room"
    return PackedAdapter(
        digest=digest,
        pages=np.zeros((num_pages, PAGE_BYTES), np.uint8),
        run_lengths=np.ones(num_pages, np.int32),
        used_bytes=num_pages * PAGE_BYTES,
        site=nothing.astype(np.int32),
        count=nothing.astype(np.int32),
        in_scale=nothing,
        out_scale=nothing,
        bias=nothing,
        a_offset=nothing,
        b_offset=nothing,
        gain=nothing.astype(np.float32),
        c=nothing.astype(np.float32),
        activation=nothing.astype(np.int8),
        num_prefix_tokens=num_prefix_tokens,
        num_prefix_pages=-(-num_prefix_tokens // PAGE_TOKENS),
        positions=positions,
    )


@dataclass
class Pages:
    pages: NDArray[np.int64]


@dataclass
class Placed:
    slot: int
    page_map: Pages
    used_bytes: int = 0
    num_prefix_tokens: int = 0
    num_prefix_pages: int = 0
    positions: Positions = EVERYWHERE
    answers_tokens: bool = False

    @property
    def num_pages(self) -> int:
        return len(self.page_map.pages)

    @property
    def prefix_pages(self) -> list[int]:
        pages: list[int] = self.page_map.pages[: self.num_prefix_pages].tolist()
        return pages


@dataclass
class PageRows:
    """Stands in for the device: takes pages, gives slots, holds nothing in them."""

    pool: PagePool
    mix_pages: int = 0  # what a mix takes for vectors of its own
    slots: list[int] = field(default_factory=lambda: list(range(500)))

    def reserve(self, packed: PackedAdapter) -> Pages:
        return Pages(np.array(self.pool.allocate(packed.num_pages), np.int64))

    def publish(self, packed: PackedAdapter, page_map: Pages) -> Placed:
        return Placed(
            self.slots.pop(0),
            page_map,
            packed.used_bytes,
            packed.num_prefix_tokens,
            packed.num_prefix_pages,
            packed.positions,
        )

    def cancel(self, page_map: Pages) -> None:
        for page in page_map.pages.tolist():
            self.pool.free(page)

    def remove(self, placed: Placed) -> None:
        self.cancel(placed.page_map)
        self.slots.insert(0, placed.slot)

    def compose(self, parts: Sequences[tuple[Placed, float]], ranks: Sequences[int | None] | None = None) -> Placed:
        pages = Pages(np.array(self.pool.allocate(self.mix_pages), np.int64))
        return Placed(self.slots.pop(0), pages)

    def remove_mix(self, mix: Placed) -> None:
        self.remove(mix)


class HandLoader:
    """A loader whose work is done at once, or when the test calls `finish_read` or `finish_copy`."""

    def __init__(self) -> None:
        self.sizes: dict[str, int] = {}  # pages by digest; 1 where nothing is said
        self.prefixes: dict[str, int] = {}  # tokens whose keys and values an adapter brings, by digest
        self.positions: dict[str, Positions] = {}  # of the tokens that an adapter changes, by digest
        self.broken: dict[str, Exception] = {}
        self.holds_reads = self.holds_copies = False
        self.reading: dict[str, Future[PackedAdapter]] = {}
        self.copying: dict[str, Future[None]] = {}
        self.reads: list[str] = []  # every read that was asked for, in order
        self.forgotten: list[str] = []

    def read(self, digest: str) -> Future[PackedAdapter]:
        self.reads.append(digest)
        read: Future[PackedAdapter] = Future()
        self.reading[digest] = read
        if not self.holds_reads:
            self.finish_read(digest)
        return read

    def finish_read(self, digest: str) -> None:
        read = self.reading.pop(digest)
        if not read.set_running_or_notify_cancel():
            return
        if digest in self.broken:
            read.set_exception(self.broken[digest])
        else:
            read.set_result(self._packed(digest))

    def _packed(self, digest: str) -> PackedAdapter:
        num_prefix_tokens = self.prefixes.get(digest, 0)
        num_pages = self.sizes.get(digest, max(1, -(-num_prefix_tokens // PAGE_TOKENS)))
        return packed_adapter(digest, num_pages, num_prefix_tokens, self.positions.get(digest, EVERYWHERE))

    def copy(self, packed: PackedAdapter, page_map: Pages) -> Future[None]:
        copied: Future[None] = Future()
        self.copying[packed.digest] = copied
        if not self.holds_copies:
            self.finish_copy(packed.digest)
        return copied

    def finish_copy(self, digest: str) -> None:
        self.copying.pop(digest).set_result(None)

    def prepare(self, digest: str) -> None:
        pass

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)

    def close(self) -> None:
        pass


class SmallWorld:
    """Scheduler, residency, KV cache and pool as the engine puts them together."""

    def __init__(
        self,
        num_pages: int = 32,
        *,
        max_batch_tokens: int = 16,
        max_batch_requests: int = 8,
        host_pages: int = 64,
        tenant_page_limit: int | None = None,
        policy: str = "lru",
    ) -> None:
        self.pool = PagePool(num_pages, PAGE_BYTES, EvictionOrder(policy))
        self.kv_cache = KvCache(self.pool, PAGE_TOKENS)
        self.loader = HandLoader()
        self.rows = PageRows(self.pool)
        self.host = HostTier(host_pages * PAGE_BYTES, EvictionOrder(policy))
        self.residency = Residency(self.loader, self.rows, self.pool, self.host, tenant_page_limit)  # type: ignore[arg-type]
        self.scheduler = Scheduler(self.kv_cache, self.residency, max_batch_tokens, max_batch_requests)
        self.next_id = 0

    def add(
        self,
        prompt: list[int],
        adapter: str | tuple[AdapterPart, ...] = (),
        *,
        tenant: str = LOCAL_TENANT,
        salt: bytes = b"",
        num_virtual_tokens: int = 0,
        **sampling: int,
    ) -> Sequence:
        self.next_id += 1
        request = Request(
            request_id=self.next_id,
            prompt_token_ids=prompt,
            sampling=SamplingParams(**{"max_tokens": 50, **sampling}),  # type: ignore[arg-type]
            adapters=(AdapterPart(adapter),) if isinstance(adapter, str) else adapter,
            tenant=tenant,
            cache_salt=salt,
            num_virtual_tokens=num_virtual_tokens,
        )
        sequence = Sequence.of(request, vocabulary_size=VOCABULARY)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> StepPlan:
        """Plan, then pretend that the model ran."""
        plan = self.scheduler.plan()
        self.run(plan)
        return plan

    def run(self, plan: StepPlan) -> None:
        """Every chunk is computed, and every complete sequence gets token 7."""
        for chunk in plan.chunks:
            chunk.sequence.num_unscored -= len(chunk.scored)
            chunk.sequence.num_computed += chunk.num_tokens
            self.kv_cache.remember(chunk.sequence)
            if chunk.completes:
                chunk.sequence.token_ids.append(7)
        self.check()

    def step_until_running(self, sequence: Sequence) -> None:
        for _ in range(MAX_STEPS):
            self.step()
            if sequence in self.scheduler.running:
                return
        raise AssertionError(f"request {sequence.request.request_id} was not started in {MAX_STEPS} steps")

    def serve(self, adapter: str | tuple[AdapterPart, ...], **options: str) -> Sequence:
        """A short request from its arrival to its end."""
        sequence = self.add([1, 2, 3], adapter, **options)  # type: ignore[arg-type]
        self.step_until_running(sequence)
        self.scheduler.finish(sequence)
        self.check()
        return sequence

    def check(self) -> None:
        self.pool.check_integrity()
        self.kv_cache.check_integrity(list(self.scheduler.sequences()))
        self.residency.check_integrity()
        self.host.check_integrity()
