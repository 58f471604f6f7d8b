"""Which eviction policy brings the fewest bytes back: the server's page pool and eviction order, and made-up requests.

Nothing is computed and no time passes, so a thousand requests take milliseconds, and a seed gives the same numbers on
every machine. The first load of each thing, which no policy could have spared, is not counted.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate, count, cycle
from pathlib import Path
from statistics import mean
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table

from heddle_adapters.eviction import POLICIES, EvictionOrder, Key
from heddle_adapters.page_pool import PagePool
from heddle_server.engine.kv_cache import RECOMPUTE_COST

PAGE_BYTES = 64 * 1024
RANKS_PER_PAGE = 4  # an adapter of rank 16 takes 4 pages
NUM_IN_FLIGHT = 8  # requests that hold their adapter and their pages at the same time
POOL_SHARES = (0.05, 0.1, 0.25, 0.5)  # of the pages that all adapters together would take
MIXED_RANKS = (8, 16, 32, 64)


@dataclass(frozen=True)
class Visit:
    """One request: its adapter, and the chain of prompt pages that it looks up and leaves behind."""

    adapter: int
    prefix: tuple[bytes, ...] = ()

    @property
    def adapter_key(self) -> Key:
        return str(self.adapter)


@dataclass(frozen=True)
class Scenario:
    """Who asks for which adapter, and how large the adapters are."""

    name: str
    visits: Callable[[random.Random, int], Iterator[Visit]]  # without end, over so many adapters
    ranks: tuple[int, ...] = (16,)  # equally many adapters of each


@dataclass(frozen=True)
class Outcome:
    """What one policy did with one scenario in one pool."""

    scenario: str
    pool_share: float
    policy: str
    hit_rate: float  # requests that found their adapter in the pool
    reloaded_bytes_per_request: float  # a prompt page that is computed again counts `RECOMPUTE_COST` times
    relative: float = 1.0  # that beside the best policy's


def zipf(exponent: float, rng: random.Random, num_adapters: int) -> Iterator[Visit]:
    """The k-th most popular adapter is asked for in proportion to k^-exponent; 0 is uniform."""
    totals = list(accumulate(place**-exponent for place in range(1, num_adapters + 1)))
    while True:
        yield Visit(rng.choices(range(num_adapters), cum_weights=totals)[0])


def drift(rng: random.Random, num_adapters: int) -> Iterator[Visit]:
    """Four in five requests go to a hot twentieth of the adapters, which moves on by one every hundred requests."""
    num_hot = num_adapters // 20
    for number in count():
        is_hot = rng.random() < 0.8
        yield Visit((number // 100 + rng.randrange(num_hot)) % num_adapters if is_hot else rng.randrange(num_adapters))


def scan(rng: random.Random, num_adapters: int) -> Iterator[Visit]:
    """Zipf, but three requests in ten walk through all the adapters one after another."""
    popular, walk = zipf(0.9, rng, num_adapters), cycle(range(num_adapters))
    while True:
        yield Visit(next(walk)) if rng.random() < 0.3 else next(popular)


def bursts(rng: random.Random, num_adapters: int) -> Iterator[Visit]:
    """Twelve users at a time, each sending about twenty requests to an adapter drawn by Zipf."""
    popular = zipf(0.6, rng, num_adapters)
    users = [next(popular) for _ in range(12)]
    while True:
        seat = rng.randrange(len(users))
        if rng.random() < 1 / 20:
            users[seat] = next(popular)
        yield users[seat]


def chats(rng: random.Random, num_adapters: int) -> Iterator[Visit]:
    """Zipf; every adapter has a system prompt of 4 pages, a turn adds 3, and half of all requests go on with a chat.

    They do so some hundred requests after its last turn; after seven turns the context is cut back.
    """
    popular = zipf(0.9, rng, num_adapters)
    recent: deque[Visit] = deque(maxlen=1000)
    for number in count():
        if recent and rng.random() < 0.5:
            chat = recent[-1 - min(int(rng.expovariate(1 / 100)), len(recent) - 1)]
        else:
            adapter = next(popular).adapter
            chat = Visit(adapter, tuple(b"system %d %d" % (adapter, page) for page in range(4)))
        context = chat.prefix if len(chat.prefix) < 25 else chat.prefix[:4]
        turn = tuple(b"turn %d %d" % (number, page) for page in range(3))
        recent.append(Visit(chat.adapter, context + turn))
        yield recent[-1]


SCENARIOS = (
    Scenario("zipf 0.6", partial(zipf, 0.6)),
    Scenario("zipf 0.9", partial(zipf, 0.9)),
    Scenario("zipf 1.2", partial(zipf, 1.2)),
    Scenario("uniform", partial(zipf, 0.0)),
    Scenario("drift", drift),
    Scenario("scan", scan),
    Scenario("bursts", bursts),
    Scenario("mixed ranks", partial(zipf, 0.9), MIXED_RANKS),
    Scenario("mixed drift", drift, MIXED_RANKS),
    Scenario("chats", chats, MIXED_RANKS),
)


class Simulation:
    """One pool under one policy: adapters and prompt pages come, are used and go."""

    def __init__(
        self,
        num_adapter_pages: Sequence[int],
        num_pages: int,
        policy: str,
        *,
        page_bytes: int = PAGE_BYTES,
        num_in_flight: int = NUM_IN_FLIGHT,
    ) -> None:
        self._num_adapter_pages = num_adapter_pages
        self._max_in_flight = num_in_flight
        self.pool = PagePool(num_pages, page_bytes, EvictionOrder(policy))
        self._pages: dict[Key, list[int]] = {}  # of everything in the pool
        self._num_users = Counter[Key]()  # requests in flight
        self._seen = set[Key]()
        self._in_flight = deque[Visit]()
        self.num_hits = 0
        self.num_reloaded_bytes = 0

    def serve(self, visit: Visit) -> None:
        """One request arrives; if that is one too many at a time, the oldest has ended before."""
        if len(self._in_flight) == self._max_in_flight:
            self._finish(self._in_flight.popleft())
        self._in_flight.append(visit)
        self.pool.eviction.touch(visit.adapter_key)
        self.num_hits += visit.adapter_key in self._pages
        for key in (visit.adapter_key, *visit.prefix):
            self._use(visit, key)

    def _use(self, visit: Visit, key: Key) -> None:
        self._num_users[key] += 1
        self.pool.eviction.withdraw(key)
        if key not in self._pages:
            self._pages[key] = self.pool.allocate(self._size(visit, key))
            if key in self._seen:
                self.num_reloaded_bytes += self._reload_bytes(visit, key)
            self._seen.add(key)

    def _finish(self, visit: Visit) -> None:
        """As the server lets go: of the pages from the end of the chain, then of the adapter."""
        for key in reversed(visit.prefix):
            self.pool.eviction.touch(key)
            self._let_go(visit, key)
        self._let_go(visit, visit.adapter_key)

    def _let_go(self, visit: Visit, key: Key) -> None:
        self._num_users[key] -= 1
        if self._num_users[key] == 0:
            size_bytes = self._size(visit, key) * self.pool.page_bytes
            self.pool.eviction.offer(key, size_bytes, self._reload_bytes(visit, key), partial(self._give_back, key))

    def _give_back(self, key: Key) -> None:
        for page in self._pages.pop(key):
            self.pool.free(page)
        if isinstance(key, bytes):  # a prompt page: the server forgets it too
            self.pool.eviction.forget(key)

    def _size(self, visit: Visit, key: Key) -> int:
        """Pages of an adapter, or one page of a prompt."""
        return self._num_adapter_pages[visit.adapter] if key == visit.adapter_key else 1

    def _reload_bytes(self, visit: Visit, key: Key) -> int:
        return self._size(visit, key) * self.pool.page_bytes * (1 if key == visit.adapter_key else RECOMPUTE_COST)


def simulate(
    scenario: Scenario, pool_share: float, policy: str, num_adapters: int, num_requests: int, seed: int = 1
) -> Outcome:
    """One policy over one scenario. With one seed all policies see the same requests.

    Raises OutOfSpace if the pool cannot hold what is in flight.
    """
    rng = random.Random(seed)
    ranks = [scenario.ranks[number % len(scenario.ranks)] for number in range(num_adapters)]
    rng.shuffle(ranks)
    num_adapter_pages = [rank // RANKS_PER_PAGE for rank in ranks]
    simulation = Simulation(num_adapter_pages, int(pool_share * sum(ranks) / RANKS_PER_PAGE), policy)
    visits = scenario.visits(rng, num_adapters)
    for _ in range(num_requests):
        simulation.serve(next(visits))
    return Outcome(
        scenario.name,
        pool_share,
        policy,
        hit_rate=simulation.num_hits / num_requests,
        reloaded_bytes_per_request=simulation.num_reloaded_bytes / num_requests,
    )


def compare(
    scenario: Scenario, pool_share: float, num_adapters: int, num_requests: int, seed: int = 1
) -> list[Outcome]:
    """All policies over the same requests, each beside the best."""
    return beside_best(
        [simulate(scenario, pool_share, policy, num_adapters, num_requests, seed) for policy in POLICIES]
    )


def beside_best(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The policies over the same requests, each with its bytes beside the fewest."""
    best = min(outcome.reloaded_bytes_per_request for outcome in outcomes)
    # where next to nothing is loaded again, a hundredth of a page more or less is no difference
    margin = PAGE_BYTES / 100
    return [
        replace(outcome, relative=(outcome.reloaded_bytes_per_request + margin) / (best + margin))
        for outcome in outcomes
    ]


