"""`heddle bench eviction --served`: do real servers load again what the simulator says?

Each scenario and policy gets a server of its own, one after another over one store: a pool for part of its adapters and
no host memory, so that what is not in the pool is read from disk. The simulation beside it has the same sizes and the
same requests in the same order.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import track
from rich.table import Table

from heddle_adapters.base_file import LazyBase, base_file_path
from heddle_adapters.content_folder import open_content
from heddle_adapters.eviction import POLICIES
from heddle_adapters.packer import Packer
from heddle_adapters.store import AdapterStore
from heddle_demo.bench.counters import Counters
from heddle_demo.bench.eviction_bench import SCENARIOS, Outcome, Scenario, Simulation, Visit, beside_best, outcome_table
from heddle_demo.bench.floor import BaseBytes
from heddle_demo.bench.machine import check_room, describe_machine
from heddle_demo.bench.random_adapters import RANKS, RandomAdapters, linear_layout
from heddle_demo.bench.server import SERVER_BYTES, ServerSettings, run_to_end, running_server
from heddle_demo.bench.stores import BenchStores
from heddle_demo.bench.window import ask_each
from heddle_demo.data import BASE_DIR
from heddle_server.config import PAGE_TOKENS

ROW_DTYPE = "bfloat16"  # the demo base's


@dataclass(frozen=True, kw_only=True)
class ServedPlan:
    """Sizes and counts of one run."""

    scenarios: tuple[str, ...] = ("mixed ranks", "mixed drift")
    num_adapters: int = 200
    num_requests: int = 800
    pool_share: float = 0.1  # of what all adapters take
    num_streams: int = 2  # few, so that the requests' order is still the trace's
    seed: int = 1


@dataclass(frozen=True)
class Counted:
    """What a server has counted since it started."""

    requests_by_tier: dict[str, int]  # where they found their adapter
    bytes_by_source: dict[str, int]  # from disk to host memory, from there to the device
    num_loads: int  # to the device

    @classmethod
    def of(cls, counters: Counters) -> Self:
        requests = counters.by_label("heddle_adapter_cache_requests_total", "tier")
        moved = counters.by_label("heddle_adapter_load_bytes_total", "source")
        return cls(
            requests_by_tier={tier: int(count) for tier, count in requests.items()},
            bytes_by_source={source: int(count) for source, count in moved.items()},
            num_loads=int(counters.total("heddle_adapter_loads_total")),
        )


@dataclass(frozen=True)
class Confirmation:
    """One policy over one scenario's requests."""

    simulated: Outcome
    served: Outcome
    counted: Counted

    @property
    def difference(self) -> float:
        """Of the bytes loaded again, beside the simulated ones."""
        return self.served.reloaded_bytes_per_request / self.simulated.reloaded_bytes_per_request - 1


class ServedEviction:
    """One run."""

    def __init__(self, plan: ServedPlan, folder: Path, console: Console) -> None:
        """Makes the store in `folder`. Raises `TooLittleRoom`."""
        self._plan = plan
        self._console = console
        self._adapters = adapters = RandomAdapters(linear_layout(BASE_DIR))
        stores = BenchStores(folder, adapters)
        content_bytes = rows_bytes = stores.room_bytes(plan.num_adapters)
        self._pool_bytes = stores.room_bytes(plan.pool_share * plan.num_adapters)
        check_room(folder, content_bytes + rows_bytes, self._pool_bytes + SERVER_BYTES)
        stores.fill(plan.num_adapters)
        self._store = stores.path(plan.num_adapters)
        self._page_bytes = BaseBytes.of(BASE_DIR, adapters.base).kv_per_token * PAGE_TOKENS
        self._num_adapter_pages = self._packed_sizes()

    def run(self) -> list[Confirmation]:
        """Every policy over every scenario."""
        scenarios = [scenario for scenario in SCENARIOS if scenario.name in self._plan.scenarios]
        return [confirmation for scenario in scenarios for confirmation in self._confirm(scenario)]

    def _confirm(self, scenario: Scenario) -> list[Confirmation]:
        visits = scenario.visits(random.Random(self._plan.seed), self._plan.num_adapters)
        trace = list(islice(visits, self._plan.num_requests))
        policies = track(POLICIES, f"serving {scenario.name}", console=self._console, transient=True)
        counted = [run_to_end(self._serve(policy, trace)) for policy in policies]
        # the first load of each, which no policy could have spared
        first_bytes = self._page_bytes * sum(self._num_adapter_pages[n] for n in {visit.adapter for visit in trace})
        served = [(each.requests_by_tier["device"], each.bytes_by_source["host"] - first_bytes) for each in counted]
        simulations = [self._simulate(policy, trace) for policy in POLICIES]
        simulated = [(each.num_hits, each.num_reloaded_bytes) for each in simulations]
        outcomes = (self._outcomes(scenario.name, results) for results in (simulated, served))
        return [Confirmation(*each) for each in zip(*outcomes, counted, strict=True)]

    def _outcomes(self, scenario: str, results: Sequence[tuple[int, int]]) -> list[Outcome]:
        """Of each policy's hits and bytes loaded again."""
        share, num = self._plan.pool_share, self._plan.num_requests
        return beside_best(
            [
                Outcome(scenario, share, policy, num_hits / num, num_bytes / num)
                for policy, (num_hits, num_bytes) in zip(POLICIES, results, strict=True)
            ]
        )

    def _simulate(self, policy: str, trace: Sequence[Visit]) -> Simulation:
        # a request takes a page for itself, which it never fills and so does not leave in the cache
        num_pages = self._pool_bytes // self._page_bytes - self._plan.num_streams
        sizes = {"page_bytes": self._page_bytes, "num_in_flight": self._plan.num_streams}
        simulation = Simulation(self._num_adapter_pages, num_pages, policy, **sizes)
        for visit in trace:
            simulation.serve(visit)
        return simulation

    async def _serve(self, policy: str, trace: Sequence[Visit]) -> Counted:
        settings = ServerSettings(policy, self._store, self._pool_bytes, host_cache_bytes=0, eviction=policy)
        async with running_server(settings) as server:
            await ask_each(server, [self._adapters.name(visit.adapter) for visit in trace], self._plan.num_streams)
            return Counted.of(await server.counters())

    def _packed_sizes(self) -> list[int]:
        """Pages of each adapter: those of its rank."""
        base = self._adapters.base
        packer = Packer(base, ROW_DTYPE, self._page_bytes, base_bias={})
        with AdapterStore(self._store) as store:
            digests = [store.record(name).latest.digest for name in self._adapters.names(len(RANKS))]
        weights = LazyBase(base_file_path(self._store, base.fingerprint, "bfloat16"))  # which LoRA does not ask for
        sizes = [packer.pack(open_content(self._store, digest, base).compile(weights)).num_pages for digest in digests]
        return [sizes[number % len(RANKS)] for number in range(self._plan.num_adapters)]


def confirm_on_servers(console: Console, plan: ServedPlan = ServedPlan()) -> dict[str, Any]:
    """Prints a table; what it says, and what the servers counted, for JSON.

    Raises `BenchFailed` if a server does not start or refuses a request, `TooLittleRoom` before anything is started.
    """
    with tempfile.TemporaryDirectory(prefix="heddle-bench-") as folder:
        confirmations = ServedEviction(plan, Path(folder), console).run()
    console.print(
        f"On servers over the demo's base: {plan.num_adapters} adapters of ranks {', '.join(map(str, RANKS))}, "
        f"{plan.num_requests} requests of one token in {plan.num_streams} streams, no host memory"
    )
    console.print(_table(confirmations))
    outcomes = [asdict(each) | {"difference": each.difference} for each in confirmations]
    return asdict(plan) | {"machine": describe_machine(), "outcomes": outcomes}


def _table(confirmations: Sequence[Confirmation]) -> Table:
    """Per scenario a row of what was simulated for its requests and one of what was served."""
    rows: list[Outcome] = []
    for first in range(0, len(confirmations), len(POLICIES)):
        policies = confirmations[first : first + len(POLICIES)]
        rows += [each.simulated for each in policies]
        rows += [replace(each.served, scenario="  served") for each in policies]
    return outcome_table(rows)