def mean_relative(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """What decides which policy is the default: bytes beside the best policy's, over all scenarios and pools."""
    return {policy: mean(outcome.relative for outcome in outcomes if outcome.policy == policy) for policy in POLICIES}


def run_eviction_bench(
    json_path: Path | None = None,
    num_adapters: int = 1000,
    num_requests: int = 15_000,
    confirm: Callable[[Console], dict[str, Any]] | None = None,
) -> None:
    """Print a table for people and one line of JSON for scripts; write everything to `json_path`.

    `confirm` prints a table of its own, and what it returns becomes part of the JSON.
    """
    console = Console()
    cases = [(scenario, share) for scenario in SCENARIOS for share in POOL_SHARES]
    outcomes = [
        outcome
        for scenario, share in track(cases, "simulating", console=console, transient=True)
        for outcome in compare(scenario, share, num_adapters, num_requests)
    ]
    table, means = outcome_table(outcomes), mean_relative(outcomes)
    table.add_section()
    table.add_row("beside best", "", *(f"{means[policy]:.3f}" for policy in POLICIES))
    console.print(table)
    result: dict[str, Any] = {
        "benchmark": "eviction",
        "num_adapters": num_adapters,
        "num_requests": num_requests,
        "page_bytes": PAGE_BYTES,
        "mean_relative": means,
        "worst_relative": {
            policy: max(outcome.relative for outcome in outcomes if outcome.policy == policy) for policy in POLICIES
        },
    }
    if confirm is not None:
        result["served"] = confirm(console)
    print(json.dumps(result))
    if json_path is not None:
        json_path.parent.mkdir(parents=True, exist_ok=True)
        json_path.write_text(json.dumps(result | {"outcomes": [asdict(outcome) for outcome in outcomes]}, indent=1))


def outcome_table(outcomes: Sequence[Outcome]) -> Table:
    """A row per scenario and pool: KiB loaded again per request and hit rate by policy, the best in bold."""
    table = Table("scenario", Column("pool", justify="right"), box=SIMPLE_HEAD)
    for unit in ("KiB", "hits"):
        for policy in POLICIES:
            table.add_column(f"{policy}\n{unit}", justify="right", no_wrap=True)
    for first in range(0, len(outcomes), len(POLICIES)):
        row = outcomes[first : first + len(POLICIES)]
        loaded = [
            f"[bold]{o.reloaded_bytes_per_request / 1024:.1f}[/]"
            if o.relative == 1.0
            else f"{o.reloaded_bytes_per_request / 1024:.1f}"
            for o in row
        ]
        table.add_row(row[0].scenario, f"{row[0].pool_share:.0%}", *loaded, *(f"{o.hit_rate:.1%}" for o in row))
    return table
